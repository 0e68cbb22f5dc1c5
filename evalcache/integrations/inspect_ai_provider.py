"""inspect_ai: the ``hf`` provider under another name, whose models are served from the cache whatever else the process does."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import GenerateConfig
from inspect_ai.model._providers.hf import HuggingFaceAPI

from evalcache.cache import Cache
from evalcache.code import ORIGINAL
from evalcache.integrations.seam import Seam
from evalcache.records import Policy

_PREFIX = "hf/"


@functools.cache
def make_provider(cache: Cache | None, serve: Callable[[Cache, Any], None]) -> type[HuggingFaceAPI]:
    """The provider that serves from ``cache``; None, and it is the ``hf`` provider.

    Args:
        serve: has a model's requests served from a cache.
    """

    class CachedHuggingFaceAPI(HuggingFaceAPI):
        """The ``hf`` provider; its model, and no other, is served from the cache."""

        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: GenerateConfig = GenerateConfig(),  # noqa: B008  as the class above has it
            **model_args: Any,
        ) -> None:
            if not model_name.startswith(_PREFIX):
                raise PrerequisiteError(f"evalcache serves the hf provider: evalcache/hf/<name>, not evalcache/{model_name}")
            self._inner = model_name.removeprefix(_PREFIX)
            with _asleep(cache):
                super().__init__(self._inner, base_url, api_key, config, **model_args)
            # By this name logs know it, and `inspect eval-retry` finds it again.
            self.model_name = model_name
            if cache is not None:
                serve(cache, self.model)

        def canonical_name(self) -> str:
            return self._inner

        def service_model_name(self) -> str:
            return self._inner

    return CachedHuggingFaceAPI


@contextlib.contextmanager
def _asleep(cache: Cache | None) -> Iterator[None]:
    """What this thread loads inside the block sleeps where it is known, although nothing else in the process is served."""
    from transformers.modeling_utils import PreTrainedModel

    if cache is None or cache.policy is Policy.OFF or Seam.installed is not None:
        yield
        return
    seam, thread = Seam(cache), threading.get_ident()
    found = vars(PreTrainedModel)["from_pretrained"]
    original = found.__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, path: Any, *args: Any, **kwargs: Any) -> Any:
        bare = functools.partial(original, cls)
        return bare(path, *args, **kwargs) if threading.get_ident() != thread else seam.load(cls, bare, path, args, kwargs)

    setattr(from_pretrained, ORIGINAL, original)
    ours = classmethod(from_pretrained)
    PreTrainedModel.from_pretrained = ours
    try:
        yield
    finally:
        if vars(PreTrainedModel)["from_pretrained"] is ours:
            PreTrainedModel.from_pretrained = found
