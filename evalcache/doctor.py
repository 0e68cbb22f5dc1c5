"""The doctor: what this installation and this cache folder are, and what is wrong with them. No torch, and nothing is changed.

Each check is one line with a state: ``ok``; ``note``, which costs something or deserves a look; ``wrong``, with what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalcache.errors import EvalCacheError, LedgerLockedError
from evalcache.folder import file_system, is_remote, local_folder
from evalcache.holders import held_by
from evalcache.integrations.clients import CLIENTS, Client, version_of_client
from evalcache.ledger import Ledger
from evalcache.printing import said_bytes
from evalcache.store import Store
from evalcache.structs import Frozen

LEAST: dict[str, tuple[int, ...]] = {"torch": (2, 6), "transformers": (5, 0), "duckdb": (1, 5, 5), "diskcache": (5, 6, 3)}
"""The least versions, as in pyproject.toml."""
LEAST_FREE_BYTES = 5 << 30
_OPTIONAL = ("torch", "transformers")
_PATIENCE_S = 2.0
_WRITES = 120  # the byte of SQLite's shared memory that a writer locks. Source: sqlite.org/walformat.html, "WAL Locks"


class Check(Frozen):
    """One thing that was looked at.

    Args:
        name: what. state: ``ok``, ``note`` or ``wrong``. found: for a person. hint: what to do, empty where all is well.
    """

    name: str
    state: str
    found: str
    hint: str = ""


def examine(directory: str | os.PathLike[str]) -> list[Check]:
    """Look at everything.

    Args:
        directory: the cache folder; it need not exist, and is not made.

    Cost: a second or two; a GPU's driver or a busy ledger may take some more.
    """
    folder = Path(directory).absolute()
    local = local_folder(folder)
    return [*_python(), *_packages(), *_clients(), *_gpu(), *_folder(folder), *_store(local), *_ledger(local)]


def is_good(checks: list[Check]) -> bool:
    """Whether nothing is wrong."""
    return all(check.state != "wrong" for check in checks)


# --- the installation --------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    if sys.flags.isolated or sys.flags.ignore_environment:
        yield Check(
            "isolation", "note", "this Python ignores PYTHONPATH (-I or -E)", "`evalcache run` cannot get into such a one"
        )
    else:
        yield Check(
            "isolation", "ok", "off (with python -I, -E or -S, `evalcache run` has no way in: use evalcache.enable() there)"
        )
    # `evalcache run -- python …` starts what PATH finds.
    other = shutil.which("python")
    if other is not None and os.path.dirname(other) != os.path.dirname(sys.executable) and not _has_us(other):
        yield Check(
            "python on PATH", "note", f"{other} has no evalcache",
            f"`evalcache run -- python …` starts that one, uncached: activate this environment, or type {sys.executable}",
        )  # fmt: skip
    ours = str(Path(__file__).parent / "_site")
    parts = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != ours]
    hidden = [part for part in parts if (Path(part) / "sitecustomize.py").is_file()]
    shadows = [part for part in parts if (Path(part) / "evalcache.py").is_file()]
    if shadows:
        yield Check("PYTHONPATH", "wrong", f"{shadows[0]}/evalcache.py hides this package", "rename that file")
    elif hidden:
        yield Check("PYTHONPATH", "note", f"{hidden[0]} has a sitecustomize", "`evalcache run` runs it first, then starts itself")
    else:
        yield Check("PYTHONPATH", "ok", os.pathsep.join(parts) or "not set")
    policy = os.environ.get("EVALCACHE", "use")
    off = policy.strip().lower() == "off"
    yield Check("EVALCACHE", "note" if off else "ok", policy, "nothing is cached: unset EVALCACHE" if off else "")


def _has_us(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", "import evalcache"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _packages() -> Iterator[Check]:
    yield Check("evalcache", "ok", _version("llm-evalcache") or "from source")
    for name, least in LEAST.items():
        found = _version(name)
        wanted = ".".join(map(str, least))
        if found is None:
            state = "note" if name in _OPTIONAL else "wrong"
            yield Check(name, state, "not installed", "pip install 'llm-evalcache[transformers]'")
        elif tuple(int(number) for number in re.findall(r"\d+", found.split("+")[0])[: len(least)]) < least:
            yield Check(name, "wrong", found, f"needs {wanted} or later: pip install -U {name}")
        else:
            yield Check(name, "ok", found)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clients() -> Iterator[Check]:
    for client in CLIENTS:
        yield _client(client)


def _client(client: Client) -> Check:
    if client.folder() is None:
        return Check(client.name, "ok", "not installed")
    version = version_of_client(client) or "of unknown version"
    if faults := client.faults():
        said = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        hint = f"it runs uncached: install {client.distribution}=={client.tested[-1]}, or a newer evalcache"
        return Check(client.name, "wrong", f"{version}: {said}", hint)
    if version not in client.tested:
        tested = ", ".join(client.tested)
        return Check(client.name, "note", f"{version}, held where it should be", f"tested was {tested}")
    return Check(client.name, "ok", f"{version}, as tested")


def _gpu() -> Iterator[Check]:
    asked = shutil.which("nvidia-smi")
    if asked is None:
        yield Check("GPU", "ok", "none (no nvidia-smi)")
        return
    command = [asked, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check("GPU", "note", f"nvidia-smi does not answer: {error}", "the driver may be hanging")
        return
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not names:
        said = (done.stderr or done.stdout).strip().splitlines()
        yield Check("GPU", "note", f"nvidia-smi fails: {said[0] if said else done.returncode}", "models will run on the CPU")
    else:
        yield Check("GPU", "ok", "; ".join(names))


# --- the cache folder --------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> Iterator[Check]:
    there = _existing(folder)
    if not folder.exists():
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        hint = "" if usable else f"{there} cannot be written: set EVALCACHE_DIR to a folder of yours"
        yield Check("folder", "ok" if usable else "wrong", f"{folder} (not made yet)", hint)
    elif not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK | os.R_OK):
        yield Check("folder", "wrong", f"{folder} cannot be used", "set EVALCACHE_DIR to a folder that you may write")
    else:
        yield Check("folder", "ok", str(folder))
        # What lies in it is somebody's prompts and answers.
        mode = stat.S_IMODE(folder.stat().st_mode)
        open_ = bool(mode & 0o077) and os.name == "posix"
        yield Check(
            "rights", "wrong" if open_ else "ok", f"{mode:04o}", f"others may look in: chmod 700 {folder}" if open_ else ""
        )
    kind = file_system(there) or "unknown"
    local = local_folder(folder)
    if local == folder:
        told = os.environ.get("EVALCACHE_NETWORK") == "0" and is_remote(folder)
        hint = "SQLite and DuckDB need locks that such mounts often lack: unset EVALCACHE_NETWORK" if told else ""
        yield Check("file system", "wrong" if told else "ok", kind, hint)
    else:
        yield Check("file system", "ok", f"{kind}, shared by machines; here the store is in {local}")
        if (folder / "store" / "cache.db").exists():
            hint = "EVALCACHE_NETWORK=0 evalcache export FILE, then evalcache import FILE, then delete it"
            yield Check("former store", "note", f"{folder / 'store'} is not used, now that machines share this folder", hint)
    there, folder = _existing(local), local
    held = sum(file.stat().st_size for file in folder.glob("store/cache.db*")) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free
    needed = max(LEAST_FREE_BYTES, 2 * held)
    low = free < needed
    hint = f"less than {said_bytes(needed)}: make room, or set EVALCACHE_DIR to another disk" if low else ""
    yield Check("free disk", "wrong" if low else "ok", said_bytes(free), hint)


def _existing(path: Path) -> Path:
    """The path, or what exists above it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _store(folder: Path) -> Iterator[Check]:
    place = folder / "store"
    if not (place / "cache.db").exists():
        yield Check("store", "ok", f"{place} (not made yet)")
        return
    # Before it is opened, which would wait for a writer.
    if writer := _writer(place):
        said = f"{place} has been locked for more than {_PATIENCE_S:.0f} s by {writer}"
        yield Check("store", "note", said, "runs wait a minute for it, then go on without the store; end it if it hangs")
        return
    try:
        with Store(place, timeout_s=_PATIENCE_S) as store:
            held = store.stats()
    except EvalCacheError as error:
        yield Check("store", "wrong", error.message, held_by(place / "cache.db", place / "cache.db-shm") or error.hint or "")
        return
    size = said_bytes(held.size_bytes)
    yield Check("store", "ok", f"{place}: {held.entries:,} entries, {size}")
    if held.aside:
        yield Check("set aside", "note", f"{held.aside:,} damaged rows", "they were computed again; `evalcache verify` reads all")
    yield Check("journal", "ok", f"{held.journal_rows:,} rows wait for the ledger")


def _writer(place: Path) -> str:
    """Who has been writing to the store for long."""
    beside = place / "cache.db-shm"
    writer = held_by(beside, byte=_WRITES)
    if writer:
        time.sleep(_PATIENCE_S)
    return writer if writer and held_by(beside, byte=_WRITES) == writer else ""


def _ledger(folder: Path) -> Iterator[Check]:
    place = folder / "ledger.duckdb"
    if not place.exists():
        yield Check("ledger", "ok", f"{place} (not made yet)")
        return
    try:
        runs = Ledger(place, lock_timeout_s=_PATIENCE_S).query("SELECT count(*) FROM runs").rows[0][0]
    except LedgerLockedError as error:
        hint = "nothing is lost, what is new waits in the journal; close what has it open to bring it up to date"
        yield Check("ledger", "note", error.message, hint)
    except EvalCacheError as error:
        hint = error.hint or "move it away: what the store holds is told to a new one, runs and scores are lost"
        yield Check("ledger", "wrong", error.message, hint)
    else:
        yield Check("ledger", "ok", f"{place}: {runs:,} runs, {said_bytes(place.stat().st_size)}")


def to_json(checks: list[Check]) -> dict[str, Any]:
    """Stable field names."""
    named = [{"name": one.name, "state": one.state, "found": one.found, "hint": one.hint or None} for one in checks]
    return {"good": is_good(checks), "checks": named}
