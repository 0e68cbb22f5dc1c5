"""The audit against runs whose sums can be done in the head, and against changes whose reason is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from recorded import (
    BASE,
    ENVIRONMENT,
    FIRST,
    NOON,
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
    write,
)

from evalcache.audit import RunSummary, summarise
from evalcache.differences import Difference, explain_keys
from evalcache.digest import digest_bytes
from evalcache.errors import UnknownNameError
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest
from evalcache.misses import explain_misses
from evalcache.store import Store


class TestSummarise:
    def test_a_cold_run(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert summarise(ledger, FIRST) == RunSummary(
            run=FIRST,
            status="ok",
            command="python eval.py",
            started_at="2023-11-14T22:13:20.250000Z",
            ended_at="2023-11-14T22:13:29.250000Z",
            hits=0,
            misses=3,
            uncacheable=0,
            duplicates=1,
            model_loads=1,
            saved_seconds=-0.75,
            duplicate_seconds=4.0,
            spent_seconds=7.0,
            overhead_seconds=0.75,
            overhead={"fingerprint": 0.5, "write": 0.25},
            model_digest=str(BASE.root),
            model_digests=(str(BASE.root),),
            hit_rate=0.0,
            hit_rate_by_seconds=0.0,
        )

    def test_a_warm_run_is_the_last(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        found = summarise(ledger, "last").to_json()
        assert json.loads(json.dumps(found)) == found
        assert {name: found[name] for name in ("run", "status", "hits", "misses", "duplicates", "model_loads")} == {
            "run": SECOND,
            "status": "failed",
            "hits": 3,
            "misses": 0,
            "duplicates": 0,
            "model_loads": 0,
        }
        assert (found["uncacheable"], found["uncacheable_reasons"]) == (3, {"streamer": 2, "training": 1})
        assert found["overhead"] == {"fingerprint": 1.0, "lookup": 0.125}
        assert (found["credited_seconds"], found["overhead_seconds"], found["saved_seconds"]) == (3.0, 1.125, 1.875)
        assert (found["unmeasured_hits"], found["spent_seconds"]) == (1, 6.0)
        assert (found["hit_rate"], found["hit_rate_by_seconds"]) == (0.5, 1 / 3)

    def test_a_run_that_asked_nothing_has_no_rates(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        write(store, FIRST, NOON, (), begin(FIRST, NOON, None))
        ledger.sync(store)
        found = summarise(ledger)
        assert (found.status, found.hit_rate, found.hit_rate_by_seconds, found.model_digest) == ("unfinished", None, None, None)

    def test_models_stand_in_the_order_in_which_they_were_met(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        write(store, FIRST, NOON, (), [*begin(FIRST, NOON, TUNED), *begin(FIRST, NOON, BASE)[1:]], BASE, TUNED)
        ledger.sync(store)
        found = summarise(ledger)
        assert found.model_digests == (str(TUNED.root), str(BASE.root))
        assert found.model_digest == str(TUNED.root)

    @pytest.mark.parametrize("name", [FIRST, FIRST[:6], "11111111-1111-1111-1111-111111111111"])
    def test_a_run_may_be_named_in_short(self, pair: tuple[Store, Ledger], name: str) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert summarise(ledger, name).run == FIRST

    @pytest.mark.parametrize("name", ["9", "", "x' OR true --", "last%"])
    def test_an_unknown_run_is_an_error(self, pair: tuple[Store, Ledger], name: str) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        with pytest.raises(UnknownNameError) as caught:
            summarise(ledger, name)
        assert caught.value.found == name

    def test_an_empty_ledger_has_no_last_run(self, pair: tuple[Store, Ledger]) -> None:
        with pytest.raises(UnknownNameError):
            summarise(pair[1])


def why(pair: tuple[Store, Ledger], model: Manifest = BASE, **asked: Any) -> list[str]:
    """What is said of a run that asks this after another asked `BASE` the usual."""
    ask_after_base(*pair, model, **asked)
    return explain_misses(pair[1], SECOND)


class TestExplainMisses:
    def test_new_weights(self, pair: tuple[Store, Ledger]) -> None:
        assert why(pair, TUNED) == ["new weights: layers.1: 1 of 3 tensors differ from base as met in run 11111111"]

    def test_the_nearest_of_several_models_is_named(self, pair: tuple[Store, Ledger]) -> None:
        far = make_model({"embed": b"far", "layers.0": b"far0", "layers.1": b"far1"})
        ask_all(pair[0], THIRD, NOON - 50, [(make_action(far), make_result())], far, "far")
        assert why(pair, TUNED) == ["new weights: layers.1: 1 of 3 tensors differ from base as met in run 11111111"]

    def test_the_same_weights_in_other_code(self, pair: tuple[Store, Ledger]) -> None:
        modules = dict(BASE.modules)
        record = modules["layers.0"]
        modules["layers.0"] = type(record)(record.digest, record.class_name, record.tensors, {"code": digest_bytes(b"patched")})
        patched = Manifest(modules, {"": digest_bytes(b"config")}, BASE.about)
        said = "the weights are those of base as met in run 11111111, but these differ: code of layers.0; config of (root)"
        assert why(pair, patched) == [said]

    def test_a_new_class_of_model(self, pair: tuple[Store, Ledger]) -> None:
        assert why(pair, make_model({"embed": b"e"}, "OtherLM")) == ["a new model: no OtherLM was asked anything before"]

    def test_another_setting(self, pair: tuple[Store, Ledger]) -> None:
        said = ["other settings: max_new_tokens 8 → 16, penalty – → 1.5"]
        assert why(pair, settings={"max_new_tokens": 16, "penalty": 1.5}) == said

    def test_another_version(self, pair: tuple[Store, Ledger]) -> None:
        environment = {**ENVIRONMENT, "transformers": "5.23.0"}
        assert why(pair, environment=environment) == ["another environment: transformers 5.22.0 → 5.23.0"]

    def test_another_version_and_setting(self, pair: tuple[Store, Ledger]) -> None:
        said = why(pair, settings={"max_new_tokens": 9}, environment={**ENVIRONMENT, "torch": "2.14.0"})
        assert said == ["other settings: max_new_tokens 8 → 9", "another environment: torch 2.13.0 → 2.14.0"]

    def test_new_prompts(self, pair: tuple[Store, Ledger]) -> None:
        assert why(pair, prompts=((7,), (8,))) == ["new prompts"]

    def test_some_new_prompts_under_another_setting(self, pair: tuple[Store, Ledger]) -> None:
        said = why(pair, prompts=((1, 2, 3), (8,), (9,)), settings={"max_new_tokens": 9})
        assert said == ["other settings: max_new_tokens 8 → 9 (1 of 3 requests)", "new prompts (2 of 3 requests)"]

    def test_the_first_run(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert explain_misses(ledger, FIRST) == ["nothing was stored before"]

    def test_a_run_that_hit_is_not_explained(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert explain_misses(ledger) == []

    def test_refresh_and_damage(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        keys = cold_and_warm(store)
        asked = [(keys[0], "miss", "refresh", 1.0), (keys[1], "miss", "corrupt", 1.0)]
        write(store, THIRD, NOON + 300, (), [*begin(THIRD, NOON + 300), look(THIRD, NOON + 301, asked)])
        ledger.sync(store)
        said = ["the policy was refresh, which computes everything again", "1 stored entry was damaged"]
        assert explain_misses(ledger, THIRD) == said

    def test_a_run_that_stored_nothing(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        asked = [(digest_bytes(b"never stored"), "miss", "absent", 1.0)]
        write(store, THIRD, NOON + 300, (), [*begin(THIRD, NOON + 300), look(THIRD, NOON + 301, asked)])
        ledger.sync(store)
        assert explain_misses(ledger, THIRD) == ["these requests were never asked of this model with these settings"]


class TestExplainKeys:
    def differences(self, store: Store, **changed: Any) -> list[Difference]:
        left, right = (make_action(**parts) for parts in ({}, changed))
        keys = write(store, FIRST, NOON, [(left, make_result()), (right, make_result())], (), BASE, TUNED)
        return explain_keys(store, *keys)

    @pytest.mark.parametrize(
        ("changed", "expected"),
        [
            ({}, []),
            ({"settings": {"max_new_tokens": 9}}, [("settings.max_new_tokens", 8, 9)]),
            ({"settings": {"max_new_tokens": 8, "a": {"b": 1}}}, [("settings.a", None, {"b": 1})]),
            ({"settings": {"max_new_tokens": 8.0}}, [("settings.max_new_tokens", 8, 8.0)]),
            ({"environment": {**ENVIRONMENT, "torch": "3"}}, [("environment.torch", "2.13.0", "3")]),
            ({"prompt": (1, 9, 3)}, [("tokens[1]", 2, 9)]),
            ({"prompt": (1, 2)}, [("tokens.length", 3, 2)]),
            ({"prompt": (9, 2)}, [("tokens[0]", 1, 9), ("tokens.length", 3, 2)]),
            ({"mask": b"\x01"}, [("inputs.mask", None, b"\x01")]),
        ],
    )
    def test_names_the_field(self, pair: tuple[Store, Ledger], changed: dict[str, Any], expected: list[tuple]) -> None:
        found = self.differences(pair[0], **changed)
        assert [tuple(item) for item in found] == expected
        assert [[type(part) for part in item] for item in found] == [[type(part) for part in item] for item in expected]

    def test_names_the_modules(self, pair: tuple[Store, Ledger]) -> None:
        found = self.differences(pair[0], model=TUNED)
        assert found[0] == Difference("model", BASE.root.hex, TUNED.root.hex)
        assert str(found[1]) == "model.modules: layers.1: 1 of 3 tensors"
        assert len(found) == 2

    def test_speaks_to_a_person(self, pair: tuple[Store, Ledger]) -> None:
        found = self.differences(pair[0], settings={"max_new_tokens": 9, "text": "x" * 99})
        assert [str(item) for item in found] == [
            "settings.max_new_tokens: 8 → 9",
            f"settings.text: – → {'x' * 77}…",
        ]

    def test_an_absent_entry_is_an_error(self, pair: tuple[Store, Ledger]) -> None:
        with pytest.raises(UnknownNameError):
            explain_keys(pair[0], digest_bytes(b"a"), digest_bytes(b"b"))
