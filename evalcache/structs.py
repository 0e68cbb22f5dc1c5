"""Classes of named fields: `Struct`, and `Frozen` for values that never change. Level 0, and the only import of msgspec.

A process that meets a model makes some sixty such classes when it starts, and a bulk of hits three objects an entry. Dataclasses
with slots take a millisecond a class (they are compiled from text) and half a microsecond an object; these take a thirtieth and
a sixth of that.
"""

from __future__ import annotations

from msgspec import Struct, field
from msgspec.structs import asdict, replace

__all__ = ["Frozen", "Struct", "asdict", "field", "names_of", "replace"]


class Frozen(Struct, frozen=True):
    """A value: its fields are set once, and two of them are equal when their fields are."""


def names_of(struct: Struct | type[Struct]) -> tuple[str, ...]:
    """Names of the fields, in their order."""
    return struct.__struct_fields__
