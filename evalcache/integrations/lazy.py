"""A checkpoint that was met before sleeps on disk until the first miss.

``from_pretrained`` of a known checkpoint returns a `LazyModel`: it answers for the config, the generation config and the class,
and ``generate`` is served from the store; anything else loads the weights first, as the caller asked for them. Known means: an
earlier load of the same files, with the same arguments and the same versions, has told what the live model is.

Nothing is taken on trust when it wakes: the live model is fingerprinted, and if it is not the one that was promised, the call is
resolved again on what is there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from evalcache.attributes import AttributeEncoder, is_config
from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, EvalCacheError, FingerprintError
from evalcache.integrations.packing import pack
from evalcache.manifest import Manifest
from evalcache.weights import library_digests

_HOLLOW = frozenset(
    "config generation_config can_generate main_input_name base_model_prefix name_or_path framework "
    "_prepare_generation_config _prepare_special_tokens _prepare_attention_mask_for_generation _prepare_generated_length "
    "_validate_model_class _supports_default_dynamic_cache adjust_generation_fn".split()
)
# Instances have sets of their own in the place of their class's.
_OF_INSTANCES = frozenset(
    "_keep_in_fp32_modules _keep_in_fp32_modules_strict _keys_to_ignore_on_load_missing _keys_to_ignore_on_load_unexpected "
    "_keys_to_ignore_on_save _no_split_modules _skip_keys_device_placement".split()
)


class LazyModel:
    """Stands for a model whose weights are still on disk. ``isinstance`` says what the model would say.

    Made by `load`, never by hand.
    """

    def __init__(self, sleep: Sleep) -> None:
        object.__getattribute__(self, "__dict__")["_lazy"] = sleep

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return object.__getattribute__(self, "__dict__")["_lazy"].cls

    def __getattr__(self, name: str) -> Any:
        sleep: Sleep = object.__getattribute__(self, "__dict__")["_lazy"]
        if sleep.real is None and not (sleep.above and name not in ("config", "generation_config")):
            if name in _HOLLOW:
                # What the hollow model lacks (a version may set more while it loads) is asked of the real one.
                with contextlib.suppress(AttributeError):
                    return getattr(sleep.hollow, name)
            found = sleep.answer(self, name)
            if found is not UNKNOWN:
                return found
            if sleep.lacks(name):
                raise AttributeError(f"{sleep.cls.__name__!r} object has no attribute {name!r}")
        return getattr(sleep.wake(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        sleep: Sleep = object.__getattribute__(self, "__dict__")["_lazy"]
        if sleep.real is None and name == "generation_config" and not sleep.adapted:
            setattr(sleep.hollow, name, value)
        elif name == "generate":
            object.__getattribute__(self, "__dict__")[name] = value
        else:
            setattr(sleep.wake(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(sleep_of(self).wake(), name)

    def __evalcache_awake__(self) -> Any:
        return sleep_of(self).wake()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return sleep_of(self).wake()(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return dir(sleep_of(self).cls)

    def __repr__(self) -> str:
        return repr(sleep_of(self).wake())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(sleep_of(self).wake(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return sleep_of(self).wake().__reduce_ex__(protocol)


class Sleep:
    """What a `LazyModel` knows, and how it wakes.

    Args:
        cls: of the model. wake: loads it. hollow: an instance of a transformers class with a config and no weights.
        record: what an earlier load told. key: under which the record lies.
    """

    adapted = False
    """Whether this is a model of PEFT's around another one, whose config and settings it uses."""

    def __init__(
        self, cache: Cache, cls: type, wake: Callable[[], Any], hollow: Any, record: dict[str, Any], key: Digest
    ) -> None:
        self.cache = cache
        self.cls = cls
        self.real: Any = None
        self.hollow = hollow
        self.key = key
        self.above: list[Sleep] = []
        """What was put into this model since: adapters change it in its place, so that nothing is known of it any more."""
        self.device = torch.device(record["device"])
        self.dtype = getattr(torch, record["dtype"])
        self._load = wake
        self.record = record
        self._config_digest = config_digest(hollow.config)
        self._manifest: Manifest | None = None
        self._grad = torch.is_grad_enabled()
        self._lock = threading.RLock()

    def answer(self, model: LazyModel, name: str) -> Any:
        """An attribute that needs no weights, else `UNKNOWN`."""
        if name in ("device", "dtype"):
            return getattr(self, name)
        if name == "training":
            return False
        if name == "eval":
            return lambda: model
        if name == "tie_weights":  # what is tied was tied when it was loaded
            return lambda: None
        if name == "num_parameters":
            return self._count
        if name == "to":
            return lambda *args, **kwargs: self._to(model, args, kwargs)
        own = name in _OF_INSTANCES or name in self.record.get("names", ())
        value = UNKNOWN if own else getattr(self.cls, name, UNKNOWN)
        plain = value is None or isinstance(value, (bool, int, float, str, tuple, list, frozenset, set, dict))
        return value if plain else UNKNOWN

    def lacks(self, name: str) -> bool:
        """Whether the model is sure to have no such attribute: asking for it (``hasattr``) needs no weights either."""
        names = self.record.get("names")
        ours = getattr(self.cls, "__getattr__", None) is torch.nn.Module.__getattr__
        return names is not None and ours and name not in names and not hasattr(self.cls, name)

    def _count(self, *args: Any, **kwargs: Any) -> int:
        """``num_parameters()``: as its fingerprint says, unless weights are packed."""
        manifest = None if args or kwargs else self.manifest()
        if manifest is None or manifest.about.get("quantisation") or "parameters" not in manifest.about:
            return self.wake().num_parameters(*args, **kwargs)
        return int(manifest.about["parameters"])

    def _to(self, model: LazyModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = args[0] if len(args) == 1 and not kwargs else kwargs.get("device") if not args and len(kwargs) == 1 else None
        with contextlib.suppress(RuntimeError, TypeError):
            device = torch.device(place) if isinstance(place, (str, int, torch.device)) else None
            # The same bytes elsewhere are the same model; a device that is not there fails as it would have.
            if device is not None and (device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())):
                self.device = device
                return model
        return self.wake().to(*args, **kwargs)

    def wake(self) -> Any:
        """Load the weights, once, and hand over what was set meanwhile."""
        with self._lock, self.cache.counts.taking(""):  # loading is the script's own work
            if self.real is None:
                states = torch.get_rng_state()
                began = time.perf_counter()
                # Weights that are made in inference mode could never be trained or changed.
                with torch.inference_mode(False), torch.set_grad_enabled(self._grad):
                    real = self._load()
                    if real.device != self.device and self.device.type != "meta":
                        real = real.to(self.device)
                    self._settle(real, time.perf_counter() - began)
                    self.real = real
                    try:
                        for one in self.above:
                            one.wake()
                    except BaseException:
                        self.real = None  # without its adapter it would be another model
                        raise
                    finally:
                        torch.set_rng_state(states)  # a sleeping model draws nothing
            return self.real

    def become(self, key: Digest, record: dict[str, Any], load: Callable[[Callable[[], Any]], Any]) -> bool:
        """Be what a known change makes of this model, if nothing speaks against it; says so.

        Args:
            load: loads it, given how it was loaded so far.
        """
        old = self.key, self.record, self._manifest
        self.key, self.record, self._manifest = key, record, None
        try:
            sure = self.manifest() is not None
        except EvalCacheError:
            sure = False
        if sure:
            self._load = functools.partial(load, self._load)
        else:
            self.key, self.record, self._manifest = old
        return sure

    def trust_config(self) -> None:
        """The config as it is now is the one that was promised."""
        self._config_digest = config_digest(self.hollow.config)

    def _settle(self, real: Any, seconds: float) -> None:
        """The weights are there: count it, and hand over what was set meanwhile."""
        self.cache.loaded(Digest(self.record["root"]), seconds)
        _hand_over(self.hollow.config, real.config)
        if "generation_config" in vars(self.hollow):  # not where a model cannot generate
            real.generation_config = self.hollow.generation_config

    def manifest(self) -> Manifest | None:
        """What the model would be if it were loaded now; None if that is not sure any more, and it has to be loaded."""
        if self.above:
            return None
        if self._manifest is None:
            data = self.cache.get_object(f"model/{Digest(self.record['root']).hex}")
            if data is None:
                return None
            self._manifest = Manifest.from_bytes(data)
        if config_digest(self.hollow.config) != self._config_digest:
            return None
        if library_digests(self.record["classes"]) != self.record["code"]:
            return None
        return self._manifest


UNKNOWN = object()
"""The answer to what only the loaded model can say."""


def sleep_of(model: Any) -> Sleep:
    """The inside of a lazy model."""
    return object.__getattribute__(model, "__dict__")["_lazy"]


def is_asleep(model: Any) -> bool:
    """Whether this is a lazy model whose weights have not been loaded."""
    return type(model) is LazyModel and sleep_of(model).real is None


def awake(model: Any) -> Any:
    """The model itself: a lazy one's real model, loaded if need be."""
    return sleep_of(model).wake() if type(model) is LazyModel else model


def config_digest(config: Any) -> bytes:
    """Digest of a config as the manifest sees it, with its kernels and dtype."""
    encoder = AttributeEncoder(_class_name, _packed)
    kernels = [getattr(config, "_attn_implementation", None), getattr(config, "_experts_implementation", None)]
    return digest_canonical([encoder.config_value(config, "config"), [str(kernel) for kernel in kernels]]).value


def _class_name(value: Any, path: str) -> Any:
    return ["class", f"{value.__module__}.{value.__qualname__}"]


def _packed(value: Any, path: str) -> Any:
    try:
        return ["packed", pack(value)]
    except CanonicalError as error:
        raise FingerprintError(path, f"a {type(value).__name__} in a config") from error


def is_same(left: Any, right: Any) -> bool:
    """Whether two values of a config are equal, and of one type."""
    return type(left) is type(right) and left == right


def _hand_over(given: Any, real: Any) -> None:
    """Set in the real config what the script has set in the sleeping one's, and make them one: the script may hold the latter."""
    for name, value in vars(given).items():
        known = vars(real).get(name)
        if is_config(value) and type(known) is type(value):
            _hand_over(value, known)
        elif name not in vars(real) or not is_same(known, value):
            setattr(real, name, value)
    object.__setattr__(given, "__dict__", vars(real))
