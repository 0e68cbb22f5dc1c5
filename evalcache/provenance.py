"""Where a run comes from: its command, the versions that it runs on, and the commit of the folder that it was started in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from evalcache.journal import RunStarted
from evalcache.records import Policy


def describe_run(run: str, policy: Policy, match: str, client: str = "", client_version: str = "") -> RunStarted:
    """The event that a run of this process begins with. ``client``: the eval framework, where one asks."""
    return RunStarted(
        run=run,
        started_at=time.time(),
        command=os.environ.get("EVALCACHE_COMMAND") or " ".join(sys.argv),
        client=client,
        client_version=client_version,
        versions=_versions(),
        git_commit=_git_commit(),
        host=socket.gethostname(),
        policy=policy.value,
        match=match,
        tags=tuple(tag for one in os.environ.get("EVALCACHE_TAGS", "").split(",") if (tag := one.strip())),
    )


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in ("evalcache", "torch", "transformers", "peft", "lm_eval", "inspect_ai", "lighteval"):
        module = sys.modules.get(package)
        if module is not None and isinstance(version := getattr(module, "__version__", None), str):
            versions[package] = str(version)
    return versions


def _git_commit() -> str | None:
    """Commit of the folder that the run was started in, if it is a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
