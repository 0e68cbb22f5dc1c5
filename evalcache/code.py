"""The identity of code: which Python computes the answer, beside which tensors.

Three kinds of code, three rules:

* **Library code** (a file of an installed, non-editable distribution or of Python itself) is keyed by the distribution's version
  and the code objects of the class's methods and of the module-level functions beside them. Code of one library that was put into
  another (a kernel package that patches a model) is hashed like any other.
* **Foreign code in library code** (a method or function of a library whose code lies in a user's file) is refused: `patched`.
* **The user's own code** (scripts, remote code, editable installs) is hashed by what it does: code objects, defaults, closures and
  the globals that it names, followed through all of the user's code; and, outside `__main__`, by the source bytes of its file.

A code object is hashed by its instructions and constants, never by file name or line, so moving code changes nothing. Bytecode
differs between Python minor versions, and so do keys.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import functools
import importlib.metadata
import logging
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from evalcache.canonical import digest_canonical
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import FingerprintError

ORIGINAL = "__evalcache_original__"
"""Attribute by which our own patches name what they replaced; they are looked through, never hashed."""

_LIBRARY_FOLDERS = tuple(
    dict.fromkeys(
        str(Path(folder).resolve()) + "/"
        for name in ("purelib", "platlib", "stdlib", "platstdlib")
        if (folder := sysconfig.get_paths().get(name))
    )
)
_SITE = "site-packages/"
_DYNAMIC_NAMES = frozenset({"getattr", "globals", "locals", "vars", "eval", "exec", "import_module", "__import__"})
_CLASS_NOISE = frozenset(
    "__abstractmethods__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ __dataclass_fields__ __dict__ __doc__ "
    "__firstlineno__ __module__ __orig_bases__ __parameters__ __qualname__ __static_attributes__ __weakref__ _abc_impl".split()
)

# Libraries whose functions others import as a matter of course; from elsewhere, they are a patch and hashed as one.
_ORIGINS = frozenset(
    "python torch numpy transformers huggingface_hub accelerate safetensors tokenizers packaging tqdm evalcache".split()
)

# Namespaces whose functions shape an answer although no class of the model is defined in them. They are only *guarded*
# (nobody may have patched them); their content is covered by the library's version.
GUARDED_MODULES = (
    "torch",
    "torch.nn.functional",
    "torch.nn.modules.module",
    "transformers.activations",
    "transformers.cache_utils",
    "transformers.generation.logits_process",
    "transformers.generation.stopping_criteria",
    "transformers.generation.utils",
    "transformers.integrations.eager_paged",
    "transformers.integrations.flash_attention",
    "transformers.integrations.flex_attention",
    "transformers.integrations.moe",
    "transformers.integrations.sdpa_attention",
    "transformers.masking_utils",
    "transformers.modeling_flash_attention_utils",
    "transformers.modeling_rope_utils",
)


@functools.cache
def library_of(filename: str) -> str | None:
    """The top-level package that a file of library code belongs to (``python`` for the standard library), else None."""
    if filename.startswith("<frozen "):
        return "python"
    path = filename if filename.startswith("/") else str(Path(filename).resolve())
    for folder in _LIBRARY_FOLDERS:
        if path.startswith(folder):
            inside = path[len(folder) :]
            if _SITE in inside:
                inside = inside.split(_SITE, 1)[1]
            elif not folder.endswith(_SITE):
                return "python"
            top = inside.split("/", 1)[0].removesuffix(".py")
            return top if version_of(top) else None
    return None


@functools.cache
def version_of(package: str) -> str | None:
    """Installed version of the distribution that provides a top-level package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(package)
        return importlib.metadata.version(names[0]) if names else None


def is_library_class(cls: type) -> bool:
    """Whether a class was defined by an installed library."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    # A class without a file is built in; one whose module is gone or is a script is the user's.
    return library_of(file) is not None if file else cls.__module__ in sys.builtin_module_names or cls.__module__ == "torch._C"


def code_value(code: types.CodeType) -> list[Any]:
    """What a code object does, as a canonical value: instructions, names and constants, without file and lines."""
    return [
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
        code.co_code,
        list(code.co_names),
        list(code.co_varnames),
        list(code.co_freevars),
        list(code.co_cellvars),
        getattr(code, "co_exceptiontable", b""),
        [_constant(value) for value in code.co_consts],
    ]


def _constant(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else ["int", str(value)]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is tuple:
        return ["tuple", *[_constant(item) for item in value]]
    if kind is frozenset:
        return ["frozenset", *sorted(digest_canonical(_constant(item)).value for item in value)]
    if kind is types.CodeType:
        return ["code", *code_value(value)]
    if value is Ellipsis:
        return ["ellipsis"]
    if kind is slice:
        return ["slice", _constant(value.start), _constant(value.stop), _constant(value.step)]
    raise FingerprintError("", f"constant of type {kind.__name__} in code", "code")


def _named(code: types.CodeType) -> list[str]:
    """All names that a code object and those nested in it look up, in a fixed order."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_named(constant)))
    return list(names)


def unwrap_ours(value: Any) -> Any:
    """What one of our own patches replaced, else the value itself."""
    return getattr(value, ORIGINAL, value) if isinstance(value, (types.FunctionType, types.MethodType)) else value


def functions_in(value: Any) -> list[types.FunctionType]:
    """The plain functions behind a class attribute: methods, properties, partials and what they wrap."""
    value = unwrap_ours(value)
    if isinstance(value, types.FunctionType):
        return [value]
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return functions_in(value.__func__)
    if isinstance(value, property):
        return [f for part in (value.fget, value.fset, value.fdel) if part for f in functions_in(part)]
    if isinstance(value, functools.cached_property):
        return functions_in(value.func)
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return functions_in(value.func)
    return []


class LibraryCode:
    """Digests of library classes, computed once and guarded by identity: a check costs about 50 ns a name.

    `digest` is over a class's methods, those of its bases, and the functions defined in the same module. The objects behind
    every name are remembered; `guard` compares them and starts afresh when anything was rebound.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._digests: dict[type, Digest] = {}
        self._modules: dict[str, Digest] = {}
        self._namespaces: list[tuple[Any, tuple[str, ...], tuple[Any, ...]]] = []
        self._functions: list[types.FunctionType] = []
        self._codes: list[tuple[Any, Any, Any]] = []
        self._guarded: set[str] = set()
        self.patches: dict[str, Digest] = {}

    def guard(self) -> bool:
        """Verify that nothing was rebound since it was hashed. Returns False after having forgotten everything.

        Raises:
            FingerprintError: ``patched``, a guarded library module holds a function from a user's file.
        """
        same = all(all(map(_same, map(namespace.get, names), values)) for namespace, names, values in self._namespaces) and all(
            function.__code__ is code and function.__defaults__ is defaults and function.__kwdefaults__ is keywords
            for function, (code, defaults, keywords) in zip(self._functions, self._codes, strict=True)
        )
        if not same:
            self._forget()
        with self._whole():
            for name in GUARDED_MODULES:
                if (module := sys.modules.get(name)) is not None:
                    self._guard_module(module)
        return same

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Half a scan is none: after a refusal everything is looked at afresh."""
        try:
            yield
        except FingerprintError:
            self._forget()
            raise

    def digest(self, cls: type) -> Digest:
        """Digest of a library class.

        Raises:
            FingerprintError: ``patched``, a method's code lies in a user's file.
        """
        found = self._digests.get(cls)
        if found is None:
            with self._whole():
                parts = [self._own(base) for base in cls.__mro__ if base is not object]
            found = self._digests[cls] = digest_canonical([f"{cls.__module__}.{cls.__qualname__}", parts])
        return found

    def _own(self, cls: type) -> list[Any]:
        name = f"{cls.__module__}.{cls.__qualname__}"
        module = sys.modules.get(cls.__module__)
        file = getattr(module, "__file__", None)
        top = library_of(file) if file else "python"
        beside = self._module(module).value if module is not None and file and top != "python" else b""
        return [name, top or "", version_of(top) or "" if top and top != "python" else "", self._namespace(cls, name), beside]

    def _module(self, module: types.ModuleType) -> Digest:
        found = self._modules.get(module.__name__)
        if found is None:
            found = self._modules[module.__name__] = digest_canonical(self._namespace(module, module.__name__))
        return found

    def _guard_module(self, module: types.ModuleType) -> None:
        if module.__name__ in self._guarded:
            return
        self._guarded.add(module.__name__)
        inside = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
        owners = [(module, module.__name__)]
        if module.__name__ == "torch":
            owners.append((sys.modules["torch"].Tensor, "torch.Tensor"))
        elif module.__name__.startswith("transformers."):
            owners += [(cls, f"{module.__name__}.{cls.__qualname__}") for cls in inside]
        for owner, where in owners:
            names, values = [], []
            for name, value in list(vars(owner).items()):
                if not callable(value) and not isinstance(value, (property, staticmethod, classmethod)):
                    continue
                names.append(name)
                values.append(value)
                for function in functions_in(value):
                    origin = self._origin(function, f"{where}.{name}")
                    if origin not in _ORIGINS and origin != where.split(".", 1)[0]:
                        self.patches[f"{where}.{name}"] = digest_canonical(
                            [origin, version_of(origin) or "", code_value(function.__code__)]
                        )
            self._namespaces.append((vars(owner), tuple(names), tuple(values)))

    def _namespace(self, owner: Any, where: str) -> list[Any]:
        """Hash the functions of a module or class, wherever they came from; refuse those of a user's file."""
        is_class = isinstance(owner, type)
        names, values, parts = [], [], []
        for name, value in list(vars(owner).items()):
            functions = functions_in(value)
            if functions or callable(value):
                names.append(name)
                values.append(value)
            for function in functions:
                self._origin(function, f"{where}.{name}")
                if is_class or function.__module__ == where:
                    parts.append([name, self._function(function, f"{where}.{name}")])
                else:  # imported: its own library's version tells the content
                    parts.append([name, f"{function.__module__}.{function.__qualname__}"])
            if not is_class and isinstance(value, type) and not is_library_class(value):
                raise FingerprintError("", f"{where}.{name} was replaced by {value.__module__}.{value.__qualname__}", "patched")
            if is_class and not functions and name not in _CLASS_NOISE and (constant := _plain(value)) is not None:
                names.append(name)
                values.append(value)
                parts.append([name, constant])
        self._namespaces.append((vars(owner), tuple(names), tuple(values)))
        return sorted(parts, key=lambda part: part[0])

    def _function(self, function: types.FunctionType, where: str) -> bytes:
        self._functions.append(function)
        self._codes.append((function.__code__, function.__defaults__, function.__kwdefaults__))
        cells = []
        for cell in function.__closure__ or ():
            inner = _cell(cell)
            for wrapped in functions_in(inner):
                if wrapped is not function:
                    self._origin(wrapped, where)
                    cells.append(digest_canonical(code_value(wrapped.__code__)).value)
            cells.append(_plain(inner))
        keywords = [[name, _plain(value)] for name, value in sorted((function.__kwdefaults__ or {}).items())]
        defaults = [_plain(value) for value in function.__defaults__ or ()]
        return digest_canonical([code_value(function.__code__), defaults, keywords, cells]).value

    def _origin(self, function: types.FunctionType, where: str) -> str:
        """The library that a function's code comes from; refuses a user's."""
        file = function.__code__.co_filename
        # `<string>` is how dataclasses, namedtuples and typing make methods; at a prompt it is the user's.
        if file.startswith("<") and function.__module__ != "__main__":
            return "python"
        origin = library_of(file)
        if origin is None and not function.__module__.startswith("evalcache."):
            raise FingerprintError("", f"{where} was replaced by {function.__module__}.{function.__qualname__}", "patched")
        return origin or "evalcache"


def _same(left: Any, right: Any) -> bool:
    return left is right


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _plain(value: Any) -> Any:
    """A library constant as a canonical value; None where it is an object, which the library's version covers."""
    kind = type(value)
    if kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if kind in (tuple, list):
        return [_plain(item) for item in value]
    if kind in (set, frozenset):
        return sorted(item for item in value if type(item) is str)
    if kind is dict:
        return {key: _plain(item) for key, item in value.items() if type(key) is str}
    return None


class UserCode:
    """Digests of the user's own code, computed afresh at every check: it is short, and its globals may change at any time.

    Args:
        library: hashes the library classes that the user's classes derive from.
        encode_other: canonical value of an object that is neither code nor a plain value (a tensor, a module), or raises.
    """

    def __init__(self, library: LibraryCode, encode_other: Callable[[Any], Any]) -> None:
        self._library = library
        self._encode_other = encode_other
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # ids stay valid while the objects live

    def digest(self, value: type | types.FunctionType) -> Digest:
        """Digest of a user's class or function with everything of the user's that it reaches.

        Raises:
            FingerprintError: ``code``, it reaches an object that cannot be hashed exactly.
        """
        self._seen, self._kept = {}, []
        return digest_canonical(self._value(value))

    def _value(self, value: Any) -> Any:
        value = unwrap_ours(value)
        kind = type(value)
        if value is None or kind in (bool, float, str, bytes):
            return value
        if kind is int:
            return _constant(value)
        if kind in (tuple, list):
            return [kind.__name__, *[self._value(item) for item in value]]
        if kind in (set, frozenset):
            return ["set", *sorted(digest_canonical(self._value(item)).value for item in value)]
        if kind is dict:
            return ["dict", *[[self._value(key), self._value(item)] for key, item in value.items()]]
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__qualname__, value.name]
        if id(value) in self._seen:
            return ["seen", self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)):
            return ["functions", *[self._function(function) for function in functions_in(value)]]
        if isinstance(value, types.MethodType):
            return ["method", self._value(value.__func__), self._value(value.__self__)]
        if isinstance(value, functools.partial):
            return ["partial", self._value(value.func), self._value(list(value.args)), self._value(dict(value.keywords))]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(
            value, (types.BuiltinFunctionType, types.BuiltinMethodType, types.MethodDescriptorType, types.WrapperDescriptorType)
        ):
            return ["builtin", getattr(value, "__module__", None) or "", value.__qualname__]
        if isinstance(value, (logging.Logger, types.GenericAlias)) or type(value).__module__ in (
            "typing",
            "re",
            "_thread",
            "_abc",
        ):
            return ["ignored", type(value).__name__]
        return self._encode_other(value)

    def _function(self, function: types.FunctionType) -> Any:
        file = function.__code__.co_filename
        if (top := library_of(file)) is not None:
            return ["library", top, version_of(top) or "", function.__module__, function.__qualname__]
        names = _named(function.__code__)
        reached = []
        for name in names:
            if name in function.__globals__:
                reached.append([name, self._global(function.__globals__[name], names)])
            elif not hasattr(builtins, name):
                continue  # an attribute name
        return [
            code_value(function.__code__),
            self._value(function.__defaults__),
            self._value(function.__kwdefaults__),
            [self._value(_cell(cell)) for cell in function.__closure__ or ()],
            reached,
            self._source(function, names),
        ]

    def _global(self, value: Any, names: Iterable[str]) -> Any:
        """A global that the code names; of a user's module, those of its attributes that the code may reach."""
        if isinstance(value, types.ModuleType) and library_of(getattr(value, "__file__", None) or "<frozen >") is None:
            inside = vars(value)
            return [
                "module",
                [[name, self._global(inside[name], names)] for name in names if name in inside and inside[name] is not value],
            ]
        return self._value(value)

    def _class(self, cls: type) -> Any:
        if is_library_class(cls) or cls is object:
            return ["class", f"{cls.__module__}.{cls.__qualname__}"]
        parts = []
        for base in cls.__mro__:
            if base is object:
                continue
            if is_library_class(base):
                parts.append(["library", self._library.digest(base).value])
                continue
            own = [[name, self._value(value)] for name, value in sorted(vars(base).items()) if name not in _CLASS_NOISE]
            parts.append([base.__qualname__, own])
        return ["class", cls.__qualname__, parts]

    def _source(self, function: types.FunctionType, names: list[str]) -> bytes:
        """Source bytes of the file, where instructions may not tell everything: modules, and scripts that look up by name."""
        if function.__module__ == "__main__" and not _DYNAMIC_NAMES.intersection(names):
            return b""
        return _source_digest(function.__code__.co_filename)


@functools.cache
def _source_digest(filename: str) -> bytes:
    # Once per process: the code objects tell what is *running*; a file edited since then is another process's business.
    try:
        return digest_bytes(Path(filename).read_bytes()).value
    except OSError:  # typed at a prompt or made by exec: the code objects are all there is
        return b""
