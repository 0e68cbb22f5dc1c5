"""Where answers come from, as a key needs it: a live model, the files of a checkpoint, or a name that somebody vouches for.

A name alone is never taken for a model: the eval caches that do have served one model's answers as another's.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.code import version_of
from evalcache.digest import Digest, Hasher, digest_bytes
from evalcache.errors import EvalCacheError, UncacheableError
from evalcache.filememo import FileMemo, FileStamp
from evalcache.identity import identify_checkpoint
from evalcache.manifest import Manifest, ModuleRecord
from evalcache.records import Environment, Fields
from evalcache.structs import Frozen
from evalcache.watch import Watch

_FORMAT = "evalcache source 1"
# What stands beside the weights and turns text into ids and back: to an engine that is given text, a part of the model.
_TEXT_FILES = frozenset((".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".spm"))
_INDEX = ".index.json"  # which file holds which tensor: resharded copies are the same model
_PIECE_BYTES = 1 << 24


class Named(Frozen):
    """A model that is known by name only. Made by `named`."""

    name: str
    version: str


def named(name: str, *, version: str) -> Named:
    """A model whose weights nobody here can read, behind an API, say. The name and the version are *your promise*: as long as
    both are the same, the same model answers.

    Args:
        name: as its provider calls it; the more exact, the better (``gpt-5-2026-10-01``, not ``gpt-5``).
        version: whatever you change when the model behind the name does: a date, a fingerprint that the provider tells.

    Raises:
        EvalCacheError: one of them is empty or no text.

    >>> named("gpt-5-2026-10-01", version="2026-11")
    Named(name='gpt-5-2026-10-01', version='2026-11')
    """
    for what, value in (("name", name), ("version", version)):
        if type(value) is not str or not value.strip():
            raise EvalCacheError(f"a named model needs a {what}", hint=f"evalcache.named(…, {what}='…')", found=value)
    return Named(name, version)


class Source:
    """Where the answers of one call come from.

    Args:
        watch: how the cache sees it. model: a live module, else None.
        versions: of the packages that compute, keyed.
    """

    def __init__(self, watch: Watch, versions: dict[str, Any], model: Any = None) -> None:
        self.watch = watch
        self.model = model
        self._versions = versions

    def look(self, cache: Cache) -> tuple[Manifest, Environment]:
        """Check it, and describe the environment in which it would answer now.

        Raises:
            UncacheableError: it cannot be keyed.
        """
        if self.model is None:
            return cache.open(self.watch), Environment(Fields(self._versions))
        from evalcache.environment import generation_settings
        from evalcache.integrations.seam import Seam

        manifest, environment = Seam.of(cache).look(self.model, self.watch)
        keyed = dict(environment.keyed) | self._versions | {"generation": generation_settings(self.model)}
        return manifest, Environment(Fields(keyed), environment.recorded)

    def wake(self, cache: Cache) -> Digest | None:
        """Load a model that sleeps, before it computes; what it is then."""
        if self.model is not None:
            from evalcache.integrations.lazy import awake, is_asleep

            if is_asleep(self.model):
                awake(self.model)
                cache.open(self.watch)
                self.watch.check_seconds = 0.0  # the first reading of what has been loaded is no check
        return self.watch.manifest.root if self.watch.manifest else None


def find_source(cache: Cache, model: Any, role: str = "", engine: str = "") -> Source:
    """What ``model`` means to `engine.run`.

    Args:
        model: a live module, a checkpoint's folder or file, or `named`.
        role: candidate, judge, …: of a model among several of one run.
        engine: the package that computes, whose installed version is keyed.

    Raises:
        EvalCacheError: it is neither. CheckpointError: of the folder.
    """
    if engine and version_of(engine) is None:
        raise EvalCacheError(f"engine {engine!r} is not installed", hint="give the name of an installed package", found=engine)
    torch = sys.modules.get("torch")  # a module cannot be there without it
    if torch is not None and isinstance(model, torch.nn.Module):
        return Source(_live_watch(cache, model, role), _versions(engine), model)
    if isinstance(model, Named):
        parts = {"name": digest_canonical(model.name), "version": digest_canonical(model.version)}
        manifest = _manifest("named", f"{model.name} ({model.version})", parts)
        return Source(_watch(cache, model, role, lambda: manifest, manifest.about["name"]), _versions(engine))
    if isinstance(model, (str, os.PathLike)):
        path, directory = Path(model).absolute(), cache.directory
        if path.is_dir() or path.is_file():
            read = _read_folder if path.is_dir() else _read_file
            return Source(
                _watch(cache, path, role, lambda: read(directory, path), str(model)), _versions(engine, "torch", "transformers")
            )
        raise EvalCacheError(
            f"{str(model)!r} is no checkpoint here, and a name alone is never keyed on: what it stands for may change",
            hint=f"give the model or its folder; of a model that is elsewhere, evalcache.named({str(model)!r}, version='…')",
            found=str(model),
        )
    raise EvalCacheError(
        f"model= takes a module, a checkpoint's folder or evalcache.named(…), not a {type(model).__name__}",
        hint="an engine's own object does not tell what its weights are; give the folder that it loaded",
        found=type(model).__name__,
    )


_watches: weakref.WeakKeyDictionary[Cache, dict[Any, Watch]] = weakref.WeakKeyDictionary()
_live_watches: weakref.WeakKeyDictionary[Cache, weakref.WeakKeyDictionary[Any, dict[str, Watch]]] = weakref.WeakKeyDictionary()


def _watch(cache: Cache, what: Any, role: str, read: Callable[[], Manifest], name: str) -> Watch:
    watches = _watches.setdefault(cache, {})
    if (what, role) not in watches:
        watches[what, role] = cache.watch(Watch(read, name, role))
    return watches[what, role]


def _live_watch(cache: Cache, model: Any, role: str) -> Watch:
    from evalcache.integrations.seam import Seam

    watches = _live_watches.setdefault(cache, weakref.WeakKeyDictionary()).setdefault(model, {})
    if role not in watches:
        # One of its own: the watch of the seam below has no role.
        watches[role] = Seam(cache).watch(model)
        watches[role].role = role
    return watches[role]


def _versions(engine: str, *packages: str) -> dict[str, Any]:
    return {f"version of {name}": version_of(name) or "" for name in (*packages, *([engine] if engine else ()))}


def _manifest(kind: str, name: str, parts: dict[str, Digest]) -> Manifest:
    whole = digest_canonical([_FORMAT, kind, {part: digest.value for part, digest in parts.items()}])
    return Manifest({"": ModuleRecord(whole, kind, parts=parts)}, about={"class": kind, "name": name})


def _read_folder(directory: Path, folder: Path) -> Manifest:
    identity = identify_checkpoint(folder, memo=FileMemo(directory))
    parts = {"tensors": identity.tensors, **identity.files}
    try:
        for file in sorted([*folder.iterdir(), *folder.glob("*/*.jinja")]):
            name = file.relative_to(folder).as_posix()
            counts = file.suffix in _TEXT_FILES and not name.endswith(_INDEX) and name not in parts
            if counts and file.is_file():
                parts[name] = digest_bytes(file.read_bytes())
    except OSError as error:
        raise UncacheableError("unhashable", f"{folder} cannot be read: {error}") from error
    return _manifest("checkpoint", str(folder), parts)


def _read_file(directory: Path, file: Path) -> Manifest:
    """One file that is a whole model (GGUF, say): its bytes."""
    memo = FileMemo(directory)
    try:
        began, stamp = memo.now_ns(), FileStamp.of(file)
        known = memo.recall("bytes", stamp)
        if known is None:
            known = _hash_file(file).value
            if FileStamp.of(file) == stamp:
                memo.remember("bytes", stamp, known, began)
    except OSError as error:
        raise UncacheableError("unhashable", f"{file} cannot be read: {error}") from error
    return _manifest("file", str(file), {"bytes": Digest(known)})


def _hash_file(file: Path) -> Digest:
    hasher = Hasher()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            hasher.update(piece)
    return hasher.digest()
