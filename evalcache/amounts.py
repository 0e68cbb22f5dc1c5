"""What a person types for a time, a size, a date or a range of versions. Level 1."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

from evalcache.errors import AmountError

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h|d|w)(?![a-z])\s*", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", re.IGNORECASE)
_VERSIONS = re.compile(r"\s*([A-Za-z][\w.-]*)?\s*([<>=!~].*)")


def parse_seconds(text: str) -> float:
    """A length of time in seconds.

    Raises:
        AmountError: it is none.

    >>> parse_seconds("1h30m"), parse_seconds("30d")
    (5400.0, 2592000.0)
    """
    parts = list(_TIME.finditer(text.strip()))
    if not parts or "".join(part.group() for part in parts) != text.strip():
        raise AmountError(f"not a length of time: {text!r}", hint="for example 30d, 12h or 1h30m", found=text)
    return sum(float(part[1]) * _SECONDS[part[2].lower()] for part in parts)


def parse_bytes(text: str) -> int:
    """A size in bytes; KB, MB, … are powers of 1000, KiB, MiB, … of 1024.

    Raises:
        AmountError: it is none.

    >>> parse_bytes("10GB"), parse_bytes("1.5 MiB"), parse_bytes("0")
    (10000000000, 1572864, 0)
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise AmountError(f"not a size: {text!r}", hint="for example 10GB or 500MiB", found=text)
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))


def parse_date(text: str) -> datetime.datetime:
    """A date or time as a naive time in UTC, which it is taken to be where it does not say.

    Raises:
        AmountError: it is none.

    >>> parse_date("2026-11-01T08:00+02:00")
    datetime.datetime(2026, 11, 1, 6, 0)
    """
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise AmountError(f"not a date: {text!r}", hint="for example 2026-11-01 or 2026-11-01T08:00", found=text) from error
    return found.astimezone(datetime.UTC).replace(tzinfo=None) if found.tzinfo else found


def parse_versions(text: str) -> tuple[str, Callable[[str], bool]]:
    """A package and which of its versions are meant, ``torch<2.13``; without a package it is evalcache itself.

    Raises:
        AmountError: it is none.

    >>> package, is_meant = parse_versions("<0.2")
    >>> package, is_meant("0.1.9"), is_meant("0.2.0")
    ('evalcache', True, False)
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion

    found = _VERSIONS.fullmatch(text)
    try:
        if found is None:
            raise InvalidSpecifier(text)
        meant = SpecifierSet(found[2], prereleases=True)
    except InvalidSpecifier as error:
        raise AmountError(f"not a range of versions: {text!r}", hint="for example <0.2 or torch<2.13", found=text) from error

    def is_meant(version: str) -> bool:
        try:
            return meant.contains(version)
        except InvalidVersion:
            return False

    return found[1] or "evalcache", is_meant
