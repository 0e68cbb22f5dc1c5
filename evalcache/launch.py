"""`evalcache run -- CMD`: set the environment, then become the command.

The command is *replaced into* this process (exec), not watched by it: its exit code, stdin, stdout, stderr, terminal, signals and
process id are its own, and there is no parent that could get any of them wrong. Everything we do inside it starts from one
folder on PYTHONPATH (`_site/sitecustomize.py`). A supervising parent was rejected: it would have to forward all of these.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from evalcache.errors import CommandError

SITE_FOLDER = Path(__file__).resolve().parent / "_site"
"""The folder whose ``sitecustomize`` starts evalcache in every Python below the command."""

_PYTHON = re.compile(r"^(python|pypy)\d*(\.\d+)*[a-z]*(\.exe)?$")
_OPTIONS_WITH_VALUE = "WX"


def launch_environment(
    command: Sequence[str],
    base: Mapping[str, str],
    *,
    directory: str | os.PathLike[str] | None = None,
    policy: str | None = None,
    match: str | None = None,
    tags: Sequence[str] = (),
) -> dict[str, str]:
    """The environment under which a command and all its Python children run with evalcache.

    One run id serves all of them (the ranks of a launch, too); an ``EVALCACHE_RUN`` that is already set is kept, so that several
    nodes can share one. Where the policy is ``off`` nothing is added but that policy.

    Args:
        command: what will be run; recorded as the run's command.
        base: the environment to start from; not changed.
        directory: cache folder, made absolute because the command may change its working folder.
        policy, match: set ``EVALCACHE`` and ``EVALCACHE_MATCH``; None leaves what ``base`` says.
        tags: the user's own words for the run, added to those of ``EVALCACHE_TAGS``.
    """
    environment = dict(base)
    if policy is not None:
        environment["EVALCACHE"] = policy
    if match is not None:
        environment["EVALCACHE_MATCH"] = match
    if directory is not None:
        environment["EVALCACHE_DIR"] = os.path.abspath(directory)
    elif environment.get("EVALCACHE_DIR"):
        environment["EVALCACHE_DIR"] = os.path.abspath(os.path.expanduser(environment["EVALCACHE_DIR"]))
    if is_off(environment):
        return environment
    environment.setdefault("EVALCACHE_RUN", uuid.uuid4().hex)
    environment["EVALCACHE_COMMAND"] = shlex.join(command)
    environment["EVALCACHE_ACTIVE"] = "1"
    if tags:
        environment["EVALCACHE_TAGS"] = ",".join([*filter(None, [environment.get("EVALCACHE_TAGS", "").strip(", ")]), *tags])
    # No empty part may be left behind: Python reads it as the current folder.
    parts = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(SITE_FOLDER)]
    environment["PYTHONPATH"] = os.pathsep.join([str(SITE_FOLDER), *parts])
    return environment


def is_off(environment: Mapping[str, str]) -> bool:
    """Whether ``EVALCACHE=off`` asks for nothing at all."""
    return environment.get("EVALCACHE", "").strip().lower() == "off"


def find_unreachable(command: Sequence[str]) -> str | None:
    """The option with which this Python command ignores PYTHONPATH (``-I``, ``-E``) or skips ``sitecustomize`` (``-S``), or None.

    The interpreter line of an installed script is read too. A Python that is started deeper down cannot be seen from here.
    """
    found = _isolating_option(command)
    if found is None and command and (path := shutil.which(command[0])) is not None:
        try:
            with open(path, "rb") as file:
                line = file.readline(4096)
        except OSError:  # may be run but not read: nothing can be said about it
            return None
        if line.startswith(b"#!"):
            found = _isolating_option(line[2:].decode("utf-8", "replace").split())
    return found


def _isolating_option(command: Sequence[str]) -> str | None:
    words = list(command)
    if words and os.path.basename(words[0]) == "env":  # `#!/usr/bin/env -S python -I`, `env NAME=value python -I`
        words = words[1:]
        while words and (words[0] == "-S" or "=" in words[0]):
            words.pop(0)
    if not words or not _PYTHON.match(os.path.basename(words[0])):
        return None
    rest = iter(words[1:])
    for word in rest:
        if not word.startswith("-") or word in ("-", "--"):
            return None
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(rest, None)
            continue
        for place, letter in enumerate(word[1:], start=2):
            if letter in "IES":
                return f"-{letter}"
            if letter in "cm":
                return None
            if letter in _OPTIONS_WITH_VALUE:
                if place == len(word):
                    next(rest, None)
                break
    return None


def cannot_run(command: Sequence[str], error: OSError) -> CommandError:
    """What to raise where a command could not be started: exit code 127 for one that is not there, else 126, as in a shell."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        hint = "is it installed in this environment?"
        return CommandError(f"command not found: {command[0]}", hint=hint, path=command[0], exit_code=127)
    return CommandError(f"cannot run {command[0]}: {error.strerror}", path=command[0], exit_code=126)


def warn_unreachable(command: Sequence[str]) -> None:
    """Say on stderr that a command keeps evalcache out, where it does."""
    if (option := find_unreachable(command)) is not None:
        print(
            f"evalcache: warning: {shlex.join(command[:2])} … is run with {option}, which keeps evalcache out; "
            "nothing will be cached (leave the option out, or call evalcache.enable() in the script)",
            file=sys.stderr,
        )


def run_command(
    command: Sequence[str],
    *,
    directory: str | os.PathLike[str] | None = None,
    policy: str | None = None,
    match: str | None = None,
    tags: Sequence[str] = (),
) -> NoReturn:
    """Become ``command`` with evalcache in it. Returns only by raising.

    Raises:
        CommandError: the command cannot be started (exit code 127: not found, 126: not executable), as a shell has it.
    """
    environment = launch_environment(command, os.environ, directory=directory, policy=policy, match=match, tags=tags)
    if not is_off(environment):
        warn_unreachable(command)
    sys.stdout.flush()
    sys.stderr.flush()
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these two, and what is ignored stays so across exec
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        raise cannot_run(command, error) from error
