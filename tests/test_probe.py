"""What a model's rows depend on, found by asking it; and what models that were never met before make of the seam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served import Told, assert_same, served
from tiny import ENCODER_DECODERS, NAMES, NOT_ROW_SEPARABLE, build, prompts
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from evalcache.integrations.generation import Traits
from evalcache.integrations.probe import batch_dependent, probe


@pytest.mark.parametrize("name", NAMES)
def test_traits_of_the_tiny_models(name: str) -> None:
    model = build(name)
    state = torch.get_rng_state()
    traits = probe(model, model.generate)
    assert torch.equal(state, torch.get_rng_state())
    assert traits.rows is (name not in NOT_ROW_SEPARABLE)
    assert traits.draws is False
    if traits.rows:  # a decoder goes on from its last place, so padding there always counts
        assert traits.right is (name in ENCODER_DECODERS)
        assert traits.left is (name not in ("bart", "marian", "m2m_100"))
    assert bool(batch_dependent(model.config)) is (name in NOT_ROW_SEPARABLE)


def test_a_model_that_tells_nothing_is_taken_for_dependent() -> None:
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert probe(model, model.generate) == Traits(False, False, False)
    model = build("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # nothing before the last token reaches the answer
    assert probe(model, model.generate) == Traits(False, False, False)


class Neighbourly(LlamaForCausalLM):
    """Every row sees the mean of its batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(0, keepdim=True)
        return output


class Counting(GPT2LMHeadModel):
    """Takes positions from the padded row, whatever the mask says."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        width = inputs["input_ids"].shape[1]
        inputs["position_ids"] = torch.arange(input_ids.shape[1])[None, -width:].expand(input_ids.shape[0], -1)
        return inputs


class Noisy(LlamaForCausalLM):
    """Draws random numbers in every forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 3 * torch.randn_like(output.logits)
        return output


class Plain(GPT2LMHeadModel):
    """Overrides nothing."""


def of_class(cls: type) -> Any:
    model = build("gpt2" if issubclass(cls, GPT2LMHeadModel) else "llama")
    model.__class__ = cls
    return model


@pytest.mark.parametrize(
    ("cls", "traits"),
    [
        (Neighbourly, Traits(False, True, False)),
        (Counting, Traits(True, False, False)),
        (Plain, Traits(True, True, False)),
    ],
)
def test_traits_of_a_class_of_one_s_own(cls: type, traits: Traits) -> None:
    model = of_class(cls)
    found = probe(model, model.generate)
    assert (found.rows, found.draws) == (traits.rows, False)
    if found.rows:
        assert found == traits


def ask(model: Any, batch: dict[str, torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [model.generate(**batch, max_new_tokens=6, do_sample=False), torch.rand(2)]


@pytest.mark.parametrize("cls", [Neighbourly, Counting, Noisy, Plain])
def test_classes_of_one_s_own_are_served_rightly(cls: type, tmp_path: Path) -> None:
    model, batch = of_class(cls), prompts()
    pieces = [
        batch,
        {name: tensor[2:] for name, tensor in batch.items()},
        {name: tensor[3:, 8:] for name, tensor in batch.items()},
        {name: tensor[3:] for name, tensor in batch.items()},
    ]
    bare = [ask(model, piece) for piece in pieces]
    with served(tmp_path) as here:
        # The same weights under the library's class.
        here.ask(ask, build("gpt2" if issubclass(cls, GPT2LMHeadModel) else "llama"), batch)
        for warm in (False, True):
            for piece, expected in zip(pieces, bare, strict=True):
                output, told = here.ask(ask, model, piece)
                assert_same(expected, output)
                assert not told.uncacheable
                assert not warm or told.misses == 0


def test_a_model_that_draws_is_keyed_with_the_generators(tmp_path: Path) -> None:
    model, batch = of_class(Noisy), prompts()
    assert probe(model, model.generate).draws
    bare = {seed: ask(model, batch, seed) for seed in (0, 1)}
    assert not torch.equal(bare[0][0], bare[1][0])
    with served(tmp_path) as here:
        for expected in (Told(0, 1, 0, {}), Told(1, 0, 0, {})):
            for seed in (0, 1):
                output, told = here.ask(ask, model, batch, seed)
                assert_same(bare[seed], output)
                assert told == expected
