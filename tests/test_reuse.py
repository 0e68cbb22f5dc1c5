"""Forwards that begin above the layers which another model has in common: always the same answers, and less to compute."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evalcache
from evalcache.audit import audit
from evalcache.cache import Cache
from evalcache.errors import EvalCacheWarning
from evalcache.integrations.reuse import Reuse
from evalcache.integrations.scoring import Scoring, score_rows
from evalcache.ledger import Ledger
from evalcache.records import Result
from evalcache.states import State
from evalcache.structs import replace
from evalcache.summary import format_summary

LAYERS = 4


def llama(cls: type = LlamaForCausalLM, **settings: Any) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": 200,
    }
    torch.manual_seed(0)
    return cls(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, **settings)).eval()


def rows(count: int = 12, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    drawn = random.Random(seed)
    return [([drawn.randrange(3, 100) for _ in range(drawn.randrange(6, 14))], [drawn.randrange(3, 100)]) for _ in range(count)]


ROWS = rows()


def cache_in(folder: Path, **settings: Any) -> Cache:
    cache = Cache(folder, **settings)
    cache.components = True
    return cache


def answers(results: list[Result]) -> list[tuple[bytes, dict]]:
    return [(result.logprobs, dict(result.scalars)) for result in results]


def bare(model: torch.nn.Module, tmp_path: Path, asked: list = ROWS, scoring: Scoring | None = None) -> list[tuple[bytes, dict]]:
    """The answers of a cache that has nothing, and computes every layer."""
    cache = Cache(tmp_path / f"bare{random.random()}")
    assert not cache.components
    found = answers(score_rows(cache, model, asked, scoring or Scoring()))
    cache.close()
    return found


@contextlib.contextmanager
def edited(tensor: torch.Tensor, by: float = 0.3) -> Iterator[None]:
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)).to(tensor) * by)
    yield
    with torch.no_grad():
        tensor.copy_(before)


def ask(cache: Cache, model: torch.nn.Module, asked: list = ROWS, scoring: Scoring | None = None) -> tuple[list, int, int]:
    """The answers, and how many rows were resumed and computed whole for them."""
    told = cache.counts.components
    before = told.resumed, told.whole
    found = answers(score_rows(cache, model, asked, scoring or Scoring()))
    return found, told.resumed - before[0], told.whole - before[1]


def test_what_variants_have_in_common_is_computed_once(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache")
    layers, count = model.model.layers, len(ROWS)
    assert ask(cache, model)[1:] == (0, count)
    steps = [  # what is edited, how many rows resume, how many run whole
        (model.lm_head.weight, count, 0),
        (model.model.norm.weight, count, 0),
        (layers[2].mlp.up_proj.weight, 0, count),  # parts from the first one where nothing was kept
        (layers[2].self_attn.q_proj.weight, count, 0),
        (layers[3].mlp.up_proj.weight, count, 0),  # from where the one before parted
        (layers[3].mlp.down_proj.weight, count, 0),
        (layers[0].mlp.up_proj.weight, 0, count),
        (model.model.embed_tokens.weight, 0, count),
    ]
    for tensor, resumed, whole in steps:
        with edited(tensor):
            wanted = bare(model, tmp_path)
            assert ask(cache, model) == (wanted, resumed, whole)
            again = cache.counts.hits
            assert ask(cache, model) == (wanted, 0, 0) and cache.counts.hits == again + count, (
                "stored under the same keys as ever"
            )
    assert not cache.counts.components.refused
    cache.close()


def test_adapters_on_the_upper_layers_leave_the_lower_ones_alone(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    cache = cache_in(tmp_path / "cache")
    assert ask(cache, llama())[1:] == (0, len(ROWS))
    told = []
    for rank in (2, 4, 8):
        config = LoraConfig(r=rank, target_modules=["q_proj", "up_proj"], layers_to_transform=[3], init_lora_weights=False)
        torch.manual_seed(rank)
        adapted = get_peft_model(llama(), config).eval()
        found, *counts = ask(cache, adapted)
        assert found == bare(adapted, tmp_path)
        told.append(counts)
        with adapted.disable_adapter():
            assert ask(cache, adapted) == (bare(llama(), tmp_path), 0, 0), "the model below is the one that was met first"
    assert told == [[0, len(ROWS)], [len(ROWS), 0], [len(ROWS), 0]]
    cache.close()


def test_states_are_found_by_another_process_and_so_are_chains(tmp_path: Path) -> None:
    model, layer = llama(), 2
    cache = cache_in(tmp_path / "cache")
    ask(cache, model)
    cache.close()
    up, down = model.model.layers[layer].mlp.up_proj.weight, model.model.layers[layer].mlp.down_proj.weight
    for tensor, resumed in ((model.lm_head.weight, len(ROWS)), (up, 0), (down, len(ROWS))):
        with edited(tensor):
            cache = cache_in(tmp_path / "cache")
            found, *told = ask(cache, model)
            cache.close()
            assert found == bare(model, tmp_path) and told == [resumed, len(ROWS) - resumed]


def test_other_rows_and_other_batches(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache")
    ask(cache, model)
    with edited(model.lm_head.weight):
        more = ROWS[:5] + rows(3, seed=1)
        found, resumed, whole = ask(cache, model, more)
        for mine, wanted in zip(found, bare(model, tmp_path, more), strict=True):
            assert mine[1]["sum"] == pytest.approx(wanted[1]["sum"], abs=1e-5)
    assert (resumed, whole) == (0, len(more)), "a batch in which a row has no state runs whole"
    cache.close()


def test_how_an_answer_was_computed_is_kept_with_it_and_told(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache", run="1" * 32)
    ask(cache, model)
    cache.close()
    with edited(model.lm_head.weight):
        cache = cache_in(tmp_path / "cache", run="2" * 32)
        ask(cache, model)
        cache.close()
    said = format_summary(cache.counts, "the ledger")
    assert re.search(r"layers below the first changed one: -?\d+\.\d\d s spared in 12 of 12 rows that ran;", said), said
    ledger = Ledger(tmp_path / "cache" / "ledger.duckdb")
    told = ledger.query(
        "SELECT run, recorded->>'resumed_at', recorded->>'parent', count(*) FROM outputs GROUP BY ALL ORDER BY run"
    )
    assert told.rows == [("1" * 32, None, None, 12), ("2" * 32, str(LAYERS), "1" * 32, 12)]
    ((run, count, seconds, share),) = ledger.query("SELECT * FROM components_by_run").rows
    assert (run, count, share) == ("2" * 32, 12, 1.0)
    assert seconds == pytest.approx(cache.counts.components.spared_seconds)
    assert audit(ledger).components == (12, seconds)
    done = subprocess.run(
        [sys.executable, "-m", "evalcache", "audit", "--dir", str(tmp_path / "cache")], capture_output=True, text=True, check=True
    )
    assert re.search(r"components +-?\d+\.\d\d s spared below the first changed layer, for 12 rows", done.stdout)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3", "bamba"])
def test_whatever_is_edited_the_answers_are_those_of_a_fresh_model(tmp_path: Path, name: str) -> None:
    model, cache, drawn = tiny.build(name), cache_in(tmp_path / "cache"), random.Random(name)
    asked = rows(5)
    ask(cache, model, asked)
    modules = list(model.modules())
    resumed = 0
    for _ in range(24):
        module = drawn.choice(modules)
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        plain = [key for key, value in vars(module).items() if type(value) is float and key != "layerdrop"]
        if tensors and (not plain or drawn.random() < 0.7):
            tensor = drawn.choice(tensors)
            if not tensor.is_floating_point():
                continue
            with torch.no_grad():
                tensor.view(-1)[drawn.randrange(tensor.numel())] += drawn.choice((1e-3, 0.5, 3.0))
        elif plain:
            key = drawn.choice(plain)
            setattr(module, key, getattr(module, key) + drawn.choice((1e-6, 0.25)))
        else:
            continue
        found, began, _ = ask(cache, model, asked)
        assert found == bare(model, tmp_path, asked), (type(module).__name__, dict(cache.counts.components.refused))
        resumed += began
    assert resumed or name == "bamba" or tiny.build(name).config.tie_word_embeddings, "it was of use at all"
    assert not cache.counts.components.refused
    cache.close()


class Skipping(LlamaForCausalLM):
    """Its last word depends on what the first layer said, past all the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = []
        handle = _Kept(self.model.layers[0], kept)
        with handle:
            output = super().forward(*args, **kwargs)
        output.logits = output.logits + kept[0][:, :1, :1]
        return output


class _Kept:
    """Keeps what a layer returns, without a hook."""

    def __init__(self, layer: torch.nn.Module, kept: list) -> None:
        self.layer, self.kept = layer, kept

    def __enter__(self) -> None:
        original = self.layer.__dict__.get("forward") or type(self.layer).forward.__get__(self.layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            self.kept.append(found if isinstance(found, torch.Tensor) else found[0])
            return found

        self.before = self.layer.__dict__.get("forward")
        self.layer.__dict__["forward"] = forward

    def __exit__(self, *_: Any) -> None:
        if self.before is None:
            del self.layer.__dict__["forward"]
        else:
            self.layer.__dict__["forward"] = self.before


class HeadFirst(LlamaForCausalLM):
    """What goes into the layers depends on the head, for rows in which a certain token stands."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        embedded = self.model.embed_tokens(input_ids)
        if (marked := (input_ids == 150).any(dim=1)).any():
            embedded = embedded + marked[:, None, None] * self.lm_head.weight[7, 0]
        return super().forward(inputs_embeds=embedded, **kwargs)


def test_code_of_ones_own_is_refused_for_what_it_uses_may_depend_on_the_row(tmp_path: Path) -> None:
    model, cache = llama(HeadFirst), cache_in(tmp_path / "cache")
    plain, marked = [([5, 6, n], [7]) for n in range(3, 9)], [([5, 150, n], [7]) for n in range(3, 9)]
    for asked in (plain, marked):
        ask(cache, model, asked)
    with edited(model.lm_head.weight):
        for asked in (plain, marked):
            assert ask(cache, model, asked)[:2] == (bare(model, tmp_path, asked), 0)
    assert "code of one's own: HeadFirst" in cache.counts.components.refused
    cache.close()


def test_a_model_that_passes_its_layers_by_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalcache.integrations.reuse._is_known", lambda cls: True)
    model, cache = llama(Skipping), cache_in(tmp_path / "cache")
    ask(cache, model)
    with edited(model.lm_head.weight), pytest.warns(EvalCacheWarning, match="does not equal the whole one"):
        found, resumed, whole = ask(cache, model)
        assert found == bare(model, tmp_path) and (resumed, whole) == (0, len(ROWS))
    assert any("does not equal" in why for why in cache.counts.components.refused)
    with edited(model.model.norm.weight):
        assert ask(cache, model) == (bare(model, tmp_path), 0, 0), "and stays off"
    cache.close()


def test_what_other_threads_ask_meanwhile_is_not_touched(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache")
    ids = torch.tensor([[5, 6, 7, 8]])
    seen: list[torch.Tensor] = []

    def forward(model: Any, mine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as other, Entered(model.model.norm, lambda: seen.append(other.submit(asked).result())):
            return model(input_ids=mine, attention_mask=mask, use_cache=False).logits

    def asked() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    scoring = Scoring(forward=forward)
    ask(cache, model, scoring=scoring)
    with edited(model.lm_head.weight):
        found, resumed, _ = ask(cache, model, scoring=scoring)
        assert found == bare(model, tmp_path) and resumed == len(ROWS)
        assert torch.equal(seen[-1], asked())
    cache.close()


class Entered:
    """Calls something once, in the middle of a forward: when a module is entered."""

    def __init__(self, module: torch.nn.Module, call: Callable[[], object]) -> None:
        self.module, self.call = module, call

    def __enter__(self) -> None:
        original, calls = type(self.module).forward.__get__(self.module), [self.call]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if calls:
                calls.pop()()
            return original(*args, **kwargs)

        self.module.__dict__["forward"] = forward

    def __exit__(self, *_: Any) -> None:
        del self.module.__dict__["forward"]


def test_layers_that_are_called_twice_leave_nothing(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache")

    def forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if len(ids) > 2:  # not while it is looked at
            model(input_ids=ids.flip(0), attention_mask=mask, use_cache=False)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    scoring = Scoring(forward=forward)
    ask(cache, model, scoring=scoring)
    cache.flush()
    assert not Reuse.within(cache).states._memory.held
    ask(cache, model, rows(2, seed=3), scoring)  # which leaves states, for it calls them once
    cache.flush()
    with edited(model.lm_head.weight):
        assert ask(cache, model, scoring=scoring) == (bare(model, tmp_path), 0, len(ROWS))
    cache.close()


def test_a_state_that_is_not_the_models_own_is_found_out(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache")
    ask(cache, model)
    cache.flush()
    states = Reuse.within(cache).states
    for held in states._memory.held.values():  # as no fault that is known would do
        held.what = State({name: replace(one, data=b"\0" * len(one.data)) for name, one in held.what.tensors.items()})
    with edited(model.lm_head.weight), pytest.warns(EvalCacheWarning, match="not the one that is computed"):
        assert ask(cache, model)[0] == bare(model, tmp_path)
    cache.close()


def test_states_of_a_model_that_changed_meanwhile_are_not_kept(tmp_path: Path) -> None:
    model, cache = llama(), cache_in(tmp_path / "cache")

    def forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if len(ids) > 2:  # not while it is probed
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(0.01)
        return logits

    ask(cache, model, scoring=Scoring(forward=forward))
    cache.flush()
    reuse = Reuse.within(cache)
    assert cache.counts.uncacheable["changed"] == len(ROWS)
    assert not reuse.states._memory.held
    with edited(model.lm_head.weight):
        assert ask(cache, model)[1:] == (0, len(ROWS))
    cache.close()


@pytest.mark.parametrize("why", ["policy", "match", "off"])
def test_where_nothing_may_be_kept(tmp_path: Path, why: str) -> None:
    settings = {"policy": {"policy": "read_only"}, "match": {"match": "strict"}, "off": {}}[why]
    model, cache = llama(), cache_in(tmp_path / "cache", **settings)
    cache.components = why != "off"
    for tensor in (model.lm_head.weight, model.model.norm.weight):
        with edited(tensor):
            assert answers(score_rows(cache, model, ROWS, Scoring())) == bare(model, tmp_path)
    cache.close()
    assert not list((tmp_path / "cache").glob("states/**/*-*")), "no file"
    assert cache.counts.components.resumed == 0 or why == "policy"


def test_a_rope_that_looks_at_the_batch_is_refused(tmp_path: Path) -> None:
    model, cache = tiny.build("phi3_longrope"), cache_in(tmp_path / "cache")
    for tensor in (model.lm_head.weight, model.model.norm.weight):
        with edited(tensor):
            ask(cache, model)
    assert cache.counts.components.resumed == 0
    cache.close()


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_it_is_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "variable":
        monkeypatch.setenv("EVALCACHE_COMPONENTS", "1")
    with evalcache.enable(tmp_path / "cache", **({"components": True} if how == "argument" else {})) as session:
        assert session.cache.components
        model = llama()
        score_rows(session.cache, model, ROWS, Scoring())
        with edited(model.lm_head.weight):
            score_rows(session.cache, model, ROWS, Scoring())
        assert session.cache.counts.components.resumed == len(ROWS)
