"""What a batch cost, measured: wall seconds of the device's work, and when the first token was there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evalcache.records import Cost


@dataclass(slots=True)
class Stopwatch:
    """Seconds of one batch: ``total_s``, and ``first_s`` until the first forward had ended (0 where there was none)."""

    total_s: float = 0.0
    first_s: float = 0.0


@contextlib.contextmanager
def measured(model: Any, device: torch.device) -> Iterator[Stopwatch]:
    """Measure what runs inside the block, waiting for the device at both ends.

    Args:
        model: its first ``forward`` is timed apart, by a hook that is gone afterwards; None where that is of no use.
    """
    watch = Stopwatch()
    handle = None

    def _first(*_: Any) -> None:
        nonlocal handle
        if handle is not None:
            handle.remove()
            handle = None
            _synchronize(device)
            watch.first_s = time.perf_counter() - began

    _synchronize(device)
    if model is not None and type(model).__name__ != "OptimizedModule":  # a hook would make it compile again
        handle = model.register_forward_hook(_first)
    began = time.perf_counter()
    try:
        yield watch
    finally:
        if handle is not None:
            handle.remove()
        _synchronize(device)
        watch.total_s = time.perf_counter() - began


def share(watch: Stopwatch, prompts: Sequence[int], completions: Sequence[int], device: str) -> list[Cost]:
    """A batch's seconds shared over its rows, so that they add up to what was measured.

    The time to the first token is shared by prompt tokens, the rest by completion tokens.
    """
    rows = len(prompts)
    first_s = min(watch.first_s, watch.total_s)
    rest_s = watch.total_s - first_s
    all_prompts, all_completions = sum(prompts), sum(completions)
    return [
        Cost(
            seconds=first_s * (prompt / all_prompts if all_prompts else 1 / rows)
            + rest_s * (completion / all_completions if all_completions else 1 / rows),
            prompt_tokens=prompt,
            completion_tokens=completion,
            device=device,
            batch_size=rows,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
