"""Served calls of ``generate`` equal bare ones: every tiny architecture, cold, warm, partly warm, other batches, other orders."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Told, assert_same, served
from tiny import ENCODER_DECODERS, EOS, NAMES, NOT_ROW_SEPARABLE, PAD, ROPE_DEPENDENT, build, prompts

import evalcache.integrations.transformers as floor
from evalcache.cache import Cache
from evalcache.integrations import generation
from evalcache.integrations.generation import select_rows
from evalcache.integrations.seam import Seam
from evalcache.integrations.timing import share

# So many end ids that rows end after unequal numbers of tokens: what follows a row's end is where batches differ.
ENDS = [EOS, *range(20, 50)]
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "all beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0},
    "sampled": {"do_sample": True},
    "scores": {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "beam scores": {"do_sample": False, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True},
}
SHARED = {"greedy": 4, "beams": 4, "all beams": 4}


def batch_for(name: str, rows: int = 4, width: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch as the model wants it: before the rows for a decoder, after them for an encoder."""
    batch = prompts(rows, width, seed)
    if name in ENCODER_DECODERS:
        lengths = batch["attention_mask"].sum(1)
        place = torch.arange(width)
        turned = [row.roll(int(length)) for row, length in zip(batch["input_ids"], lengths, strict=True)]
        batch = {"input_ids": torch.stack(turned), "attention_mask": (place < lengths[:, None]).long()}
    return batch


def modes_of(name: str) -> dict[str, dict[str, Any]]:
    # Recurrent states of this class cannot be reordered: beams raise, bare ones too.
    return {mode: settings for mode, settings in MODES.items() if name != "rwkv" or "num_beams" not in settings}


def ask(model: Any, batch: dict[str, torch.Tensor], **settings: Any) -> tuple[Any, torch.Tensor]:
    """The output, and what the generator draws after it."""
    torch.manual_seed(7)
    output = model.generate(**batch, max_new_tokens=7, eos_token_id=ENDS, pad_token_id=PAD, **settings)
    return output, torch.rand(3)


def take(batch: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {key: value[rows] for key, value in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_output_equals_the_bare_one(name: str, tmp_path: Path) -> None:
    model = build(name)
    batch, other = batch_for(name), batch_for(name, 3, 11, seed=5)
    whole = name in NOT_ROW_SEPARABLE
    if name == "rwkv":  # its first forward rescales its weights for good
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    # Half of these rows will have been computed, beside other neighbours and at another width.
    joined = {key: torch.cat([torch.nn.functional.pad(batch[key], _side(name, 2), value=0), other[key]]) for key in batch}
    if name not in ENCODER_DECODERS:
        assert joined["attention_mask"][0, 0] == 0
    modes = modes_of(name)
    bare = {mode: ask(model, batch, **settings) for mode, settings in modes.items()}
    joined_modes = [mode for mode in ("greedy", "beams") if mode in modes]
    bare_joined = {mode: ask(model, joined, **modes[mode]) for mode in joined_modes}
    backwards = take(joined, [6, 2, 0, 5, 3, 1, 4])
    bare_backwards = {mode: ask(model, backwards, **modes[mode]) for mode in joined_modes}
    if name in ROPE_DEPENDENT:
        ask(model, batch, do_sample=False)  # the embeddings of positions go back to those of short rows

    for warm in (False, True):
        with served(tmp_path) as here:
            for mode, settings in modes.items():
                output, told = here.ask(ask, model, batch, **settings)
                assert_same(list(bare[mode]), list(output))
                number = 1 if whole else SHARED.get(mode, 1)
                assert told == (Told(number, 0, 0, {}) if warm else Told(0, number, 0, {})), mode
    with served(tmp_path) as here:
        for mode in joined_modes:
            output, told = here.ask(ask, model, joined, **modes[mode])
            assert_same(list(bare_joined[mode]), list(output))
            if name in ROPE_DEPENDENT:  # the long row changes the embeddings of positions that the model holds
                assert told == (Told(0, 0, 0, {"changed": 1}) if mode == "greedy" else Told(0, 1, 0, {}))
                continue
            assert told == (Told(0, 1, 0, {}) if whole else Told(4, 3, 0, {}))
            output, told = here.ask(ask, model, backwards, **modes[mode])
            assert_same(list(bare_backwards[mode]), list(output))
            assert told == (Told(0, 1, 0, {}) if whole else Told(7, 0, 0, {}))


def _side(name: str, more: int) -> tuple[int, int]:
    return (0, more) if name in ENCODER_DECODERS else (more, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("mode", ["greedy", "all beams"])
def test_a_row_is_the_same_request_in_every_batch(name: str, mode: str, tmp_path: Path) -> None:
    model, batch = build(name), batch_for(name, 6)
    bare = {}
    groups = [[0, 1, 2, 3, 4, 5], [5], [4, 3], [0, 5, 1], [2, 2, 2], [3, 0, 3, 1]]
    for group in groups:
        bare[tuple(group)] = ask(model, take(batch, group), **MODES[mode])[0]
    with served(tmp_path) as here:
        for group in groups:
            output, told = here.ask(ask, model, take(batch, group), **MODES[mode])
            assert_same(bare[tuple(group)], output[0])
            assert told.hits == (0 if group == groups[0] else len(set(group)))
            assert told.duplicates == len(group) - len(set(group))


def test_duplicates_in_a_batch_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    batch = take(batch_for("llama", 3), [0, 1, 0, 2, 1, 0])
    bare = ask(model, batch, do_sample=False)
    asked = []
    monkeypatch.setattr(generation, "select_rows", lambda call, rows: asked.append(list(rows)) or select_rows(call, rows))
    with served(tmp_path) as here:
        output, told = here.ask(ask, model, batch, do_sample=False)
        assert_same(list(bare), list(output))
        assert told == Told(0, 3, 3, {})
    assert asked == [[0, 1, 3]]


def test_int32_prompts_come_back_as_the_engine_returns_them(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_for("llama")
    narrow = {"input_ids": batch["input_ids"].int(), "attention_mask": batch["attention_mask"]}
    bare = ask(model, narrow, do_sample=False)
    with served(tmp_path) as here:
        assert_same(list(bare), list(here.ask(ask, model, narrow, do_sample=False)[0]))
        output, told = here.ask(ask, model, narrow, do_sample=False)
        assert_same(list(bare), list(output))
        assert told == Told(4, 0, 0, {})
        output, told = here.ask(ask, model, batch, do_sample=False)
        assert told.hits == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2"])
def test_masks_of_every_kind_come_back_as_the_bare_model_answers(name: str, tmp_path: Path) -> None:
    model, batch = build(name), prompts(6, 9)
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[1, 6:] = 0  # padded after, as no decoder should be
    mask[2, 3:5] = 0  # a hole
    mask[3, :2], mask[3, 5] = 0, 0
    mask[4, :4], mask[4, 8] = 0, 0
    mask[5] = 0  # nothing at all
    rows = {"input_ids": batch["input_ids"], "attention_mask": mask}
    shorter = {key: value[:, 1:] for key, value in take(rows, [3, 4]).items()}
    bare = [ask(model, one, do_sample=False) for one in (rows, shorter, take(rows, [5, 4, 3, 2, 1, 0]))]
    for _ in range(2):
        with served(tmp_path) as here:
            for one, expected in zip((rows, shorter, take(rows, [5, 4, 3, 2, 1, 0])), bare, strict=True):
                output, told = here.ask(ask, model, one, do_sample=False)
                assert_same(list(expected), list(output))
                assert not told.uncacheable
    assert told == Told(6, 0, 0, {})


# --- edits between and during calls ---------------------------------------------------------------------------------------


def _fused_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model.train()
    ids = torch.arange(5, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    model.zero_grad()


def _through_data(model: Any) -> None:
    model.lm_head.weight.data.mul_(-1.0)


def _through_numpy(model: Any) -> None:
    view = model.lm_head.weight.detach().numpy()
    view *= -1.0


def _through_storage(model: Any) -> None:
    model.lm_head.weight.data = torch.linspace(-9, 9, 128 * 32).sin().reshape(128, 32)


def _attribute(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5
    model.model.layers[0].self_attn.scaling = 2.0


@pytest.mark.parametrize("edit", [_fused_step, _through_data, _through_numpy, _through_storage, _attribute])
def test_an_edited_model_is_never_served_its_old_answers(edit: Any, tmp_path: Path) -> None:
    batch = batch_for("llama")
    edited = build("llama")
    edit(edited)
    old, new = ask(build("llama"), batch, do_sample=False), ask(edited, batch, do_sample=False)
    assert not torch.equal(old[0], new[0]) or old[0].shape != new[0].shape
    model = build("llama")
    with served(tmp_path) as here:
        assert_same(list(old), list(here.ask(ask, model, batch, do_sample=False)[0]))
        output, told = here.ask(ask, model, batch, do_sample=False)
        assert told.hits == 4
        edit(model)
        output, told = here.ask(ask, model, batch, do_sample=False)
        assert_same(list(new), list(output))
        assert told == Told(0, 4, 0, {})


def test_an_edit_after_the_batch_and_before_the_next_check_keeps_the_batch_out_of_the_store(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_for("llama")
    old = ask(model, batch, do_sample=False)
    with served(tmp_path) as here:
        watch = Seam.of(here.cache).watch(model)
        here.ask(ask, model, take(batch, [0]), do_sample=False)
        watch.check_seconds = 1e9  # a check that dear is left to the next call
        assert_same(list(old), list(ask(model, batch, do_sample=False)))
        _through_data(model)
        here.cache.flush()
        assert here.cache.counts.uncacheable["changed"] == 3
    with served(tmp_path) as here:
        _through_data(model)
        output, told = here.ask(ask, model, batch, do_sample=False)
        assert_same(list(old), list(output))
        assert told == Told(1, 3, 0, {})


def test_a_batch_is_not_stored_when_another_thread_edits_the_model_meanwhile(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_for("llama")
    over = threading.Event()
    edits = []

    def edit() -> None:
        # Once the lookup has been timed, the check before it is over and the batch begins.
        while here.cache.counts.overhead["lookup"] == looked_up and not over.is_set():
            time.sleep(0.0005)
        while not over.is_set():
            model.lm_head.weight.data.add_(0.01)
            edits.append(1)
            time.sleep(0.001)

    with served(tmp_path) as here:
        here.ask(ask, model, batch, do_sample=False)
        looked_up = here.cache.counts.overhead["lookup"]
        thread = threading.Thread(target=edit)
        thread.start()
        try:
            model.generate(**batch, max_new_tokens=200, do_sample=False, eos_token_id=[])
        finally:
            over.set()
            thread.join()
        here.cache.flush()
        assert edits and here.cache.counts.uncacheable["changed"] == 4
        # Whatever weights those answers came from, none of them is in the store: not for the old ones, not for the new.
        for step in (0.0, -0.01 * len(edits)):
            model.lm_head.weight.data.add_(step)
            _, told = here.ask(model.generate, **batch, max_new_tokens=200, do_sample=False, eos_token_id=[])
            assert told.hits == 0


# --- costs ------------------------------------------------------------------------------------------------------------------


def test_the_costs_of_a_batch_s_rows_add_up_to_its_measured_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama"), batch_for("llama")
    measured: list[Any] = []
    monkeypatch.setattr("evalcache.integrations.seam.share", lambda watch, *args: measured.append(watch) or share(watch, *args))
    with served(tmp_path) as here:
        here.ask(ask, model, batch, do_sample=False)
        here.ask(ask, model, batch, do_sample=True)
        counts = here.cache.counts
        assert len(measured) == 2
        assert all(0.0 < watch.first_s < watch.total_s for watch in measured)
        assert counts.spent_seconds == pytest.approx(sum(watch.total_s for watch in measured), rel=1e-9)
        assert counts.duplicate_seconds == 0
        here.ask(ask, model, batch, do_sample=False)  # from what the run itself has computed, which is no saving
        assert (counts.credited_seconds, counts.duplicate_seconds) == (0, pytest.approx(measured[0].total_s, rel=1e-9))


# --- wrapping one model -----------------------------------------------------------------------------------------------------


def test_wrap_serves_one_model_and_leaves_the_others_alone(tmp_path: Path) -> None:
    model, other, batch = build("llama"), build("llama"), batch_for("llama")
    bare = ask(model, batch, do_sample=False)
    cache = Cache(tmp_path)
    assert floor.wrap(model, cache) is model
    for _ in range(2):
        assert_same(list(bare), list(ask(model, batch, do_sample=False)))
        assert_same(list(bare), list(ask(other, batch, do_sample=False)))
    assert (cache.counts.hits, cache.counts.misses) == (4, 4)
    cache.close()
