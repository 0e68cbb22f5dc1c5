"""``PeftModel.from_pretrained``: asleep where its base sleeps and the adapter is known on it.

The adapted model lies in the base model's place, so the two wake together: whatever is asked of either loads the base first and
then the adapter, as the script asked for them. Known means: an earlier load of the same adapter's files on the same base, with
the same arguments and versions, has told what the live model is.

What cannot be told exactly (adapters that are made from the base's weights or from other files, that live outside of the layers,
or whose weights are not all in their file) is loaded each time.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from evalcache.adapters import is_determined
from evalcache.cache import Cache
from evalcache.checkpoint import fingerprint_checkpoint
from evalcache.code import library_of
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, EvalCacheError
from evalcache.filememo import FileMemo
from evalcache.identity import adapter_weights, identify_adapter
from evalcache.integrations.draws import skip_draws
from evalcache.integrations.known import apply, names_of
from evalcache.integrations.lazy import UNKNOWN, LazyModel, Sleep, awake, sleep_of
from evalcache.integrations.loading import folder_of, guarded, known_as, later, sleeps_on
from evalcache.integrations.packing import class_named, name_of, pack
from evalcache.integrations.steps import Step

# Arguments that choose where files come from, and those that may change what is made of them.
_NEVER = frozenset("token cache_dir force_download local_files_only".split())
_KEYED = frozenset("adapter_name autocast_adapter_dtype low_cpu_mem_usage subfolder revision torch_device".split())
# Others have to be as they are by default.
_DEFAULTS = {"is_trainable": False, "config": None, "ephemeral_gpu_offload": False, "key_mapping": None}


def load(cache: Cache, cls: type, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cls.from_pretrained`` of PEFT: a `LazyModel` where base and adapter are known, else the loaded model, known from then on.

    Args:
        original: the bound, untouched ``from_pretrained``.
    """
    known = guarded(cache, lambda: _Adapter.find(cache, cls, original, args, kwargs))
    if known is not None and known.record is not None and cache.policy.reads:
        lazy = guarded(cache, lambda: known.lazy(original))
        if lazy is not None:
            return lazy
    new = known is not None and known.record is None and cache.policy.writes
    if new:
        awake(known.base)  # as the load itself would do
    new = new and guarded(cache, known.begin)
    model = original(*args, **kwargs)
    if new:
        guarded(cache, lambda: known.tell(model))
    return model


class AdaptedSleep(Sleep):
    """What a `LazyModel` knows that stands for PEFT's model around a sleeping base, and how both wake."""

    adapted = True

    def __init__(self, base: Sleep, cls: type, wake: Callable[[], Any], record: dict[str, Any], key: Digest) -> None:
        super().__init__(base.cache, cls, wake, base.hollow, record, key)
        self._base = base
        self._lock = base._lock

    def promise(self) -> None:
        """From here on both are what the adapter makes of them. The base's config is the adapted model's, too."""
        apply(self.hollow.config, self.record["config"])
        self.trust_config()
        self._base.above.append(self)

    def wake(self) -> Any:
        """Load the base, and the adapter on it."""
        with self._lock:
            if self._base.real is None:
                self._base.wake()  # which wakes all that is above it
            return super().wake()

    def _settle(self, real: Any, seconds: float) -> None:
        self.cache.counts.model_load_seconds += seconds  # one load; config and settings are the base's

    def answer(self, model: LazyModel, name: str) -> Any:
        """As PEFT looks an attribute up: its own, the tuner's, the base's."""
        if name == "active_adapter":
            return self.record["adapter"]
        if name == "active_adapters":
            return [self.record["adapter"]]
        if name in ("device", "dtype", "training", "eval", "to", "num_parameters"):
            return super().answer(model, name)
        if self._has(name, 2):
            return UNKNOWN
        return self._base.answer(model, name)

    def lacks(self, name: str) -> bool:
        """Whether neither PEFT's objects nor the base have such an attribute."""
        return self.record["forwards"] and not self._has(name, 3)

    def _has(self, name: str, levels: int) -> bool:
        names, classes = self.record["names"][:levels], self.record["kinds"][:levels]
        return any(name in mine for mine in names) or any(hasattr(class_named(kind), name) for kind in classes)


class _Adapter(Step):
    """One adapter on one base, as they are asked for."""

    def __init__(self, cache: Cache, base: Any, folder: Any, bound: inspect.BoundArguments, cls: type) -> None:
        self.folder, self.bound = folder, bound
        self.identity = identify_adapter(folder, memo=FileMemo(cache.directory))
        given = {name: pack(value) for name, value in _given(bound).items() if name in _KEYED}
        super().__init__(cache, base, ["adapter", self.identity.value, f"{cls.__module__}.{cls.__qualname__}", given])

    @classmethod
    def find(
        cls, cache: Cache, model: type, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Adapter | None:
        """The adapter that is asked for; None where what it makes cannot be known before it is loaded."""
        try:
            bound = inspect.signature(original).bind(*args, **kwargs)
        except TypeError:
            return None  # the call itself will say so
        bound.apply_defaults()
        given = _given(bound)
        base, path = given.pop("model", None), given.pop("model_id", None)
        if (
            not isinstance(path, (str, os.PathLike))
            or library_of(getattr(sys.modules.get(model.__module__), "__file__", "") or "") is None
            or any(given.pop(name, default) is not default for name, default in _DEFAULTS.items())
            or given.keys() - _NEVER - _KEYED
            or known_as(base) is None
        ):
            return None
        folder = folder_of(path, given, "adapter_config.json")
        if folder is None:
            return None
        try:
            return cls(cache, base, folder, bound, model)
        except (EvalCacheError, OSError) as error:
            if not isinstance(error, CanonicalError):
                cache.warn(f"{folder} is loaded at once: {error}")
            return None

    def lazy(self, original: Callable[..., Any]) -> LazyModel | None:
        """A sleeping model, if its base sleeps, an earlier load told what it is, and nothing speaks against it."""
        if not self.sleeps:
            return None
        rest = {name: copy.deepcopy(value) for name, value in _given(self.bound).items() if name not in ("model", "model_id")}
        wake = later(self.bound.arguments["model_id"], lambda path: original(self.base, path, **rest))
        sleep = AdaptedSleep(sleep_of(self.base), class_named(self.record["kinds"][0]), wake, self.record, self.key)
        try:
            if sleep.manifest() is None:
                return None
        except EvalCacheError:
            return None
        sleep.promise()
        skip_draws(self.record["drawn"])
        return sleeps_on(LazyModel(sleep), self.folder)

    def tell(self, model: Any) -> None:
        """Write down what was loaded, where that can be told exactly."""
        try:
            if not self._is_plain(model) or not self._is_complete(model):
                return
            all_three = model, model.base_model, awake(model.base_model.model)
            unchanged = identify_adapter(self.folder, memo=FileMemo(self.cache.directory)) == self.identity
        except (EvalCacheError, OSError, ValueError, TypeError, AttributeError):
            return
        if all_three[2] is awake(self.base) and unchanged:
            more = {
                "adapter": self.bound.arguments["adapter_name"],
                "kinds": [name_of(type(one)) for one in all_three],
                "names": [names_of(one) for one in all_three],
                "forwards": _forwards(*all_three[:2]),
            }
            self.remember(model, more)

    def _is_plain(self, model: Any) -> bool:
        """Whether nothing but the adapter's files, its base and the arguments decides what it is."""
        name = self.bound.arguments["adapter_name"]
        config = model.peft_config[name]
        if list(model.peft_config) != [name] or not is_determined(config):
            return False
        if library_of(getattr(sys.modules.get(type(model).__module__), "__file__", "") or "") is None:
            return False
        return model.active_adapter == name and list(model.active_adapters) == [name]

    def _is_complete(self, model: Any) -> bool:
        """Whether all that the adapter has was in its file; the rest would be as it was drawn when it was made."""
        from peft import get_peft_model_state_dict

        name = self.bound.arguments["adapter_name"]
        had = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        stored = fingerprint_checkpoint(adapter_weights(self.folder), memo=FileMemo(self.cache.directory)).tensors
        return had.keys() <= stored.keys()


def _given(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments by name, those in ``**kwargs`` beside the others."""
    given = dict(bound.arguments)
    return given | given.pop("kwargs", {})


def _forwards(model: Any, tuner: Any) -> bool:
    """Whether PEFT's objects look for a missing attribute in what they hold, and nowhere else."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    return type(model).__getattr__ is PeftModel.__getattr__ and getattr(type(tuner), "__getattr__", None) is BaseTuner.__getattr__
