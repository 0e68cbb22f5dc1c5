"""Manifest: what a model is made of, module by module, as a Merkle tree with one root.

A module's digest covers its class, code, attributes, tensors and children, so two equal digests mean that two modules compute
the same function of their inputs, wherever in a model they stand. The root adds what belongs to no single module (configs).
Built by `weights.py`; this file only holds, compares, and writes down.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from evalcache.canonical import decode, digest_canonical, encode_canonical
from evalcache.digest import Digest
from evalcache.errors import CanonicalError
from evalcache.structs import Frozen, field

_FORMAT = "evalcache manifest 1"


class TensorRecord(Frozen):
    """One tensor that a module owns: digest over dtype, shape and bytes; ``dtype`` by torch's name."""

    digest: Digest
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class ModuleRecord(Frozen):
    """One module.

    Args:
        digest: over everything below, children included.
        class_name: ``module.QualifiedName`` of its class.
        tensors: the parameters and buffers that it owns itself, by name.
        parts: digests of what else it is made of (``code``, ``attributes``, ``extra``), by kind.
    """

    digest: Digest
    class_name: str
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    parts: Mapping[str, Digest] = field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)  # with a field that is none of its arguments
class Manifest:
    """Module path → `ModuleRecord`, in the order of the model's own traversal, with the root over them and the configs.

    Args:
        modules: the root module's path is the empty string.
        configs: digest of each distinct configuration, by the path of the first module that holds it.
        about: what a person wants to know (``class``, ``config``, ``parameters``, ``adapter``, ``quantisation``), and
            ``references``: paths of modules that others reach otherwise than as children; not hashed.
    """

    modules: Mapping[str, ModuleRecord]
    configs: Mapping[str, Digest] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    root: Digest = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        configs = {path: digest.value for path, digest in self.configs.items()}
        object.__setattr__(self, "root", digest_canonical([_FORMAT, self.modules[""].digest.value, configs]))

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """All tensors by full name; a tied tensor appears under each of its names."""
        return {
            f"{path}.{name}" if path else name: tensor
            for path, module in self.modules.items()
            for name, tensor in module.tensors.items()
        }

    @property
    def size_bytes(self) -> int:
        """Bytes of all distinct tensors."""
        return sum({tensor.digest: tensor.size_bytes for tensor in self.tensors.values()}.values())

    def subset(self, path: str) -> Manifest:
        """The manifest of one submodule, as if it had been fingerprinted alone, without configs.

        Raises:
            KeyError: there is no module at ``path``.
        """
        prefix = f"{path}." if path else ""
        modules = {"": self.modules[path]}
        modules |= {name[len(prefix) :]: module for name, module in self.modules.items() if name and name.startswith(prefix)}
        return Manifest(modules)

    def diff(self, other: Manifest) -> ManifestDiff:
        """What is different in ``other``; ``print`` it for a person."""
        mine, theirs = self.tensors, other.tensors
        names = list(dict.fromkeys([*theirs, *mine]))
        tensors = tuple(name for name in names if _digest(mine.get(name)) != _digest(theirs.get(name)))
        paths = list(dict.fromkeys([*other.modules, *self.modules]))
        parts = []
        for path in paths:
            left, right = self.modules.get(path), other.modules.get(path)
            if left is None or right is None:
                parts.append((path, "added" if left is None else "removed"))
                continue
            if left.class_name != right.class_name:
                parts.append((path, "class"))
            kinds = sorted(set(left.parts) | set(right.parts))
            parts += [(path, kind) for kind in kinds if left.parts.get(kind) != right.parts.get(kind)]
        for path in dict.fromkeys([*self.configs, *other.configs]):
            if self.configs.get(path) != other.configs.get(path):
                parts.append((path, "config"))
        return ManifestDiff(tensors, len(names), tuple(parts), tuple(theirs or mine))

    def to_bytes(self) -> bytes:
        """The canonical bytes that `from_bytes` reads, as kept in the store."""
        modules = [
            [
                path,
                module.digest.value,
                module.class_name,
                {name: [t.digest.value, t.dtype, list(t.shape), t.size_bytes] for name, t in module.tensors.items()},
                {kind: digest.value for kind, digest in module.parts.items()},
            ]
            for path, module in self.modules.items()
        ]
        configs = {path: digest.value for path, digest in self.configs.items()}
        return encode_canonical([_FORMAT, modules, configs, dict(self.about)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises:
            CanonicalError: the bytes are not a manifest of this format.
        """
        try:
            form, modules, configs, about = decode(data)
            if form != _FORMAT:
                raise CanonicalError(f"not a manifest: {form!r}", path="format", found=form)
            return cls(
                {
                    path: ModuleRecord(
                        Digest(digest),
                        class_name,
                        {
                            name: TensorRecord(Digest(d), dtype, tuple(shape), size)
                            for name, (d, dtype, shape, size) in tensors.items()
                        },
                        {kind: Digest(value) for kind, value in parts.items()},
                    )
                    for path, digest, class_name, tensors, parts in modules
                },
                {path: Digest(value) for path, value in configs.items()},
                about,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise CanonicalError(f"not a manifest: {error}", path="manifest", found=type(error).__name__) from error


class ManifestDiff(Frozen):
    """What differs between two manifests.

    Args:
        tensors: names of tensors that differ, were added or removed; total: how many names there are in all.
        parts: (module path, ``code`` | ``attributes`` | ``extra`` | ``config`` | ``class`` | ``added`` | ``removed``).
        names: all tensor names of the newer model, for grouping.
    """

    tensors: tuple[str, ...]
    total: int
    parts: tuple[tuple[str, str], ...]
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tensors or self.parts)

    def __str__(self) -> str:
        said = []
        if self.tensors:
            groups = ", ".join(group_names(self.tensors, self.names))
            said.append(f"{groups}: {len(self.tensors)} of {self.total} tensors")
        kinds: dict[str, list[str]] = {}
        for path, kind in self.parts:
            kinds.setdefault(kind, []).append(path or "(root)")
        for kind, paths in kinds.items():
            if kind in ("added", "removed"):  # with all below it
                said.append(f"{kind}: {_shorten(_topmost(paths))}")
            elif kind == "config" and "(root)" not in paths:  # its own path says what it is
                said.append(_shorten(paths))
            else:
                said.append(f"{kind} of {_shorten(paths)}")
        return "; ".join(said) or "no difference"


def group_names(changed: Iterable[str], names: Iterable[str]) -> list[str]:
    """Name sets of tensors as a person would: ``model.layers.3.*`` when all below it changed, ``norm`` for its only tensor.

    Numbered siblings that changed in the same way are joined: ``layers.3-5.*``.
    """
    changed_set = set(changed)
    every = [name for name in names if name] or sorted(changed_set)
    below: dict[str, list[str]] = {}
    for name in dict.fromkeys([*every, *sorted(changed_set)]):
        parts = name.split(".")
        for depth in range(1, len(parts)):
            below.setdefault(".".join(parts[:depth]), []).append(name)

    groups: list[str] = []

    def visit(path: str, members: list[str]) -> None:
        hit = [name for name in members if name in changed_set]
        if not hit:
            return
        if len(hit) == len(members) and path:
            groups.append(path if len(members) == 1 else f"{path}.*")
            return
        depth = path.count(".") + 1 if path else 0
        for child in dict.fromkeys(".".join(name.split(".")[: depth + 1]) for name in members):
            if child in below:
                visit(child, below[child])
            elif child in changed_set:
                groups.append(child)

    visit("", list(dict.fromkeys([*every, *sorted(changed_set)])))
    return _join_numbered(_drop_common_prefix(groups))


def _digest(tensor: TensorRecord | None) -> Digest | None:
    return tensor.digest if tensor else None


def _topmost(paths: list[str]) -> list[str]:
    known = set(paths)
    above = {path: [path[:place] for place, letter in enumerate(path) if letter == "."] for path in paths}
    return [path for path in paths if not known.intersection(above[path])]


def _shorten(paths: list[str], most: int = 3) -> str:
    paths = _drop_common_prefix(paths)
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _drop_common_prefix(groups: list[str]) -> list[str]:
    """Leave out ``model.`` and the like where it says nothing; a name that has no such prefix stays as it is."""
    return [re.sub(r"^(base_model\.model\.)?(model|transformer)\.(?=[^*])", "", group) for group in groups]


def _join_numbered(groups: list[str]) -> list[str]:
    joined: list[tuple[str, list[int], str]] = []
    for group in groups:
        found = re.match(r"^(.*?\.)?(\d+)((?:\..*)?)$", group)
        if found is None:
            joined.append((group, [], ""))
            continue
        head, number, tail = found[1] or "", int(found[2]), found[3]
        if joined and joined[-1][0] == head and joined[-1][2] == tail and joined[-1][1] and joined[-1][1][-1] == number - 1:
            joined[-1][1].append(number)
        else:
            joined.append((head, [number], tail))
    return [
        head if not numbers else f"{head}{numbers[0]}{f'-{numbers[-1]}' if len(numbers) > 1 else ''}{tail}"
        for head, numbers, tail in joined
    ]
