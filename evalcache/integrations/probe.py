"""Do a model's rows depend on their neighbours, or on their padding? Asked of the model itself, once per class and dtype.

Most architectures answer a row alike alone, beside others, and with padding before it; some do not (absolute positions that
count padding, recurrent states that ignore the mask), and no list of them would stay right. Rotary embeddings that change with the
longest row and experts with a capacity cannot be seen on short rows, so these are known by name.
"""

from __future__ import annotations

from typing import Any

import torch

from evalcache.integrations.generation import Traits

_BATCH_ROPES = frozenset({"dynamic", "longrope"})
_BATCH_MODELS = frozenset({"rwkv", "switch_transformers", "nllb-moe", "reformer", "xlnet"})
_LENGTH, _MORE, _STEPS = 8, 4, 3
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


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
        All False where the probe cannot be run: then every batch is one Action.

    Cost: four generations of three tokens.
    """
    if batch_dependent(model.config):
        return Traits(False, False, False)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    if vocabulary < 4:
        return Traits(False, False, False)
    draws = torch.Generator().manual_seed(0)  # never the script's own generator
    device = model.device
    row = torch.randint(2, vocabulary, (1, _LENGTH), generator=draws).to(device)
    other = torch.randint(2, vocabulary, (1, _LENGTH + _MORE), generator=draws).to(device)
    pad = torch.ones((1, _MORE), dtype=torch.long, device=device)
    ones, zeros = torch.ones_like(row), torch.zeros_like(pad)
    try:
        alone = _logits(generate, row, ones)
        neighbour = _logits(
            generate, torch.cat([row, other[:, :_LENGTH]]), torch.ones(2, _LENGTH, dtype=torch.long, device=device)
        )
        left = _logits(
            generate,
            torch.cat([torch.cat([pad, row], 1), other]),
            torch.cat([torch.cat([zeros, ones], 1), torch.ones_like(other)]),
        )
        right = _logits(
            generate,
            torch.cat([torch.cat([row, pad], 1), other]),
            torch.cat([torch.cat([ones, zeros], 1), torch.ones_like(other)]),
        )
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return Traits(False, False, False)
    tolerance = _TOLERANCE.get(alone.dtype, 0.0)
    alone = alone.double()
    scale = max(1e-3, float(alone.abs().max()))

    def same(found: torch.Tensor) -> bool:
        return bool((found.double() - alone).abs().max() <= tolerance * scale)

    return Traits(same(neighbour), same(left), same(right))


def _logits(generate: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the first row's first steps. Shape: ``(steps, vocabulary)``."""
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
    return torch.stack([step[0] for step in output.logits])
