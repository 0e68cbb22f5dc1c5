"""What the experiments share: timing side by side, one line about the hardware, JSON that `compare.py` reads.

A shared machine's absolute times drift by a factor of two within minutes; ratios of neighbours do not. So peers take turns,
repeat by repeat, and what is reported is the median of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(name: str, about: str) -> argparse.ArgumentParser:
    """The options that every experiment has: ``--quick`` and ``--json PATH`` (default ``benchmarks/results/<name>.json``)."""
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--quick", action="store_true", help="less work, rougher figures")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", metavar="PATH", help="where the figures go")
    return parser


def hardware(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures were taken on: processor, cores that this process may use, memory, versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "processor": processor,
        "cores": cores,
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def hardware_line(found: Mapping[str, Any]) -> str:
    """`hardware` as one line for people."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    line = f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, {found['system']}, Python {found['python']}"
    return f"{line}, {versions}" if versions else line


def side_by_side(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, taken in turns: one call of every case per repeat, in an order that turns with the repeats."""
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            kept = cases[name]()
            seconds[name].append(time.perf_counter() - start)
            del kept  # freed outside the clock
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median over the repeats of ``over``'s time divided by ``under``'s time in the same repeat."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


@dataclass
class Report:
    """The figures of one run of one experiment.

    Args:
        name: of the experiment. quick: whether it was a short run.
        figures: name → value with its unit in the name. targets: name → (value, comparison, limit, met).
    """

    name: str
    quick: bool
    hardware: Mapping[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    started_at: float = field(default_factory=time.time)

    def add(self, name: str, value: float) -> None:
        """Note a figure and print it."""
        self.figures[name] = value
        print(f"  {name:<58} {value:12.4g}", flush=True)

    def target(self, name: str, value: float, comparison: str, limit: float) -> None:
        """Note whether ``value`` is ``>=`` or ``<=`` its limit, and print it."""
        met = value >= limit if comparison == ">=" else value <= limit
        self.targets[name] = {"value": value, "comparison": comparison, "limit": limit, "met": met}
        print(f"  {'met   ' if met else 'MISSED'} {name:<51} {value:12.4g} ({comparison} {limit:g})", flush=True)

    def write(self, path: Path) -> None:
        """Write the JSON that `compare.py` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "experiment": self.name,
            "quick": self.quick,
            "started_at": self.started_at,
            "hardware": dict(self.hardware),
            "figures": self.figures,
            "targets": self.targets,
        }
        path.write_text(json.dumps(body, indent=2) + "\n")
        print(f"written to {path}")
