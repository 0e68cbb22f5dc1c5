"""lm-evaluation-harness's own ``generate_until`` over some requests: each answer as it is made, with its tokens and its cost.

The harness hands out text that it has cut, and batches in its own order; what the engine made is seen where it asks the engine.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evalcache.environment import device_name
from evalcache.integrations import lazy
from evalcache.integrations.generation import Call
from evalcache.integrations.lm_eval_requests import Asked, Numbered
from evalcache.integrations.outputs import row_results
from evalcache.integrations.timing import Stopwatch, measured, share
from evalcache.measuring import Meter
from evalcache.records import Cost, unpack_tokens
from evalcache.structs import Frozen
from evalcache.weights import unwrap


class Row(Frozen):
    """One computed row: its new tokens up to its own end, why it ended, and its share of the batch's cost."""

    tokens: Any
    reason: str | None
    cost: Cost


def generate_until(
    lm: Any,
    original: Callable[..., Any],
    requests: Sequence[Any],
    asked: Sequence[Asked],
    call: Call,
    meter: Meter,
    take: Callable[[int, str, Row], None],
    disable_tqdm: bool,
) -> list[str]:
    """Have the harness answer some requests.

    Args:
        original: its untouched ``generate_until``, of no instance. call: any of those that were resolved for these requests.
        take: is told of each answer as it is made: which request's, in the order of ``requests``, its text and its row.

    Returns:
        Their texts, in their order.
    """
    numbered = [
        dataclasses.replace(request, arguments=(Numbered.of(one.text, number), one.given))
        for number, (request, one) in enumerate(zip(requests, asked, strict=True))
    ]
    batch: list[Row] = []
    generate = lm._model_generate

    def watched(context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        with measured(unwrap(lazy.awake(lm._model)), context.device, meter) as watch:
            output = generate(context, max_length, stop, **kwargs)
        batch[:] = _rows(call, context, kwargs.get("attention_mask"), output, watch)
        return output

    class Hook:
        """Takes each answer as it is made; the caller's own hook is told at the end, of all."""

        def add_partial(self, _: str, request: Any, answer: str) -> None:
            take(request[0].place, answer, batch.pop(0))

    hook, lm.cache_hook = lm.cache_hook, Hook()
    lm._model_generate = watched
    try:
        return original(lm, numbered, disable_tqdm)
    finally:
        lm.cache_hook = hook
        del lm._model_generate


def cut(lm: Any, tokens: list[int], until: Sequence[str]) -> str:
    """The text of a row as the harness cuts it."""
    from lm_eval.models.utils import postprocess_generated_text

    mark = lm.think_end_token
    if isinstance(mark, int) and mark in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(mark) :]
    text = lm.tok_decode(tokens)
    if isinstance(mark, int):
        text = text.lstrip()
    return postprocess_generated_text(generation=text, stop=list(until), think_end_token=mark if isinstance(mark, str) else None)


def _rows(call: Call, context: torch.Tensor, mask: torch.Tensor | None, output: torch.Tensor, watch: Stopwatch) -> list[Row]:
    here = copy.copy(call)
    here.prefix = context
    results = row_results(here, output, context.shape[0])
    tokens = [unpack_tokens(result.tokens) for result in results]
    prompts = [context.shape[1]] * context.shape[0] if mask is None else [int(row.sum()) for row in mask]
    costs = share(watch, prompts, [len(row) for row in tokens], device_name(context.device.type))
    return [
        # A row that a stop string ended goes on for as long as its neighbours do: neither stopped by its length nor by its end.
        Row(row, result.finish_reason if result.finish_reason == "stop" else None, cost)
        for row, result, cost in zip(tokens, results, costs, strict=True)
    ]
