"""A checkpoint's files → Manifest, without building the model: its bytes are hashed where they lie in the page cache.

What the manifest says is in the files alone: names, dtypes, shapes, bytes. How they are spread over files, in which format and
under which path makes no difference. What a model makes of them (casts, fused layers) shows only in the live module.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evalcache.canonical import digest_canonical, encode_trusted
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CheckpointError
from evalcache.filememo import FileMemo, FileStamp
from evalcache.leaf import leaf_digest
from evalcache.manifest import Manifest, ModuleRecord, TensorRecord
from evalcache.structs import Frozen
from evalcache.tensorfile import FileContent, StoredTensor, parse_json, read_safetensors
from evalcache.torchfile import read_torch_file

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while files are hashed."""

_Read = Callable[[str, memoryview], FileContent]

_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# By name, as in transformers: a file can be made that is good in both formats, with different tensors in each. The kinds are what
# the memo knows a file's content as.
_SAFETENSORS = ("safetensors 1", read_safetensors)
_TORCH = ("torch 1", read_torch_file)
_PARALLEL_FROM_BYTES = 32 << 20
_THREADS = 2  # one reads at about memory speed, two saturate it
# Names that transformers ties to another one, and leaves out of the files that it saves, where `tie_word_embeddings` is true.
_TIED_NAMES = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


class _Kept(Frozen):
    """One tensor of a file, hashed; ``offset`` tells which ones share their bytes."""

    name: str
    offset: int
    record: TensorRecord


def fingerprint_checkpoint(
    path: str | os.PathLike[str],
    *,
    memo: FileMemo | None = None,
    rehash: bool = False,
    progress: Progress | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> Manifest:
    """The manifest of the tensors in a checkpoint's files.

    Copies that were moved, renamed, sharded otherwise or converted between ``.bin`` and safetensors have the same manifest.

    Args:
        path: a folder as transformers saves it (of a model or an adapter), an index, or one file of tensors.
        memo: knows files that have not been touched; None means the one in the cache folder.
        rehash: read every byte whatever the memo knows.
        progress: told about bytes as they are hashed.
        variant, use_safetensors: as in `from_pretrained`: which of a folder's files are meant.

    Raises:
        CheckpointError: there is no checkpoint, or its files contradict each other or their format.

    Cost: one pass over the files' bytes (memory speed in page cache, else the disk's); a stat for each file that the memo knows.
    """
    root = Path(path)
    weights = find_weights(root, variant=variant, use_safetensors=use_safetensors)
    return fingerprint_files(weights, memo=memo, rehash=rehash, progress=progress, tied=_ties_embeddings(weights.parent))


def fingerprint_files(
    weights: Path,
    *,
    memo: FileMemo | None = None,
    rehash: bool = False,
    progress: Progress | None = None,
    tied: bool = False,
) -> Manifest:
    """The manifest of one file of tensors or of the files that an index names; arguments as in `fingerprint_checkpoint`.

    Args:
        tied: the model ties its head to its embedding, so that a head which shares the embedding's bytes in a ``.bin`` file says
            nothing: safetensors files leave it out.
    """
    reader = _Reader(FileMemo() if memo is None else memo, rehash, progress)
    placed = _shards(weights) if weights.suffix == ".json" else {weights: None}
    reader.total_bytes = sum(_stat(file).st_size for file in placed)
    found: dict[str, TensorRecord] = {}
    metadata: dict[str, str] = {}
    for file, names in placed.items():
        kept, said = reader.read(file)
        if names is not None and {tensor.name for tensor in kept} != names:
            differing = sorted({tensor.name for tensor in kept} ^ names)
            raise CheckpointError(
                f"{weights} and {file.name} disagree about {len(differing)} tensors ({', '.join(differing[:3])} …)",
                hint="download or save the checkpoint again", path=str(file), expected=sorted(names), found=differing,
            )  # fmt: skip
        if differing := sorted(name for name in said if metadata.get(name, said[name]) != said[name]):
            raise CheckpointError(
                f"the files of {weights} disagree in their metadata: {', '.join(differing[:3])}", hint="save it again",
                path=str(file), expected={name: metadata[name] for name in differing}, found=said,
            )  # fmt: skip
        metadata |= said
        found |= {tensor.name: tensor.record for tensor in (_without_aliases(kept) if tied else kept)}
    return _manifest(str(weights), found, metadata)


def find_weights(root: Path, *, variant: str | None = None, use_safetensors: bool | None = None) -> Path:
    """The file, or the index of the files, that `from_pretrained` would load from a folder; in its order of preference.

    Raises:
        CheckpointError: there is none.
    """
    if root.is_file():
        return root
    if not root.is_dir():
        raise CheckpointError(
            f"there is no checkpoint at {root}", hint="give a folder with config.json and weights, or a .safetensors file",
            path=str(root), expected="a folder or file", found="nothing",
        )  # fmt: skip
    named = _config(root).get("transformers_weights")
    if named is not None:
        if type(named) is not str or not _stays_inside(named):
            raise CheckpointError(
                f"{root}/config.json names weights outside the folder: {named!r}", hint="correct transformers_weights",
                path=str(root), expected="a file in the folder", found=named,
            )  # fmt: skip
        candidates = [named]
    else:
        wanted = (".safetensors", ".bin") if use_safetensors is None else (".safetensors" if use_safetensors else ".bin",)
        names = [name for name in _MODEL_FILES if name.endswith(wanted)]
        candidates = [_varied(candidate, variant) for name in names for candidate in (name, f"{name}.index.json")]
        candidates += [name for name in ADAPTER_FILES if name.endswith(wanted)]
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    raise CheckpointError(
        f"{root} holds no weights", hint="give the folder that model.save_pretrained wrote",
        path=str(root), expected=candidates, found=sorted(entry.name for entry in root.iterdir())[:20],
    )  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
        CheckpointError: it cannot be read or is something else.
    """
    try:
        return parse_json(str(file), file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}",
            hint="check the path and its rights",
            path=str(file),
            expected="JSON",
            found=str(error),
        ) from error


class _Reader:
    """Hashes files, or asks the memo about them."""

    def __init__(self, memo: FileMemo, rehash: bool, progress: Progress | None) -> None:
        self._memo = memo
        self._rehash = rehash
        self._progress = progress
        self._done_bytes = 0
        self.total_bytes = 0

    def read(self, file: Path) -> tuple[list[_Kept], dict[str, str]]:
        """The tensors of a file, and its metadata."""
        stamp = FileStamp.of(file, _stat(file))
        kind, read = _SAFETENSORS if file.suffix == ".safetensors" else _TORCH
        known = None if self._rehash else self._memo.recall(kind, stamp)
        if known is not None:
            self._advance(stamp.size_bytes)
            rows, metadata = known
            return [
                _Kept(name, offset, TensorRecord(Digest(digest), dtype, tuple(shape), size_bytes))
                for name, offset, digest, dtype, shape, size_bytes in rows
            ], metadata
        read_at_ns = self._memo.now_ns()
        try:
            with open(file, "rb") as handle:
                stamp = FileStamp.of(file, os.fstat(handle.fileno()))
                kept, metadata = self._hash(file, read, handle.fileno(), stamp.size_bytes)
                # By path as well, should another file have taken the place of the one that was read.
                if {FileStamp.of(file, os.fstat(handle.fileno())), FileStamp.of(file)} != {stamp}:
                    raise CheckpointError(
                        f"{file} was changed while it was read", hint="try again when nothing writes to it",
                        path=str(file), expected=stamp, found="another size or time",
                    )  # fmt: skip
        except OSError as error:
            raise _unreadable(file, error) from error
        rows = [
            [k.name, k.offset, k.record.digest.value, k.record.dtype, list(k.record.shape), k.record.size_bytes] for k in kept
        ]
        self._memo.remember(kind, stamp, [rows, metadata], read_at_ns)
        return kept, metadata

    def _hash(self, file: Path, read: _Read, descriptor: int, size_bytes: int) -> tuple[list[_Kept], dict[str, str]]:
        if size_bytes == 0:
            raise CheckpointError(f"{file} is empty", hint="copy it again", path=str(file), expected="tensors", found="0 bytes")
        # Unmapped when the last view of it is gone. A file that is cut short meanwhile ends the process, as it would in any
        # reader of safetensors; reading through a buffer instead would cost half the speed.
        data = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        content = read(str(file), data)
        tensors = content.tensors
        kept = []
        for tensor, digest in zip(tensors, _digests(tensors, data), strict=True):
            kept.append(_Kept(tensor.name, tensor.offset, TensorRecord(digest, tensor.dtype, tensor.shape, tensor.size_bytes)))
            self._advance(tensor.size_bytes)
        # Headers and padding; in a .bin file shared bytes were counted with each tensor.
        self._advance(max(0, size_bytes - sum(tensor.size_bytes for tensor in tensors)))
        return kept, dict(content.metadata)

    def _advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self._progress is not None:
            self._progress(min(self._done_bytes, self.total_bytes), self.total_bytes)


def _digests(tensors: Sequence[StoredTensor], data: memoryview) -> Iterable[Digest]:
    """The digest of each tensor, in order. Large ones by two threads: xxhash releases the GIL, page faults and all."""

    def digest(tensor: StoredTensor) -> Digest:
        if tensor.stride is None:
            with data[tensor.offset : tensor.offset + tensor.size_bytes] as view:
                return leaf_digest(tensor.dtype, tensor.shape, view)
        # The only copy: a transposed or expanded tensor in a .bin file.
        items = np.frombuffer(data, f"V{tensor.item_bytes}", offset=tensor.offset, count=_extent(tensor))
        strides = [step * tensor.item_bytes for step in tensor.stride]
        rows = np.ascontiguousarray(np.lib.stride_tricks.as_strided(items, tensor.shape, strides, writeable=False))
        return leaf_digest(tensor.dtype, tensor.shape, rows.tobytes())

    if sum(tensor.size_bytes for tensor in tensors) < _PARALLEL_FROM_BYTES:
        yield from map(digest, tensors)
        return
    # Here: it cannot be imported while Python shuts down, when the end of a run asks after names.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(digest, tensors)


def _extent(tensor: StoredTensor) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride or (), strict=True))


def _without_aliases(kept: Sequence[_Kept]) -> list[_Kept]:
    """The tensors without tied names that share the bytes of a name which stays."""
    owners = {(tensor.offset, tensor.record) for tensor in kept if not _is_tied_name(tensor.name)}
    return [t for t in kept if not (_is_tied_name(t.name) and t.record.size_bytes and (t.offset, t.record) in owners)]


def _is_tied_name(name: str) -> bool:
    return any(name == tied or name.endswith(f".{tied}") for tied in _TIED_NAMES)


def _ties_embeddings(folder: Path) -> bool:
    # Only where the config says so itself: what a class's default is depends on the version that loads it.
    return _config(folder).get("tie_word_embeddings") is True


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _shards(index: Path) -> dict[Path, set[str] | None]:
    """File → names of the tensors that an index says are in it."""
    placed = read_json(index).get("weight_map")
    if type(placed) is not dict or not placed or not all(type(name) is str and _stays_inside(name) for name in placed.values()):
        raise CheckpointError(
            f"{index} does not map tensors to files beside it", hint="download or save the checkpoint again",
            path=str(index), expected="a weight_map", found=str(placed)[:200],
        )  # fmt: skip
    shards: dict[Path, set[str] | None] = {}
    for name, file in placed.items():
        names = shards.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    for file in shards:
        if not file.is_file():
            raise CheckpointError(
                f"{index} names {file.name}, which is not there", hint="download or copy the missing file",
                path=str(file), expected="a file", found="nothing",
            )  # fmt: skip
    return shards


def _manifest(path: str, tensors: dict[str, TensorRecord], metadata: dict[str, str]) -> Manifest:
    """The tree that the dotted names describe, in natural order, so that the files' own order does not matter."""
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors", hint="save the model again", path=path, expected="tensors", found=0)
    owned: dict[str, dict[str, TensorRecord]] = {"": {}}
    children: dict[str, list[str]] = {}
    for name in sorted(tensors, key=_natural):
        parts = name.split(".")
        if not all(parts):
            raise CheckpointError(
                f"{path}: tensor name {name!r} has an empty part", hint="save the model again",
                path=path, expected="a dotted name", found=name,
            )  # fmt: skip
        for depth in range(1, len(parts)):
            module = ".".join(parts[:depth])
            if module not in owned:
                owned[module] = {}
                children.setdefault(".".join(parts[: depth - 1]), []).append(module)
        owned[".".join(parts[:-1])][parts[-1]] = tensors[name]
    digests: dict[str, Digest] = {}
    for module in reversed(owned):  # a parent is entered before its children, so here each child comes first
        leaves = [[name, record.digest.value] for name, record in owned[module].items()]
        below = [[child.rpartition(".")[2], digests[child].value] for child in children.get(module, ())]
        digests[module] = digest_bytes(encode_trusted(["files", leaves, below]))
    modules = {module: ModuleRecord(digests[module], "", leaves) for module, leaves in owned.items()}
    about = {"parameters": sum(math.prod(record.shape) for record in tensors.values())}
    # Metadata says how some quantised weights are to be put together (torchao's kind, blocks and scales).
    configs = {"": digest_canonical(["metadata", metadata])} if metadata else {}
    return Manifest(modules, configs, about | {"bytes": sum(record.size_bytes for record in tensors.values())})


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 10 behind layer 9."""
    parts = name.split(".")
    return [(0, int(part), part) if part.isascii() and part.isdigit() and len(part) < 20 else (1, 0, part) for part in parts]


def _varied(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def _stays_inside(name: str) -> bool:
    return bool(name) and not os.path.isabs(name) and ".." not in Path(name).parts


def _stat(file: Path) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read: {error.strerror or error}", hint="check the path and its rights",
        path=str(file), expected="a readable file", found=str(error),
    )  # fmt: skip
