"""Library code: which methods and functions of installed libraries compute the answer, found again in microseconds.

A class is hashed with its bases, and with the modules around them: the functions that its methods can call lie in the module of
the class, or are imported into it, so imports are followed through the model libraries. Everything that was hashed is remembered
by identity; `guard` compares, and what was rebound since is hashed afresh.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from evalcache.canonical import digest_trusted, encode_trusted
from evalcache.code import (
    BUILTINS,
    CLASS_NOISE,
    builtin_name,
    cell_value,
    class_name,
    code_value,
    is_library_class,
    library_of,
    origin_of,
    unwrap_ours,
    version_of,
)
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import FingerprintError
from evalcache.namespaces import (
    Space,
    all_are,
    is_same_content,
    is_table,
    operator_implementations,
    plain_value,
    rebound_names,
)

# Namespaces that every module's forward may reach without importing a function from them.
_TORCH_NAMESPACES = (
    "torch torch.nn.functional torch.nn.modules.module torch._C._nn torch.special torch.linalg torch.fft torch.functional".split()
)
# Those of a transformers model: generation calls them, or they are chosen by name at run time.
_TRANSFORMERS_NAMESPACES = [
    f"transformers.{name}"
    for name in (
        "activations cache_utils generation.logits_process generation.stopping_criteria generation.utils masking_utils "
        "modeling_flash_attention_utils modeling_rope_utils modeling_utils integrations.eager_paged "
        "integrations.flash_attention integrations.flex_attention integrations.moe integrations.sdpa_attention"
    ).split()
]
# Imported functions are followed into these packages: the others' insides are covered by their versions.
_FOLLOWED = ("transformers.", "torch.nn.", "peft.tuners.")
_FUNCTION = "__code__", "__defaults__", "__kwdefaults__"
# What torch.compile and transformers put into this class while a process runs; none of it runs in a forward.
_NOT_IN_A_FORWARD = {
    "torch.nn.modules.module.Module": frozenset({"__init__", "__setstate__", "___needs_generation_tag_patch", "smart_apply"})
}

_code, _defaults, _keywords = (operator.attrgetter(name) for name in _FUNCTION)
_contents = operator.attrgetter("cell_contents")


class LibraryCode:
    """Digests of library classes and functions, computed once and guarded by identity.

    Cost: some 100 ms for the first model of a process; `guard` takes about 50 ns a name, 0.3 ms for a transformers model.
    """

    def __init__(self) -> None:
        self._code_digests: dict[int, tuple[types.CodeType, bytes]] = {}
        self._implementations = operator_implementations()
        self._forget()

    def _forget(self) -> None:
        self._digests: dict[type, Digest] = {}
        self._runtimes: dict[bool, Digest] = {}
        self._classes: dict[type, Digest] = {}
        self._function_digests: dict[int, Digest] = {}
        self._modules: dict[str, tuple[Digest, frozenset[str]]] = {}
        self._spaces: list[Space] = []
        self._mutable: list[tuple[Any, list[Any] | None, list[Any]]] = []
        self._functions: dict[int, types.FunctionType] = {}
        self._codes: list[Any] = []
        self._all_defaults: list[Any] = []
        self._keyword_functions: list[types.FunctionType] = []
        self._all_keywords: list[Any] = []
        self._cells: list[types.CellType] = []
        self._contents_of_cells: list[Any] = []
        self._empty_cells: list[types.CellType] = []
        self.interfaces: dict[str, Any] = {}

    # --- guarding ------------------------------------------------------------------------------------------------------

    def guard(self) -> bool:
        """Verify that nothing was rebound since it was hashed. Returns False after having forgotten everything.

        Raises:
            FingerprintError: ``patched``, an operator of torch itself was given another implementation.
        """
        if added := operator_implementations() - self._implementations:
            raise FingerprintError("", f"implementation of its own for {', '.join(sorted(added)[:3])}", "patched")
        same = (
            all(space.is_same() for space in self._spaces)
            and all_are(map(_code, self._functions.values()), self._codes)
            and all_are(map(_defaults, self._functions.values()), self._all_defaults)
            and all_are(map(_keywords, self._keyword_functions), self._all_keywords)
            and self._has_same_cells()
            and all(is_same_content(*known) for known in self._mutable)
        )
        if not same:
            self._forget()
        return same

    def _has_same_cells(self) -> bool:
        try:
            same = all_are(map(_contents, self._cells), self._contents_of_cells)
            return same and all(cell_value(cell) is None for cell in self._empty_cells)
        except ValueError:  # one was emptied
            return False

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Half a scan is none: after a refusal everything is looked at afresh."""
        try:
            yield
        except FingerprintError:
            self._forget()
            raise

    # --- what is asked -------------------------------------------------------------------------------------------------

    def digest(self, cls: type) -> Digest:
        """Digest of a library class with its bases and the modules around them.

        Raises:
            FingerprintError: ``patched``, something in them lies in a user's file.
        """
        found = self._digests.get(cls)
        if found is None:
            with self._whole():
                bases = [base for base in cls.__mro__ if base is not object]
                parts = [self._class(base) for base in bases]
                beside = self._reached([base.__module__ for base in bases])
            found = self._digests[cls] = digest_trusted([class_name(cls), parts, beside])
        return found

    def function(self, function: types.FunctionType) -> bytes:
        """Digest of one library function: code, defaults and closure. Raises: as `digest`."""
        with self._whole():
            return self._function(function, f"{function.__module__}.{function.__qualname__}")

    def runtime(self, *, transformers: bool) -> Digest:
        """Digest of what every model runs on: torch's own namespaces and, for its models, those of transformers.

        Raises:
            FingerprintError: ``patched``, something in them lies in a user's file.
        """
        found = self._runtimes.get(transformers)
        if found is None:
            names = [*_TORCH_NAMESPACES, *(_TRANSFORMERS_NAMESPACES if transformers else ())]
            with self._whole():
                parts = self._reached([name for name in names if name in sys.modules])
                tensor = vars(sys.modules["torch"])["Tensor"]
                parts.append(["torch.Tensor", self._namespace(tensor, "torch.Tensor")])
                parts.append(sorted(self._implementations))
                if transformers:
                    # Caches and processors are made by a call: no module of the model is an instance of them.
                    for name in _TRANSFORMERS_NAMESPACES:
                        module = sys.modules.get(name)
                        inside = [] if module is None else [*vars(module).values()]
                        classes = [value for value in inside if isinstance(value, type) and value.__module__ == name]
                        parts += [self._class(cls) for cls in sorted(classes, key=class_name)]
            found = self._runtimes[transformers] = digest_trusted(parts)
        return found

    # --- hashing -------------------------------------------------------------------------------------------------------

    def _class(self, cls: type) -> list[Any]:
        name = class_name(cls)
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        top = library_of(file) if file else "python"
        version = version_of(top) or "" if top and top != "python" else ""
        found = self._classes.get(cls)  # not by name: classes that are made at run time share theirs
        if found is None:
            found = self._classes[cls] = digest_trusted(self._namespace(cls, name))
        return [name, top or "", version, found.value]

    def _reached(self, names: list[str]) -> list[Any]:
        """Digests of modules and of those whose functions they import, by name."""
        found: dict[str, bytes] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            module = sys.modules.get(name)
            file = getattr(module, "__file__", None)
            compiled = name in _TORCH_NAMESPACES
            if name in found or module is None or not (compiled or (file and library_of(file) not in (None, "python"))):
                continue
            known = self._modules.get(name)
            if known is None:
                content = self._namespace(module, name)
                homes = frozenset(_homes(module)) if not compiled else frozenset()
                known = self._modules[name] = digest_trusted(content), homes
            found[name] = known[0].value
            waiting += known[1]
        return [[name, found[name]] for name in sorted(found)]

    def _namespace(self, owner: Any, where: str) -> list[Any]:
        """Hash what a module or class holds; refuse what is a user's."""
        is_class = isinstance(owner, type)
        space = vars(owner)
        state = _NOT_IN_A_FORWARD.get(where, frozenset()) if is_class else rebound_names(owner)
        parts = []
        for name, value in list(space.items()):
            if name in CLASS_NOISE or name == "_global_mapping" or (not is_class and name.startswith("__")):
                continue  # a table of kernels is looked at where one is chosen
            if is_class and name in state:
                continue
            if not is_class and isinstance(value, type) and value.__module__ == where and _is_beside_models(value):
                parts.append([name, self._class(value)])
                continue
            content = self._value(value, f"{where}.{name}", is_class=is_class, name=name)
            if content is not None and name not in state:
                parts.append([name, content])
        self._spaces.append(Space(space, state))
        return sorted(parts, key=operator.itemgetter(0))

    def _value(self, value: Any, where: str, *, is_class: bool = False, name: str = "") -> Any:
        """Canonical value of one name's object, None where the library's version tells all there is to know."""
        value = unwrap_ours(value)
        if isinstance(value, types.FunctionType):
            return ["function", self._function(value, where)]
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            return [type(value).__name__, self._value(value.__func__, where)]
        if isinstance(value, property):
            return ["property", *[self._value(part, where) for part in (value.fget, value.fset, value.fdel)]]
        if isinstance(value, (functools.partial, functools.partialmethod)):
            bound = [[key, plain_value(item)] for key, item in sorted(value.keywords.items())]
            return ["partial", self._value(value.func, where), [plain_value(item) for item in value.args], bound]
        if isinstance(value, functools.cached_property):
            return ["cached", self._value(value.func, where)]
        if isinstance(value, types.ModuleType):
            return None
        if isinstance(value, BUILTINS):
            return builtin_name(value)
        if isinstance(value, type):
            if not is_library_class(value):
                raise _replaced(where, value)
            return ["class", class_name(value)]
        if _is_interface(value):
            if not any(known is value for known in self.interfaces.values()):
                self.interfaces[where] = value
            return ["table", class_name(type(value))]
        if _is_users(type(value)) or type(value).__module__ == "unittest.mock":
            raise _replaced(where, type(value))
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            return ["wrapped", class_name(type(value)), self._function(value.__wrapped__, where)]
        if callable(value):
            # A compiled script, an operator with its own dispatch, …: with whatever functions it holds.
            inside = getattr(value, "__dict__", {})
            held = [[key, self._function(item, where)] for key, item in inside.items() if isinstance(item, types.FunctionType)]
            text = getattr(value, "code", None)
            name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
            return ["object", class_name(type(value)), str(name or ""), text if isinstance(text, str) else "", sorted(held)]
        if isinstance(value, (Mapping, list, set)) and (is_class or is_table(name, value)):
            content = self._contents(value, where)
            self._watch(value)
            return content
        # A module's texts are paths, ids of the process and messages as often as constants; a class's are what it is set up with.
        plain = (bool, int, float, str, bytes, tuple, frozenset) if is_class else (bool, int, float)
        return plain_value(value) if isinstance(value, plain) else None

    def _watch(self, value: Any) -> None:
        """Remember what a container holds, and the containers in it."""
        is_map = isinstance(value, Mapping)
        inside = [*value.values()] if is_map else [*value]
        self._mutable.append((value, [*value] if is_map else None, inside))
        for item in inside:
            if isinstance(item, (dict, list, set)):
                self._watch(item)

    def _contents(self, value: Any, where: str = "") -> Any:
        """Plain items of a container, and the functions and classes in it."""
        if not isinstance(value, Mapping):
            return plain_value(value)
        found = []
        for key, item in value.items():
            name = str(key) if isinstance(key, (str, enum.Enum)) else plain_value(key)
            inside = self._function(item, where) if isinstance(item, types.FunctionType) else plain_value(item)
            found.append([class_name(one) if isinstance(one, type) else told for one, told in ((key, name), (item, inside))])
        return found

    def _function(self, function: types.FunctionType, where: str) -> bytes:
        function = unwrap_ours(function)
        found = self._function_digests.get(id(function))
        if found is not None:
            return found.value
        origin = origin_of(function)
        if origin is None:
            raise FingerprintError("", f"{where} was replaced by {function.__module__}.{function.__qualname__}", "patched")
        self._functions[id(function)] = function
        self._codes.append(function.__code__)
        self._all_defaults.append(function.__defaults__)
        if function.__code__.co_kwonlyargcount:
            self._keyword_functions.append(function)
            self._all_keywords.append(function.__kwdefaults__)
            if function.__kwdefaults__:
                self._watch(function.__kwdefaults__)
        self._function_digests[id(function)] = Digest(bytes(16))  # a function that closes over itself
        cells = []
        for cell in function.__closure__ or ():
            inside = cell_value(cell)
            if inside is None:
                self._empty_cells.append(cell)
            else:
                self._cells.append(cell)
                self._contents_of_cells.append(inside)
            cells.append(self._cell(inside, where))
        keywords = [[name, self._cell(value, where)] for name, value in sorted((function.__kwdefaults__ or {}).items())]
        defaults = [self._cell(value, where) for value in function.__defaults__ or ()]
        found = digest_trusted([origin, self._code_digest(function.__code__), defaults, keywords, cells])
        self._function_digests[id(function)] = found
        return found.value

    def _cell(self, value: Any, where: str) -> Any:
        """What a library function closes over, or takes by default: functions and plain values; of others their class."""
        if isinstance(value, type):
            return ["class", class_name(value)]
        if class_name(type(value)) == "torch.dtype":
            return ["dtype", str(value)]
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod, property)):
            return self._value(value, where)
        plain = plain_value(value)
        return plain if plain is not None or value is None else ["object", class_name(type(value))]

    def _code_digest(self, code: types.CodeType) -> bytes:
        # Kept beyond `_forget`: code objects cannot change, and hashing them is most of the work.
        found = self._code_digests.get(id(code))
        if found is None:
            found = self._code_digests[id(code)] = code, digest_bytes(encode_trusted(code_value(code))).value
        return found[1]


def _replaced(where: str, cls: type) -> FingerprintError:
    return FingerprintError("", f"{where} was replaced by {class_name(cls)}", "patched")


def _is_users(cls: type) -> bool:
    """Whether an object's class is a user's; extensions make classes in modules that were never imported by that name."""
    functions = (value for value in vars(cls).values() if isinstance(value, types.FunctionType))
    return not is_library_class(cls) and any(origin_of(function) is None for function in functions)


def _is_interface(value: Any) -> bool:
    """Whether it is one of transformers' tables of kernels, which everybody may add to: looked at where a kernel is chosen."""
    return isinstance(getattr(type(value), "_global_mapping", None), dict) and hasattr(value, "_local_mapping")


def _is_beside_models(cls: type) -> bool:
    """Whether a class in a model's file is none of its modules: a cache of its own, say, which its forward makes or calls."""
    is_module = any(base.__module__ == "torch.nn.modules.module" for base in cls.__mro__)
    return cls.__module__.startswith("transformers.models.") and not is_module


def _homes(module: types.ModuleType) -> Iterator[str]:
    for value in vars(module).values():
        if isinstance(value, types.FunctionType):
            home = value.__globals__.get("__name__")
            if isinstance(home, str) and home.startswith(_FOLLOWED):
                yield home
