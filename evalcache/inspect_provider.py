"""inspect_ai's entry point: ``inspect eval task.py --model evalcache/hf/<name>`` serves this one model from the cache.

inspect_ai imports this file at the start of every eval, of whatever model, once evalcache is installed beside it: nothing but the
name is registered here, and what it stands for is imported when somebody asks for it.
"""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="evalcache")
def evalcache() -> Any:
    """The provider's class."""
    from evalcache.integrations.inspect_ai import install
    from evalcache.integrations.inspect_ai_provider import make_provider
    from evalcache.session import current, session_cache

    cache = session_cache()
    held = current()
    if cache is not None and held is not None and "inspect_ai" not in held._clients:
        held._clients.append("inspect_ai")  # so that it lets go of inspect_ai when it ends
    return make_provider(cache, install)
