"""The figures of an audit: what each one is, and how sums by device become a row of them. Pure.

Prices are applied here, when a report is made. What has no price or no measure is None, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evalcache.prices import Price, Prices
from evalcache.structs import Frozen, replace


class Figure(Frozen):
    """What one figure is: its unit, the view that it can be checked with, and what it means."""

    unit: str
    view: str
    meaning: str


_R, _L = "audit_requests", "audit_loads"
FIGURES: Mapping[str, Figure] = {
    "requests": Figure("requests", _R, "all that were asked: hits, misses, uncacheables and duplicates"),
    "hits": Figure("requests", _R, "answered from the store"),
    "own_hits": Figure("requests", _R, "hits on what the same run had computed before; no saving"),
    "imported_hits": Figure("requests", _R, "hits on what was computed by a run that this ledger does not know"),
    "misses": Figure("requests", _R, "computed, because the store had no answer"),
    "uncacheable": Figure("requests", _R, "computed as if evalcache were not there"),
    "duplicates": Figure("requests", _R, "merged with an equal request of the same call"),
    "unmeasured_hits": Figure("requests", _R, "hits whose entries have no measured cost; credited nothing"),
    "spent_seconds": Figure("s", _R, "measured for misses and uncacheables; uncacheables that nobody timed are not in it"),
    "credited_seconds": Figure("s", _R, "what the hits' entries cost when earlier runs of this ledger computed them"),
    "imported_seconds": Figure("s", _R, "the same for entries that were computed by runs which this ledger does not know"),
    "reused_seconds": Figure("s", _R, "credited and imported"),
    "first_computed_seconds": Figure("s", _R, "what the entries behind reused_seconds cost, each counted once; does not add up"),
    "duplicate_seconds": Figure("s", _R, "what duplicates and own hits would have cost; in no other figure"),
    "overhead_seconds": Figure("s", _R, "that evalcache itself took; measured for a run, an equal share for each request"),
    "verification_seconds": Figure(
        "s", _R, "spent on verification: checks of models, and probes; in overhead once, in no other figure"
    ),
    "net_seconds": Figure("s", _R, "reused less overhead; may be negative"),
    "loads": Figure("loads", _L, "models that were loaded"),
    "load_seconds": Figure("s", _L, "that this took; in no other figure"),
    "avoided_loads": Figure("loads", _L, "models of which all was hit and none was loaded, and that an earlier run had loaded"),
    "avoided_load_seconds": Figure("s", _L, "the last earlier load of each of them on the same device; in no other figure"),
    "unmeasured_loads": Figure(
        "loads", _L, "avoided loads of models that no earlier run loaded on that device; credited nothing"
    ),
    "hit_rate": Figure("share", _R, "hits over hits, misses and uncacheables"),
    "hit_rate_by_seconds": Figure("share", _R, "reused over reused and spent: this is the one that counts"),
    "money_spent": Figure("currency", _R, "spent_seconds at the price of their device"),
    "money_reused": Figure("currency", _R, "reused_seconds at the price of the device that they were measured on"),
    "money_overhead": Figure("currency", _R, "overhead_seconds at the price of the run's device, as if it stood still meanwhile"),
    "money_net": Figure("currency", _R, "money_reused less money_overhead"),
    "energy_measured_joules": Figure("J", "run_devices", "by the devices' own meters while they computed; null without meters"),
    "energy_spent_joules": Figure("J", _R, "spent_seconds times rated watts: an upper bound"),
    "energy_reused_joules": Figure("J", _R, "reused_seconds times rated watts: an upper bound"),
    "carbon_spent_grams": Figure("g", _R, "energy_spent_joules times the grid factor that was named"),
    "carbon_reused_grams": Figure("g", _R, "energy_reused_joules times the grid factor that was named"),
}
UNKNOWN_DEVICE = "device not known"
MEASURED_BOUNDARY = "the device's board, by its own meter (NVML), while it computed; no host, no cooling (PUE)"

_COUNTS = ("requests", "hits", "own_hits", "imported_hits", "misses", "uncacheable", "duplicates", "unmeasured_hits")
_SECONDS = (
    "spent_seconds",
    "credited_seconds",
    "imported_seconds",
    "duplicate_seconds",
    "overhead_seconds",
    "verification_seconds",
)
_LOADS = ("loads", "load_seconds", "avoided_loads", "avoided_load_seconds", "unmeasured_loads")
NO_LOADS = (0, 0.0, 0, 0.0, 0)
"""The figures of `_LOADS` of a group without any."""


class Row(Frozen):
    """One row of a report. ``group``: None stands for requests that have none (no tag, no model, …). ``name``: for a person."""

    group: str | None
    name: str | None
    figures: Mapping[str, Any]

    def without_money(self) -> Row:
        """The same with null in the place of all money."""
        figures = {name: None if name.startswith("money") else value for name, value in self.figures.items()}
        return replace(self, figures=figures)

    def to_json(self) -> dict[str, Any]:
        """Group, name and figures beside each other."""
        return {"group": self.group, "name": self.name, **self.figures}


class Report(Frozen):
    """An audit of some runs.

    Args:
        by: what the rows are grouped by. run, since: which runs were asked for. runs: how many there are.
        rows: what belongs to each group; total: of all. Rows add up to it, but for a run with several tags, which is in several.
        uncacheable: reasons with requests and seconds. misses: causes likewise, with what had changed.
        expensive: the requests that took the most seconds, of those that were computed.
        currency: of the figures of money; None where nothing has a price, or prices are in several currencies, which have no sum.
        components: rows whose forward began above the first layer, and the seconds that this spared; in no other figure.
        missing_prices: devices whose seconds have no price. prices: those that were used. grid: grams of CO₂e per kWh.
    """

    by: str
    run: str | None
    since: str | None
    runs: int
    rows: Sequence[Row]
    total: Row
    uncacheable: Sequence[Mapping[str, Any]]
    misses: Sequence[Mapping[str, Any]]
    expensive: Sequence[Mapping[str, Any]]
    currency: str | None
    missing_prices: Sequence[str]
    missing_watts: Sequence[str]
    prices: Sequence[Price]
    grid: float | None
    components: tuple[int, float] = (0, 0.0)

    @property
    def boundaries(self) -> dict[str, str]:
        """What each figure of energy is about."""
        told = "; ".join(
            dict.fromkeys(price.boundary or "as the price's watts were given" for price in self.prices if price.watts)
        )
        reckoned = f"{told or 'no watts are known'}; no host, no cooling (PUE)"
        names = ("energy_spent_joules", "energy_reused_joules", "carbon_spent_grams", "carbon_reused_grams")
        return {"energy_measured_joules": MEASURED_BOUNDARY} | dict.fromkeys(names, reckoned)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the unit, view, meaning and boundary of each figure."""
        boundaries = self.boundaries
        figures = {
            name: {"unit": figure.unit, "view": self.view(name), "meaning": figure.meaning}
            | ({"boundary": boundaries[name]} if name in boundaries else {})
            for name, figure in FIGURES.items()
        }
        return {
            "by": self.by,
            "run": self.run,
            "since": self.since,
            "runs": self.runs,
            "total": dict(self.total.figures),
            "rows": [row.to_json() for row in self.rows],
            "uncacheable": list(self.uncacheable),
            "misses": list(self.misses),
            "expensive": list(self.expensive),
            "currency": self.currency,
            "missing_prices": list(self.missing_prices),
            "missing_watts": list(self.missing_watts),
            "prices": [price.to_json() for price in self.prices],
            "grid_grams_per_kwh": self.grid,
            "figures": figures,
            "views": {"uncacheable": "uncacheable_by_reason", "misses": "miss_reasons", "expensive": "lookups_once"},
        }

    def view(self, name: str) -> str:
        """The view that a figure of this report can be checked with."""
        ready = {"run": "audit_by_run", "task": "audit_by_task"}.get(self.by)
        figure = FIGURES[name]
        computed = name.startswith(("money", "energy", "carbon", "first"))
        return ready if ready and figure.view == _R and not computed else figure.view


class Counted:
    """Sums with prices; remembers which prices were used, and which were missing."""

    def __init__(self, prices: Prices, grid: float | None) -> None:
        self.used: dict[Price, None] = {}
        self.missing_prices: set[str] = set()
        self.missing_watts: set[str] = set()
        self._prices = prices
        self._grid = grid
        self._known: dict[str | None, Price | None] = {}

    @property
    def currencies(self) -> list[str]:
        """Those that the prices are in which were used."""
        return sorted({price.currency for price in self.used})

    def figures(
        self, rows: Iterable[Mapping[str, Any]], first_computed: float, loads: Sequence[Any] | None, joules: float | None
    ) -> dict[str, Any]:
        """The figures of one group, from its sums by device."""
        rows = list(rows)
        found: dict[str, Any] = {name: sum(row[name] for row in rows) for name in _COUNTS}
        found |= {name: sum((row[name] for row in rows), 0.0) for name in _SECONDS}
        found["reused_seconds"] = found["credited_seconds"] + found["imported_seconds"]
        found["first_computed_seconds"] = first_computed
        found["net_seconds"] = found["reused_seconds"] - found["overhead_seconds"]
        found |= dict(zip(_LOADS, loads or [None] * len(_LOADS), strict=True))
        asked = found["hits"] + found["misses"] + found["uncacheable"]
        costs = found["reused_seconds"] + found["spent_seconds"]
        found["hit_rate"] = found["hits"] / asked if asked else None
        found["hit_rate_by_seconds"] = found["reused_seconds"] / costs if costs else None
        spent = [(row["device"], row["device_count"], row["spent_seconds"]) for row in rows]
        reused = [(row["device"], row["device_count"], row["credited_seconds"] + row["imported_seconds"]) for row in rows]
        own = [(row["run_device"], row["run_device_count"], row["overhead_seconds"]) for row in rows]
        for name, parts in (("spent", spent), ("reused", reused), ("overhead", own)):
            found[f"money_{name}"] = self._money(parts)
        found["money_net"] = _less(found["money_reused"], found["money_overhead"])
        found["energy_measured_joules"] = joules
        for name, parts in (("spent", spent), ("reused", reused)):
            energy = self._joules(parts)
            found[f"energy_{name}_joules"] = energy
            found[f"carbon_{name}_grams"] = None if energy is None or self._grid is None else energy / 3.6e6 * self._grid
        return {name: found[name] for name in FIGURES}

    def _money(self, parts: Iterable[tuple[str | None, int, float]]) -> float | None:
        total: float | None = 0.0
        for device, count, seconds in parts:
            price = self._price(device) if seconds else None
            if seconds and price is None:
                self.missing_prices.add(device or UNKNOWN_DEVICE)
                total = None
            elif price is not None:
                self.used[price] = None
                total = None if total is None else total + seconds / 3600 * price.per_hour * count
        return total

    def _joules(self, parts: Iterable[tuple[str | None, int, float]]) -> float | None:
        total: float | None = 0.0
        for device, count, seconds in parts:
            price = self._price(device) if seconds else None
            if seconds and (price is None or price.watts is None):
                self.missing_watts.add(device or UNKNOWN_DEVICE)
                total = None
            elif price is not None and price.watts is not None:
                self.used[price] = None
                total = None if total is None else total + seconds * price.watts * count
        return total

    def _price(self, device: str | None) -> Price | None:
        if device not in self._known:
            self._known[device] = self._prices.of(device)
        return self._known[device]


def _less(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
