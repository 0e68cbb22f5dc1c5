"""Pace: what each layer of a stack takes of a forward, measured on the device that it runs on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from evalcache.integrations.stacks import of_this_thread
from evalcache.structs import Struct, field


class Pace(Struct):
    """Seconds a token of the last whole forward: ``ended[d]`` from its beginning to the end of ``d`` layers; ``whole`` in all.

    Empty before the first one.
    """

    ended: list[float] = field(default_factory=list)
    whole: float = 0.0

    def up_to(self, depth: int, tokens: int) -> float:
        """Seconds that the layers below ``depth``, and what comes before them, take; 0 where that is not known."""
        return self.ended[depth] * tokens if self.ended else 0.0

    @contextlib.contextmanager
    def measuring(self, layers: Sequence[nn.Module], ids: torch.Tensor) -> Iterator[None]:
        """Measure the whole forward inside the block. Cost: a microsecond a layer; on a GPU the block ends when its work does."""
        marks: list[Any] = []
        mark = _marker(ids.device)
        hooks = [layer.register_forward_hook(of_this_thread(lambda *_: marks.append(mark()))) for layer in layers]
        try:
            marks.append(mark())
            yield
            marks.append(mark())
        finally:
            for hook in hooks:
                hook.remove()
        if len(marks) == len(layers) + 2:
            *self.ended, self.whole = [_between(marks[0], one) / ids.numel() for one in marks]


def _marker(device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":
        return time.perf_counter

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark


def _between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
