"""Who has a file locked, as far as the system tells."""

from __future__ import annotations

import os
import re
from pathlib import Path


def held_by(*files: Path, byte: int | None = None) -> str:
    """Who has a lock on one of these files (for writing, on this byte), as far as the system tells (Linux)."""
    try:
        inodes = {file.stat().st_ino for file in files if file.exists()}
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    for line in locks:
        found = re.search(r" (READ|WRITE) +(\d+) [0-9a-f]+:[0-9a-f]+:(\d+) (\d+) (\d+|EOF)", line)
        if not found or int(found[3]) not in inodes or int(found[2]) in (0, os.getpid()):
            continue
        end = float("inf") if found[5] == "EOF" else int(found[5])
        if byte is None or (found[1] == "WRITE" and int(found[4]) <= byte <= end):
            return process_name(int(found[2]))
    return ""


def holder_in(error: BaseException) -> str:
    """The process that an error of DuckDB's names, if it names one."""
    found = re.search(r"PID (\d+)", str(error))  # DuckDB names the process, if it is of this user
    return process_name(int(found[1])) if found else ""


def process_name(pid: int) -> str:
    """A process, for a person."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = ""
    command = " ".join(command.split())  # a script on the command line has several lines
    return f"process {pid}: {command[:80]}" if command else f"process {pid}"
