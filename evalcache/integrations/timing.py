"""What a batch cost, measured: wall seconds of the device's work, and when the first token was there."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evalcache.environment import device_name
from evalcache.measuring import Busy, Meter, process_peak_bytes
from evalcache.records import Cost
from evalcache.structs import Struct


class Stopwatch(Struct):
    """Seconds of one batch: ``total_s``, and ``first_s`` until the first forward had ended (0 where there was none)."""

    total_s: float = 0.0
    first_s: float = 0.0


@contextlib.contextmanager
def measured(model: Any, device: torch.device, meter: Meter | None = None, *, first: bool = True) -> Iterator[Stopwatch]:
    """Measure what runs inside the block, waiting for the devices at both ends.

    Args:
        model: may lie on several devices. device: of what it is asked.
        meter: is told that these devices compute now.
        first: whether the model's first ``forward`` is timed apart, by a hook that is gone afterwards.
    """
    watch = Stopwatch()
    handle = None
    devices = devices_of(model, device)

    def _first(*_: Any) -> None:
        nonlocal handle
        if handle is not None:
            handle.remove()
            handle = None
            _synchronize(devices)
            watch.first_s = time.perf_counter() - began

    _synchronize(devices)
    with contextlib.nullcontext() if meter is None else meter.computing(busy(devices)):  # which may end the process
        if first and type(model).__name__ != "OptimizedModule":  # a hook would make it compile again
            handle = model.register_forward_hook(_first)
        began = time.perf_counter()
        try:
            yield watch
        finally:
            if handle is not None:
                handle.remove()
            _synchronize(devices)
            watch.total_s = time.perf_counter() - began


def share(watch: Stopwatch, prompts: Sequence[int], completions: Sequence[int], device: str) -> list[Cost]:
    """A batch's seconds shared over its rows, so that they add up to what was measured.

    The time to the first token is shared by prompt tokens, the rest by completion tokens: what a token of either weighs beside
    the other is as measured in this batch. Where the first token was not timed apart (a compiled model), all is shared by
    completion tokens.
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


def devices_of(model: Any, device: torch.device) -> tuple[torch.device, ...]:
    """The devices that compute: where a map has put a model's parts, else the one that is asked."""
    places = getattr(model, "hf_device_map", None)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not isinstance(places, dict) or device.type != "cuda":
        return (device,)
    # A map names a GPU by its number, too. Parts on the host or on disk come to the others when their turn is there.
    found = {str(place) if not isinstance(place, int) else f"cuda:{place}" for place in places.values()}
    return tuple(torch.device(place) for place in sorted(found) if place.startswith("cuda")) or (device,)


@functools.cache
def busy(devices: tuple[torch.device, ...]) -> Busy:
    """These devices as a `Meter` knows them."""
    kind = devices[0].type
    if kind == "cpu":
        return Busy(device_name(kind), (kind,), process_peak_bytes)
    places = tuple(str(one) for one in devices)
    if kind != "cuda":
        return Busy(device_name(kind), places)
    uuids = [getattr(torch.cuda.get_device_properties(one), "uuid", None) for one in devices]
    known = () if None in uuids else tuple(f"GPU-{uuid}" for uuid in uuids)
    return Busy(device_name(kind), places, lambda: max(map(torch.cuda.max_memory_allocated, devices)), known)


def _synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
