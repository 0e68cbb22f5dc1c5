"""``from_pretrained``: asleep where the checkpoint is known, else loaded, and known from then on.

Known means: an earlier load of the same files, with the same arguments and the same versions, has told what the live model is.
What cannot be told exactly (weights that are made up while loading, code of one's own) is loaded each time. An adapter that
transformers itself puts into the model is part of the checkpoint; PEFT's own models are in `loading_adapters.py`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evalcache.adapters import is_determined
from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.checkpoint import read_json
from evalcache.code import library_of
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, EvalCacheError, FingerprintError
from evalcache.filememo import FileMemo
from evalcache.identity import ADAPTER_CONFIG, CheckpointIndex, base_of_adapter, identify_adapter, identify_checkpoint
from evalcache.integrations.draws import Draws, skip_draws
from evalcache.integrations.known import changed, describe, hollow_model, names_of, runtime
from evalcache.integrations.lazy import LazyModel, Sleep, awake, config_digest, sleep_of
from evalcache.integrations.packing import name_of, pack
from evalcache.weights import fingerprint

# Arguments that choose where files come from or how loading goes, and never what is loaded.
_NEVER = frozenset(
    "config adapter_kwargs token cache_dir force_download local_files_only low_cpu_mem_usage weights_only disable_mmap "
    "offload_folder offload_state_dict max_memory resume_download proxies _from_auto _from_pipeline commit_hash _commit_hash "
    "trust_remote_code revision code_revision".split()
)
# Arguments that bring weights from elsewhere, or spread them.
_UNKNOWABLE = (
    "state_dict",
    "output_loading_info",
    "gguf_file",
    "tp_plan",
    "key_mapping",
    "device_mesh",
)
# Arguments that mean nothing where they are None; of any other name None is a value, which the config takes over.
_NOTHING = frozenset(
    "use_safetensors fusion_config dtype torch_dtype device_map quantization_config variant generation_config "
    "distributed_config tp_size kernel_config state_dict gguf_file tp_plan key_mapping device_mesh".split()
)
_loading = threading.local()
_asleep: weakref.WeakKeyDictionary[LazyModel, frozenset[str]] = weakref.WeakKeyDictionary()  # and the folders of their files
_loaded: weakref.WeakKeyDictionary[Any, tuple[Digest, dict[str, Any]]] = weakref.WeakKeyDictionary()


def load(cache: Cache, cls: type, original: Callable[..., Any], path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cls.from_pretrained``: a `LazyModel` where the checkpoint is known, else the loaded model, which is then known.

    Args:
        original: the bound, untouched ``from_pretrained``.
    """
    if getattr(_loading, "active", False):
        return original(path, *args, **kwargs)
    if not kwargs.get("output_loading_info"):
        kwargs.pop("output_loading_info", None)  # we ask for it ourselves
    _loading.active = True
    try:
        known = guarded(cache, lambda: _Checkpoint.find(cache, cls, path, args, kwargs))
        if known is not None and cache.policy.reads:
            lazy = guarded(cache, lambda: known.lazy(original))
            if lazy is not None:
                return lazy
        began = time.perf_counter()
        # What lies on a hub may be here, and known, once it has been loaded.
        if known is None and (kwargs.get("output_loading_info") or not isinstance(path, str) or os.path.isdir(path)):
            model = original(path, *args, **kwargs)
            cache.loaded(Digest(bytes(16)), time.perf_counter() - began)
            return model
        _loading.draws, _loading.base = Draws(), None
        model, told = original(path, *args, **kwargs, output_loading_info=True)
        took_s = time.perf_counter() - began
        # What was made up at random while loading, or with draws from the script's generator, cannot be promised.
        draws = _loading.draws
        known = known or guarded(cache, lambda: _Checkpoint.find(cache, cls, path, args, kwargs))
        whole = known is not None and _is_whole(told) and (_loading.base if known.adapter else draws.nothing())
        if whole and cache.policy.writes:
            guarded(cache, lambda: known.remember(model, draws))
        found = known_as(model)
        cache.loaded(Digest(bytes(16) if found is None else found[1]["root"]), took_s)
        return model
    finally:
        _loading.active, _loading.draws = False, None


def _is_whole(told: dict[str, Any]) -> bool:
    """Whether a model's files held all of its weights."""
    return not any(told.get(name) for name in ("missing_keys", "mismatched_keys", "error_msgs"))


def heard(original: Callable[..., Any]) -> Callable[..., Any]:
    """The end of a load, before an adapter comes: what is told afterwards is about the adapter alone."""

    def patched(*args: Any, **kwargs: Any) -> Any:
        told = original(*args, **kwargs)
        draws = getattr(_loading, "draws", None)
        if draws is not None and hasattr(told, "to_dict"):
            _loading.base = _loading.base is not False and _is_whole(told.to_dict()) and draws.nothing()
        return told

    return patched


def known_as(model: Any) -> tuple[Digest, dict[str, Any]] | None:
    """The key and the record under which a model was written down; one that is awake may have changed since."""
    if type(model) is LazyModel:
        sleep = sleep_of(model)
        return None if sleep.adapted or sleep.above else (sleep.key, sleep.record)
    return _loaded.get(model) if isinstance(model, torch.nn.Module) else None


def note(model: Any, key: Digest, record: dict[str, Any]) -> None:
    """From here on a model is known as another one."""
    if type(model) is LazyModel:
        sleep_of(model).key, sleep_of(model).record = key, record
    else:
        _loaded[model] = key, record


def guarded(cache: Cache, step: Callable[[], Any]) -> Any:
    """One step of ours around a load; whatever fails in it, the load goes on without it."""
    try:
        with cache.counts.taking("fingerprint"):
            return step()
    except Exception as error:
        cache.warn(f"a checkpoint is loaded as if evalcache were not there: {type(error).__name__}: {error}")
        return None


def sleeps_on(model: LazyModel, *folders: Any) -> LazyModel:
    """A model that sleeps, from these folders."""
    _asleep[model] = frozenset(os.path.realpath(one) for one in folders if one is not None)
    return model


def before_writing(cache: Cache, folder: Any) -> None:
    """Wake the models that sleep on a folder that is about to be written: without us they would have been read by now."""
    if isinstance(folder, (str, os.PathLike)):
        for model in [model for model, folders in _asleep.items() if os.path.realpath(folder) in folders]:
            guarded(cache, lambda model=model: awake(model))


class _Checkpoint:
    """One checkpoint as it is asked for: which files, which arguments, which versions.

    Args:
        folder: of the model. adapter: of the adapter that transformers puts into it.
    """

    def __init__(
        self, cache: Cache, cls: type, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any], adapter: Path | None = None
    ) -> None:
        self.cache, self.cls, self.args, self.kwargs = cache, cls, args, kwargs
        self.folder, self.adapter = folder, adapter
        self.path: Any = folder
        self.name: Any = folder
        self.index = CheckpointIndex(cache.directory / "checkpoints.sqlite")
        self.identity = self._identify()
        config = kwargs.get("config")
        given = {
            name: pack(value) for name, value in kwargs.items() if name not in _NEVER and not (value is None and name in _NOTHING)
        }
        self.key = digest_canonical(
            [
                self.identity.value,
                name_of(cls),
                given,
                b"" if config is None else config_digest(config),
                # Where a map puts a model depends on what is there.
                torch.cuda.device_count() if kwargs.get("device_map") is not None else 0,
                *runtime(),
            ]
        )
        self.last = digest_canonical([self.identity.value, name_of(cls), "last"])
        """Where it is written down how these files were loaded last, for whoever wonders what has changed since."""

    @classmethod
    def find(cls, cache: Cache, model: type, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Checkpoint | None:
        """The checkpoint at ``path``; None where it cannot be known before it is loaded."""
        if (
            args
            or not isinstance(path, (str, os.PathLike))
            or library_of(getattr(sys.modules.get(model.__module__), "__file__", "") or "") is None
        ):
            return None
        given = {name: _without_nothing(kwargs.get(name)) for name in _UNKNOWABLE}
        if any(given.values()):
            return None
        folder, name = folder_of(path, kwargs), path
        if folder is None or isinstance(kwargs.get("config"), (str, os.PathLike)) or _names_other_weights(kwargs, folder):
            return None
        try:
            found = _adapter_of(path, folder, kwargs)
            if found is not None and not (folder / "config.json").exists():
                name = folder = base_of_adapter(folder)
                if not folder.is_absolute():  # it means another one once the script has changed its working directory
                    return None
            found = cls(cache, model, folder, args, kwargs, found)
        except _UnknowableError:
            return None
        except (EvalCacheError, OSError) as error:
            if os.path.isdir(path) and not isinstance(error, (CanonicalError, FingerprintError)):
                cache.warn(f"{folder} is loaded at once: {error}")
            return None
        found.path, found.name = path, name
        return found

    def _identify(self) -> Digest:
        files = {name: self.kwargs.get(name) for name in ("variant", "use_safetensors")}
        memo = FileMemo(self.cache.directory)
        model = identify_checkpoint(self.folder, memo=memo, **files).digest
        return model if self.adapter is None else digest_canonical([model.value, identify_adapter(self.adapter, memo=memo).value])

    def lazy(self, original: Callable[..., Any]) -> LazyModel | None:
        """A sleeping model, if an earlier load told what it is, and nothing speaks against it."""
        record = self.index.recall(self.key)
        if record is None:
            return None
        hollow = hollow_model(self.cls, self.folder, self.name, self.kwargs, record)
        if hollow is None:
            return None

        # As it was asked for: the script may change its config, its working directory or the default device before it wakes.
        kwargs = copy.deepcopy(self.kwargs)
        if self.adapter is not None and kwargs.get("adapter_kwargs"):
            kwargs["adapter_kwargs"]["_adapter_model_path"] = os.path.realpath(self.adapter)
        load = later(self.path, lambda path: original(path, *self.args, **kwargs))
        model = LazyModel(Sleep(self.cache, self.cls, load, hollow, record, self.key))
        try:
            if sleep_of(model).manifest() is None:
                return None
        except EvalCacheError:
            return None
        skip_draws(record["drawn"])
        return sleeps_on(model, self.folder, self.adapter)

    def remember(self, model: Any, draws: Draws) -> None:
        """Write down what was loaded. Silently not, where that cannot be told exactly."""
        try:
            drawn = [0, []] if self.adapter is None else draws.count()
            if drawn is None or (self.adapter is not None and not all(map(is_determined, model.peft_config.values()))):
                return
            manifest = fingerprint(model)
            config = self.kwargs.get("config") or type(model).config_class.from_pretrained(self.folder)
            generation = model.generation_config.to_dict() if model.can_generate() else {}
            record = describe(model, manifest) | {
                "names": names_of(model),
                "drawn": drawn,
                "config": changed(config, model.config),
                "generation": {name: value for name, value in generation.items() if value is not None},
            }
            hollow = hollow_model(self.cls, self.folder, self.name, self.kwargs, record)
            same = (
                hollow is not None
                and config_digest(hollow.config) == config_digest(model.config)
                and (not model.can_generate() or hollow.generation_config.to_dict() == model.generation_config.to_dict())
            )
            if same and self._identify() == self.identity:
                self.cache.put_object(f"model/{manifest.root.hex}", manifest.to_bytes())
                self.index.remember(self.key, record)
                self.index.remember(self.last, {"root": manifest.root.value, "runtime": runtime()})
                note(model, self.key, record)
        except (EvalCacheError, OSError, ValueError, TypeError, AttributeError):
            return  # it will be loaded again next time: slower, and as right


def later(path: Any, load: Callable[[Any], Any]) -> Callable[[], Any]:
    """``load`` of a path, to be called once the script may have changed its working directory and torch's defaults."""
    folder = os.path.realpath(path) if os.path.isdir(path) else None
    device, dtype = torch.get_default_device(), torch.get_default_dtype()

    def wake() -> Any:
        moved = folder is not None and os.path.realpath(path) != folder
        now, outer = torch.get_default_dtype(), getattr(_loading, "active", False)
        _loading.active = True
        torch.set_default_dtype(dtype)
        try:
            with device if torch.get_default_device() != device else contextlib.nullcontext():
                return load(folder if moved else path)
        finally:
            torch.set_default_dtype(now)
            _loading.active = outer

    return wake


class _UnknowableError(Exception):
    """What a load makes cannot be known before."""


def _adapter_of(path: Any, folder: Path, kwargs: dict[str, Any]) -> Path | None:
    """Where the adapter lies that transformers puts into the model: the auto classes say so, else it is beside the model.

    Raises:
        _UnknowableError: it is asked for in a way that is not known.
    """
    told = kwargs.get("adapter_kwargs") or {}
    found = told.get("_adapter_model_path") or (path if (folder / ADAPTER_CONFIG).exists() else None)
    if set(told) - {"_adapter_model_path", "revision", "token"}:
        raise _UnknowableError
    if found is None:
        return None
    adapter = folder_of(found, told, ADAPTER_CONFIG)
    # Of two files of weights another one comes first, or the folder is another one.
    if adapter is None or kwargs.get("use_safetensors") is False or kwargs.get("subfolder"):
        raise _UnknowableError
    return adapter


def _names_other_weights(kwargs: dict[str, Any], folder: Path) -> bool:
    """Whether the config that is given names a file of weights that the folder's own does not name."""
    named = getattr(kwargs.get("config"), "transformers_weights", None)
    return named is not None and named != read_json(folder / "config.json").get("transformers_weights")


def _without_nothing(value: Any) -> Any:
    """A load argument, an empty one for a dict of nothing that counts: the auto classes pass such on, with the hub's revision."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if item is not None and name not in ("revision", "token")}


def folder_of(path: Any, kwargs: dict[str, Any], file: str = "config.json") -> Path | None:
    """Where the files are: a folder, or a snapshot in the hub's cache.

    A name is asked of the hub, as the load itself would do: its branch may have moved on since it was downloaded. What has come
    since is not here yet, and loaded at once.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder / kwargs["subfolder"] if kwargs.get("subfolder") else folder
    if kwargs.get("force_download"):
        return None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            str(path),
            file,
            cache_dir=kwargs.get("cache_dir"),
            revision=kwargs.get("revision") or "main",
            token=kwargs.get("token"),
            local_files_only=bool(kwargs.get("local_files_only")),
            subfolder=kwargs.get("subfolder") or "",
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None
