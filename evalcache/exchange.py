"""Exchange: the entries of a store as one file, to carry answers from one machine to another.

The file is a ZIP archive of three members that are stored as they are:

| member | holds |
|---|---|
| ``manifest.json`` | `FORMAT`, `VERSION`, when it was made, and rows, bytes and checksum (xxh3_128) of each of the others |
| ``entries.parquet`` | ``key``, ``frame``: the entries' bytes (`frame.py`), which know their key and their checksum |
| ``objects.parquet`` | ``name``, ``data``: settings, environments and manifests that the entries name |

What runs asked and spent stays where it was: a ledger tells of its own runs. There, in the audit, a hit on what came from
elsewhere is on the line ``imported``.

Nothing of a file is believed. All of it is read and checked before anything is written: the archive's members, their
checksums, each frame, *that its key is the key of what it says it answers*, and each object, that its name is its digest's.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import filelock

from evalcache.digest import SIZE_BYTES, Digest, Hasher, digest_bytes
from evalcache.errors import CanonicalError, ExchangeError, FrameError
from evalcache.frame import Question, decode_entry, decode_question
from evalcache.key import KEY_VERSION, elder_keys_of_question, key_of_question
from evalcache.manifest import Manifest
from evalcache.records import Entry, Taken
from evalcache.rows import ROW_LIMIT_BYTES
from evalcache.schema import quoted
from evalcache.store import Store
from evalcache.structs import Frozen

FORMAT = "evalcache entries"
VERSION = 1

_MANIFEST = "manifest.json"
_TABLES = {"entries": ("key", "frame"), "objects": ("name", "data")}
_MANIFEST_BYTES = 1 << 16
_ROWS = 500  # in memory at once
_TEXT_BYTES = 4 << 20
_LOCK = "export.lock"  # held by the process that writes
_ABANDONED_S = 60.0
_OBJECT = re.compile(r"(fields|model)/[0-9a-f]{32}")
_IGNORED = re.compile(r"probe/[0-9a-f]{32}")  # what a machine found out about an architecture; exported once, never taken


class Exported(Frozen):
    """What a file holds. ``damaged``: entries of the store that were left out, because they fail their checks."""

    entries: int
    objects: int
    damaged: int
    size_bytes: int


def export_entries(
    store: Store,
    path: Path,
    holds: Callable[[Entry, Question], bool] = lambda entry, question: True,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write every good entry of a store that is meant, and what they name, into a file.

    The file appears whole or not at all: it is written under another name in the same folder. Mode 0600: it holds somebody's
    prompts and answers.

    Cost: a pass over the store, and twice its size on the disk while it lasts.

    Raises:
        ExchangeError: the file cannot be written. StoreError: the store cannot be read.
    """
    damaged = 0
    named: set[str] = set()

    def entries() -> Iterator[tuple[bytes, bytes]]:
        nonlocal damaged
        for number, (key, frame) in enumerate(store.frames(), 1):
            progress(number, number)
            try:
                entry, question = decode_entry(key, frame), decode_question(key, frame)
            except FrameError:
                damaged += 1
                continue
            if holds(entry, question):
                named.add(f"model/{question.model.hex}")
                named.update(f"fields/{digest.hex}" for digest in (question.settings, question.environment))
                yield key.value, frame

    def objects() -> Iterator[tuple[str, bytes]]:
        for name in sorted(named):  # asked for after the entries, when all are known
            if (data := store.get_object(name)) is not None:
                yield name, data

    rows = write_archive(path, entries(), objects())
    return Exported(rows["entries"], rows["objects"], damaged, path.stat().st_size)


def write_archive(path: Path, entries: Iterable[tuple[bytes, bytes]], objects: Iterable[tuple[str, bytes]]) -> dict[str, int]:
    """Write (key, good frame) and (name, data) into a file; see `export_entries`. Returns how many of each there were.

    Raises:
        ExchangeError: the file cannot be written.
    """
    try:
        with _scratch(path) as folder:
            rows = {"entries": _write(folder, "entries", entries), "objects": _write(folder, "objects", objects)}
            members = {f"{name}.parquet": _member(folder / f"{name}.parquet", count) for name, count in rows.items()}
            told = {"format": FORMAT, "version": VERSION, "made_at": time.time(), "members": members}
            made = folder / "made"
            with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_MANIFEST, json.dumps(told, indent=2))
                for name in members:
                    archive.write(folder / name, name)
            made.chmod(0o600)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(path)
    except OSError as error:
        raise ExchangeError(f"{path} cannot be written: {error}", hint="check rights and space", path=str(path)) from error
    return rows


def import_entries(
    store: Store, path: Path, *, due: bool = True, progress: Callable[[int, int], None] = lambda done, total: None
) -> Taken:
    """Take the entries of a file into a store; those that it has already are left as they are.

    An entry whose *answer* is another one than the store's is a finding: the store's is served on, the other one is kept beside
    it (`Store.conflicts`). To import a file again changes nothing. ``due``: as in `Store.take_in`.

    Cost: two passes over the file; nothing is written before the first has ended.

    Raises:
        ExchangeError: the file is not a whole, unaltered export of a version that is known here; nothing was taken.
        StoreError: the store cannot be written; what was taken before is in it.
    """
    with tempfile.TemporaryDirectory(prefix="evalcache-import-") as scratch:
        counts = _unpack(path, Path(scratch))
        with _opened(path, Path(scratch), counts) as read:
            for done, (key, frame) in enumerate(_each(read("entries")), 1):
                _check_entry(path, key, frame)
                progress(done, 2 * counts["entries"])
            objects = {name: data for name, data in _each(read("objects")) if not _IGNORED.fullmatch(str(name))}
            for name, data in objects.items():
                _check_object(path, name, data)
            taken = Taken()
            for rows in read("entries"):
                taken += store.take_in([(Digest(key), frame) for key, frame in rows], objects, due=due)
                objects = {}  # with the first of them
                progress(counts["entries"] + taken.total, 2 * counts["entries"])
            return taken


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for as long as this lasts. Takes those away that exports to it left which were killed."""
    for lock in path.parent.glob(f".{glob.escape(path.name)}.*/{_LOCK}"):
        with contextlib.suppress(OSError, filelock.Timeout):
            # One that has just been made may not be locked yet.
            if time.time() - lock.stat().st_mtime > _ABANDONED_S:
                with filelock.FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent)
    scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with scratch as folder, filelock.FileLock(Path(folder) / _LOCK, timeout=0):
        yield Path(folder)


# --- writing ---------------------------------------------------------------------------------------------------------------


def _write(folder: Path, name: str, rows: Iterable[tuple[Any, bytes]]) -> int:
    first, second = _TABLES[name]
    kind = "BLOB" if name == "entries" else "VARCHAR"
    with contextlib.closing(duckdb.connect(str(folder / f"{name}.duckdb"))) as connection:
        connection.execute(f"CREATE TABLE t ({first} {kind}, {second} BLOB)")
        for some in _chunks(rows):
            _insert(connection, kind, some)
        # Frames are packed already. What is not packed again cannot unpack to more than it is, either.
        connection.execute(f"COPY t TO '{_quoted(folder / name)}.parquet' (FORMAT parquet, COMPRESSION uncompressed)")
        return int(connection.execute("SELECT count(*) FROM t").fetchall()[0][0])


def _insert(connection: Any, kind: str, rows: Sequence[tuple[Any, bytes]]) -> None:
    left, right = (list(column) for column in zip(*rows, strict=True))
    if len(rows) == _ROWS or sum(map(len, right)) > _TEXT_BYTES:
        connection.execute(f"INSERT INTO t SELECT unnest($1::{kind}[]), unnest($2::BLOB[])", [left, right])
        return
    # As text, which takes twice as long: DuckDB imports pandas at the first bound value (see `intake.execute`), which is half a
    # second for a few rows at the end of a run.
    texts = [{"a": one.hex() if kind == "BLOB" else one, "b": data.hex()} for one, data in zip(left, right, strict=True)]
    first = "unhex(a)" if kind == "BLOB" else "a"
    given = f"""from_json({quoted(json.dumps(texts))}, '[{{"a":"VARCHAR","b":"VARCHAR"}}]')"""
    connection.execute(f"INSERT INTO t SELECT {first}, unhex(b) FROM (SELECT unnest({given}, recursive := true))")


def _chunks(rows: Iterable[tuple[Any, bytes]]) -> Iterator[list[tuple[Any, bytes]]]:
    some: list[tuple[Any, bytes]] = []
    for row in rows:
        some.append(row)
        if len(some) == _ROWS:
            yield some
            some = []
    if some:
        yield some


def _member(path: Path, rows: int) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"rows": rows, "bytes": path.stat().st_size, "xxh3_128": _checksum(file).hex}


def _checksum(file: Any) -> Digest:
    hasher = Hasher()
    while part := file.read(1 << 20):
        hasher.update(part)
    return hasher.digest()


# --- reading ---------------------------------------------------------------------------------------------------------------


def _unpack(path: Path, folder: Path) -> dict[str, int]:
    """Copy the tables into ``folder``, under names of ours. Returns how many rows each is said to have."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if set(members) != {_MANIFEST, *(f"{name}.parquet" for name in _TABLES)} or len(members) != len(archive.infolist()):
                raise _fault(path, f"it holds {', '.join(map(repr, sorted(members)[:5])) or 'nothing'}")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise _fault(path, "its members are packed")
            if members[_MANIFEST].file_size > _MANIFEST_BYTES:
                raise _fault(path, f"its manifest has {members[_MANIFEST].file_size:,} bytes")
            told = _manifest(path, archive.read(_MANIFEST))
            for name in _TABLES:
                member = f"{name}.parquet"
                with archive.open(member) as source, (folder / member).open("wb") as target:
                    hasher = Hasher()
                    while part := source.read(1 << 20):
                        hasher.update(part)
                        target.write(part)
                if hasher.digest().hex != told[member].get("xxh3_128"):
                    raise _fault(path, f"{member} was altered or is not whole")
            return {name: told[f"{name}.parquet"]["rows"] for name in _TABLES}
    # RuntimeError: an encrypted member, or a kind of archive that zipfile does not read.
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError) as error:
        raise _fault(path, str(error)) from error


def _manifest(path: Path, data: bytes) -> Mapping[str, Any]:
    try:
        told = json.loads(data)
        if told["format"] != FORMAT:
            raise _fault(path, f"its format is {told['format']!r}")
        if told["version"] != VERSION:
            hint = "a newer evalcache made it: upgrade"
            raise ExchangeError(f"{path} has version {told['version']!r}, known here is {VERSION}", hint=hint, path=str(path))
        members = told["members"]
        if any(type(members[f"{name}.parquet"]["rows"]) is not int for name in _TABLES):
            raise TypeError("rows that are no number")
        return members
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _fault(path, f"its manifest cannot be read: {error}") from error


@contextlib.contextmanager
def _opened(path: Path, folder: Path, counts: Mapping[str, int]) -> Iterator[Callable[[str], Iterator[list[tuple[Any, bytes]]]]]:
    """A function that gives the rows of a table, some at a time."""
    files = {name: str(folder / f"{name}.parquet") for name in _TABLES}
    with contextlib.closing(duckdb.connect(":memory:")) as connection:
        allowed = ", ".join(f"'{_quoted(file)}'" for file in files.values())
        connection.execute(f"SET allowed_paths = [{allowed}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

        def read(name: str) -> Iterator[list[tuple[Any, bytes]]]:
            first, second = _TABLES[name]
            asked = connection.cursor().execute(f"SELECT {first}, {second} FROM '{_quoted(files[name])}'")
            while rows := asked.fetchmany(_ROWS):
                yield rows

        try:
            for name, file in files.items():
                _check_table(path, connection, name, _quoted(file), counts[name])
            yield read
        except duckdb.Error as error:
            raise _fault(path, f"a table in it cannot be read: {error}") from error


def _check_table(path: Path, connection: Any, name: str, file: str, rows: int) -> None:
    """What a table claims, before any of it is unpacked."""
    first, second = _TABLES[name]
    types = dict(row[:2] for row in connection.execute(f"DESCRIBE SELECT * FROM '{file}'").fetchall())
    if types != {first: "BLOB" if name == "entries" else "VARCHAR", second: "BLOB"}:
        raise _fault(path, f"the columns of {name} are {types}")
    packed = f"SELECT DISTINCT compression FROM parquet_metadata('{file}') WHERE compression <> 'UNCOMPRESSED'"
    if connection.execute(packed).fetchall():
        raise _fault(path, f"{name} is packed")
    # One value may stand for many rows: together they are no longer than the file, or some are there twice.
    count, distinct, size, most = connection.execute(
        f"SELECT count(*), count(DISTINCT {first}), coalesce(sum(octet_length({second})), 0), "
        f"coalesce(max(octet_length({second})), 0) FROM '{file}'"
    ).fetchall()[0]
    if count != rows or distinct != rows:
        raise _fault(path, f"{name} has {count:,} rows, {distinct:,} of them different, and should have {rows:,}")
    if size > os.path.getsize(_unquoted(file)) or most > ROW_LIMIT_BYTES:
        raise _fault(path, f"{name} unpacks to {size:,} bytes")


def _each(tables: Iterator[list[tuple[Any, bytes]]]) -> Iterator[tuple[Any, bytes]]:
    return (row for rows in tables for row in rows)


def _check_entry(path: Path, key: Any, frame: Any) -> None:
    if type(key) is not bytes or len(key) != SIZE_BYTES:
        raise _fault(path, f"{key!r} is no key")
    try:
        decode_entry(Digest(key), frame)
        question = decode_question(Digest(key), frame)
        asked = key_of_question(question)
        elder = elder_keys_of_question(question) if asked != key else []
    except (FrameError, CanonicalError) as error:
        raise _fault(path, str(error)) from error
    if key in elder:
        raise ExchangeError(
            f"{path} was written when keys had another form (KEY_VERSION is {KEY_VERSION} now): nothing of it would be served",
            hint="nothing of it was taken; export it from a store that has computed it anew",
            path=str(path),
        )
    if asked != key:
        raise _fault(path, f"{Digest(key)} stands for what has the key {asked}")


def _check_object(path: Path, name: Any, data: Any) -> None:
    if type(name) is not str or not _OBJECT.fullmatch(name) or type(data) is not bytes:
        raise _fault(path, f"{name!r} is no object of ours")
    kind, _, digest = name.partition("/")
    try:
        found = digest_bytes(data) if kind == "fields" else Manifest.from_bytes(data).root
    except (CanonicalError, KeyError) as error:
        raise _fault(path, f"{name}: {error}") from error
    if found.hex != digest:
        raise _fault(path, f"{name} holds what has the digest {found.hex}")


def _quoted(path: str | Path) -> str:
    return str(path).replace("'", "''")


def _unquoted(path: str) -> str:
    return path.replace("''", "'")


def _fault(path: Path, what: str) -> ExchangeError:
    return ExchangeError(
        f"{path} is not a whole export: {what}", hint="nothing of it was taken; copy or export it again", path=str(path)
    )
