"""What a checkpoint is before it is loaded, and what was seen when it was loaded last.

A model is more than its tensors: its configs, its adapter and the code that comes with it decide what `from_pretrained` makes of
them. All of these together are the checkpoint's identity; with the load arguments and the libraries' versions it is the key under
which an index keeps what the live model turned out to be. So a run that hits everywhere need not load the weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evalcache.canonical import decode, digest_canonical, encode_canonical
from evalcache.checkpoint import ADAPTER_FILES, Progress, find_weights, fingerprint_checkpoint, read_json
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CanonicalError, CheckpointError, CorruptEntryWarning
from evalcache.faults import tell
from evalcache.filememo import FileMemo
from evalcache.folder import default_folder, local_folder
from evalcache.manifest import Manifest
from evalcache.sidetable import SideTable
from evalcache.structs import Frozen

_FORMAT = "evalcache checkpoint 1"
_ADAPTER_FORMAT = "evalcache adapter 1"
_INDEX_FORMAT = "evalcache loaded 1"
ADAPTER_CONFIG = "adapter_config.json"
_CUSTOM_GENERATE = "custom_generate/generate.py"

# Fields that are never keyed: where a config came from, and the commit it was downloaded at.
_ORIGIN_FIELDS = ("_name_or_path", "_commit_hash")
# Of these only the presence is keyed: a config may ask whether transformers wrote it, but not which one.
_PRESENCE_FIELDS = ("transformers_version",)
# As transformers finds the files that a remote module needs. Source: transformers/dynamic_module_utils.py, get_relative_imports.
_RELATIVE_IMPORTS = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)


class CheckpointIdentity(Frozen):
    """What `from_pretrained` has to go on.

    Args:
        tensors: root of the manifest of the model's own tensors (for an adapter alone: of the base model's).
        files: digest of each other file that counts: configs and code by name, ``adapter`` for the adapter's tensors, ``base``
            for the whole base model of an adapter alone.
    """

    tensors: Digest
    files: Mapping[str, Digest]

    @property
    def digest(self) -> Digest:
        """Equal for copies that were moved, renamed, sharded otherwise or converted to another format."""
        return digest_canonical([_FORMAT, self.tensors.value, {name: digest.value for name, digest in self.files.items()}])


def identify_checkpoint(
    path: str | os.PathLike[str],
    *,
    memo: FileMemo | None = None,
    rehash: bool = False,
    progress: Progress | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> CheckpointIdentity:
    """The identity of a checkpoint folder.

    Chat templates and tokenizers are not part of it: they matter through the token ids that they make.

    Args:
        path: a folder as `save_pretrained` writes it: of a model, a model with an adapter, or an adapter whose config names a
            local folder as its base.
        memo, rehash, progress, variant, use_safetensors: as in `fingerprint_checkpoint`.

    Raises:
        CheckpointError: no such folder, or something in it counts that cannot be read here: broken files, code or a base model
            that lies in another repository.

    Cost: as `fingerprint_checkpoint`; configs and code are read each time.
    """
    memo = FileMemo() if memo is None else memo
    reading: dict[str, Any] = {"memo": memo, "rehash": rehash, "progress": progress}
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(
            f"{root} is not a checkpoint folder", hint="give the folder that model.save_pretrained wrote",
            path=str(root), expected="a folder", found="a file" if root.exists() else "nothing",
        )  # fmt: skip
    files: dict[str, Digest] = {}
    if (root / ADAPTER_CONFIG).is_file():
        files[ADAPTER_CONFIG] = _adapter_config_digest(root)
        files["adapter"] = fingerprint_checkpoint(adapter_weights(root), **reading).root
        if not (root / "config.json").is_file():
            base = identify_checkpoint(base_of_adapter(root), variant=variant, use_safetensors=use_safetensors, **reading)
            return CheckpointIdentity(base.tensors, files | {"base": base.digest})
    files |= _config_files(root)
    weights = find_weights(root, variant=variant, use_safetensors=use_safetensors)
    if weights.name in ADAPTER_FILES:
        raise CheckpointError(
            f"{root} holds an adapter and no model", hint="give a folder with config.json and the model's weights",
            path=str(root), expected="weights of a model", found=weights.name,
        )  # fmt: skip
    manifest = fingerprint_checkpoint(root, variant=variant, use_safetensors=use_safetensors, **reading)
    files |= _inferred_dtype(root, weights, manifest)
    return CheckpointIdentity(manifest.root, files)


def identify_adapter(path: str | os.PathLike[str], *, memo: FileMemo | None = None, rehash: bool = False) -> Digest:
    """What PEFT makes an adapter of: its tensors and its config, whichever base that names.

    Args:
        path: a folder with an ``adapter_config.json``. memo, rehash: as in `fingerprint_checkpoint`.

    Raises:
        CheckpointError: something is missing or broken.
    """
    root = Path(path)
    tensors = fingerprint_checkpoint(adapter_weights(root), memo=FileMemo() if memo is None else memo, rehash=rehash)
    return digest_canonical([_ADAPTER_FORMAT, _adapter_config_digest(root).value, tensors.root.value])


def _config_files(root: Path) -> dict[str, Digest]:
    """Configs and code of a model's folder."""
    files: dict[str, Digest] = {}
    config: dict[str, Any] = {}
    if (root / "config.json").is_file():
        config = read_json(root / "config.json")
        files["config.json"] = _config_digest(root / "config.json", config)
    # A config may name others, one of which is read in its place, by the version of transformers.
    others = config.get("configuration_files")
    for name in ["generation_config.json", *(others if type(others) is list else [])]:
        if type(name) is str and (root / name).is_file():
            files[name] = _config_digest(root / name, read_json(root / name))
    starts = [_module_file(root, reference) for reference in _references(config.get("auto_map"))]
    for name in dict.fromkeys([*starts, _CUSTOM_GENERATE]):
        files |= _code_files(root, name)
    return files


def _inferred_dtype(root: Path, weights: Path, manifest: Manifest) -> dict[str, Digest]:
    """What ``dtype="auto"`` goes by where the config names no dtype: an index's word, else the first tensor of the first file."""
    config = read_json(root / "config.json") if (root / "config.json").is_file() else {}
    if config.get("dtype") is not None or config.get("torch_dtype") is not None:
        return {}
    metadata = read_json(weights).get("metadata") if weights.suffix == ".json" else None
    if type(metadata) is dict and metadata.get("dtype") is not None:
        return {"index dtype": digest_canonical(str(metadata["dtype"]))}
    every = {tensor.dtype for tensor in manifest.tensors.values()}
    usual = {dtype for dtype in every if "float" in dtype and not dtype.startswith(("float8_", "float4_"))}
    if len(usual or every) > 1:
        raise CheckpointError(
            f"{root}/config.json names no dtype, and which one is meant depends on the order of its tensors",
            hint="add a dtype to the config", path=str(root), expected="a dtype", found=sorted(usual or every),
        )  # fmt: skip
    return {}


def _config_digest(file: Path, config: Mapping[str, Any]) -> Digest:
    kept = {name: value for name, value in config.items() if name not in _ORIGIN_FIELDS}
    kept |= dict.fromkeys((name for name in _PRESENCE_FIELDS if name in kept), True)
    try:
        return digest_canonical(kept)
    except CanonicalError as error:
        raise CheckpointError(
            f"{file}: {error.message}",
            hint="correct the file",
            path=str(file),
            expected="JSON values of 64 bits",
            found=error.fields.get("path"),
        ) from error


def _adapter_config_digest(root: Path) -> Digest:
    config = read_json(root / ADAPTER_CONFIG)
    # The base is keyed by what it is, and is not read at all where the folder holds a model itself.
    config.pop("base_model_name_or_path", None)
    return _config_digest(root / ADAPTER_CONFIG, config)


def adapter_weights(root: Path) -> Path:
    """The file of an adapter's tensors that PEFT reads.

    Raises:
        CheckpointError: there is none.
    """
    for name in ADAPTER_FILES:
        if (root / name).is_file():
            return root / name
    raise CheckpointError(
        f"{root} has an {ADAPTER_CONFIG} and no adapter", hint="copy the adapter's weights too",
        path=str(root), expected=list(ADAPTER_FILES), found="nothing",
    )  # fmt: skip


def base_of_adapter(root: Path) -> Path:
    """The folder of the model that an adapter's config names.

    Raises:
        CheckpointError: it names none that is here.
    """
    named = read_json(root / ADAPTER_CONFIG).get("base_model_name_or_path")
    # As transformers takes it: relative to the working directory. A base that is an adapter again would not load, nor end here.
    if type(named) is str and named and (Path(named) / "config.json").is_file():
        return Path(named)
    raise CheckpointError(
        f"the base of adapter {root} is not a local model: {named!r}", hint="load the base from its folder, then the adapter",
        path=str(root), expected="a folder with config.json", found=named,
    )  # fmt: skip


def _references(auto_map: Any) -> Iterator[str]:
    """``module.Class`` references in an ``auto_map``, however nested."""
    if type(auto_map) is str:
        yield auto_map
    elif type(auto_map) is list:
        for item in auto_map:
            yield from _references(item)
    elif type(auto_map) is dict:
        for item in auto_map.values():
            yield from _references(item)


def _module_file(root: Path, reference: str) -> str:
    if "--" in reference:
        raise CheckpointError(
            f"{root} runs code of another repository: {reference}", hint="copy that code into the folder",
            path=str(root), expected="module.Class", found=reference,
        )  # fmt: skip
    return f"{reference.rpartition('.')[0].replace('.', '/')}.py"


def _code_files(root: Path, name: str) -> dict[str, Digest]:
    """Digests of a source file and of those beside it that it imports, by path; of what is not there nothing can run."""
    files: dict[str, Digest] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in files or not (root / name).is_file():
            continue
        source = (root / name).read_bytes()
        files[name] = digest_bytes(source)
        for one, other in _RELATIVE_IMPORTS.findall(source.decode("utf-8", errors="replace")):
            module = (one or other).lstrip(".")
            beside = (Path(name).parent / module.replace(".", "/")).as_posix()
            waiting += [f"{beside}.py", f"{beside}/__init__.py"]
    return files


class CheckpointIndex:
    """Identity, load arguments and versions → what the model was when it was loaded so.

    Args:
        path: of the SQLite file; None means the one in the cache folder. Many processes may use it.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._table = SideTable(local_folder(default_folder()) / "checkpoints.sqlite" if path is None else path)

    @staticmethod
    def key(identity: CheckpointIdentity, arguments: Mapping[str, Any], versions: Mapping[str, str]) -> Digest:
        """The key of one way to load one checkpoint.

        Args:
            arguments: all of `from_pretrained` but the path, as canonical values.
            versions: of every library that has a part in loading.

        Raises:
            CanonicalError: an argument has no canonical encoding; such a load is not remembered.
        """
        return digest_canonical([_INDEX_FORMAT, identity.digest.value, dict(arguments), dict(versions)])

    def remember(self, key: Digest, record: Mapping[str, Any]) -> None:
        """Keep a canonical record in the place of what was there. Faults of the disk cost a warning.

        Raises:
            CanonicalError: the record holds something that has no canonical encoding.
        """
        self._table.put(key.value, encode_canonical(dict(record)))

    def recall(self, key: Digest) -> dict[str, Any] | None:
        """The record under ``key``, or None; a damaged one counts as absent, with a `CorruptEntryWarning`."""
        found = self._table.get(key.value)
        if found is None:
            return None
        try:
            record = decode(found)
        except CanonicalError as error:
            record = error
        if type(record) is not dict:
            tell(f"{self._table.path}: a record is no map and is made again", CorruptEntryWarning, stacklevel=2)
            return None
        return record
