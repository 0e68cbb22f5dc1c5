"""Values of load arguments and configs as canonical ones, and back: dtypes, enums, and the settings of quantisers.

An object is taken apart only where its class is a library's and it has nothing but attributes. What they make again is its equal.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
from typing import Any

import torch

from evalcache.attributes import is_config
from evalcache.code import is_library_class
from evalcache.errors import CanonicalError


def pack(value: Any) -> Any:
    """A canonical value from which `unpack` makes an equal one.

    Raises:
        CanonicalError: it is of a type that is not known.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (torch.dtype, torch.device):
        return [kind.__name__, str(value).removeprefix("torch.")]
    if kind in (list, tuple):
        return [kind.__name__, *map(pack, value)]
    if kind is dict:
        return ["dict", *([pack(key), pack(item)] for key, item in value.items())]
    if is_library_class(kind):
        if isinstance(value, enum.Enum):
            return ["enum", name_of(kind), value.name]
        if (dataclasses.is_dataclass(kind) or is_config(value)) and not _slots(kind):
            return ["object", name_of(kind), pack(vars(value))]
    raise CanonicalError(f"a {name_of(kind)}", path="value", found=kind.__name__)


def unpack(packed: Any) -> Any:
    """What `pack` was given."""
    if not isinstance(packed, list):
        return packed
    kind, *content = packed
    if kind == "dtype":
        return getattr(torch, content[0])
    if kind == "device":
        return torch.device(content[0])
    if kind in ("list", "tuple"):
        items = map(unpack, content)
        return list(items) if kind == "list" else tuple(items)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    cls = class_named(content[0])
    if kind == "enum":
        return cls[content[1]]
    value = object.__new__(cls)
    vars(value).update(unpack(content[1]))
    return value


def name_of(cls: type) -> str:
    """``module:QualifiedName``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def class_named(name: str) -> Any:
    """The class of such a name."""
    module, _, inside = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in inside.split("."):
        found = getattr(found, part)
    return found


def _slots(cls: type) -> bool:
    return any(vars(base).get("__slots__") for base in cls.__mro__)
