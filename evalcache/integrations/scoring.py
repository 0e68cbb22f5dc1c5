"""Log-likelihoods of (context, continuation) pairs: a request-level seam, which batches as it likes.

It is told only the misses. Pairs are computed in length-sorted batches by token budget (padding falls from three quarters to a
few percent), pairs whose input is the same share one row (the four letters of a multiple choice do), and what was computed is
committed every few seconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.environment import device_name
from evalcache.errors import EvalCacheError, UncacheableError
from evalcache.integrations import lazy
from evalcache.integrations.generators import generator_states, restore_generators
from evalcache.integrations.probe import TOLERANCE, batch_dependent, other_generators
from evalcache.integrations.reuse import Reuse, Reused
from evalcache.integrations.seam import CLIENT, AnotherModelError, Seam
from evalcache.integrations.timing import Stopwatch, measured, share
from evalcache.measuring import Meter
from evalcache.records import Actions, Environment, Fields, Result, pack_logprobs, pack_tokens, unpack_logprobs
from evalcache.serving import Labels
from evalcache.structs import Frozen, Struct, field
from evalcache.tensors import dtype_name
from evalcache.watch import Watch

_PROBE_LENGTH = 16
TOGETHER, ALONE, DRAWS = "together", "alone", "draws"

Row = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""


class Score(Frozen):
    """What a model thinks of one continuation.

    Args:
        logprob: sum over the continuation's tokens, in nats.
        token_logprobs: one per token of the continuation, float32 values.
        is_greedy: whether greedy decoding would have produced the continuation.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


class Scoring(Frozen):
    """How rows are scored.

    Args:
        softmax_dtype: in which logits become log-probabilities; None means that of the logits.
        batch_tokens: padded tokens of one batch. batch_rows: rows of one batch, asked for with the inputs, longest first, when
            something has to be computed; it takes the place of ``batch_tokens``. No parts of the key.
        forward: (model, ids, mask) → logits; ids and mask ``(batch, width) int64``, padded on the right, where a causal model
            never looks. reads: what of it the model is given.
        around: what a client puts around each forward (autocast).
        alone: rows that depend on their neighbours are computed one by one; else they are Uncacheable.
        announce: told how many requests were stored and how many have to be computed. tick: how many were.
    """

    softmax_dtype: torch.dtype | None = torch.float32
    batch_tokens: int = 8192
    batch_rows: Callable[[Sequence[tuple[int, ...]]], int] | None = None
    forward: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] = _forward
    reads: str = "ids, mask"
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    alone: bool = True
    announce: Callable[[int, int], object] = lambda stored, missing: None
    tick: Callable[[int], object] = lambda count: None


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
    scoring = Scoring(softmax_dtype, batch_tokens)
    try:
        if cache is None:
            raise UncacheableError("off")
        results = score_rows(cache, model, rows, scoring)
    except UncacheableError as error:
        alone = probe_rows(lazy.awake(model), scoring) != TOGETHER
        made = dict(_Scorer.of(model, rows, scoring, alone, range(len(rows))).compute(range(len(rows))))
        results = [made[place] for place in range(len(rows))]
        if cache is not None:
            seconds = sum(result.cost.seconds for result in results if result.cost)
            cache.uncacheable(error.reason, error.detail, requests=len(rows), seconds=seconds, client=CLIENT)
    return [_score(result) for result in results]


def score_rows(
    cache: Cache, model: Any, rows: Sequence[Row], scoring: Scoring, *, client: str = CLIENT, labels: Labels | None = None
) -> list[Result]:
    """Results of rows in their order: stored ones, and the others computed as ``scoring`` says. One entry for all clients.

    Raises:
        UncacheableError: they cannot be keyed; nothing was computed.
    """
    seam = Seam.of(cache)
    watch = seam.watch(model)
    with watch.lock:
        try:
            return _serve(seam, watch, model, rows, scoring, client, labels)
        except AnotherModelError:  # what woke is not what was promised: ask again, of what is there
            return _serve(seam, watch, model, rows, scoring, client, labels)


def _serve(
    seam: Seam, watch: Watch, model: Any, rows: Sequence[Row], scoring: Scoring, client: str, labels: Labels | None
) -> list[Result]:
    with scoring.around():
        manifest, environment = seam.look(model, watch)
    if "dynamic" in batch_dependent(model.config):
        raise UncacheableError("unsupported", "a dynamic rotary embedding remembers the rows before")
    name = "" if scoring.softmax_dtype is None else dtype_name(scoring.softmax_dtype)
    if not name:  # the logits' own, which is known of a model without lower precision anywhere
        exact = environment.keyed["dtype"] == "float32" and not environment.keyed["autocast"]
        name = "float32" if exact else "logits"
    settings = Fields({"softmax_dtype": name})
    if seam.cache.match == "strict":
        batch = digest_canonical([scoring.batch_tokens, [[pack_tokens(context), pack_tokens(tail)] for context, tail in rows]])
        environment = Environment(Fields(dict(environment.keyed) | {"batch": batch.value}), environment.recorded)
    with seam.cache.counts.taking("keys"):
        contexts = [pack_tokens(context) for context, _ in rows]
        tails = [{"continuation": pack_tokens(tail)} for _, tail in rows]
    actions = Actions(manifest.root, "loglikelihood", settings, environment, contexts, tails)

    scorers: list[_Scorer] = []

    def portions(missing: list[int]) -> list[list[int]]:
        seam.wake(model, watch, manifest)
        live = lazy.awake(model)
        parts = ["scoring", manifest.root.value, environment.keyed.digest.value]
        found = seam.once(parts, lambda: probe_rows(live, scoring))
        if found == DRAWS:
            raise UncacheableError("unsupported", "a forward of this model draws random numbers")
        alone = found == ALONE
        if alone and not scoring.alone:
            raise UncacheableError("unsupported", "rows of this model depend on each other")
        scoring.announce(len(rows) - len(missing), len(missing))
        exact = name if scoring.softmax_dtype is None else ""
        scorer = _Scorer.of(live, rows, scoring, alone, missing, exact, seam.cache.meter)
        if seam.cache.components and seam.cache.match != "strict" and not alone and missing:
            with torch.no_grad(), scoring.around():
                forward = functools.partial(scoring.forward, live)
                scorer.reused = Reuse.within(seam.cache).of(live, watch, manifest, environment, forward, scoring.reads)
        scorers.append(scorer)
        return scorer.portions(missing)

    def compute(mine: Sequence[int]) -> Iterator[tuple[int, Result]]:
        return scorers[0].compute(mine)

    whole = seam.cache.match == "strict"
    results = seam.cache.serve(watch, actions, compute, client=client, labels=labels, all_or_none=whole, portions=portions)
    if not scorers:
        scoring.announce(len(rows), 0)
    elif rest := scorers[0].waiting:
        scoring.tick(rest)  # another process has computed them
    return results


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


def probe_rows(model: Any, scoring: Scoring) -> str:
    """Whether rows may be scored together or only alone, or draw random numbers. Cost: two forwards of a few tokens.

    The generators are left as they were.
    """
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    if vocabulary < _PROBE_LENGTH:
        return ALONE
    numbers = torch.Generator().manual_seed(0)  # never the script's own generator
    other = torch.randint(2, vocabulary, (1, _PROBE_LENGTH), generator=numbers)
    row = torch.randint(2, vocabulary, (1, _PROBE_LENGTH // 2), generator=numbers)
    ids, mask = torch.zeros((2, _PROBE_LENGTH), dtype=torch.long), torch.ones((2, _PROBE_LENGTH), dtype=torch.long)
    ids[0, : row.shape[1]], ids[1], mask[0, row.shape[1] :] = row, other, 0
    device = model.device
    states, others = generator_states(device), other_generators()
    try:
        with torch.no_grad(), scoring.around():
            alone = scoring.forward(model, row.to(device), torch.ones_like(row).to(device))[0].double()
            logits = scoring.forward(model, ids.to(device), mask.to(device))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return ALONE
    finally:
        drawn = not all(map(torch.equal, states, generator_states(device))) or other_generators() != others
        restore_generators(states, device)
    if drawn:
        return DRAWS
    beside = logits[0, : alone.shape[0]].double()
    tolerance = TOLERANCE.get(logits.dtype, 0.0) * max(1e-3, float(alone.abs().max()))
    apart = bool(batch_dependent(model.config)) or not float((alone - beside).abs().max()) <= tolerance
    return ALONE if apart else TOGETHER


_Batch = dict[tuple[int, ...], list[int]]
"""Inputs that share a forward, each with the places of the rows that it answers."""


class _Scorer(Struct):
    """Scores rows in length-sorted batches; the same places are always split into the same batches.

    Args:
        most: rows of one batch; 0 means that its padded tokens count. waiting: how many were announced and are not done yet.
        exact: the dtype that the logits were taken to have. meter: is told what computes.
        reused: forwards that may begin above the first layer.
    """

    model: Any
    rows: Sequence[Row]
    scoring: Scoring
    alone: bool
    most: int
    waiting: int
    exact: str
    meter: Meter | None = None
    reused: Reused | None = None
    _planned: dict[int, tuple[list[int], _Batch]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Any,
        rows: Sequence[Row],
        scoring: Scoring,
        alone: bool,
        missing: Sequence[int],
        exact: str = "",
        meter: Meter | None = None,
    ) -> _Scorer:
        scorer = cls(lazy.awake(model), rows, scoring, alone, 1 if alone else 0, len(missing), exact, meter)
        if not alone and scoring.batch_rows is not None:
            scorer.most = scoring.batch_rows(list(scorer._inputs(missing)))
        return scorer

    def _inputs(self, places: Sequence[int]) -> _Batch:
        """Longest first: a batch that does not fit in memory fails at once and not after hours."""
        shared: _Batch = {}
        for place in places:
            context, continuation = self.rows[place]
            shared.setdefault(tuple(context + continuation[:-1]), []).append(place)
        if self.alone:
            return shared
        return {ids: shared[ids] for ids in sorted(shared, key=lambda ids: (-len(ids), ids))}

    def plan(self, places: Sequence[int]) -> list[_Batch]:
        """Split places into batches."""
        shared = self._inputs(places)
        inputs = list(shared)
        batches, start = [], 0
        while start < len(inputs):
            count = self.most or max(1, self.scoring.batch_tokens // len(inputs[start]))
            batches.append({ids: shared[ids] for ids in inputs[start : start + count]})
            start += count
        return batches

    def portions(self, places: Sequence[int]) -> list[list[int]]:
        """The places of each batch."""
        batches = self.plan(places)
        portions = [[place for mine in batch.values() for place in mine] for batch in batches]
        self._planned = {mine[0]: (mine, batch) for mine, batch in zip(portions, batches, strict=True)}
        return portions

    def _batches(self, places: Sequence[int]) -> list[_Batch]:
        """Whole portions as they were planned; others anew, so that what is left of several fills one batch."""
        batches, start = [], 0
        while start < len(places):
            mine, batch = self._planned.get(places[start], ([], {}))
            if not mine or mine != places[start : start + len(mine)]:
                return self.plan(places)
            batches.append(batch)
            start += len(mine)
        return batches

    def compute(self, places: Sequence[int]) -> Iterator[tuple[int, Result]]:
        """Score rows, batch by batch."""
        for batch in self._batches(places):
            made = _score_batch(self, list(batch), list(batch.values()))
            self.waiting -= len(made)
            self.scoring.tick(len(made))
            yield from made


@torch.no_grad()
def _score_batch(scorer: _Scorer, batch: Sequence[tuple[int, ...]], places: Sequence[list[int]]) -> list[tuple[int, Result]]:
    model, rows, scoring, exact = scorer.model, scorer.rows, scorer.scoring, scorer.exact
    device = model.device
    width = max(len(one) for one in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, one in enumerate(batch):
        ids[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    asked = [(row, place, rows[place][1]) for row, mine in enumerate(places) for place in mine]
    ids, mask = ids.to(device), mask.to(device)
    if scorer.reused is not None:
        with scoring.around():
            scorer.reused.prepare(batch, ids, mask)
    with measured(model, device, scorer.meter, first=False) as watch:
        with scoring.around():
            logits = scoring.forward(model, ids, mask) if scorer.reused is None else scorer.reused(ids, mask)
        if exact not in ("", "logits", dtype_name(logits.dtype)):
            raise UncacheableError("unsupported", f"logits of {logits.dtype} from a model of {exact}")
        virtual = logits.shape[1] - width  # the tokens that a prompt-learning adapter puts before the prompt
        # Only the places that predict a continuation, all at once: each round trip to a device costs more than the work.
        at_row = [row for row, _, tail in asked for _ in tail]
        at_place = [virtual + len(batch[row]) - len(tail) + step for row, _, tail in asked for step in range(len(tail))]
        target = torch.tensor([token for *_, tail in asked for token in tail], device=device)
        steps = torch.log_softmax(logits[at_row, at_place], dim=-1, dtype=scoring.softmax_dtype)
        # Of the log-probabilities, as clients do: in a short dtype two logits may round to one of them.
        greedy = (steps.argmax(dim=-1) == target).tolist()
        found = steps.gather(1, target[:, None])[:, 0].tolist()
    watch = Stopwatch(watch.total_s, watch.total_s)  # all of it is reading
    costs = share(watch, [len(one) for one in batch], [0] * len(batch), device_name(device.type))
    results, start = [], 0
    for row, place, tail in asked:
        end = start + len(tail)
        logprobs, cost = found[start:end], costs[row]
        mine = type(cost)(cost.seconds / len(places[row]), cost.prompt_tokens, len(tail), cost.device, len(batch))
        scalars = {"sum": float(sum(logprobs)), "is_greedy": all(greedy[start:end]), "dtype": dtype_name(steps.dtype)}
        made = None if scorer.reused is None else scorer.reused.made[row]
        results.append((place, Result(logprobs=pack_logprobs(logprobs), scalars=scalars, cost=mine, made=made)))
        start = end
    return results


def _score(result: Result) -> Score:
    return Score(
        float(result.scalars["sum"]), tuple(unpack_logprobs(result.logprobs).tolist()), bool(result.scalars["is_greedy"])
    )
