"""`evalcache plan -- CMD`: what would hit, what would run, and what that would take, before any model is loaded.

The command is run as far as its requests (`planning.py`), and what it would ask is looked up. What would run is estimated from
measured costs of like requests on that device: of the same task, if there are any, and of the same model, else of models of its
class and size. Estimated seconds are those of computing and of loading the model; what is not known is left out and said.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalcache.budget import Budget, budget_environment
from evalcache.differences import Difference, compare_fields, find_nearest_model, read_fields, read_manifest, say_differences
from evalcache.digest import digest_bytes
from evalcache.errors import BudgetError, LedgerError, PlanError
from evalcache.estimates import Estimates, Seconds, add_seconds
from evalcache.launch import cannot_run, find_unreachable, is_off, launch_environment
from evalcache.ledger import Ask, Ledger
from evalcache.prices import Prices, read_prices
from evalcache.printing import print_table, visible
from evalcache.store import Store
from evalcache.structs import Frozen, asdict
from evalcache.summary import format_reasons, format_seconds

_UPGRADES = ("torch", "transformers", "engine_version")


class Line(Frozen):
    """What would become of the requests of one task and kind.

    Args:
        samples: sampled requests that are served together: they count as one. reused_seconds: what the hits cost when they were
            computed. estimate: of what would run; None where nothing like it was measured on the device.
    """

    task: str
    kind: str
    hits: int
    runs: int
    duplicates: int
    uncacheable: dict[str, int]
    samples: int
    reused_seconds: float
    estimate: Seconds | None


class Part(Frozen):
    """What one process of the command would ask of its model.

    Args:
        loading: of the model, None where nothing would run or no load of such a model was measured.
        why: reasons for what would run. warnings: what a person should know before it runs.
    """

    device: str
    model: str
    model_class: str
    path: str
    lines: tuple[Line, ...]
    loading: Seconds | None
    why: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> Seconds | None:
        """Of everything that can be estimated, loading included; None where something would run and nothing is known of it."""
        known = [line.estimate for line in self.lines if line.estimate]
        if not known and any(line.runs or line.uncacheable for line in self.lines):
            return None
        return add_seconds(known + ([self.loading] if self.loading else []))


class Plan(Frozen):
    """What a command would ask. Seconds are estimated ones."""

    command: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def lines(self) -> list[Line]:
        """Those of all parts."""
        return [line for part in self.parts for line in part.lines]

    @property
    def unknown(self) -> int:
        """Requests that would run and that nothing is known of: the estimate is without them."""
        return sum(sum(line.uncacheable.values()) + (0 if line.estimate else line.runs) for line in self.lines)

    @property
    def seconds(self) -> Seconds | None:
        """Of everything that can be estimated, loading included; None where something would run and nothing is known of it."""
        known = [part.seconds for part in self.parts if part.seconds is not None]
        return add_seconds(known) if known or not self.parts else None

    @property
    def devices(self) -> list[str]:
        """On which it would run."""
        return sorted({part.device for part in self.parts if part.device})

    def money(self, prices: Prices) -> tuple[str, float, float, float] | None:
        """(currency, amount, low, high) on one device each; None where a price is missing, or there are several currencies."""
        found = [(prices.of(part.device), part.seconds) for part in self.parts if part.seconds is not None]
        currencies = {price.currency for price, _ in found if price is not None}
        if len(currencies) != 1 or any(price is None for price, _ in found):
            return None
        amounts = [
            (
                one.seconds * price.per_hour / 3600,
                one.low_seconds * price.per_hour / 3600,
                one.high_seconds * price.per_hour / 3600,
            )
            for price, one in found
            if price is not None
        ]
        return currencies.pop(), *map(sum, zip(*amounts, strict=True))  # type: ignore[return-value]

    def to_json(self, prices: Prices) -> dict[str, Any]:
        """For `json.dumps`."""
        total, money = self.seconds, self.money(prices)
        return {
            "command": list(self.command),
            "hits": sum(line.hits for line in self.lines),
            "runs": sum(line.runs for line in self.lines),
            "duplicates": sum(line.duplicates for line in self.lines),
            "uncacheable": dict(sum((Counter(line.uncacheable) for line in self.lines), Counter())),
            "reused_seconds": sum(line.reused_seconds for line in self.lines),
            "estimated": total and {name: getattr(total, name) for name in ("seconds", "low_seconds", "high_seconds")},
            "money": None if money is None else dict(zip(("currency", "amount", "low", "high"), money, strict=True)),
            "without_price": [device for device in self.devices if prices.of(device) is None],
            "not_estimated": self.unknown,
            "parts": [asdict(part) for part in self.parts],
        }


def make_plan(
    command: Sequence[str], *, directory: str | None = None, policy: str | None = None, match: str | None = None
) -> Plan:
    """Run a command as far as its requests, and say what would become of them. Loads no model, stores nothing.

    Its output goes to stderr, and its input is empty.

    Raises:
        PlanError: its requests cannot be known before it has run. CommandError: it cannot be started.
    """
    environment = launch_environment(command, os.environ, directory=directory, policy=policy, match=match)
    if is_off(environment):
        raise PlanError("EVALCACHE=off: nothing is looked up", hint="leave it out")
    if (option := find_unreachable(command)) is not None:
        raise PlanError(f"the command is run with {option}, which keeps evalcache out", hint="leave the option out")
    with tempfile.TemporaryDirectory(prefix="evalcache-plan-") as folder:
        environment |= {"EVALCACHE_PLAN": folder, "EVALCACHE_QUIET": "1"}
        environment.pop("EVALCACHE_BUDGET", None)
        sys.stdout.flush()
        try:
            done = subprocess.run(list(command), env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
        except OSError as error:
            raise cannot_run(command, error) from error
        told = [
            json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"), key=lambda file: file.stat().st_mtime)
        ]
    for one in told:
        if one["reason"]:
            raise PlanError(one["reason"], hint="plans are made of lm_eval's hf models; `evalcache run` needs no plan")
    if done.returncode:
        raise PlanError(
            f"the command failed with exit code {done.returncode} before its requests were known", hint="see what it printed"
        )
    if not told:
        raise PlanError(
            "the command ended, and asked nothing that evalcache serves", hint="plans are made of lm_eval's hf models"
        )
    from evalcache.folder import default_folder, local_folder

    place = local_folder(Path(environment.get("EVALCACHE_DIR") or default_folder()))
    store, ledger = Store(place / "store"), Ledger(place / "ledger.duckdb")
    ledger.sync(store)
    return Plan(tuple(command), tuple(_estimate(ledger, store, one) for one in told))


def run_with_budget(
    command: Sequence[str],
    budget: str,
    typed: Sequence[str] = (),
    files: Sequence[str] = (),
    *,
    directory: str | None = None,
    policy: str | None = None,
    match: str | None = None,
) -> None:
    """Plan a command, say so on stderr, and give what is run next a budget: `launch.run_command` goes on.

    Raises:
        BudgetError: the budget is none, one of money for a device without a price, or one that loading the model takes up.
            As `make_plan`; no plan is no fault.
    """
    given, prices = Budget.parse(budget), read_prices(typed, files)
    try:
        plan = make_plan(command, directory=directory, policy=policy, match=match)
    except (PlanError, LedgerError) as error:
        print(f"evalcache: no plan: {visible(error.message)}; the budget of {given} counts all the same", file=sys.stderr)
    else:
        with contextlib.redirect_stdout(sys.stderr):
            tell(plan, prices)
        for part in plan.parts:
            _refuse_hopeless(given, part, prices)
    os.environ.update(budget_environment(budget, typed, files))


def _refuse_hopeless(given: Budget, part: Part, prices: Prices) -> None:
    """A run whose budget is spent when its model has been loaded computes nothing, however often it is run again."""
    if not part.device:
        return
    rate = given.per_second(prices, part.device, 1)
    if part.loading is not None and part.loading.low_seconds * rate >= given.amount:
        raise BudgetError(
            f"the budget of {given} is less than it takes to load the model: {format_seconds(part.loading.low_seconds)} at least "
            f"({part.loading.like}, {part.loading.like_count:,} measured)",
            hint="nothing would be computed, however often it is run: give it more", found=str(given),
        )  # fmt: skip


def tell(plan: Plan, prices: Prices) -> None:
    """Print a plan for a person."""
    rows = []
    for line in plan.lines:
        one = line.estimate
        seconds, span, like = ("", "", "") if line.runs == 0 else ("?", "?", "nothing like it was measured")
        if one is not None:
            seconds, span = format_seconds(one.seconds), _range(one.low_seconds, one.high_seconds)
            like = f"{one.like} ({one.like_count:,})"
        task = f"{line.task} ({line.samples:,} samples)" if line.samples else line.task
        rows.append((task, line.kind, line.hits, line.runs, line.duplicates, sum(line.uncacheable.values()), seconds, span, like))
    columns = ("task", "asks for", "hits", "runs", "duplicates", "uncacheable", "about", "10–90 %", "estimated from")
    print_table(columns, rows, empty="no requests")
    found, total = plan.to_json(prices), plan.seconds
    said = [
        f"{found['hits']:,} hit, {found['runs']:,} run, {found['duplicates']:,} merged, {format_reasons(found['uncacheable'])}",
        f"reused {format_seconds(found['reused_seconds'])}",
    ]
    if found["runs"] or found["uncacheable"]:
        loading = "loading included" if any(part.loading for part in plan.parts) else "without loading, which was not measured"
        if total is not None:
            spans = _range(total.low_seconds, total.high_seconds)
            said.append(f"to run about {format_seconds(total.seconds)} ({spans}) on {', '.join(plan.devices)}, {loading}")
        if (money := plan.money(prices)) is not None:
            currency, amount, low, high = money
            said.append(f"about {amount:,.2f} {currency} ({low:,.2f}–{high:,.2f}) on one device")
        elif found["without_price"]:
            said.append(f"no price for {', '.join(found['without_price'])}")
    if plan.unknown:
        said.append(f"{plan.unknown:,} requests are not estimated")
    print(visible(f"plan: {'; '.join(said)}"))
    for part in plan.parts:
        for reason in part.why:
            print(visible(f"  {reason}"))
        for warning in part.warnings:
            print(visible(f"  warning: {warning}"))


def _range(low: float, high: float) -> str:
    return f"{format_seconds(low)}–{format_seconds(high)}"


# --- estimating ----------------------------------------------------------------------------------------------------------


def _estimate(ledger: Ledger, store: Store, told: dict[str, Any]) -> Part:
    model, groups = told["model"], told["groups"]
    with ledger.reading() as ask:
        like = Estimates(
            ask, told.get("device") or "", model.get("root") or model.get("last_root") or "", model.get("class") or "",
            model.get("parameters"),
        )  # fmt: skip
        lines = tuple(_line(group, like.of_group(group) if group["runs"] else None) for group in groups)
        runs = any(group["runs"] or group["uncacheable"] for group in groups)
        loading = like.of_loading() if runs else None
        why, warnings = _explain(ask, store, told) if runs else ((), ())
    if told.get("own_cache"):
        warnings += ("the harness's own cache (--use_cache) was not looked at: what it answers is counted as asked",)
    return Part(
        told.get("device") or "", model.get("root") or "", model.get("class") or "", model.get("path") or "", lines, loading,
        tuple(why), tuple(warnings),
    )  # fmt: skip


def _line(group: dict[str, Any], estimate: Seconds | None) -> Line:
    return Line(
        group["task"], group["asked_kind"], group["hits"], group["runs"], group["duplicates"], group["uncacheable"],
        group["samples"], group["hit_seconds"], estimate,
    )  # fmt: skip


# --- why it would run ----------------------------------------------------------------------------------------------------


def _explain(ask: Ask, store: Store, told: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(reasons, warnings)."""
    model, groups = told["model"], told["groups"]
    if told["refresh"]:
        return ("the policy is refresh: everything is computed again",), ()
    if model.get("state") == "stranger":
        return _explain_stranger(model)
    if "environment" not in model:
        return ("the model runs as if evalcache were not there",), ()
    root = model["root"]
    if not ask("SELECT count(*) FROM ledger.requests WHERE model = ?", [root]).rows[0][0]:
        return (_nearest(ask, store, model),), ()
    environment = bytes.fromhex(model["environment"])
    known = "SELECT count(*) FROM ledger.requests WHERE model = ? AND environment_digest = ?"
    if not ask(known, [root, digest_bytes(environment).hex]).rows[0][0]:
        changes = _changes(ask, "environment", environment, "r.model = ?", [root])
        if any(name in _UPGRADES for name, _, _ in changes) and not any(group["hits"] for group in groups):
            return (f"another environment: {say_differences(changes)}",), (_upgraded(say_differences(changes)),)
        return (f"another environment: {say_differences(changes)}",), ()
    said = []
    for group in groups:
        if not group["runs"]:
            continue
        name = f"{group['task'] or 'requests'} ({group['asked_kind']})"
        new = []
        for settings in map(bytes.fromhex, group["settings"]):
            where = "SELECT count(*) FROM ledger.requests WHERE model = ? AND kind = ? AND settings_digest = ?"
            if not ask(where, [root, group["kind"], digest_bytes(settings).hex]).rows[0][0]:
                where = "r.model = ? AND r.kind = ? AND r.key IN (SELECT key FROM ledger.lookups WHERE task = ?)"
                new += _changes(ask, "settings", settings, where, [root, group["kind"], group["task"]])
        if new:
            said.append(f"{name}: other settings: {say_differences(new)}")
        elif group["kind"] == "generate_until_call":
            said.append(f"{name}: samples are stored as a whole, and one of them or the generators' state is new")
        else:
            said.append(f"{name}: {group['runs']:,} that this model was not asked so before")
    return tuple(dict.fromkeys(said)), ()


def _explain_stranger(model: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if "last_root" not in model:
        return ("the model was never loaded here: everything runs",), ()
    changed = [Difference(name, then, now) for name, (then, now) in model["versions"].items()]
    if not changed:
        return (
            "the model's files were loaded before, but in another way (dtype, device map, kernels): what it is now is known only "
            "once it is loaded, and everything is counted as if it ran",
        ), ()
    said = say_differences(changed)
    if any(name in _UPGRADES for name, _, _ in changed):
        return (f"other versions than when the model was last loaded: {said}",), (_upgraded(said),)
    return (
        f"the model was last loaded with other versions: {said}; what it is now is known only once it is loaded, and everything "
        "is counted as if it ran",
    ), ()


def _upgraded(said: str) -> str:
    return f"everything misses, because a library was changed: {said}; answers of one version do not stand for another's"


def _nearest(ask: Ask, store: Store, model: dict[str, Any]) -> str:
    """A model that was asked nothing yet: what is different in it from the nearest one that was."""
    manifest = read_manifest(store.get_object(f"model/{model['root']}"))
    among = "SELECT model FROM ledger.requests"
    found = None if manifest is None else find_nearest_model(ask, manifest, model.get("class") or "", among)
    if found is None:
        return "this model was asked nothing before"
    names = ask("SELECT name FROM ledger.model_names WHERE model = ? ORDER BY seq DESC LIMIT 1", [found[1]]).rows
    return f"new weights: {found[0]} differ from {names[0][0] if names and names[0][0] else str(found[1])[:12]}"


def _changes(ask: Ask, name: str, now: bytes, where: str, params: list[Any]) -> list[Difference]:
    """The fields in which the latest stored requests differ from those of now."""
    latest = ask(
        f"SELECT f.canonical FROM ledger.requests r JOIN ledger.outputs o USING (key) JOIN ledger.fields f "
        f"ON f.digest = r.{name}_digest WHERE {where} ORDER BY o.created_at DESC LIMIT 1",
        params,
    ).rows
    sides = [read_fields(data) for data in (latest[0][0] if latest else None, now)]
    return [] if None in sides else list(compare_fields("", *sides))
