"""What a person may type for a model or a key, and the thing that is meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from evalcache.checkpoint import fingerprint_checkpoint
from evalcache.digest import ALGORITHM, SIZE_BYTES, Digest
from evalcache.errors import UnknownNameError
from evalcache.ledger import Ask, Ledger
from evalcache.manifest import Manifest
from evalcache.progress import progress_bar
from evalcache.store import Store

_T = TypeVar("_T")
_SHORTEST = 4  # hex digits; fewer would name a lucky neighbour


def find_key(text: str, store: Store) -> Digest:
    """The key of the one entry whose key is, or starts with, ``text``.

    Args:
        text: ``xxh3_128:<hex>``, bare hex or a UUID, at least four digits of it.

    Cost: one look-up for a whole key, a pass over the store for a part.

    Raises:
        UnknownNameError: no entry, or more than one, has such a key. Fields: ``found``.
    """
    digits = _digits(text)
    if digits is None:
        raise UnknownNameError(f"not a key: {text!r}", hint="give at least four of its 32 hexadecimal digits", found=text)
    if len(digits) == 2 * SIZE_BYTES:
        keys = [key for key in [Digest(bytes.fromhex(digits))] if store.get(key) is not None]
    else:
        keys = [key for key, _ in store.frames() if key.hex.startswith(digits)]
    return _only(text, keys, "entry", f"`evalcache query 'FROM outputs'` lists what is stored in {store.directory}")


def find_manifest(text: str, open_ledger: Callable[[], Ledger]) -> Manifest:
    """The manifest of a checkpoint folder or file, or of a model that was run.

    Args:
        text: a path, or the root digest of a model (or at least four digits of it).
        open_ledger: called where ``text`` is no path, so that comparing two folders needs no ledger.

    Cost: for a path, a pass over its files unless they are known.

    Raises:
        UnknownNameError: neither of the two. Fields: ``found``.
        CheckpointError: the path is not a checkpoint.
    """
    if Path(text).exists():
        with progress_bar(f"reading {text}", in_bytes=True) as tell:
            return fingerprint_checkpoint(text, progress=tell)
    digits = _digits(text)
    hint = "give the path of a checkpoint, or the digest of a model that was run (`evalcache query 'FROM models_in_order'`)"
    if digits is None:
        raise UnknownNameError(f"no such checkpoint: {text}", hint=hint, found=text)
    sql = "SELECT any_value(manifest) FROM models WHERE starts_with(replace(digest::VARCHAR, '-', ''), ?) GROUP BY digest"
    manifests = [bytes(row[0]) for row in open_ledger().query(sql, [digits]).rows if row[0] is not None]
    return Manifest.from_bytes(_only(text, manifests, "model", hint))


def find_models(ask: Ask, text: str) -> set[Digest]:
    """The roots of a model, of which there are several where what stood under its name has changed.

    Args:
        ask: of an open ledger. text: the name under which runs met it, or its root digest (or at least four digits of it).

    Raises:
        UnknownNameError: there is no such model, or digits fit more than one. Fields: ``found``.
    """
    named = {row[0] for row in ask("SELECT DISTINCT model FROM model_names WHERE name = ? AND model IS NOT NULL", [text]).rows}
    if not named and (digits := _digits(text)):
        sql = "SELECT DISTINCT model FROM requests WHERE starts_with(replace(model::VARCHAR, '-', ''), ?)"
        named = {row[0] for row in ask(sql, [digits]).rows}
        if len(named) > 1:
            raise UnknownNameError(f"{len(named)} models start with {text}", hint="give more digits", found=text)
    if not named:
        hint = "`evalcache query 'SELECT names, digest FROM models_in_order'` lists them"
        raise UnknownNameError(f"no model {text!r} in the ledger", hint=hint, found=text)
    return {Digest.parse(root) for root in named}


def names_of_models(ask: Ask) -> dict[str, list[str]]:
    """Root (hex) → the names under which runs met that model."""
    named = ask("SELECT model, list(DISTINCT name ORDER BY name) FROM model_names WHERE name <> '' GROUP BY model").rows
    return {root: names for root, names in named if root}


def find_run(ask: Ask, run: str) -> str:
    """The id of a run.

    Args:
        ask: of an open ledger. run: id, the start of one, or ``last``.

    Raises:
        UnknownNameError: there is no such run, or more than one. Fields: ``found``.
    """
    if run == "last":
        # Not one in which stored entries were computed again, to see whether they are right.
        others = "run NOT IN (SELECT run FROM overheads WHERE kind = 'recompute')"
        found = ask(f"SELECT run FROM run_spans WHERE {others} ORDER BY started_at DESC NULLS LAST, run LIMIT 1").rows
    else:
        found = ask("SELECT run FROM run_spans WHERE run = ?", [run]).rows
        found = found or ask("SELECT run FROM run_spans WHERE starts_with(run, ?)", [run.replace("-", "").lower()]).rows
    if len(found) == 1 and run:
        return found[0][0]
    if len(found) > 1:
        raise UnknownNameError(f"{len(found)} runs start with {run!r}", hint="give more digits", found=run)
    raise UnknownNameError(f"no run {run!r} in the ledger", hint="`evalcache runs` lists them", found=run)


def _digits(text: str) -> str | None:
    digits = text.strip().lower().removeprefix(f"{ALGORITHM}:").removesuffix("…").replace("-", "")
    return digits if re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},{2 * SIZE_BYTES}}}", digits) else None


def _only(text: str, found: list[_T], kind: str, hint: str) -> _T:
    if len(found) == 1:
        return found[0]
    if not found:
        raise UnknownNameError(f"no {kind} under {text}", hint=hint, found=text)
    raise UnknownNameError(f"{len(found)} {kind}s start with {text}", hint="give more digits", found=text)
