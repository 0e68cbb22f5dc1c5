"""Prices: what an hour of a device costs, and what it draws. Applied when a report is made, never stored.

A device without a price has none: its money is None, never zero. Level 2.
"""

from __future__ import annotations

import datetime
import fnmatch
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evalcache.errors import PriceError
from evalcache.structs import Frozen, asdict, names_of

_TABLE = Path(__file__).with_name("prices.toml")
_TYPED = re.compile(r"(?P<device>.+)=\s*(?P<amount>[\d.]+)\s*(?P<currency>[A-Za-z]{3})(?:\s*,\s*(?P<watts>[\d.]+)\s*W)?\s*")


class Price(Frozen):
    """One row of a table of prices.

    Args:
        device: shell pattern for a device's name. per_hour: of one device, in ``currency``. watts: of one device, within
            ``boundary``; None where nobody said. kind: what is rented, and where. source, date: where and when that was read.
    """

    device: str
    per_hour: float
    currency: str
    watts: float | None = None
    kind: str = ""
    boundary: str = ""
    source: str = ""
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class Prices:
    """Prices in the order in which they are tried: the first whose pattern fits a device's name counts."""

    def __init__(self, rows: Iterable[Price]) -> None:
        self.rows = tuple(rows)

    def of(self, device: str | None) -> Price | None:
        """The price of a device by its name."""
        name = (device or "").strip().lower()
        return next((row for row in self.rows if name and fnmatch.fnmatchcase(name, row.device.lower())), None)


def read_prices(typed: Sequence[str] = (), files: Sequence[str | os.PathLike[str]] = ()) -> Prices:
    """The project's table, behind what the user has said: the last that was typed first, then the files, the last first.

    Args:
        typed: ``DEVICE=AMOUNT CURRENCY[, WATTS W]`` for an hour of one device; DEVICE may be a pattern (``*H200*``).
        files: of the form of ``prices.toml``.

    Raises:
        PriceError: a price or file cannot be read.
    """
    rows = [_parse(text) for text in reversed(typed)]
    for path in [*reversed(list(files)), _TABLE]:
        rows += _read(Path(path))
    return Prices(rows)


def _parse(text: str) -> Price:
    found = _TYPED.fullmatch(text)
    if found is None:
        raise PriceError(f"not a price: {text!r}", hint="'NVIDIA H200=3.20 EUR' or '*H200*=3.20 EUR, 700 W'", found=text)
    told: dict[str, Any] = {
        "device": found["device"].strip(),
        "per_hour": _number(found["amount"], text),
        "currency": found["currency"].upper(),
        "watts": _number(found["watts"], text) if found["watts"] else None,
        "source": "--price",
    }
    return _price(told, "--price")


def _read(path: Path) -> list[Price]:
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PriceError(f"{path}: {error}", hint="a file of the form of evalcache/prices.toml", path=path) from error
    shared, rows = told.get("table", {}), told.get("price", [])
    if not isinstance(shared, Mapping) or not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise PriceError(f"{path}: no table of prices", hint="one [[price]] for each device", path=path)
    return [_price({"source": str(path), **shared, **row}, str(path)) for row in rows]


def _price(told: Mapping[str, Any], where: str) -> Price:
    known = set(names_of(Price))
    if unknown := sorted(set(told) - known):
        raise PriceError(f"{where}: unknown field {unknown[0]!r}", hint=f"known: {', '.join(sorted(known))}", found=unknown[0])
    text: dict[str, Any] = {
        name: value.isoformat() if isinstance(value, datetime.date) else value for name, value in told.items()
    }
    for name in ("device", "per_hour", "currency"):
        if name not in text:
            raise PriceError(f"{where}: a price without {name}", found=dict(told))
    for name, value in text.items():
        if name in ("per_hour", "watts"):
            is_good = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf)
        else:
            is_good = isinstance(value, str)
        if not is_good or (name == "per_hour" and value is None):
            raise PriceError(f"{where}: {name} = {value!r}", hint="per_hour and watts are numbers, the rest is text", found=value)
    return Price(**text)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError as error:
        raise PriceError(f"not a price: {text!r}", found=text) from error
