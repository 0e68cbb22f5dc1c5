"""Show two runs of an experiment beside each other: ``python benchmarks/compare.py OLD.json NEW.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import hardware_line


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The lines of the table: every figure of either run, its two values and new / old; then the targets."""
    lines = []
    for label, run in (("old", old), ("new", new)):
        lines.append(f"{label}: {run['experiment']}{' (quick)' if run['quick'] else ''} on {hardware_line(run['hardware'])}")
    names = list(dict.fromkeys([*old["figures"], *new["figures"]]))
    wide = max((len(name) for name in [*names, *old["targets"], *new["targets"]]), default=6)
    lines.append(f"{'figure':<{wide}} {'old':>12} {'new':>12} {'new/old':>8}")
    for name in names:
        left, right = old["figures"].get(name), new["figures"].get(name)
        change = f"{right / left:8.2f}" if left and right is not None else f"{'–':>8}"
        lines.append(f"{name:<{wide}} {_figure(left)} {_figure(right)} {change}")
    for name in dict.fromkeys([*old["targets"], *new["targets"]]):
        left, right = (run["targets"].get(name) for run in (old, new))
        limit = f"{(right or left)['comparison']} {(right or left)['limit']:g}"
        lines.append(f"{name:<{wide}} {_target(left):>12} {_target(right):>12} {limit:>8}")
    return lines


def _figure(value: float | None) -> str:
    return f"{'–':>12}" if value is None else f"{value:12.4g}"


def _target(found: dict[str, Any] | None) -> str:
    return "–" if found is None else "met" if found["met"] else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    chosen = parser.parse_args()
    print("\n".join(compare(json.loads(chosen.old.read_text()), json.loads(chosen.new.read_text()))))


if __name__ == "__main__":
    main()
