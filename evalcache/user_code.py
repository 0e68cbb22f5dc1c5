"""The user's own code: scripts, remote code, editable installs, hashed by what they do.

Code objects, defaults, closures, and the globals that they name are followed through all of the user's code; outside of scripts
the source bytes of each file count too. It is done afresh at every check: such code is short, and its globals change at any time.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from evalcache.canonical import digest_canonical
from evalcache.code import (
    BUILTINS,
    CLASS_NOISE,
    builtin_name,
    cell_value,
    class_name,
    code_value,
    constant_value,
    is_library_class,
    library_of,
    origin_of,
    unwrap_ours,
)
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import FingerprintError
from evalcache.library_code import LibraryCode
from evalcache.lookups import computes_attributes, computes_globals, environment_names

_DYNAMIC_NAMES = frozenset({"getattr", "globals", "locals", "vars", "eval", "exec", "import_module", "__import__"})
_EVALUATED = frozenset({"eval", "exec"})
_LOOK_UP = frozenset(dis.opmap[name] for name in ("LOAD_GLOBAL", "LOAD_NAME"))
# They shape no answer, and their insides (handlers, locks) cannot be hashed.
_INERT = ("typing", "_thread", "_abc", "abc")
_SCALARS = frozenset({bool, int, float, complex, str, bytes})
_OUR_VARIABLES = ("EVALCACHE", "PYTEST_")
_HEAP_TYPE = 1 << 9
_HAS_DOCSTRING = 1 << 26
_COMPILED = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)


class UserCode:
    """Digests of the user's own code.

    Args:
        library: hashes the library classes and functions that it stands on.
        encode_other: canonical value of an object that is neither code nor a plain value (a tensor, a module), or raises.
    """

    def __init__(self, library: LibraryCode, encode_other: Callable[[Any], Any]) -> None:
        self._library = library
        self._encode_other = encode_other
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # ids stay valid while the objects live

    def digest(self, value: Any) -> Digest:
        """Digest of a class, a function or an object, with everything of the user's that it reaches.

        Raises:
            FingerprintError: ``code``, it reaches an object that cannot be hashed exactly.
        """
        # A module held by the code leads back here, in the middle of another digest.
        before = self._seen, self._kept
        self._seen, self._kept = {}, []
        try:
            return digest_canonical(self._value(value))
        finally:
            self._seen, self._kept = before

    def _value(self, value: Any) -> Any:
        value = unwrap_ours(value)
        kind = type(value)
        if value is None or kind in (bool, float, str, bytes):
            return value
        if kind in (int, complex):
            return constant_value(value)
        if kind in (tuple, list):
            return [kind.__name__, *[self._value(item) for item in value]]
        if kind in (set, frozenset):
            return ["set", *sorted(digest_canonical(self._value(item)).value for item in value)]
        if kind is dict:
            return ["dict", *[[self._value(key), self._value(item)] for key, item in value.items()]]
        if id(value) in self._seen:
            return ["seen", self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, enum.Enum):
            return ["enum", self._class(kind), value.name, self._value(value.value)]
        if isinstance(value, type):
            return self._class(value)
        code = self._code(value)
        return code if code is not None else self._object(value)

    def _code(self, value: Any) -> Any:
        """Canonical value of whatever can be called, None of anything else."""
        if isinstance(value, types.FunctionType):
            return ["function", self._function(value)]
        if isinstance(value, (staticmethod, classmethod)):
            return [type(value).__name__, self._value(value.__func__)]
        if isinstance(value, property):
            return ["property", self._value(value.fget), self._value(value.fset), self._value(value.fdel)]
        if isinstance(value, functools.cached_property):
            return ["cached", self._value(value.func)]
        if isinstance(value, types.MethodType):
            return ["method", self._value(value.__func__), self._value(value.__self__)]
        if isinstance(value, (functools.partial, functools.partialmethod)):
            bound = [self._value(list(value.args)), self._value(dict(value.keywords))]
            return ["partial", self._value(value.func), *bound, self._insides(value)]
        if isinstance(value, BUILTINS):
            owner = getattr(value, "__self__", None)
            bound = None if owner is None or isinstance(owner, (type, types.ModuleType)) else self._value(owner)
            return [*builtin_name(value), bound]
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType) and is_library_class(type(value)):
            return ["wrapped", class_name(type(value)), self._value(value.__wrapped__)]
        return None

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, types.ModuleType):
            inside = vars(value).items() if _is_users_module(value) else ()
            return ["module", value.__name__, [[name, self._value(item)] for name, item in inside if not name.startswith("__")]]
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if isinstance(value, (threading.local, types.SimpleNamespace)):
            return ["object", self._class(kind), self._insides(value)]
        if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
            own = {
                name: one for name, one in vars(kind).items() if isinstance(one, types.FunctionType) and origin_of(one) is None
            }
            return ["named", kind.__qualname__, list(kind._fields), self._value(own), [self._value(item) for item in value]]
        if kind in (range, slice):
            return [kind.__name__, value.start, value.stop, value.step]
        if kind is collections.deque:
            return ["deque", value.maxlen, [self._value(item) for item in value]]
        if isinstance(value, PurePath) and is_library_class(kind):
            return ["path", str(value)]
        if kind.__module__ == "numpy" and kind.__name__ == "ufunc":
            return ["ufunc", value.__name__]
        if isinstance(value, (logging.Logger, types.GenericAlias, types.UnionType)) or kind.__module__ in _INERT:
            return ["inert", kind.__name__]
        if isinstance(value, dict):  # OrderedDict, defaultdict, a user's own
            items = [[self._value(key), self._value(item)] for key, item in value.items()]
            missing = value.default_factory if isinstance(value, collections.defaultdict) else None
            return [self._class(kind), items, self._insides(value), self._value(missing)]
        if _is_kernel_table(value):  # what is chosen from it is hashed where the configuration names it
            return ["kernels", class_name(kind)]
        try:
            return self._encode_other(value)
        except FingerprintError as error:
            if not _is_plain_object(kind):
                raise FingerprintError("", error.problem, "code" if error.reason == "unhashable" else error.reason) from error
        return ["object", self._class(kind), self._insides(value)]

    def _insides(self, value: Any) -> Any:
        inside = vars(value) if hasattr(value, "__dict__") else {}
        return [[name, self._value(item)] for name, item in sorted(inside.items())]

    def _function(self, function: types.FunctionType) -> Any:
        code = function.__code__
        names = _named(code)
        every = computes_attributes(code)
        cells = [self._global(cell_value(cell), names, every) for cell in function.__closure__ or ()]
        defaults = [self._value(function.__defaults__), self._value(function.__kwdefaults__)]
        origin = origin_of(function)
        if origin is not None:
            # A library's decorator around the user's function: the function is in the closure.
            own = self._library.function(function) if not cells else digest_canonical(code_value(function.__code__)).value
            return ["library", origin, function.__module__, function.__qualname__, own, cells, defaults]
        known = function.__globals__
        if computes_globals(code):
            self._unknowable(f"{function.__qualname__} asks for globals by names that do not stand in it")
        reached = [[name, self._global(known[name], names, every)] for name in _looked_up(code) if name in known]
        reached += [[name, self._value(value)] for name, value in _put_into_python(function)]
        reached += [[module.__name__, self._global(module, names, every)] for module in _imported_modules(function)]
        if {"environ", "getenv"}.intersection(names):
            read = environment_names(code, known)
            everything = (one for one in os.environ if not one.startswith(_OUR_VARIABLES))
            wanted = set(everything if read is None else [*_texts(code), *read])
            reached += [["environ", name, os.environ.get(name)] for name in sorted(wanted)]
        own = [[name, self._value(item)] for name, item in sorted(vars(function).items()) if not name.startswith("__")]
        return [code_value(code), defaults, cells, reached, own, self._source(function, names)]

    def _global(self, value: Any, names: Iterable[str], every: bool = False, above: tuple[Any, ...] = ()) -> Any:
        """A global that the code names; of a module, those of its attributes that the code may reach.

        Args:
            every: the code computes the names of attributes.
        """
        if not isinstance(value, types.ModuleType):
            return self._value(value)
        inside = vars(value)
        if not _is_users_module(value):
            put = [[name, self._value(inside[name])] for name in names if name in inside and _is_users_value(inside[name])]
            return [self._value(value), put] if put else self._value(value)
        if any(value is one for one in above):  # packages and their modules import each other
            return ["module again"]
        if every:
            return self._value(value)
        return ["module", [[name, self._global(inside[name], names, every, (*above, value))] for name in names if name in inside]]

    def _unknowable(self, problem: str) -> None:
        """What no hash of the code can tell."""
        raise FingerprintError("", problem, "code")

    def _class(self, cls: type) -> Any:
        if is_library_class(cls):
            return self._library_class(cls)
        parts = []
        for base in cls.__mro__:
            if base is object:
                continue
            if is_library_class(base):
                parts.append(self._library_class(base))
                continue
            if base is not cls and id(base) in self._seen:
                parts.append(["seen", self._seen[id(base)]])
                continue
            own = [[name, self._value(value)] for name, value in sorted(vars(base).items()) if name not in CLASS_NOISE]
            parts.append([base.__qualname__, own])
        meta = type(cls)
        return ["class", cls.__qualname__, parts, None if is_library_class(meta) else self._value(meta)]

    def _library_class(self, cls: type) -> Any:
        if cls.__module__.startswith(("torch.nn.", "transformers.", "peft.")):
            return ["class", class_name(cls), self._library.digest(cls).value]
        # Of others the version of their library tells, except for methods that somebody has put there.
        put = [[name, self._value(one)] for base in cls.__mro__ for name, one in vars(base).items() if is_users_method(one)]
        return ["class", class_name(cls), *put]

    def _source(self, function: types.FunctionType, names: list[str]) -> bytes:
        """Source bytes of the file, where instructions may not tell everything: modules, and scripts that look up by name."""
        if function.__module__ == "__main__" and not _DYNAMIC_NAMES.intersection(names):
            return b""  # any other line of a script may change: its prints are nobody's business
        return _source_digest(function.__code__.co_filename)


def names_read(cls: type) -> frozenset[str]:
    """All names that the user's part of a class reads, and the user's functions that it calls."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [value for base in cls.__mro__ if not is_library_class(base) for value in vars(base).values()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting += [value.fget, value.fset]
        elif isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
            waiting.append(value.func)
        elif isinstance(value, types.FunctionType):
            waiting += [cell_value(cell) for cell in value.__closure__ or ()]
            if origin_of(value) is None:
                found.update(_named(value.__code__))
                space = value.__globals__
                waiting += [space[name] for name in _looked_up(value.__code__) if isinstance(space.get(name), types.FunctionType)]
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _named(code: types.CodeType) -> tuple[str, ...]:
    """All names that a code object and those nested in it use, attributes too, in a fixed order; where it looks up by name, its
    texts as well."""
    names = dict.fromkeys(code.co_names)
    if _DYNAMIC_NAMES.intersection(names):
        names.update(dict.fromkeys(_texts_as_names(code)))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_named(constant)))
    return tuple(names)


@functools.lru_cache(maxsize=4096)
def _looked_up(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a code object and those nested in it look up."""
    names = dict.fromkeys(one.argval for one in dis.get_instructions(code) if one.opcode in _LOOK_UP)
    if _DYNAMIC_NAMES.intersection(names):
        names.update(dict.fromkeys(_texts_as_names(code)))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_looked_up(constant)))
    return tuple(names)


def _texts(code: types.CodeType) -> list[str]:
    """The texts in a code object and those nested in it, docstrings left out."""
    documented = code.co_flags & _HAS_DOCSTRING if sys.version_info >= (3, 13) else not code.co_name.startswith("<")
    found = [one for one in code.co_consts[1 if documented else 0 :] if isinstance(one, str)]
    # Keyword names and tuples of names are constants, too.
    found += [text for one in code.co_consts if isinstance(one, tuple) for text in one if isinstance(text, str)]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _texts(constant)
    return sorted(set(found))


def _texts_as_names(code: types.CodeType) -> list[str]:
    """What the texts of code that looks up by name may mean: a name each, or every name in a text that is evaluated."""
    evaluated = _EVALUATED.intersection(code.co_names)
    return sorted({name for text in _texts(code) for name in ([text] if not evaluated else re.findall(r"[^\W\d]\w*", text))})


@functools.lru_cache(maxsize=4096)
def _imports(code: types.CodeType) -> tuple[str, ...]:
    """The names of modules that a code object and those nested in it import while they run; relative ones without their dots."""
    names = dict.fromkeys(one.argval for one in dis.get_instructions(code) if one.opname == "IMPORT_NAME")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_imports(constant)))
    return tuple(names)


def _imported_modules(function: types.FunctionType) -> list[types.ModuleType]:
    """The user's modules that a function imports while it runs, as far as they have been imported by now."""
    names = _imports(function.__code__)
    if not names:
        return []
    package = str(function.__globals__.get("__package__") or "").split(".")
    around = [".".join(package[:depth]) for depth in range(len(package), 0, -1) if package[0]]
    wanted = [one for name in names for one in (name, name.partition(".")[0], *(f"{up}.{name}".rstrip(".") for up in around))]
    found = [sys.modules.get(name) for name in dict.fromkeys(wanted)]
    return [module for module in found if isinstance(module, types.ModuleType) and _is_users_module(module)]


def _is_users_module(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file:
        return library_of(file) is None
    # A package without a file of its own, or one that was made at run time; those compiled into Python have none either.
    return type(module) is types.ModuleType and getattr(module.__spec__, "origin", None) not in ("built-in", "frozen")


def _put_into_python(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function looks up as a name of Python's own, and somebody else has put there."""
    known, own = function.__globals__, getattr(function, "__builtins__", {})
    found = [(name, own[name]) for name in _looked_up(function.__code__) if name not in known and name in own]
    return [(name, value) for name, value in found if name[:2] != "__" and not _is_pythons(value)]


def _is_pythons(value: Any) -> bool:
    if value is Ellipsis or value is NotImplemented:
        return True
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return value.__module__ in ("builtins", "io", "_io", "_sitebuiltins")
    return type(value).__module__ == "_sitebuiltins"


def _is_users_value(value: Any) -> bool:
    """Whether somebody may have put it into a library's module, where the library's version does not tell."""
    return type(value) in _SCALARS or is_users_method(value)


def is_users_method(value: Any) -> bool:
    """Whether it is a function or method that lies in no library's file."""
    function = getattr(value, "__func__", value)
    if not isinstance(function, types.FunctionType) or function.__code__.co_filename.startswith("<"):
        return False  # what libraries make by `exec` lies nowhere
    return origin_of(function) is None


def _is_kernel_table(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(getattr(type(value), "_global_mapping", None), dict)


def _is_plain_object(kind: type) -> bool:
    """Whether an object of this class is what its ``__dict__`` says: every class of it was written in Python, without slots."""
    bases = [base for base in kind.__mro__ if base is not object]
    return bool(bases) and all(
        base.__flags__ & _HEAP_TYPE and not base.__dict__.get("__slots__") and _has_source(base) for base in bases
    )


def _has_source(cls: type) -> bool:
    # Classes of extension modules may be heap types too: their methods are compiled.
    return not any(isinstance(value, _COMPILED) for value in vars(cls).values())


@functools.cache
def _source_digest(filename: str) -> bytes:
    # Once per process: the code objects tell what is *running*; a file edited since then is another process's business.
    try:
        return digest_bytes(Path(filename).read_bytes()).value
    except OSError:  # typed at a prompt or made by exec: the code objects are all there is
        return b""
