"""Log-likelihoods of (context, continuation) pairs: a request-level seam, which batches as it likes.

It is told only the misses. Pairs are computed in length-sorted batches by token budget (padding falls from three quarters to a
few percent), pairs whose input is the same share one row (the four letters of a multiple choice do), and what was computed is
committed every few seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.environment import device_name
from evalcache.errors import EvalCacheError, UncacheableError
from evalcache.integrations import lazy
from evalcache.integrations.probe import batch_dependent
from evalcache.integrations.timing import Stopwatch, measured, share
from evalcache.integrations.transformers import CLIENT, AnotherModelError, Seam
from evalcache.records import Action, Environment, Fields, Request, Result, pack_logprobs, pack_tokens, unpack_logprobs
from evalcache.tensors import dtype_name
from evalcache.watch import Watch

Row = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a model thinks of one continuation.

    Args:
        logprob: sum over the continuation's tokens, in nats.
        token_logprobs: one per token of the continuation, float32 values.
        is_greedy: whether greedy decoding would have produced the continuation.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool


def loglikelihood(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    cache: Cache | None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    softmax_dtype: torch.dtype = torch.float32,
) -> list[Score]:
    """Score continuations, from the store where they are known.

    Args:
        model: a causal transformers model. tokenizer: turns text into ids; only the ids are keyed.
        pairs: (context, continuation); spaces at a context's end go to the continuation, an empty context is the start token.
        cache: where to look and store; None means that everything is computed.
        batch_tokens: padded tokens of one batch; no part of the key.
        max_length: tokens that the model can read; None means its config's. Longer inputs lose their beginning.
        softmax_dtype: in which logits become log-probabilities; those of bfloat16 differ by up to 0.12.

    Returns:
        One `Score` per pair, in order.

    Raises:
        EvalCacheError: a continuation without tokens, or an encoder–decoder model.

    Cost: one check of the model at the start, one every few seconds of computing.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise EvalCacheError(
            "log-likelihoods are of causal models", hint="use generate for encoder–decoder models", found="encoder–decoder"
        )
    limit = max_length or int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
    rows = [_encode(tokenizer, context, continuation, limit) for context, continuation in pairs]
    if not rows:
        return []
    if cache is None:
        bare = dict(_compute(model, rows, batch_tokens, softmax_dtype, range(len(rows))))
        return [_score(bare[place]) for place in range(len(rows))]
    seam = Seam.of(cache)
    watch = seam.watch(model)
    with watch.lock:
        try:
            try:
                results = _serve(seam, watch, model, rows, batch_tokens, softmax_dtype)
            except AnotherModelError:  # what woke is not what was promised: ask again, of what is there
                results = _serve(seam, watch, model, rows, batch_tokens, softmax_dtype)
        except UncacheableError as error:
            made = dict(_compute(model, rows, batch_tokens, softmax_dtype, range(len(rows))))
            seconds = sum(result.cost.seconds for result in made.values() if result.cost)
            cache.uncacheable(error.reason, error.detail, requests=len(rows), seconds=seconds, client=CLIENT)
            results = [made[place] for place in range(len(rows))]
    return [_score(result) for result in results]


def _serve(
    seam: Seam, watch: Watch, model: Any, rows: Sequence[Row], batch_tokens: int, softmax_dtype: torch.dtype
) -> list[Result]:
    manifest, environment = seam.look(model, watch)
    if "dynamic" in batch_dependent(model.config):
        raise UncacheableError("unsupported", "a dynamic rotary embedding remembers the rows before")
    if seam.cache.match == "strict":
        batch = digest_canonical([batch_tokens, [[pack_tokens(context), pack_tokens(tail)] for context, tail in rows]])
        environment = Environment(Fields(dict(environment.keyed) | {"batch": batch.value}), environment.recorded)
    settings = Fields({"softmax_dtype": dtype_name(softmax_dtype)})
    actions = [
        Action(
            manifest.root,
            Request("loglikelihood", pack_tokens(context), settings, {"continuation": pack_tokens(continuation)}),
            environment,
        )
        for context, continuation in rows
    ]

    def compute(missing: Sequence[int]) -> Iterator[tuple[int, Result]]:
        seam.wake(model, watch, manifest)
        return _compute(model, rows, batch_tokens, softmax_dtype, missing)

    return seam.cache.serve(watch, actions, compute, client=CLIENT, all_or_none=seam.cache.match == "strict")


def _encode(tokenizer: Any, context: str, continuation: str, limit: int) -> Row:
    """Ids of context and continuation, as they are when encoded together; the context's beginning is cut at ``limit``."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = list(tokenizer.encode(context + continuation))
    head = list(tokenizer.encode(context)) if context else []
    if not head:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise EvalCacheError("an empty context needs a start token", hint="set tokenizer.bos_token", found=context)
        whole = whole[1:] if whole[:1] == [start] else whole
        head, tail = [start], whole
    else:
        tail = whole[len(head) :]
    if not tail:
        raise EvalCacheError("a continuation has no tokens", hint="give every pair a continuation", found=continuation)
    if len(tail) > limit:
        raise EvalCacheError(
            f"a continuation of {len(tail)} tokens is longer than the model reads", hint="shorten it", found=len(tail)
        )
    # The last token is only predicted, never read.
    return head[-(limit + 1 - len(tail)) :], tail


def _compute(
    model: Any, rows: Sequence[Row], batch_tokens: int, softmax_dtype: torch.dtype, missing: Sequence[int]
) -> Iterator[tuple[int, Result]]:
    model = lazy.awake(model)
    shared: dict[tuple[int, ...], list[int]] = {}
    for place in missing:
        context, continuation = rows[place]
        shared.setdefault(tuple(context + continuation[:-1]), []).append(place)
    alone = bool(batch_dependent(model.config))
    # Longest first: a batch that does not fit in memory fails at once and not after hours.
    inputs = list(shared) if alone else sorted(shared, key=len, reverse=True)
    start = 0
    while start < len(inputs):
        width = len(inputs[start])
        count = 1 if alone else max(1, batch_tokens // width)
        batch = inputs[start : start + count]
        start += count
        yield from _score_batch(model, rows, softmax_dtype, batch, [shared[one] for one in batch])


@torch.no_grad()
def _score_batch(
    model: Any,
    rows: Sequence[Row],
    softmax_dtype: torch.dtype,
    batch: Sequence[tuple[int, ...]],
    places: Sequence[list[int]],
) -> list[tuple[int, Result]]:
    device = model.device
    width = max(len(one) for one in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, one in enumerate(batch):
        ids[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    scored: list[tuple[int, int, list[float], bool]] = []
    with measured(None, device) as watch:
        # Padding stands on the right, where a causal model never looks.
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        virtual = logits.shape[1] - width  # the tokens that a prompt-learning adapter puts before the prompt
        for row, one in enumerate(batch):
            for place in places[row]:
                continuation = rows[place][1]
                end = virtual + len(one)
                steps = torch.log_softmax(logits[row, end - len(continuation) : end], dim=-1, dtype=softmax_dtype)
                target = torch.tensor(continuation, device=device)
                # Of the log-probabilities, as clients do: in a short dtype two logits may round to one of them.
                greedy = bool((steps.argmax(dim=-1) == target).all())
                scored.append((row, place, steps.gather(1, target[:, None])[:, 0].tolist(), greedy))
    watch = Stopwatch(watch.total_s, watch.total_s)  # all of it is reading
    costs = share(watch, [len(one) for one in batch], [0] * len(batch), device_name(device.type))
    results = []
    for row, place, logprobs, greedy in scored:
        cost = costs[row]
        mine = type(cost)(cost.seconds / len(places[row]), cost.prompt_tokens, len(logprobs), cost.device, len(batch))
        scalars = {"sum": float(sum(logprobs)), "is_greedy": greedy}
        results.append((place, Result(logprobs=pack_logprobs(logprobs), scalars=scalars, cost=mine)))
    return results


def _score(result: Result) -> Score:
    return Score(
        float(result.scalars["sum"]), tuple(unpack_logprobs(result.logprobs).tolist()), bool(result.scalars["is_greedy"])
    )
