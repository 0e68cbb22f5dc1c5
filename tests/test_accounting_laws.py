"""Laws of the audit, on ledgers that are made up and real files: what adds up, what is subtracted, what is never counted twice.

Every ledger is also counted again here, event by event in plain Python, by rules that are written down a second time.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from recorded import BASE, NOON, TUNED, make_action, make_result, write

from evalcache.audit import BY, audit
from evalcache.cache import Cache
from evalcache.digest import Digest, digest_bytes
from evalcache.figures import FIGURES
from evalcache.journal import Event, LookedUp, Measured, ModelLoaded, ModelSeen, Overhead, RunEnded, RunStarted
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest, ModuleRecord
from evalcache.prices import Price, Prices
from evalcache.records import Action, Cost, Environment, Fields, Request, Result, pack_tokens
from evalcache.store import Store
from evalcache.watch import Watch

ADDITIVE = [name for name, figure in FIGURES.items() if figure.unit != "share" and name != "first_computed_seconds"]
LOADS = [name for name in FIGURES if "load" in name]
DEVICES = ("NVIDIA H200", "NVIDIA L4", "")
ELSEWHERE = "e" * 32  # a run that no ledger here knows
PRICES = Prices([Price("*H200*", 3.0, "EUR", 700.0), Price("*L4*", 0.5, "EUR", 72.0)])

# What one request was: (line, key, task, role, seconds, device). Seconds are eighths, so that any order of adding is exact.
eighths = st.integers(0, 80).map(lambda n: n / 8)
asked = st.tuples(
    st.sampled_from(["credited", "imported", "own", "duplicate", "miss", "uncacheable"]),
    st.integers(0, 5),
    st.sampled_from(["", "gsm8k", "mmlu"]),
    st.sampled_from(["", "judge"]),
    st.none() | eighths,
    st.sampled_from(DEVICES),
)


@dataclass(frozen=True)
class Run:
    """A run that is made up: calls are lists of requests."""

    calls: Sequence[Sequence[tuple[str, int, str, str, float | None, str]]]
    overhead: dict[str, float]
    tags: tuple[str, ...]
    model: Manifest
    loads: Sequence[float]
    measured: Sequence[tuple[str, int, float | None]]


runs_made = st.builds(
    Run,
    calls=st.lists(st.lists(asked, min_size=1, max_size=6), max_size=3),
    overhead=st.dictionaries(st.sampled_from(["fingerprint", "checks", "probe", "lookup", "sync"]), eighths, max_size=3),
    tags=st.lists(st.sampled_from(["nightly", "small"]), max_size=2, unique=True).map(tuple),
    model=st.sampled_from([BASE, TUNED]),
    loads=st.lists(eighths, max_size=2),
    measured=st.lists(st.tuples(st.sampled_from(DEVICES[:2]), st.integers(1, 4), st.none() | eighths), max_size=2),
)
ledgers = st.lists(runs_made, min_size=1, max_size=4)


def run_id(number: int) -> str:
    return f"{number + 1:032x}"


def key_of_place(place: int) -> Digest:
    return digest_bytes(f"key {place}".encode())


def events_of(number: int, run: Run) -> Iterator[Event]:
    """What a run tells. Hits of a first run name it as their origin only where they are its own."""
    name, at = run_id(number), NOON + 1000 * number
    yield RunStarted(name, at, "python eval.py", client="lm_eval", tags=run.tags)
    yield ModelSeen(name, run.model.root.value, "model")
    for seconds in run.loads:
        yield ModelLoaded(name, run.model.root.value, seconds)
    for calls, call in enumerate(run.calls):
        outcomes, reasons, origins = [], [], []
        for line, *_ in call:
            outcomes.append("hit" if line in ("credited", "imported", "own") else line)
            reasons.append({"own": "own", "miss": "absent", "uncacheable": "streamer: a test"}.get(line, ""))
            origins.append({"credited": run_id(0), "imported": ELSEWHERE, "own": name}.get(line, ""))
        for role in ("", "judge"):
            rows = [place for place, one in enumerate(call) if one[3] == role]
            if rows:
                yield LookedUp(
                    name, at + 10 * calls, run.model.root.value, "lm_eval", role,
                    tuple(b"" if outcomes[n] == "uncacheable" else key_of_place(call[n][1]).value for n in rows),
                    tuple(outcomes[n] for n in rows), tuple(reasons[n] for n in rows), tuple(call[n][4] for n in rows),
                    tuple(call[n][2] for n in rows), tuple("" for n in rows),
                    tuple(call[n][5] for n in rows), tuple(origins[n] for n in rows),
                )  # fmt: skip
    if run.overhead:
        yield Overhead(name, at + 50, run.overhead)
    for device, count, joules in run.measured:
        yield Measured(name, at + 60, device, count, 1 << 30, joules)
    yield RunEnded(name, at + 99, "ok", 0)


class Made:
    """A store and a ledger in files, from runs that are made up."""

    def __init__(self, folder: str, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.store = Store(Path(folder) / "store")
        self.ledger = Ledger(Path(folder) / "ledger.duckdb")
        for number, run in enumerate(runs):
            write(self.store, run_id(number), NOON + 1000 * number, (), list(events_of(number, run)), run.model)
        self.ledger.sync(self.store)

    def report(self, run: str | None = None, by: str = "run", prices: Prices = PRICES) -> Any:
        return audit(self.ledger, run, by=by, prices=prices, grid=400.0)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Any]:
    """Opens a new folder for each example of a test."""
    opened = []

    def make(runs: Sequence[Run]) -> Made:
        made = Made(tempfile.mkdtemp(dir=tmp_path), runs)
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.store.close()


# An example takes half a second: a failing one is shown as it is found, for to make it smaller would take minutes.
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FEW = settings(max_examples=6, deadline=None, phases=UNSHRUNK, suppress_health_check=QUIET)
MANY = settings(FEW, max_examples=150)


def added(rows: Sequence[Any], name: str) -> float | None:
    """The sum of a figure over rows; None where one of them has none (money without a price), or all (energy without a meter)."""
    values = [row.figures[name] for row in rows]
    if name == "energy_measured_joules":
        known = [value for value in values if value is not None]
        return sum(known) if known else None
    return None if any(value is None for value in values) else sum(values)


def same(left: float | None, right: float | None) -> bool:
    return left is right or (left is not None and right is not None and left == pytest.approx(right, rel=1e-9, abs=1e-9))


def check_all_laws(made: Made) -> None:
    """Every law that holds for one ledger."""
    whole = made.report()
    check_recounted(made, whole)
    for by, how in BY.items():
        found = made.report(by=by)
        for row in [*found.rows, found.total]:
            check_row(row.figures)
        assert all(same(whole.total.figures[name], found.total.figures[name]) for name in FIGURES), by
        if by == "tag":
            continue
        untold = ({*LOADS} if not how.load else set()) | ({"energy_measured_joules"} if not how.energy else set())
        for name in ADDITIVE:  # shares add up, where a figure can be told apart by this
            if name in untold:
                assert all(row.figures[name] is None for row in found.rows)
            else:
                assert same(added(found.rows, name), found.total.figures[name]), (by, name)
    # Reports over each run add up to the report over all.
    parts = [made.report(run_id(number)).total for number in range(len(made.runs))]
    for name in ADDITIVE:
        assert same(added(parts, name), whole.total.figures[name]), name
    check_views(made, whole)


def check_row(figures: dict[str, Any]) -> None:
    """What holds within each row."""
    assert figures["net_seconds"] == figures["credited_seconds"] + figures["imported_seconds"] - figures["overhead_seconds"]
    assert figures["reused_seconds"] == figures["credited_seconds"] + figures["imported_seconds"]
    assert figures["requests"] == figures["hits"] + figures["misses"] + figures["uncacheable"] + figures["duplicates"]
    assert figures["verification_seconds"] <= figures["overhead_seconds"] + 1e-9
    if None not in (figures["money_reused"], figures["money_overhead"]):
        assert figures["money_net"] == figures["money_reused"] - figures["money_overhead"]
    for name in ("hit_rate", "hit_rate_by_seconds"):
        assert figures[name] is None or 0 <= figures[name] <= 1


def check_recounted(made: Made, report: Any) -> None:
    """Line by line the same as by a plain count of the events."""
    for row in report.rows:
        run = made.runs[int(row.group, 16) - 1]
        seconds: Counter[str] = Counter()
        count: Counter[str] = Counter()
        first: dict[int, float] = {}
        for line, key, _, _, cost_s, _ in (one for call in run.calls for one in call):
            count[line] += 1
            seconds[line] += cost_s or 0.0
            if line in ("credited", "imported") and cost_s is not None:
                first[key] = max(first.get(key, 0.0), cost_s)
        found = row.figures
        assert found["hits"] == count["credited"] + count["imported"] + count["own"]
        assert (found["own_hits"], found["imported_hits"]) == (count["own"], count["imported"])
        assert (found["misses"], found["uncacheable"], found["duplicates"]) == (
            count["miss"], count["uncacheable"], count["duplicate"],
        )  # fmt: skip
        assert found["credited_seconds"] == seconds["credited"]  # never a run's own, nor a duplicate
        assert found["imported_seconds"] == seconds["imported"]
        assert found["duplicate_seconds"] == seconds["duplicate"] + seconds["own"]
        assert found["spent_seconds"] == seconds["miss"] + seconds["uncacheable"]
        assert found["first_computed_seconds"] == sum(first.values())
        assert found["overhead_seconds"] == pytest.approx(sum(run.overhead.values()))
        verification = sum(spent for kind, spent in run.overhead.items() if kind in ("checks", "probe"))
        assert found["verification_seconds"] == pytest.approx(verification)  # a part of overhead, which net has lost once
        reused = sum(cost_s or 0.0 for call in run.calls for line, _, _, _, cost_s, _ in call if line in ("credited", "imported"))
        assert found["net_seconds"] == pytest.approx(reused - sum(run.overhead.values()))
        assert (found["loads"], found["load_seconds"]) == (len(run.loads), sum(run.loads))
        assert tuple(found[name] for name in SPARED) == spared_load(made.runs, int(row.group, 16) - 1)
        joules = [energy for _, _, energy in run.measured if energy is not None]
        assert found["energy_measured_joules"] == (sum(joules) if joules else None)


SPARED = ("avoided_loads", "avoided_load_seconds", "unmeasured_loads")


def spared_load(runs: Sequence[Run], number: int) -> tuple[int, float, int]:
    """A run that hit everything and loaded nothing is spared what the last run before it that loaded the model on a device that
    its answers were computed on took for the last load; nothing where no run before it loaded it there."""

    def devices(run: Run, lines: Sequence[str]) -> set[str]:
        return {device for call in run.calls for line, *_, device in call if line in lines and device}

    run = runs[number]
    lines = {line for call in run.calls for line, *_ in call}
    elder = [one for one in runs[:number] if one.model is run.model and one.loads]
    if "miss" in lines or not lines & {"credited", "imported", "own"} or run.loads or not elder:
        return (0, 0.0, 0)
    there = devices(run, ("credited", "imported", "own"))
    for one in reversed(elder):
        if (devices(one, ("miss",)) or {device for device, _, _ in one.measured}) & there:
            return (1, one.loads[-1], 0)
    return (1, 0.0, 1)


def check_views(made: Made, report: Any) -> None:
    """The named views say the same as the report."""
    columns = [name for name, figure in FIGURES.items() if figure.unit in ("requests", "s", "share", "loads")]
    columns = [name for name in columns if name not in ("reused_seconds", "first_computed_seconds")]
    told = {row[0]: row[1:] for row in made.ledger.query(f"SELECT run, {', '.join(columns)} FROM audit_by_run").rows}
    assert len(told) == len(report.rows)
    for row in report.rows:
        assert all(same(value, row.figures[name]) for name, value in zip(columns, told[row.group], strict=True))
    by_task = [name for name in columns if "load" not in name]
    for row in made.report(by="task").rows:
        task = "" if row.group is None else row.group.removeprefix("lm_eval:")
        sums = ", ".join(f"sum({name})" for name in by_task if not name.startswith("hit_rate"))
        (found,) = made.ledger.query(f"SELECT {sums} FROM audit_by_task WHERE coalesce(task, '') = ?", [task]).rows
        names = [name for name in by_task if not name.startswith("hit_rate")]
        assert all(same(float(value), row.figures[name]) for name, value in zip(names, found, strict=True))


@FEW
@given(runs=ledgers)
def test_every_law_holds(folder: Any, runs: list[Run]) -> None:
    check_all_laws(folder(runs))


@pytest.mark.campaign
@MANY
@given(runs=ledgers)
def test_every_law_holds_at_length(folder: Any, runs: list[Run]) -> None:
    check_all_laws(folder(runs))


def one_request(line: str) -> Any:
    return st.sampled_from(DEVICES).map(lambda device: [[(line, 0, "", "", 1.0, device)]])


several_loads = st.lists(
    st.one_of(
        st.builds(
            Run, calls=one_request("miss"), overhead=st.just({}), tags=st.just(()), model=st.just(BASE),
            loads=st.lists(eighths, min_size=1, max_size=2), measured=st.just(()),
        ),
        st.builds(
            Run, calls=one_request("credited"), overhead=st.just({}), tags=st.just(()),
            model=st.sampled_from([BASE, BASE, TUNED]), loads=st.just(()), measured=st.just(()),
        ),
    ),
    min_size=5, max_size=8,
)  # fmt: skip


@FEW
@given(runs=several_loads)
def test_a_spared_load_is_the_last_one_on_its_device(folder: Any, runs: list[Run]) -> None:
    made = folder(runs)
    check_recounted(made, made.report())
    spared = made.ledger.query("SELECT count(*), count(avoided_load_seconds) FROM audit_loads WHERE avoided_loads > 0").rows
    told = [spared_load(runs, number) for number in range(len(runs))]
    assert spared == [(sum(one[0] for one in told), sum(one[0] - one[2] for one in told))]  # NULL where none was measured


@FEW
@given(runs=ledgers, factor=st.sampled_from([0.0, 0.5, 2.0, 10.0]))
def test_money_and_energy_scale_with_their_prices(folder: Any, runs: list[Run], factor: float) -> None:
    made = folder(runs)
    scaled = Prices([Price(p.device, p.per_hour * factor, p.currency, (p.watts or 0) * factor) for p in PRICES.rows])
    one, other = made.report(), made.report(prices=scaled)
    assert one.missing_prices == other.missing_prices
    for left, right in zip([*one.rows, one.total], [*other.rows, other.total], strict=True):
        for name, value in left.figures.items():
            priced = name.startswith(("money", "energy_spent", "energy_reused", "carbon"))
            expected = value * factor if priced and value is not None else value
            assert same(expected, right.figures[name]), name


@FEW
@given(runs=ledgers)
def test_rows_that_are_there_twice_count_once(folder: Any, runs: list[Run]) -> None:
    made = folder(runs)
    before = made.report()
    for table in ("lookups", "overheads", "runs", "run_ends", "run_tags", "measurements", "model_loads", "model_names"):
        made.ledger.query(f"INSERT INTO ledger.{table} SELECT * FROM ledger.{table}", unsafe=True)
    after = made.report()
    assert len(after.rows) == len(before.rows)
    for left, right in zip([*before.rows, before.total], [*after.rows, after.total], strict=True):
        wrong = [name for name in FIGURES if not same(left.figures[name], right.figures[name])]
        assert not wrong, [(name, left.figures[name], right.figures[name]) for name in wrong]
    assert (after.uncacheable, after.misses) == (before.uncacheable, before.misses)
    assert len(made.report(by="tag").rows) <= 3


@FEW
@given(runs=ledgers)
def test_entries_that_come_from_elsewhere_change_no_total(folder: Any, runs: list[Run]) -> None:
    made = folder(runs)
    before = made.report().to_json()
    write(
        made.store, ELSEWHERE, NOON - 5000, [(make_action(prompt=(9, n)), make_result(seconds=5.0)) for n in range(3)], (), BASE
    )
    made.ledger.sync(made.store)
    made.ledger.rebuild(made.store)
    after = made.report().to_json()
    assert (after["total"], after["rows"]) == (before["total"], before["rows"])


@settings(FEW, max_examples=5)
@given(asked=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4), whole=st.booleans())
def test_no_run_is_credited_for_what_it_computed(tmp_path: Path, asked: list[list[int]], whole: bool) -> None:
    """Calls of a real cache; ``whole``: all in one run, else a run each. Each answer costs 2 to the power of its number."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    manifest = Manifest({"": ModuleRecord(digest_bytes(b"engine"), "Engine")})
    environment = Environment(Fields({"dtype": "float32"}))
    cache, seen, computed = None, set(), {}
    credited = merged = spent = 0.0
    for call in asked:
        if cache is None or not whole:
            cache = Cache(folder)
            watch = cache.watch(Watch(lambda: manifest, "engine"))
        root = cache.open(watch).root
        actions = [Action(root, Request("generate", pack_tokens([n]), Fields({})), environment) for n in call]
        cache.serve(
            watch, actions,
            lambda places, call=call: [(n, Result(pack_tokens([1]), cost=Cost(2.0 ** call[n], 1, 1, "cpu", 1))) for n in places],
        )  # fmt: skip
        for place, number in enumerate(call):
            if number in call[:place]:
                merged += 2.0**number
            elif number not in seen:
                spent += 2.0**number
                computed[number] = cache.run_id
            elif computed[number] == cache.run_id:
                merged += 2.0**number
            else:
                credited += 2.0**number
        seen.update(call)
        cache.flush()
        if not whole:
            cache.close()
    cache.close()
    total = audit(Ledger(cache.ledger_path), prices=PRICES).total.figures
    assert (total["credited_seconds"], total["duplicate_seconds"], total["spent_seconds"]) == (credited, merged, spent)
    assert total["imported_seconds"] == 0 and total["overhead_seconds"] > 0
    assert total["net_seconds"] == credited - total["overhead_seconds"]
