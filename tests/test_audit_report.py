"""The report of an audit against runs that can be added up in the head: prices, loads, causes of misses, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from recorded import (
    BASE,
    ENVIRONMENT,
    FIRST,
    NOON,
    PROMPTS,
    SECOND,
    THIRD,
    TUNED,
    ask_after_base,
    ask_all,
    begin,
    cold_and_warm,
    look,
    make_action,
    make_model,
    make_result,
    open_pair,
    write,
)

from evalcache.audit import BY, audit
from evalcache.cli import commands
from evalcache.digest import digest_bytes
from evalcache.errors import AuditError, PriceError, UnknownNameError
from evalcache.figures import FIGURES
from evalcache.journal import LookedUp, Measured, ModelLoaded
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest
from evalcache.misses import explain_run
from evalcache.prices import Price, Prices, read_prices
from evalcache.store import Store

HOURLY = Prices([Price("gpu*", 3600.0, "EUR", 100.0), Price("cpu", 360.0, "EUR", 10.0)])


def look_on(run: str, at: float, asked: list[tuple[str, float]], device: str, origin: str = "") -> LookedUp:
    """One call: (outcome, seconds) of each request, measured on ``device``."""
    keys = tuple(digest_bytes(f"{run}{n}".encode()).value for n in range(len(asked)))
    outcomes, seconds = zip(*asked, strict=True)
    reasons = tuple("absent" if outcome == "miss" else "" for outcome in outcomes)
    devices, origins = (device,) * len(asked), (origin,) * len(asked)
    return LookedUp(run, at, BASE.root.value, "", "", keys, outcomes, reasons, seconds, devices=devices, origins=origins)


class TestPrices:
    def test_what_the_user_says_goes_first(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.toml"
        mine.write_text('[[price]]\ndevice = "NVIDIA H200*"\nper_hour = 2\ncurrency = "EUR"\ndate = 2026-11-02\n')
        assert read_prices().of("NVIDIA H200").currency == "USD"
        found = read_prices(files=[mine]).of("nvidia h200")
        assert (found.per_hour, found.currency, found.date, found.watts, found.source) == (
            2,
            "EUR",
            "2026-11-02",
            None,
            str(mine),
        )
        found = read_prices(["*h200*=3.2 chf, 650 W", "X=1 EUR"], [mine]).of("NVIDIA H200 NVL")
        assert (found.per_hour, found.currency, found.watts, found.source) == (3.2, "CHF", 650.0, "--price")

    def test_what_nobody_names_has_no_price(self) -> None:
        prices = read_prices()
        assert [prices.of(name) for name in ("AMD EPYC", "", None, "NVIDIA L40X")] == [None] * 4

    def test_each_row_of_the_table_is_whole(self) -> None:
        rows = read_prices().rows
        assert len({row.device for row in rows}) == len(rows) > 10
        for row in rows:
            assert row.per_hour > 0 and row.watts != 0 and row.source.startswith("http")
            assert row.kind and row.date and row.boundary

    @pytest.mark.parametrize("text", ["H200", "H200=", "H200=3", "=3 EUR", "H200=3..2 EUR", "H200=-3 EUR", "H200=3 EUR, W"])
    def test_what_is_no_price_is_refused(self, text: str) -> None:
        with pytest.raises(PriceError) as caught:
            read_prices([text])
        assert caught.value.found == text

    @pytest.mark.parametrize(
        "text",
        [
            "[[price",
            "price = 3",
            '[[price]]\ndevice = "x"\nper_hour = 1',
            '[[price]]\ndevice = "x"\nper_hour = "1"\ncurrency = "EUR"',
            '[[price]]\ndevice = "x"\nper_hour = nan\ncurrency = "EUR"',
            '[[price]]\ndevice = "x"\nper_hour = -1\ncurrency = "EUR"',
            '[[price]]\ndevice = "x"\nper_hour = 1\ncurrency = "EUR"\nper_month = 3',
        ],
    )
    def test_a_file_that_is_no_table_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "prices.toml"
        path.write_text(text)
        with pytest.raises(PriceError):
            read_prices(files=[path])


class TestMoney:
    def test_seconds_are_priced_where_they_were_measured(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        first = [*begin(FIRST, NOON), look_on(FIRST, NOON + 1, [("miss", 2.0)], "gpu one"), Measured(FIRST, NOON, "gpu one", 4)]
        second = [
            *begin(SECOND, NOON + 9),
            look_on(SECOND, NOON + 9, [("hit", 2.0)], "gpu one", FIRST),  # computed on four of them
            look_on(SECOND, NOON + 9, [("miss", 5.0)], "cpu"),
            Measured(SECOND, NOON + 9, "cpu", 1, energy_joules=7.0),
        ]
        write(store, FIRST, NOON, (), first, BASE)
        write(store, SECOND, NOON + 9, (), second, BASE)
        ledger.sync(store)
        report = audit(ledger, SECOND, prices=HOURLY, grid=3.6e5)
        found = report.total.figures
        assert (found["money_spent"], found["money_reused"], found["money_net"]) == (0.5, 8.0, 8.0)
        assert (found["energy_spent_joules"], found["energy_reused_joules"]) == (50.0, 800.0)
        assert (found["carbon_spent_grams"], found["energy_measured_joules"]) == (5.0, 7.0)
        assert (report.currency, report.missing_prices) == ("EUR", [])
        assert audit(ledger, FIRST, prices=HOURLY).total.figures["energy_measured_joules"] is None
        by_device = {row.group: row.figures for row in audit(ledger, by="device", prices=HOURLY).rows}
        assert (by_device["gpu one"]["money_spent"], by_device["cpu"]["money_spent"]) == (8.0, 0.5)

    def test_a_device_without_a_price_has_null_and_is_named(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        write(store, FIRST, NOON, (), [*begin(FIRST, NOON), look_on(FIRST, NOON, [("miss", 2.0)], "abacus")], BASE)
        write(store, SECOND, NOON, (), [*begin(SECOND, NOON), look_on(SECOND, NOON, [("miss", 2.0)], "cpu")], BASE)
        ledger.sync(store)
        report = audit(ledger, prices=HOURLY)
        money = {row.group: row.figures["money_spent"] for row in report.rows}
        assert money == {FIRST: None, SECOND: 0.2}
        assert report.total.figures["money_spent"] is None and report.total.figures["money_reused"] == 0.0
        assert report.missing_prices == ["abacus"]

    def test_several_currencies_have_no_sum(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        write(store, FIRST, NOON, (), [*begin(FIRST, NOON), look_on(FIRST, NOON, [("miss", 2.0)], "gpu")], BASE)
        write(store, SECOND, NOON, (), [*begin(SECOND, NOON), look_on(SECOND, NOON, [("miss", 2.0)], "cpu")], BASE)
        ledger.sync(store)
        report = audit(ledger, prices=Prices([Price("gpu", 1.0, "EUR", 1.0), Price("cpu", 1.0, "USD", 1.0)]))
        assert report.currency is None and report.total.figures["money_spent"] is None
        assert report.total.figures["energy_spent_joules"] == 4.0


class TestLoads:
    def test_a_load_that_was_spared_is_a_line_of_its_own(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)  # the first run loads it in 5 s, the second hits whatever it asks with a key
        ledger.sync(store)
        rows = {row.group: row.figures for row in audit(ledger, by="run").rows}
        assert [rows[FIRST][name] for name in ("loads", "load_seconds", "avoided_loads")] == [1, 5.0, 0]
        # Nobody told on which device the answers were computed: whether the load was measured there is not known.
        spared = ("loads", "avoided_loads", "avoided_load_seconds", "unmeasured_loads")
        assert [rows[SECOND][name] for name in spared] == [0, 1, 0.0, 1]
        assert ledger.query("SELECT avoided_load_seconds FROM audit_loads WHERE run = ?", [SECOND]).rows == [(None,)]
        assert rows[SECOND]["net_seconds"] == 3.0 - 1.125  # not in it
        assert audit(ledger, by="task").rows[0].figures["loads"] is None

    def test_the_last_earlier_load_on_the_same_device_counts(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        on_gpu, early, warm_gpu, elsewhere, later = (str(n) * 32 for n in range(4, 9))
        loaded = [
            (FIRST, 0, (5.0,), "cpu"),
            (SECOND, 10, (7.0, 3.0), "cpu"),
            (on_gpu, 15, (1.0,), "gpu"),
            (later, 30, (9.0,), "cpu"),
        ]
        for run, after, seconds, device in loaded:
            at = NOON + after
            # A load whose model was not known when it was told is that of the one model that the run met.
            loads = [ModelLoaded(run, bytes(16), one) for one in seconds]
            write(store, run, at, (), [*begin(run, at), *loads, look_on(run, at, [("miss", 1.0)], device)], BASE)
        for run, after, device in ((early, 5, "cpu"), (THIRD, 20, "cpu"), (warm_gpu, 21, "gpu"), (elsewhere, 22, "abacus")):
            at = NOON + after
            write(store, run, at, (), [*begin(run, at), look_on(run, at, [("hit", 1.0)], device, FIRST)])
        ledger.sync(store)
        rows = {row.group: row.figures for row in audit(ledger, by="run").rows}
        credited = {run: rows[run]["avoided_load_seconds"] for run in (early, THIRD, warm_gpu, elsewhere)}
        assert credited == {early: 5.0, THIRD: 3.0, warm_gpu: 1.0, elsewhere: 0.0}
        assert [rows[run]["avoided_loads"] for run in (early, THIRD, warm_gpu, elsewhere)] == [1, 1, 1, 1]
        assert [run for run in rows if rows[run]["unmeasured_loads"]] == [elsewhere]
        assert all(rows[run]["avoided_loads"] == 0 for run, *_ in loaded)


class TestSelection:
    def test_by_date(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert audit(ledger).runs == 2
        assert [row.group for row in audit(ledger, since="2023-11-14T22:14").rows] == [SECOND]
        assert audit(ledger, since="2023-11-15").runs == 0
        assert audit(ledger, since="2023-11-14T23:13:30+01:00").runs == 1

    def test_what_cannot_be_told_is_refused(self, pair: tuple[Store, Ledger]) -> None:
        for asked in ({"since": "yesterday"}, {"by": "weekday"}, {"grid": float("nan")}, {"grid": -1.0}):
            with pytest.raises(AuditError):
                audit(pair[1], **asked)
        with pytest.raises(UnknownNameError):
            audit(pair[1], "last")

    def test_an_empty_ledger_has_an_empty_report(self, pair: tuple[Store, Ledger]) -> None:
        for by in BY:
            report = audit(pair[1], by=by)
            assert (report.runs, report.rows, report.total.figures["requests"]) == (0, [], 0)

    def test_tags_models_and_days(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        write(store, FIRST, NOON, (), [*begin(FIRST, NOON, tags=("a", "b")), look_on(FIRST, NOON, [("miss", 2.0)], "cpu")], BASE)
        write(store, SECOND, NOON, (), [*begin(SECOND, NOON), look_on(SECOND, NOON, [("miss", 3.0)], "cpu")], BASE)
        ledger.sync(store)

        def spent(by: str) -> dict[str | None, float]:
            return {row.group: row.figures["spent_seconds"] for row in audit(ledger, by=by).rows}

        assert spent("tag") == {"a": 2.0, "b": 2.0, None: 3.0}
        assert audit(ledger, by="tag").total.figures["spent_seconds"] == 5.0
        assert spent("model") == {BASE.root.hex: 5.0}
        assert audit(ledger, by="model").rows[0].name == "base"
        assert spent("day") == {"2023-11-14": 5.0}


def missed(pair: tuple[Store, Ledger], model: Manifest = BASE, **asked: Any) -> list[tuple[str, int, list[str]]]:
    """Causes of the misses of a run that asks this after another asked `BASE` the usual."""
    ask_after_base(*pair, model, **asked)
    return [(cause["cause"], cause["requests"], cause["changed"]) for cause in audit(pair[1], SECOND).misses]


class TestCauses:
    def test_another_model(self, pair: tuple[Store, Ledger]) -> None:
        names = f"mine ({TUNED.root.hex[:8]}) against base ({BASE.root.hex[:8]})"
        assert missed(pair, TUNED) == [("model", 2, [f"weights of {names}: layers.1: 1 of 3 tensors"])]

    def test_other_settings(self, pair: tuple[Store, Ledger]) -> None:
        assert missed(pair, settings={"max_new_tokens": 9}) == [("settings", 2, ["settings: max_new_tokens 8 → 9"])]

    def test_another_environment(self, pair: tuple[Store, Ledger]) -> None:
        changed = {**ENVIRONMENT, "torch": "2.14.0"}
        assert missed(pair, environment=changed) == [("environment", 2, ["environment: torch 2.13.0 → 2.14.0"])]

    def test_new_prompts_beside_other_settings(self, pair: tuple[Store, Ledger]) -> None:
        found = missed(pair, prompts=((1, 2, 3), (7,), (8,)), settings={"max_new_tokens": 9})
        assert found == [("prompt", 2, []), ("settings", 1, ["settings: max_new_tokens 8 → 9"])]

    def test_the_first_run_and_one_whose_store_was_lost(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        keys = cold_and_warm(store)
        gone = look(THIRD, NOON + 300, [(keys[0], "miss", "absent", 1.0), (digest_bytes(b"?"), "miss", "absent", 1.0)])
        write(store, THIRD, NOON + 300, (), [*begin(THIRD, NOON + 300), gone])
        ledger.sync(store)
        assert [(one["cause"], one["share"]) for one in audit(ledger, FIRST).misses] == [("first", 1.0)]
        assert [(one["cause"], one["share"]) for one in audit(ledger, THIRD).misses] == [("gone", 0.5), ("unstored", 0.5)]

    def test_what_happens_at_the_same_time_or_later_is_no_cause(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        ask_all(store, FIRST, NOON + 50, [(make_action(), make_result())])
        ask_all(store, SECOND, NOON, [(make_action(TUNED), make_result())], TUNED)
        ledger.sync(store)
        assert [one["cause"] for one in audit(ledger, SECOND).misses] == ["first"]

    def test_the_views_say_the_same(self, pair: tuple[Store, Ledger]) -> None:
        missed(pair, TUNED, prompts=((1, 2, 3), (7,)))
        told = pair[1].query("SELECT cause, requests, seconds, share FROM miss_reasons WHERE run = ?", [SECOND])
        assert sorted(told.rows) == [("model", 1, 2.0, 0.5), ("prompt", 1, 2.0, 0.5)]


class TestExplainRun:
    def test_both_sides_of_an_example(self, pair: tuple[Store, Ledger]) -> None:
        missed(pair, TUNED, settings={"max_new_tokens": 9})
        found = explain_run(pair[1], SECOND)
        assert (found["run"], found["against"], found["misses"]) == (SECOND, None, 2)
        (task,) = found["tasks"]
        (cause,) = task["causes"]
        assert (task["misses"], task["requests"], cause["cause"], cause["share"]) == (2, 2, "model", 1.0)
        assert cause["changed"].endswith("1 of 3 tensors; settings: max_new_tokens 8 → 9")
        sides = {one["field"]: (one["left"], one["right"]) for one in cause["example"]["fields"]}
        assert sides["settings.max_new_tokens"] == (8, 9)
        assert sides["model"] == (BASE.root.hex, TUNED.root.hex)
        assert sides["environment.torch"] == ("2.13.0", "2.13.0")
        assert sides["tokens.length"] == (3, 3) and sides["tokens"][0] == sides["tokens"][1]
        assert json.loads(json.dumps(found)) == found

    def test_against_one_run_nothing_else_counts(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        missed(pair, TUNED)  # FIRST asked the base, SECOND the tuned one
        other = make_model({"embed": b"e", "layers.0": b"0", "layers.1": b"third"})
        entries = [(make_action(other, prompt), make_result()) for prompt in PROMPTS]
        ask_all(store, THIRD, NOON + 200, entries, other, "third")
        ledger.sync(store)
        names = [
            explain_run(ledger, THIRD, against)["tasks"][0]["causes"][0]["example"]["fields"][2]["left"][:4]
            for against in (None, FIRST, SECOND)
        ]
        assert names == ["mine", "base", "mine"]
        assert explain_run(ledger, FIRST, SECOND)["tasks"][0]["causes"][0]["cause"] == "model"
        assert explain_run(ledger, SECOND, SECOND)["tasks"][0]["causes"][0]["cause"] == "gone"

    def test_a_run_without_misses_has_no_tasks(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert explain_run(ledger)["tasks"] == []

    def test_modules_that_changed(self, pair: tuple[Store, Ledger]) -> None:
        grown = make_model({"embed": b"e", "layers.0": b"0", "layers.1": b"other", "layers.2": b"new"})
        write(pair[0], FIRST, NOON, (), begin(FIRST, NOON, BASE), BASE)
        write(pair[0], SECOND, NOON + 1, (), begin(SECOND, NOON + 1, grown, "grown"), grown)
        pair[1].sync(pair[0])
        told = pair[1].query("SELECT path, change, names_a, names_b FROM model_modules_changed ORDER BY path").rows
        assert told == [("layers.1", "weights", ["base"], ["grown"]), ("layers.2", "added", ["base"], ["grown"])]


class TestCommandLine:
    @pytest.fixture
    def ask(self, tmp_path: Path) -> Any:
        store, _ = open_pair(tmp_path)
        cold_and_warm(store)
        store.close()

        def asked(*arguments: str) -> str:
            done = CliRunner().invoke(commands, [*arguments, "--dir", str(tmp_path)], standalone_mode=False)
            assert done.exception is None, done.output
            return done.stdout

        return asked

    def test_json_names_the_view_of_each_figure(self, ask: Any) -> None:
        found = json.loads(ask("audit", "last", "--json", "--price", "cpu=1 EUR"))
        assert set(found["figures"]) == set(FIGURES) == set(found["total"])
        assert found["figures"]["net_seconds"]["view"] == "audit_by_task"
        assert found["figures"]["energy_spent_joules"]["boundary"].endswith("no host, no cooling (PUE)")
        assert (found["total"]["net_seconds"], found["total"]["hits"], found["run"]) == (1.875, 3, SECOND)
        assert found["uncacheable"][0] == {"reason": "streamer", "requests": 2, "seconds": 6.0, "example": "a TextStreamer"}
        assert [one["seconds"] for one in found["expensive"]] == [3.0, 3.0]

    def test_csv_is_a_table(self, ask: Any) -> None:
        rows = list(csv.DictReader(io.StringIO(ask("audit", "--csv", "--by", "run"))))
        assert [row["run"] for row in rows] == [SECOND, FIRST, "total"]
        assert [float(row["spent_seconds"]) for row in rows] == [6.0, 7.0, 13.0]
        assert rows[1]["money_spent"] == ""  # nobody knows

    def test_text_and_markdown_say_which_price_is_missing(self, ask: Any) -> None:
        text, markdown = ask("audit"), ask("audit", "--md")
        for shown in (text, markdown):
            assert "device not known: its money" in shown and "streamer" in shown and "audit_by_run" in shown
        assert "| `net_seconds` | s | `audit_by_run` |" in markdown

    def test_explain_run_speaks(self, ask: Any) -> None:
        assert "nothing was stored before" in ask("explain-run", FIRST[:5])
        assert json.loads(ask("explain-run", FIRST, "--json"))["misses"] == 3

    def test_two_forms_at_once_are_refused(self, ask: Any) -> None:
        for arguments in (["audit", "--csv", "--md"], ["audit", "last", "--since", "2026-01-01"]):
            assert CliRunner().invoke(commands, arguments).exit_code == 2
