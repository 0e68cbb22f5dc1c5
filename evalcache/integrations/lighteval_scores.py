"""lighteval: log-likelihoods of a document's choices, by the entries that all clients share.

What comes back of a call depends on its batches: the tokens of the choices are padded to the longest of their batch, and the
scores that are normalised by tokens count the padding. So the batches are made as lighteval makes them, though hits need none.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.environment import device_name
from evalcache.errors import UncacheableError
from evalcache.integrations.scoring import Row, Scoring, score_rows
from evalcache.integrations.seam import AnotherModelError, Seam
from evalcache.manifest import Manifest
from evalcache.records import Environment, Result, unpack_logprobs
from evalcache.serving import Labels
from evalcache.watch import Watch

_log = logging.getLogger("lighteval.evalcache")

Encoded = tuple[list[int], list[list[int]]]
"""Ids of a document's context, and of each of its choices."""


def score_documents(cache: Cache, client: str, lm: Any, module: Any, docs: Sequence[Any]) -> list[Any]:
    """lighteval's responses for ``docs``, in their order.

    Raises:
        UncacheableError: they cannot be keyed; nothing was computed.
    """
    if not all(doc.choices for doc in docs):
        raise UncacheableError("argument", "a document without choices")
    dataset = module.LoglikelihoodDataset(requests=docs, num_dataset_splits=1)
    (split,) = dataset.splits_iterator()
    most_choices = max(len(doc.choices) for doc in docs)
    longest = _longest(lm, split[0])
    size = _batch_documents(batch_size_of(cache, lm, longest, module.STARTING_BATCH_SIZE), most_choices)
    loader = module.DataLoader(split, batch_size=size, collate_fn=lambda batch: batch)
    if lm.accelerator:
        loader = lm.accelerator.prepare(loader)
    batches = [list(batch) for batch in loader]  # in the same way: it draws a number
    encoded = [[_encode(lm, doc) for doc in batch] for batch in batches]
    rows = [(context, tail) for batch in encoded for context, tails in batch for tail in tails]
    flat = [doc for batch in batches for doc in batch]
    labels = [(str(doc.task_name), str(doc.id)) for doc in flat for _ in doc.choices]
    answers = iter(_answers(cache, client, lm, module, rows, labels, size * most_choices))
    responses = []
    for batch in encoded:
        scored = [[next(answers) for _ in tails] for _, tails in batch]
        responses += _responses(lm, module, batch, scored)
    return dataset.get_original_order(responses)


def batch_size_of(
    cache: Cache, lm: Any, longest: int, start: int, known: tuple[Seam, Watch, Manifest, Environment] | None = None
) -> int:
    """Rows of a batch as lighteval would choose them: as it was told, or the most that the device was once found to hold."""
    if lm.config.batch_size is not None:
        return int(lm.config.batch_size)
    if known is None:
        seam = Seam.of(cache)
        watch = seam.watch(lm.model)
        with watch.lock:
            try:
                return batch_size_of(cache, lm, longest, start, (seam, watch, *seam.look(lm.model, watch)))
            except AnotherModelError:  # what woke is not what was promised: ask again, of what is there
                return batch_size_of(cache, lm, longest, start, (seam, watch, *seam.look(lm.model, watch)))
    seam, watch, manifest, environment = known

    def ask() -> int:
        seam.wake(lm.model, watch, manifest)
        return int(type(lm)._get_batch_size(lm, max_input_length=longest, override_bs=None, starting_batch_size=start))

    name = device_name(torch.device(lm.device).type)
    parts = ["lighteval batch", manifest.root.value, environment.keyed.digest.value, name, longest, start]
    return int(seam.once(parts, ask))


def _longest(lm: Any, doc: Any) -> int:
    contexts, tails = lm.tok_encode_pair(lm.prompt_manager.prepare_prompt(doc), doc.choices, pairwise=lm.pairwise_tokenization)
    return max(min(lm.max_length, len(contexts[0] + tails[0]) - 1), 1)


def _batch_documents(batch_size: int, most_choices: int) -> int:
    return max(1, round(batch_size // most_choices / 8) * 8)  # as lighteval has it


def _encode(lm: Any, doc: Any) -> Encoded:
    contexts, tails = lm.tok_encode_pair(lm.prompt_manager.prepare_prompt(doc), doc.choices, pairwise=True)
    return list(contexts[0]), [list(tail) for tail in tails]


def _answers(
    cache: Cache,
    client: str,
    lm: Any,
    module: Any,
    asked: Sequence[Row],
    labels: Sequence[tuple[str, str]],
    batch_rows: int,
) -> list[tuple[float, bool]]:
    limit = lm.max_length
    rows: list[Row] = []
    places = []
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(asked)  # of a choice without tokens, which asks the model nothing
    for place, (context, tail) in enumerate(asked):
        if not context or len(tail) >= limit:
            raise UncacheableError("argument", "a choice without context, or one that leaves no room for it")
        if tail:
            rows.append((context[-(limit - len(tail)) :], tail))
            places.append(place)
    if not rows:
        return answers
    with contextlib.ExitStack() as shown:
        bar: Any = None

        def announce(stored: int, missing: int) -> None:
            nonlocal bar
            _log.info(f"evalcache: loglikelihood {stored}/{stored + missing} stored, {missing} to run")
            if missing:
                bar = module.tqdm(total=missing, disable=lm.disable_tqdm, desc="Log-likelihoods")
                shown.callback(bar.close)

        scoring = Scoring(
            softmax_dtype=None,  # that of the logits
            batch_rows=lambda _: batch_rows,
            forward=lambda model, ids, _mask: model(ids).logits,  # without a mask, as lighteval asks
            reads="ids",
            alone=False,
            announce=announce,
            tick=lambda count: bar.update(count),
        )
        named = Labels([labels[place][0] for place in places], [labels[place][1] for place in places])
        results = score_rows(cache, lm.model, rows, scoring, client=client, labels=named)
    for place, result in zip(places, results, strict=True):
        answers[place] = _answer(result)
    return answers


def _answer(result: Result) -> tuple[float, bool]:
    """Added up in the dtype of the log-probabilities, so that short dtypes round as they would have."""
    logprobs = unpack_logprobs(result.logprobs)
    dtype = getattr(torch, str(result.scalars["dtype"]))
    return float(torch.from_numpy(logprobs.copy()).to(dtype).sum()), bool(result.scalars["is_greedy"])


def _responses(lm: Any, module: Any, batch: Sequence[Encoded], scored: Sequence[Sequence[tuple[float, bool]]]) -> list[Any]:
    """One batch's responses, with the tokens of the choices padded (and cut) as lighteval's gathering leaves them."""
    device = lm.device
    tokens = [
        module.pad_sequence(
            [torch.tensor(tail, dtype=torch.long, device=device) for tail in tails], batch_first=True, padding_value=-1
        )
        for _, tails in batch
    ]
    if lm.accelerator:
        width = max(one.shape[1] for one in tokens)
        # Its second cut means the width and takes rows: of choices with one token each, one is left.
        tokens = [module.F.pad(one, (0, width - one.shape[1]), value=-1)[: one.shape[1]] for one in tokens]
    return [
        module.ModelResponse(
            argmax_logits_eq_gold=[greedy for _, greedy in answers],
            logprobs=[logprob for logprob, _ in answers],
            input_tokens=torch.tensor(context, dtype=torch.long, device=device),
            output_tokens=mine,
        )
        for (context, _), answers, mine in zip(batch, scored, tokens, strict=True)
    ]
