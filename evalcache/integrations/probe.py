"""Do a model's rows depend on their neighbours, or on their padding? Asked of the model itself, once per set of weights.

Most architectures answer a row alike alone, beside others, and with padding before it; some do not (absolute positions that
count padding, recurrent states that ignore the mask), and no list of them would stay right. What cannot be seen on short rows is
known by name: rotary embeddings that change with the longest row, experts with a capacity, attention over blocks.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from evalcache.integrations.generation import Traits
from evalcache.integrations.generators import generator_states, restore_generators

_BATCH_ROPES = frozenset({"dynamic", "longrope"})
# Recurrent ones, experts with a capacity, and attention over blocks, which are cut by padded position.
_BATCH_MODELS = frozenset(
    "rwkv switch_transformers nllb-moe reformer xlnet longformer led big_bird bigbird_pegasus longt5 pegasus_x".split()
)
_DECODING = ("_sample", "_beam_search", "_get_logits_processor", "_get_stopping_criteria", "_merge_criteria_processor_list")
_LENGTH, _MORE, _STEPS = 8, 4, 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def batch_dependent(config: Any) -> str:
    """Why rows of this model depend on each other by construction; empty if nothing is known of that kind."""
    if config is None:
        return "no config"
    for one in [config, *[getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]]:
        if one is None:
            continue
        for rope in _ropes(getattr(one, "rope_parameters", None) or getattr(one, "rope_scaling", None)):
            if rope in _BATCH_ROPES:
                return f"{rope} rotary embedding"
        if getattr(one, "model_type", "") in _BATCH_MODELS:
            return f"model type {one.model_type}"
        if getattr(one, "expert_capacity", None):
            return "experts with a capacity"
    return ""


def _ropes(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    found = [str(parameters[name]) for name in ("rope_type", "type") if name in parameters]
    return found + [rope for value in parameters.values() for rope in _ropes(value)]


def probe(model: Any, generate: Any) -> Traits:
    """Find a model's traits by a few short generations.

    Args:
        model: a transformers model in eval mode. generate: its untouched ``generate``, bound.

    Returns:
        Rows and padding all False where the probe cannot be run, or tells nothing (a model whose answer does not even depend on
        the order of the prompt): then every batch is one Action.

    Cost: three generations of three tokens; two more where rows depend on each other. The generators are left as they were.
    """
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    states, others = generator_states(model.device), other_generators()
    steady = True
    try:
        if vocabulary < _LENGTH:
            return _unknown(draws=True)
        found = _ask(model, generate, vocabulary)
        draws = not all(map(torch.equal, states, generator_states(model.device)))
        if not found[0] or other_generators() != others:
            steady = _is_steady(model, generate, vocabulary, states)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return _unknown(draws=True)
    finally:
        restore_generators(states, model.device)
    # A prompt-learning adapter stands around a model, which makes the tokens.
    inner = model.get_base_model() if hasattr(type(model), "get_base_model") else model
    if batch_dependent(model.config) or _decodes_by_itself(type(inner)):
        return _unknown(draws, steady)
    return Traits(*found, draws, steady)


def _decodes_by_itself(cls: type) -> bool:
    """Whether a class has put its own in the place of what makes tokens of logits: the probe sees logits only."""
    from transformers.generation.utils import GenerationMixin

    return any(getattr(cls, name, None) is not getattr(GenerationMixin, name, None) for name in _DECODING)


def _unknown(draws: bool, steady: bool = True) -> Traits:
    return Traits(False, False, False, draws, steady)


def other_generators() -> Any:
    """The states of Python's and numpy's own generators, of which no key knows."""
    numpy = sys.modules.get("numpy.random")
    name, words, *rest = ("", b"") if numpy is None else numpy.get_state()
    return random.getstate(), name, bytes(words), rest


def _is_steady(model: Any, generate: Any, vocabulary: int, states: list[torch.Tensor]) -> bool:
    """Whether a row answers alike twice, alone and from the same states of torch's generators."""
    row, answers, others = _row(vocabulary).to(model.device), [], other_generators()
    for _ in range(2):
        restore_generators(states, model.device)
        answers.append(_logits(generate, row, torch.ones_like(row)).double())
    one, other = answers
    tolerance = TOLERANCE.get(torch.float32, 0.0) * max(1e-3, float(one.abs().max()))
    return float((one - other).abs().max()) <= tolerance and other_generators() == others


def _row(vocabulary: int) -> torch.Tensor:
    """The row that is asked again and again. Shape: ``(1, 8) int64``."""
    row = torch.randint(2, vocabulary, (1, _LENGTH), generator=torch.Generator().manual_seed(0))  # never the script's own
    row[0, :2] = torch.tensor([2, vocabulary - 1])
    return row


def _ask(model: Any, generate: Any, vocabulary: int) -> tuple[bool, bool, bool]:
    """Whether a row answers alike beside another one, with padding before it, and with padding after it."""
    numbers = torch.Generator().manual_seed(1)  # never the script's own generator
    device, row = model.device, _row(vocabulary)
    other = torch.randint(2, vocabulary, (1, _LENGTH + _MORE), generator=numbers)
    turned = torch.cat([row[:, :-1].flip(1), row[:, -1:]], 1)
    # Not pad ids alone: some models count positions by looking for those, whatever the mask says.
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    filler = torch.tensor([[pad_id if isinstance(pad_id, int) and 0 <= pad_id < vocabulary else 0, vocabulary - 2, 1, 3]])
    ones, zeros = torch.ones_like(row), torch.zeros_like(filler)

    def ask(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _logits(generate, ids.to(device), mask.to(device))

    (alone,) = ask(row, ones)
    tolerance = TOLERANCE.get(alone.dtype, 0.0) * max(1e-3, float(alone.double().abs().max()))

    def apart(found: torch.Tensor) -> float:
        return float((found.double() - alone.double()).abs().max())

    # Few generations, because each reads all weights once a step. A neighbour of the same tokens alone would hide an average.
    beside, backwards, _ = ask(torch.cat([row, turned, other[:, :_LENGTH]]), torch.cat([ones, ones, ones]))
    if not apart(backwards) > 2 * tolerance:
        return False, False, False
    ids = torch.cat([torch.cat([filler, row], 1), torch.cat([row, filler], 1), other])
    left, right, _ = ask(ids, torch.cat([torch.cat([zeros, ones], 1), torch.cat([ones, zeros], 1), torch.ones_like(other)]))
    return apart(beside) <= tolerance, apart(left) <= tolerance, apart(right) <= tolerance


def _logits(generate: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of each row's first steps. Shape: ``(rows, steps, vocabulary)``."""
    output = generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, 1)
