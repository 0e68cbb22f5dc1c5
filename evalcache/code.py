"""The identity of code, first part: what a code object is, and whose it is.

Three kinds of code, three rules:

* **Library code** (a file of an installed, non-editable distribution or of Python itself) is keyed by the distribution's version
  and the code objects of classes and of the functions around them: `library_code.py`.
* **Foreign code in library code** (a method or function of a library whose code lies in a user's file) is refused: `patched`.
* **The user's own code** (scripts, remote code, editable installs) is hashed by what it does, and outside of scripts by the
  source bytes of its file: `user_code.py`.

A code object is hashed by its instructions and constants, never by file name or line, so moving code changes nothing. Bytecode
differs between Python minor versions, and so do keys.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

from evalcache.canonical import digest_canonical
from evalcache.errors import FingerprintError

ORIGINAL = "__evalcache_original__"
"""Attribute by which our own patches name what they replaced; they are looked through, never hashed."""

_LIBRARY_FOLDERS = tuple(
    dict.fromkeys(
        str(path) + "/"
        for name in ("purelib", "platlib", "stdlib", "platstdlib")
        if (folder := sysconfig.get_paths().get(name))
        for path in (Path(folder).resolve(), Path(folder).absolute())  # a virtual environment may be reached by a link
    )
)
_OUR_FOLDER = str(Path(__file__).resolve().parent) + "/"
_SITE = "site-packages/"
_INSTALLED = (_SITE, "dist-packages/")

BUILTINS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
"""Types of callables and descriptors that are compiled into Python or into an extension."""

CLASS_NOISE = frozenset(
    "__abstractmethods__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ __dataclass_fields__ __dict__ "
    "__dataclass_params__ __doc__ __firstlineno__ "
    "__module__ __orig_bases__ __parameters__ __qualname__ __static_attributes__ __weakref__ _abc_impl "
    # Written into classes while they are used: by copyreg, by transformers when a first model is made or asked.
    "__slotnames__ smart_apply _can_set_attn_implementation_cached_value _can_set_experts_implementation_cached_value".split()
)
"""Names in a class that tell nothing about what it does."""


@functools.cache
def library_of(filename: str) -> str | None:
    """The top-level package that a file of library code belongs to (``python`` for the standard library), else None."""
    if filename.startswith("<frozen "):
        return "python"
    path = filename if filename.startswith("/") else str(Path(filename).resolve())
    for folder in _LIBRARY_FOLDERS:
        if path.startswith(folder):
            inside = path[len(folder) :]
            if _is_linked_in(folder, os.path.dirname(inside) or inside):
                return None
            if _SITE in inside:
                inside = inside.split(_SITE, 1)[1]
            elif not folder.endswith(_SITE):
                return "python"
            top = inside.split("/", 1)[0].removesuffix(".py")
            return top if version_of(top) else None
    return None


@functools.cache
def _is_linked_in(folder: str, inside: str) -> bool:
    """Whether a package's folder, or a module that is one file, is a link to somebody's checkout, whose version says nothing.

    Package managers link, too: whole packages to where they are installed as well, or each file of a package by itself.
    """
    place = os.path.realpath(folder + inside)
    return place != os.path.join(os.path.realpath(folder), inside) and not any(name in f"{place}/" for name in _INSTALLED)


@functools.cache
def version_of(package: str) -> str | None:
    """Installed version of the distribution that provides a top-level package, None where there is none.

    Cost: under a millisecond where both have one name, else some 150 ms once: every installed distribution is looked at.
    """
    found = version_of_distribution(package)
    if found is None and (names := importlib.metadata.packages_distributions().get(package)):
        found = version_of_distribution(names[0])
    return found


@functools.cache
def version_of_distribution(name: str) -> str | None:
    """Installed version of a distribution, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_library_class(cls: type) -> bool:
    """Whether a class was defined by an installed library."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file:
        return library_of(file) is not None
    # A class without a file is compiled in, on its own or within a package; if its module is gone or a prompt, it is the user's.
    if cls.__module__ in sys.builtin_module_names:
        return True
    package, _, inside = cls.__module__.partition(".")
    file = getattr(sys.modules.get(package), "__file__", None) if inside else None
    return file is not None and library_of(file) is not None


def origin_of(function: types.FunctionType) -> str | None:
    """The library that a function's code comes from, ``evalcache`` for our own, None for a user's.

    Judged by the file of the code, never by ``__module__``, which `functools.wraps` copies.
    """
    file = function.__code__.co_filename
    if file.startswith("<") and not file.startswith("<frozen "):
        # `<string>` is how dataclasses and namedtuples make methods: theirs if the module around them is.
        file = function.__globals__.get("__file__") or file
        if function.__globals__.get("__name__") in ("builtins", "namedtuple_" + function.__name__):
            return "python"
    if _is_our_file(file):
        return "evalcache"
    return library_of(file)


@functools.cache
def _is_our_file(filename: str) -> bool:
    return filename.startswith(_OUR_FOLDER)


def is_ours(value: Any) -> bool:
    """Whether ``value`` is one of our own patches; a wrapper that merely copied our mark is not."""
    return (
        isinstance(value, (types.FunctionType, types.MethodType))
        and hasattr(value, ORIGINAL)
        and _is_our_file(value.__code__.co_filename)
    )


def unwrap_ours(value: Any) -> Any:
    """What one of our own patches replaced, else the value itself."""
    return getattr(value, ORIGINAL) if is_ours(value) else value


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
        [constant_value(value) for value in code.co_consts],
    ]


def constant_value(value: Any) -> Any:
    """Canonical value of a constant in a code object.

    Raises:
        FingerprintError: ``code``, it is of a type that the compiler does not make.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else ["int", str(value)]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is tuple:
        return ["tuple", *[constant_value(item) for item in value]]
    if kind is frozenset:
        return ["frozenset", *sorted(digest_canonical(constant_value(item)).value for item in value)]
    if kind is types.CodeType:
        return ["code", *code_value(value)]
    if value is Ellipsis:
        return ["ellipsis"]
    if kind is slice:
        return ["slice", constant_value(value.start), constant_value(value.stop), constant_value(value.step)]
    raise FingerprintError("", f"constant of type {kind.__name__} in code", "code")


def cell_value(cell: types.CellType) -> Any:
    """What a closure's cell holds, None where it has not been filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def class_name(cls: type) -> str:
    """Dotted name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def keyed_name(cls: type) -> str:
    """Dotted name of a library's class; a user's without its module, which may be a path or a commit (remote code's is)."""
    return class_name(cls) if is_library_class(cls) else cls.__qualname__


def builtin_name(value: Any) -> list[str]:
    """What a compiled callable or descriptor is known by."""
    owner = getattr(value, "__objclass__", None)
    return [
        "builtin",
        class_name(owner) if owner is not None else str(getattr(value, "__module__", None) or ""),
        str(getattr(value, "__qualname__", "") or ""),
    ]
