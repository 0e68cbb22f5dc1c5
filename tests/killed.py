"""Processes that are killed in the middle of what they do, and what is left of it.

A round: a folder that is a copy of a prepared one; a process of its own that does one thing there (a *phase*) and acknowledges
each part that is done; SIGKILL at a moment of its duration or at a line of its code; and a look at all that is left, by content.

Processes come from a server that has everything imported and nothing open, and forks: a round costs some tenths of a second.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import unittest.mock
import warnings
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from numbered import Fault
from phases import PHASES

from evalcache import ledger as ledgers
from evalcache.errors import EvalCacheError

_LATE = 1.1  # kills are spread over so much of a phase's duration: some come after its end
_PATIENCE_S = 60.0

_PACKAGE = str(Path(ledgers.__file__).parent)


@functools.cache
def fork_server() -> Any:
    """Where processes come from, with this file imported and nothing open."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    # Python 3.11 does not hand its path on to what is imported beforehand.
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


Line = tuple[str, int]
"""A line of evalcache's own source: file and number."""


def _watch_lines(reached: Counter[Line], fatal: tuple[Line, int] | None) -> None:
    """Count the lines that this thread reaches from here on, and have it killed when it reaches one for the n-th time."""

    def at_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            reached[line] += 1
            if fatal is not None and line == fatal[0] and reached[line] == fatal[1]:
                os.kill(os.getpid(), signal.SIGKILL)
        return at_line

    sys.settrace(lambda frame, event, _: at_line if frame.f_code.co_filename.startswith(_PACKAGE) else None)


def _act(phase: str, folder: Path, connection: Connection, at: tuple[Line, int] | None, counting: bool) -> None:
    """In a process of its own. A message is one write: it arrives whole or not at all."""
    warnings.simplefilter("error")  # nothing may even look damaged
    reached: Counter[Line] = Counter()
    connection.send("begun")
    try:
        if counting or at is not None:
            _watch_lines(reached, at)
        PHASES[phase].act(folder, connection.send)
        sys.settrace(None)
        connection.send(reached)
        connection.send("done")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
    signal.pause()  # for the kill: whoever is waited for is not replaced by another process of the same id


@dataclass
class Campaign:
    """Rounds of one phase.

    Half of the kills come at moments of the phase's duration, most of which passes in few places (in a COMMIT, in Parquet); the
    others at lines of evalcache's own code that it runs through.

    Args:
        scratch: a folder for it alone. prepared: by `prepare`.
    """

    phase: str
    scratch: Path
    prepared: Path
    rounds: int = 0
    late: int = 0
    """Rounds whose kill came when everything was done."""
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = self.scratch / "template"
        shutil.copytree(self.prepared, self._template)
        PHASES[self.phase].prepare(self._template)
        _, self.duration_s = self._do()
        self.lines: Counter[Line] = next(word for word in self._do(counting=True)[0] if isinstance(word, Counter))

    def run(self, rounds: int, seed: int = 0) -> list[Fault]:
        """Kill so many times, once in each of as many equal parts of the whole, and look after each; returns the faults."""
        draw = random.Random(f"{self.phase} {seed}")
        lines = sorted(self.lines)
        for place in draw.sample(range(rounds), rounds):
            share = (place + draw.random()) / rounds
            if place % 2:
                line = lines[int(share * len(lines))]
                said, _ = self._do(at=(line, draw.randint(1, self.lines[line])))
            else:
                said, _ = self._do(moment_s=share * _LATE * self.duration_s)
            finished = said[-1:] == ["done"]
            self.rounds += 1
            self.late += finished
            self.faults += self._look([word for word in said if isinstance(word, int)], finished)
        return self.faults

    @property
    def _folder(self) -> Path:
        return self.scratch / "round"

    def _do(
        self, *, moment_s: float | None = None, at: tuple[Line, int] | None = None, counting: bool = False
    ) -> tuple[list[Any], float]:
        """One process, killed at a moment, at a line, or when it has finished; what it said, and how long it took."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._template, self._folder)
        context = fork_server()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_act, args=(self.phase, self._folder, theirs, at, counting))
        process.start()
        theirs.close()
        said: list[Any] = []

        def hear(until: str | None) -> None:
            with contextlib.suppress(EOFError):  # in the middle of a message, too
                while (not said or said[-1] != until) and ours.poll(_PATIENCE_S):
                    said.append(ours.recv())

        with ours:
            hear("begun")
            began = time.perf_counter()
            if moment_s is None:
                hear("done")
            else:
                time.sleep(moment_s)
            took_s = time.perf_counter() - began
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            hear(None)
        process.join(_PATIENCE_S)
        finished = said[-1:] == ["done"]
        if said[:1] != ["begun"] or process.exitcode != -signal.SIGKILL or not (finished or moment_s is not None or at):
            raise AssertionError(f"{self.phase} ended with {process.exitcode}: {said[-1:]}")
        if failed := [word for word in said[1:] if isinstance(word, str) and word != "done"]:
            raise AssertionError(f"{self.phase} failed: {failed}")
        return said, took_s

    def _look(self, acknowledged: list[Any], finished: bool) -> list[Fault]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return PHASES[self.phase].look(self._folder, acknowledged, finished)
            except (EvalCacheError, Warning) as error:
                return [Fault("damaged", f"{type(error).__name__}: {error}")]
