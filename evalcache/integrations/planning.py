"""transformers below `evalcache plan`: models sleep, known or not, and nothing wakes them.

A checkpoint that was loaded before sleeps as it always does. One that never was is a stranger: config and class are read from its
folder, its weights are not; what it would answer is unknown, so all that it is asked would run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from evalcache.digest import Digest
from evalcache.errors import EvalCacheError
from evalcache.identity import ADAPTER_CONFIG
from evalcache.integrations import lazy, loading, transformers
from evalcache.integrations.known import hollow_model, runtime
from evalcache.integrations.seam import Seam
from evalcache.manifest import Manifest
from evalcache.planning import PlanCache, WouldLoad
from evalcache.watch import Watch
from evalcache.weights import library_digests

_SCRIPT = "a script asks its model one call after another, and what it will ask is known only when it has the answers"
_LOAD = "the model's weights are needed before its requests are known"


def install(cache: PlanCache) -> None:
    """Have every model of this process sleep. transformers has been imported."""
    transformers.install(cache)
    Seam.installed = PlanSeam(cache)


class PlanSeam(Seam):
    """Loads nothing, and answers nothing."""

    cache: PlanCache

    def __init__(self, cache: PlanCache) -> None:
        super().__init__(cache)
        self._expecting = False
        self._about: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """In the block, what needs weights raises `WouldLoad`; elsewhere there is no plan of what does."""
        self._expecting = True
        try:
            yield
        finally:
            self._expecting = False

    def about(self, model: Any) -> dict[str, Any]:
        """What is known of a model."""
        return self._about.get(model) or {"state": "awake"}

    def load(self, cls: type, original: Callable[..., Any], path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``from_pretrained``: asleep, known or not."""
        given = dict(kwargs)
        try:
            with self.expecting():
                model = super().load(cls, self._refuse, path, args, kwargs)
        except WouldLoad:
            model = self._stranger(cls, path, args, given)
            return self.asleep(model)
        sleep = lazy.sleep_of(model)
        sleep._load = self._refuse
        manifest = sleep.manifest()
        self._about[model] = {"state": "known", "path": str(path), **(_described(manifest) if manifest is not None else {})}
        return model

    def generate(self, model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The end of the plan: a script that calls this reads the answer before it asks again."""
        self.cache.end(_SCRIPT)

    def wake(self, model: Any, watch: Watch, manifest: Manifest) -> None:
        """Never."""
        self._refuse()

    def once(self, parts: Sequence[Any], ask: Callable[[], Any]) -> Any:
        """What an earlier run has found out about a model."""
        return super().once(parts, self._refuse)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        if self._expecting:
            raise WouldLoad
        self.cache.end(_LOAD)

    def _stranger(self, cls: Any, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A model of which nothing is known but its config."""
        folder = loading.folder_of(path, kwargs)
        if folder is None or (folder / ADAPTER_CONFIG).exists() or kwargs.get("gguf_file"):
            self.cache.end(f"{path} has to be loaded before anything is known of it")
        try:
            config = kwargs.get("config")
            config = cls.config_class.from_pretrained(folder) if config is None else config
            record = {
                "root": bytes(16), "classes": [], "code": library_digests([]), "config": [],
                "device": str(_device(kwargs)), "dtype": _dtype(kwargs, config),
                "generation": _generation(cls, folder, config),
            }  # fmt: skip
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self.cache.end(f"{path} has to be loaded before anything is known of it: {type(error).__name__}: {error}")
        hollow = hollow_model(cls, folder, path, kwargs, record)
        if hollow is None:
            self.cache.end(f"{path} has to be loaded before anything is known of it")
        model = lazy.LazyModel(_Stranger(self.cache, cls, self._refuse, hollow, record, Digest(bytes(16))))
        self._about[model] = {
            "state": "stranger",
            "path": str(path),
            "class": cls.__qualname__,
            "parameters": _count(folder, config),
            **_last_time(self.cache, cls, path, args, kwargs),
        }
        return model


class _Stranger(lazy.Sleep):
    """A model that was never loaded: what it is cannot be told."""

    def manifest(self) -> Manifest | None:
        return None


def _described(manifest: Manifest) -> dict[str, Any]:
    about = manifest.about
    return {"root": manifest.root.hex, "class": str(about.get("class") or ""), "parameters": about.get("parameters")}


def _last_time(cache: PlanCache, cls: type, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the same files were when they were last loaded, and what of the libraries has changed since."""
    known = loading.guarded(cache, lambda: loading._Checkpoint.find(cache, cls, path, args, kwargs))
    last = None if known is None else known.index.recall(known.last)
    if last is None:
        return {}
    (now, _, python_now), (then, _, python_then) = runtime(), last["runtime"]
    now, then = ({**one, "python": ".".join(map(str, python))} for one, python in ((now, python_now), (then, python_then)))
    changed = {name: [then.get(name), now.get(name)] for name in sorted({*then, *now}) if then.get(name) != now.get(name)}
    return {"last_root": Digest(last["root"]).hex, "versions": changed}


def _device(kwargs: dict[str, Any]) -> torch.device:
    place = kwargs.get("device_map")
    if isinstance(place, dict):
        place = place.get("")
    if isinstance(place, str) and place in ("auto", "balanced", "balanced_low_0", "sequential"):
        place = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu" if place is None else place)


def _dtype(kwargs: dict[str, Any], config: Any) -> str:
    given = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if given is None or given == "auto":
        given = getattr(config, "dtype", None) or torch.float32
    return str(given).removeprefix("torch.")


def _generation(cls: Any, folder: Path, config: Any) -> dict[str, Any]:
    from transformers import GenerationConfig

    if not cls.can_generate():
        return {}
    try:
        found = GenerationConfig.from_pretrained(folder)
    except OSError:
        found = GenerationConfig.from_model_config(config)
    return {name: value for name, value in found.to_dict().items() if value is not None}


def _count(folder: Path, config: Any) -> int | None:
    """About how many parameters its files hold."""
    sizes = [file.stat().st_size for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
    dtype = getattr(config, "dtype", None) or torch.float32
    with contextlib.suppress(AttributeError, TypeError, EvalCacheError):
        return sum(sizes) // (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize or None
    return None
