"""What code looks up under a name that does not stand in it: `getattr` of a computed name, a variable of the environment.

Read off the instructions: nothing is run. Where that does not tell, the name counts as computed.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping, Sequence

_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_CALLS = frozenset({"CALL", "CALL_FUNCTION", "CALL_METHOD"})
_NO_MATTER = frozenset("CACHE PRECALL PUSH_NULL RESUME EXTENDED_ARG NOP KW_NAMES NOT_TAKEN".split())
_VALUES = frozenset({"LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_SMALL_INT"})
_GETTERS = frozenset({"get", "pop", "setdefault", "__getitem__"})
_BUILTINS = frozenset({"eval", "exec", "__import__"})  # as methods these are something else: `module.eval()`
_ALWAYS = frozenset({"vars", "__dict__", "attrgetter", "methodcaller", "__getattribute__"})
_Call = tuple[int, Sequence[dis.Instruction]]


@functools.lru_cache(maxsize=4096)
def computes_attributes(code: types.CodeType) -> bool:
    """Whether it asks something for an attribute whose name does not stand in it."""
    found = list(_instructions(code))
    asks = (_is_load(one, "getattr") and not _is_constant(_arguments(found, place), 1) for place, one in enumerate(found))
    return not _ALWAYS.isdisjoint(code.co_names) or any(asks) or any(map(computes_attributes, _inside(code)))


@functools.lru_cache(maxsize=4096)
def computes_globals(code: types.CodeType) -> bool:
    """Whether it asks for a global whose name does not stand in it, or evaluates a text that does not."""
    found = list(_instructions(code))
    for place, one in enumerate(found):
        if _evaluates(found, place) and not _is_constant(_arguments(found, place), 0):
            return True
        if _is_load(one, "globals"):
            after = [other for other in found[place + 1 : place + 6] if other.opname not in _CALLS]
            if after and after[0].opname in _ATTRIBUTES and after[0].argval in _GETTERS:
                after = after[1:]
            if not after or after[0].opname != "LOAD_CONST" or not isinstance(after[0].argval, str):
                return True
    return any(map(computes_globals, _inside(code)))


def _evaluates(found: Sequence[dis.Instruction], place: int) -> bool:
    """Whether the function that is loaded here takes a text that says what to do."""
    one = found[place]
    if _is_load(one, "import_module"):
        return True
    if not any(_is_load(one, name) for name in _BUILTINS):
        return False
    return one.opname not in _ATTRIBUTES or (place > 0 and _is_load(found[place - 1], "builtins"))


def environment_names(code: types.CodeType, known: Mapping[str, object]) -> set[str] | None:
    """The variables of the environment that it reads; None where their names stand neither in it nor in a global text.

    Args:
        known: its globals.
    """
    names: set[str] = set()
    found = list(_instructions(code))
    for place, one in enumerate(found):
        if not (_is_load(one, "environ") or _is_load(one, "getenv")):
            continue
        key = _environment_key(found, place)
        if key is None:
            return None
        name = known.get(key.argval) if key.opname in ("LOAD_GLOBAL", "LOAD_NAME") else key.argval
        if not isinstance(name, str):
            return None
        names.add(name)
    for one in _inside(code):
        more = environment_names(one, known)
        if more is None:
            return None
        names |= more
    return names


def _environment_key(found: Sequence[dis.Instruction], place: int) -> dis.Instruction | None:
    """The instruction that gives the name of a variable, where it is a single one."""
    one, after = found[place], found[place + 1 : place + 3]
    if after and after[0].opname == "CONTAINS_OP":  # "NAME" in os.environ
        key = found[place - 2] if one.opname in _ATTRIBUTES else found[place - 1]
    elif one.argval == "getenv" or (after and after[0].opname in _ATTRIBUTES and after[0].argval in _GETTERS):
        count, inside = _arguments(found, place if one.argval == "getenv" else place + 1) or (0, [])
        key = inside[0] if count and len(inside) == count else None
    else:
        key = after[0] if len(after) == 2 and (after[1].opname == "BINARY_SUBSCR" or after[1].argrepr == "[]") else None
    return key if key is not None and key.opname in ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME") else None


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    return (one for one in dis.get_instructions(code) if one.opname not in _NO_MATTER)


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    return (one for one in code.co_consts if isinstance(one, types.CodeType))


def _is_load(one: dis.Instruction, name: str) -> bool:
    return one.opname in _LOADS and one.argval == name


def _is_constant(call: _Call | None, place: int) -> bool:
    """Whether one of a call's arguments is a text that stands in the code: the first one, or the name that `getattr` asks for."""
    if call is None:
        return False
    count, inside = call
    if place == 0:
        one = inside[0] if count and (count == 1 or len(inside) == count) else None
    elif count == 3:  # of a default that is an expression nothing tells where it begins
        one = inside[-2] if inside[-1].opname in _VALUES else None
    else:
        one = inside[-1] if count == 2 else None
    return one is not None and one.opname == "LOAD_CONST" and isinstance(one.argval, str)


def _arguments(found: Sequence[dis.Instruction], place: int) -> _Call | None:
    """How many arguments a function is called with, and the instructions that make them; None where it is not called there."""
    depth = 0
    for end in range(place + 1, len(found)):
        one = found[end]
        if one.opname in _CALLS and depth == one.arg:
            return one.arg, found[place + 1 : end]
        if one.is_jump_target or "JUMP" in one.opname:
            return None
        # By Python 3.11's own count an instruction of its own, which is not among these, takes a call's arguments off the stack.
        depth += -one.arg - 1 if one.opname in _CALLS else dis.stack_effect(one.opcode, one.arg)
    return None
