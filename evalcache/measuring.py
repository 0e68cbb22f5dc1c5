"""What computing took of the devices: their name and number, peak memory, and energy where a GPU counts it.

Seconds are measured elsewhere (`integrations/timing.py`), batch by batch; this is kept by a process, and told when it syncs or
ends. Where nothing was computed nothing is told, and what cannot be measured is None, never zero.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from evalcache.structs import Frozen

READ_SHARE = 0.001
"""An energy counter is read at most so often that reading it takes less than this share of the time. Some take milliseconds."""


@dataclass(frozen=True, slots=True)  # with a field that is not compared
class Busy:
    """The devices that one model computes on.

    Args:
        device: name as its maker prints it; empty where it is not known, and then nothing is measured.
        places: which of them, by what the process calls them.
        peak_bytes: asks for the most memory that this process has held on them; None where nobody counts it.
        uuids: of GPUs, as NVML knows them; empty where there is none, or where they have no counter.
    """

    device: str
    places: tuple[str, ...] = ("cpu",)
    peak_bytes: Callable[[], int | None] = field(default=lambda: None, compare=False)
    uuids: tuple[str, ...] = ()


class Used(Frozen):
    """What this process has used of one kind of devices; see `journal.Measured`.

    Args:
        device_count: how many this process has used so far. peak_bytes: the most so far, on one of them.
        energy_joules: since this was last asked for.
    """

    device: str
    device_count: int
    peak_bytes: int | None
    energy_joules: float | None


class Meter:
    """Keeps what a process's computing takes of its devices. Thread-safe."""

    def __init__(self, joules: Callable[[Sequence[str]], float | None] | None = None) -> None:
        self._joules = joules or board_joules
        self._lock = threading.RLock()
        self._seen: set[Busy] = set()
        self._energies: dict[tuple[str, ...], _Energy] = {}
        self._new: set[str] = set()

    @contextlib.contextmanager
    def computing(self, busy: Busy) -> Iterator[None]:
        """Around what is computed on ``busy``. Cost: a microsecond, and now and then a reading of the energy counter."""
        if not busy.device:
            yield
            return
        with self._lock:
            self._seen.add(busy)
            self._new.add(busy.device)
            energy = self._energies.setdefault(busy.uuids, _Energy(self._joules, busy)) if busy.uuids else None
            if energy is not None:
                energy.begin()
        try:
            yield
        finally:
            if energy is not None:
                with self._lock:
                    energy.end()

    def used(self) -> list[Used]:
        """What is new since this was last asked for; empty where nothing was computed since."""
        with self._lock:
            found = []
            for device in sorted(self._new):
                seen = [busy for busy in self._seen if busy.device == device]
                places = {place for busy in seen for place in busy.places}
                peaks = [peak for busy in seen if (peak := busy.peak_bytes()) is not None]
                joules = [energy.take() for energy in self._energies.values() if energy.busy.device == device]
                measured = [one for one in joules if one is not None]
                energy_joules = sum(measured) if measured and len(measured) == len(joules) else None
                found.append(Used(device, len(places), max(peaks, default=None), energy_joules))
            self._new.clear()
            return found


class _Energy:
    """Energy of some boards while they compute: differences of their counters, read rarely where reading is slow.

    Between two batches that follow each other within one reading's time the boards count as computing.
    """

    def __init__(self, joules: Callable[[Sequence[str]], float | None], busy: Busy) -> None:
        self.busy = busy
        self._joules = joules
        self._running = 0
        self._open = False  # from `_base` on is still to be counted
        self._base: float | None = None
        self._read_at = -float("inf")
        self._cost_s = 0.0
        self._total = 0.0
        self._failed = False

    def begin(self) -> None:
        self._running += 1
        if self._running == 1 and not self._open:
            if self._due:
                self._base = self._read()
            self._open = True

    def end(self) -> None:
        self._running -= 1
        if self._running == 0 and self._due:
            self._count()

    def take(self) -> float | None:
        """Joules since the last time; None where they could not be read."""
        if self._open:
            self._count()
        total, self._total = self._total, 0.0
        return None if self._failed else total

    @property
    def _due(self) -> bool:
        return time.monotonic() - self._read_at > self._cost_s / READ_SHARE

    def _count(self) -> None:
        """Count what was used up to now."""
        before, self._base = self._base, self._read()
        if before is not None and self._base is not None:
            self._total += max(0.0, self._base - before)
        self._open = self._running > 0

    def _read(self) -> float | None:
        if self._failed:
            return None
        began = time.monotonic()
        joules = self._joules(self.busy.uuids)
        self._failed = joules is None
        self._read_at = time.monotonic()
        self._cost_s = self._read_at - began
        return joules


def process_peak_bytes() -> int | None:
    """The most host memory that this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_nvml: Any = None


def board_joules(uuids: Sequence[str]) -> float | None:
    """The energy counters of whole GPU boards, added up: of all that runs on them, since their driver was loaded.

    None where NVML (the package nvidia-ml-py) is not there, or where one of the boards has no counter (before Volta; a part of a
    GPU under MIG).
    """
    global _nvml
    try:
        if _nvml is None:
            import pynvml  # type: ignore[import-not-found, unused-ignore]

            pynvml.nvmlInit()
            _nvml = pynvml
        handles = [_nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        return sum(_nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000  # it counts millijoules
    except Exception:  # no package, no driver, no counter: each has an error of its own
        return None
