"""One process of a client, bare or with evalcache in it: what it took, what it answered, whether it opened the weights."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
_IN_OPEN = 0x20


@dataclass(frozen=True)
class Ask:
    """What one process is asked to do.

    Args:
        out: folder for what it writes; does not exist yet.
        store: evalcache's folder; None: bare.
        own: folder of the client's own cache; None: without.
        one: one document of each task instead of all.
        sampled: the task whose answers are drawn, where that takes a run of its own (`Client.samples_apart`).
    """

    out: Path
    store: Path | None = None
    own: Path | None = None
    one: bool = False
    sampled: bool = False


@dataclass
class Ran:
    """One process: its seconds, answers by task, how often weights were opened, what evalcache says of its run."""

    wall_s: float
    cpu_s: float
    answers: dict[str, list[Any]]
    opened: int | None
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def overhead_s(self) -> float:
        """evalcache's own share of the wall seconds, as its run counted it."""
        return self.told["overhead_seconds"]


class Client(ABC):
    """An eval client and its documents for one tiny model. What differs from client to client: `command` and `answers`."""

    name = ""
    has_own_cache = False
    samples_apart = False
    exit_code = 0

    def __init__(self, folder: Path, documents: int) -> None:
        from harness_tasks import make_model

        self.folder = folder
        self.documents = documents
        self.model = make_model(folder / "model", hidden_size=256, intermediate_size=768, num_hidden_layers=6)

    @abstractmethod
    def command(self, ask: Ask) -> list[str]:
        """As it is typed, in the client's folder."""

    @abstractmethod
    def answers(self, ask: Ask) -> dict[str, list[Any]]:
        """What it wrote: an answer for each document, by task."""

    def environment(self, ask: Ask) -> dict[str, str]:
        """What its environment has beside ours."""
        return {}

    def run(self, ask: Ask) -> Ran:
        """Run one process to its end."""
        ask.out.mkdir()
        opened = Opened(self.model)
        environment = self._environment(ask)
        began = time.perf_counter()
        with (ask.out / "process.log").open("w+") as log:
            command = with_evalcache(self.command(ask), ask.store)
            process = subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
            try:
                self.converse(ask, process)
                _, status, used = os.wait4(process.pid, 0)  # what it used; `wait` does not say
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()
            wall_s = time.perf_counter() - began
            if process.returncode != self.exit_code:
                log.seek(0)
                raise SystemExit(f"{self.name} ended with {process.returncode}: {log.read()}")
        told = told_of(environment) if ask.store else {}
        return Ran(wall_s, used.ru_utime + used.ru_stime, self.answers(ask), opened.count(), told)

    def converse(self, ask: Ask, process: subprocess.Popen[bytes]) -> None:  # noqa: B027  most clients ask by themselves
        """What there is to do until the process ends."""

    def edit(self) -> None:
        """One layer, in place: the same folder, the same name, another model."""
        from safetensors.torch import load_file, save_file

        (file,) = self.model.glob("*.safetensors")
        tensors = load_file(file)
        tensors["model.layers.5.mlp.down_proj.weight"].mul_(-1)
        save_file(tensors, file, metadata={"format": "pt"})

    def _environment(self, ask: Ask) -> dict[str, str]:
        # With bytecode, as an installed package has it: of a checkout, evalcache alone would be compiled at each start.
        dropped = ("EVALCACHE", "PYTHONDONTWRITEBYTECODE")
        ours = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        ours |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ours |= {"HF_DATASETS_CACHE": str(self.folder / "datasets")} | self.environment(ask)
        return ours | ({"EVALCACHE_DIR": str(ask.store)} if ask.store else {})


class Opened:
    """Counts how often a model's weights are opened, by whatever means: inotify sees what Rust and C do, too. Linux only."""

    def __init__(self, model: Path) -> None:
        self._descriptor = -1
        if sys.platform == "linux":
            (file,) = model.glob("*.safetensors")
            libc = ctypes.CDLL(None)
            self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            libc.inotify_add_watch(self._descriptor, os.fsencode(file), _IN_OPEN)

    def count(self) -> int | None:
        """Since it was made; None where that is not known. Events have 16 bytes each. To be asked once."""
        if self._descriptor < 0:
            return None
        try:
            return len(os.read(self._descriptor, 1 << 16)) // 16
        except BlockingIOError:
            return 0
        finally:
            os.close(self._descriptor)


def with_evalcache(command: list[str], store: Path | None) -> list[str]:
    """The same command under ``evalcache run``, where there is a store."""
    return [str(BIN / "evalcache"), "run", "--", *command] if store else command


def told_of(environment: dict[str, str]) -> dict[str, Any]:
    """What evalcache says of the run that ended last."""
    stats = [str(BIN / "evalcache"), "stats", "--run", "last", "--json"]
    return json.loads(subprocess.run(stats, env=environment, capture_output=True, text=True, check=True).stdout)


def differing(left: dict[str, list[Any]], right: dict[str, list[Any]]) -> int:
    """How many answers differ by more than the last bits of floats; all of them where the tasks do not match."""
    if left.keys() != right.keys() or any(len(left[name]) != len(right[name]) for name in left):
        return max(sum(map(len, left.values())), sum(map(len, right.values())))
    return sum(not same(*pair) for name in left for pair in zip(left[name], right[name], strict=True))


def same(left: Any, right: Any) -> bool:
    """Equal but for the last bits of floats."""
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    try:  # as text in lm_eval's files
        return abs(float(left) - float(right)) <= 1e-4 * max(1.0, abs(float(left)))
    except (TypeError, ValueError):
        return left == right
