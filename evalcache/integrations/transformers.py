"""transformers: `generate` of every model, or of one, served from the cache.

The floor of all seams: plain scripts, pipelines and PEFT models end here. `install` puts one function in the place of
``GenerationMixin.generate`` (and of PEFT's, which stands above it); what it does with a call is in `seam.py`.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.code import ORIGINAL
from evalcache.integrations import lazy, loading, loading_adapters, steps
from evalcache.integrations.seam import Seam
from evalcache.records import Policy
from evalcache.weights import unwrap


def install(cache: Cache) -> None:
    """Serve every model of this process from ``cache``. transformers has been imported; PEFT may be, now or later.

    A second call with another cache takes the first one's place.
    """
    Seam.installed = Seam.of(cache)  # the same one, where PEFT was imported since: a sleeping model holds on to it
    from transformers.generation.utils import GenerationMixin

    _patch(GenerationMixin, "generate")
    _patch_loading()
    _patch_peft()


def uninstall() -> None:
    """Put back what `install` replaced, except where somebody else has put something above it since."""
    Seam.installed = Seam.sampling_thread = None
    if _wrapped:
        return
    for (owner, name), (original, ours) in list(_patched.items()):
        if vars(owner).get(name) is ours:
            setattr(owner, name, original)
            del _patched[owner, name]


def wrap(model: Any, cache: Cache) -> Any:
    """Serve one model from ``cache``; returns the same object, on which nothing is set: its copies are models of their own."""
    model = lazy.awake(model)
    _wrapped[unwrap(model) if not hasattr(type(model), "generate") else model] = Seam(cache)
    from transformers.generation.utils import GenerationMixin

    _patch(GenerationMixin, "generate")
    _patch_peft()
    return model


_wrapped: weakref.WeakKeyDictionary[Any, Seam] = weakref.WeakKeyDictionary()
_patched: dict[tuple[type, str], tuple[Any, Any]] = {}  # what was there, and what we put there


def _patch(owner: type, name: str) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            seam = _wrapped.get(self) or Seam.installed
            if seam is None or torch.compiler.is_compiling():
                return original(self, *args, **kwargs)
            return seam.generate(self, functools.partial(original, self), args, kwargs)

        return patched

    _replace(owner, name, make)


def _patch_loading() -> None:
    """``from_pretrained`` of every class goes through one: a known checkpoint sleeps until it is needed."""
    from transformers.modeling_utils import PreTrainedModel

    def make(original: Any) -> Callable[..., Any]:
        def patched(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            seam = Seam.installed
            bare = functools.partial(original, cls)
            if seam is None or seam.cache.policy is Policy.OFF:
                return bare(pretrained_model_name_or_path, *args, **kwargs)
            return seam.load(cls, bare, pretrained_model_name_or_path, args, kwargs)

        return patched

    _replace(PreTrainedModel, "from_pretrained", make)

    def make_resize(original: Any) -> Callable[..., Any]:
        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            seam = Seam.installed
            if seam is None or seam.cache.policy is Policy.OFF:
                return original(lazy.awake(self), *args, **kwargs)
            return steps.resize(seam.cache, self, original, args, kwargs)

        return patched

    _replace(PreTrainedModel, "resize_token_embeddings", make_resize)
    _replace(PreTrainedModel, "save_pretrained", _wakes_before)
    if "_finalize_model_loading" in vars(PreTrainedModel):
        _replace(PreTrainedModel, "_finalize_model_loading", loading.heard)


def _wakes_before(original: Any) -> Callable[..., Any]:
    """``save_pretrained`` of every model: one that sleeps on the files which are written is read first."""

    def patched(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if Seam.installed is not None:
            loading.before_writing(Seam.installed.cache, save_directory)
        return original(self, save_directory, *args, **kwargs)

    return patched


def _replace(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``make(original)`` in the place of a method, unless ours is there, or somebody's above ours."""
    found = vars(owner)[name]
    if (owner, name) in _patched and found is not _patched[owner, name][0]:
        return
    kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    original = found.__func__ if kind else found
    ours = functools.wraps(original)(make(original))
    setattr(ours, ORIGINAL, original)
    _patched[owner, name] = found, kind(ours) if kind else ours
    setattr(owner, name, _patched[owner, name][1])


def _patch_peft() -> None:
    """PEFT's ``generate`` stands above the base model's: prompt-learning adapters live outside of that one. A known adapter on
    a sleeping base sleeps, too."""
    module = sys.modules.get("peft.peft_model")
    if module is None or not hasattr(module, "PeftModelForSeq2SeqLM"):
        return
    for name in ("PeftModelForCausalLM", "PeftModelForSeq2SeqLM"):
        cls = getattr(module, name)
        if "generate" in vars(cls):
            _patch(cls, "generate")

    def make(original: Any) -> Callable[..., Any]:
        def patched(cls: type, *args: Any, **kwargs: Any) -> Any:
            seam = Seam.installed
            bare = functools.partial(original, cls)
            if seam is None or seam.cache.policy is Policy.OFF:
                return bare(*args, **kwargs)
            return seam.asleep(loading_adapters.load(seam.cache, cls, bare, args, kwargs))

        return patched

    _replace(module.PeftModel, "from_pretrained", make)
    _replace(module.PeftModel, "save_pretrained", _wakes_before)
