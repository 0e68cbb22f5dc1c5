"""Tiny models with one of PEFT's adapters on them. Adapters are drawn: two that are made alike have to be the same one."""

from __future__ import annotations

from typing import Any

import torch
from tiny import build


def lora(name: str = "llama", task: str = "CAUSAL_LM") -> Any:
    """One that changes the answers, as if it had been trained."""
    return _adapted(name, "LoraConfig", task_type=task, r=2, init_lora_weights=False)


def prompt_tuned() -> Any:
    """Virtual tokens, which live outside the base model."""
    return _adapted("llama", "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3)


def _adapted(name: str, config: str, **settings: Any) -> Any:
    import peft  # not before a test asks for it: without it there are fewer seams

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(build(name), getattr(peft, config)(**settings)).eval()
