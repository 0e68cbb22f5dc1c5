"""evalcache: the build cache for LLM evals.

A model, a prompt and the generation settings determine an answer. When none of them has changed, the stored answer is
served and the model stays asleep; what cannot be keyed exactly runs as if this package were not there.

The names below are all that a user needs; each is imported when it is first touched, so that ``import evalcache`` costs
next to nothing and never imports torch. Inside, a file imports only files of a lower level:

| level | files | what they know |
|---|---|---|
| 0 | ``errors`` | every exception and warning |
| 1 | ``digest``, ``canonical`` | bytes → digest; value → canonical bytes |
| 2 | ``records``, ``manifest``, ``journal`` | the frozen records that everything else passes around |
| 3 | ``key``, ``decide``, ``weights``, ``checkpoint``, ``environment`` | what is keyed; a policy's decision; what a model is |
| 4 | ``store``, ``ledger`` | diskcache serves, DuckDB remembers |
| 5 | ``cache``, ``audit`` | the two joined; what it cost and saved |
| 6 | ``integrations`` | one file per client |
| 7 | ``session``, ``one_model``, ``launch``, ``engine`` | one process with evalcache in it; one model; a command; a loop |
| 8 | ``cli`` | verbs: parse → call → print |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evalcache.cache import Cache
    from evalcache.checkpoint import fingerprint_checkpoint
    from evalcache.digest import Digest
    from evalcache.engine import cached, run, run_async
    from evalcache.errors import EvalCacheError, EvalCacheWarning, ReplayMissError, UncacheableError
    from evalcache.manifest import Manifest
    from evalcache.one_model import loglikelihood, wrap
    from evalcache.recompute import verify
    from evalcache.records import Policy
    from evalcache.session import Session, disable, enable
    from evalcache.sources import Named, named
    from evalcache.weights import fingerprint

_HOMES = {
    "Cache": "evalcache.cache",
    "Digest": "evalcache.digest",
    "EvalCacheError": "evalcache.errors",
    "EvalCacheWarning": "evalcache.errors",
    "Manifest": "evalcache.manifest",
    "Named": "evalcache.sources",
    "Policy": "evalcache.records",
    "ReplayMissError": "evalcache.errors",
    "Session": "evalcache.session",
    "UncacheableError": "evalcache.errors",
    "cached": "evalcache.engine",
    "disable": "evalcache.session",
    "enable": "evalcache.session",
    "fingerprint": "evalcache.weights",
    "fingerprint_checkpoint": "evalcache.checkpoint",
    "loglikelihood": "evalcache.one_model",
    "named": "evalcache.sources",
    "run": "evalcache.engine",
    "run_async": "evalcache.engine",
    "verify": "evalcache.recompute",
    "wrap": "evalcache.one_model",
}

__all__ = [
    "Cache",
    "Digest",
    "EvalCacheError",
    "EvalCacheWarning",
    "Manifest",
    "Named",
    "Policy",
    "ReplayMissError",
    "Session",
    "UncacheableError",
    "__version__",
    "cached",
    "disable",
    "enable",
    "fingerprint",
    "fingerprint_checkpoint",
    "loglikelihood",
    "named",
    "run",
    "run_async",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
