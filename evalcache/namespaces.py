"""A namespace as it was: which object stood behind which name, and whether each still does.

The pieces from which `library_code.py` knows unchanged libraries again, and tells their constants from their state.
"""

from __future__ import annotations

import dis
import operator
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


class Space:
    """The namespace of a module or class as it was: which object stood behind which name."""

    __slots__ = ("_every", "_names", "_space", "_state")

    def __init__(self, space: Any, state: frozenset[str]) -> None:
        self._space = space
        self._state = state  # names that its own functions rebind while they run
        self._names = [*space]
        self._every = [*space.values()]

    def is_same(self) -> bool:
        """Whether nothing but state was rebound, added or deleted."""
        space = self._space
        if [*space] != self._names:
            return False
        if all_are(space.values(), self._every):
            return True
        known = zip(self._names, self._every, strict=True)
        if not self._state or any(space[name] is not value for name, value in known if name not in self._state):
            return False
        self._every = [*space.values()]
        return True


def is_same_content(value: Any, keys: list[Any] | None, inside: list[Any]) -> bool:
    """Whether a container holds the very objects that it held; ``keys`` is None unless it is a mapping."""
    if keys is not None:
        return [*value] == keys and all_are(value.values(), inside)
    return len(value) == len(inside) and all_are(value, inside)


def all_are(left: Any, right: Any) -> bool:
    """Whether two sequences of one length hold the very same objects."""
    return all(map(operator.is_, left, right))


def is_table(name: str, value: Any) -> bool:
    """Whether a module's container is a constant table of functions or classes, by convention; others are its state."""
    inside = value.values() if isinstance(value, Mapping) else value
    return name.isupper() and name[0] != "_" and any(isinstance(item, (types.FunctionType, type)) for item in inside)


def rebound_names(module: types.ModuleType) -> frozenset[str]:
    """Globals that a module's own functions rebind: its state, not its code."""
    found: set[str] = set()
    for value in vars(module).values():
        code = getattr(value, "__code__", None)
        if isinstance(code, types.CodeType) and _STORE_GLOBAL in code.co_code[::2]:
            found.update(one.argval for one in dis.get_instructions(code) if one.opcode == _STORE_GLOBAL)
    return frozenset(found)


_counted: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()


def operator_implementations() -> frozenset[str]:
    """Kernels that Python code registered for torch's own operators; those for shapes only compute nothing.

    What `torch.vmap` registers for itself when it is first used is none of them, as long as nobody else's stands in its place.
    """
    global _counted
    library = sys.modules.get("torch.library")
    names = getattr(library, "_impls", frozenset())
    if names != _counted[0]:
        _counted = frozenset(names), _for_torch(names)
    return _counted[1] - _of_vmap()


def _of_vmap() -> frozenset[str]:
    """Cost: some 0.1 ms, where vmap has been used: torch's own table of names does not tell one who registers over another."""
    module = sys.modules.get("torch._functorch.predispatch")
    names = getattr(getattr(module, "VMAP_DECOMPOSITIONS_LIB", None), "_op_impls", ())
    describe = getattr(sys.modules["torch"]._C, "_dispatch_dump", None) if names else None
    if describe is None:
        return frozenset()

    def stands(name: str) -> bool:
        space, operator_name, key = name.split("/")
        return f"\n{key}: registered at {module.__file__}:" in describe(f"{space}::{operator_name}")

    return frozenset(filter(stands, list(names)))


def _for_torch(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if name.startswith("aten/") and not name.endswith("/Meta"))


def plain_value(value: Any) -> Any:
    """A library constant as a canonical value; None where it is an object, which the library's version covers."""
    kind = type(value)
    if kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if kind in (tuple, list):
        return [plain_value(item) for item in value]
    if kind in (set, frozenset):
        return sorted(item for item in value if type(item) is str)
    if kind is dict:
        return {key: plain_value(item) for key, item in value.items() if type(key) is str}
    return None
