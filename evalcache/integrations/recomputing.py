"""Stored questions, asked of a live model once more, in the way in which a miss is computed.

A question is rebuilt as a call: token ids, and the settings as they acted. That it is the same question is not believed but
seen: the call goes through the same seam as any other, into a store of its own that is thrown away, and what comes to lie there
under the very key of the stored entry is that entry's answer, computed again. What does not come to lie there is not compared.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.digest import Digest
from evalcache.errors import CheckpointError, UncacheableError
from evalcache.frame import Question
from evalcache.integrations import lazy
from evalcache.integrations.scoring import Scoring, score_rows
from evalcache.integrations.seam import Seam, _bare_generate
from evalcache.manifest import Manifest
from evalcache.records import Entry, Environment, Policy, Result, unpack_logprobs, unpack_tokens
from evalcache.weights import unwrap

KINDS = {
    "generate_batch": "a batch that shares its key: sampling, scores, or settings that reach over rows",
    "generate_until": "text that lm_eval has cut",
    "generate_until_call": "a whole call of lm_eval",
    "greedy_until": "text that lighteval has cut",
    "greedy_until_call": "a whole call of lighteval",
    "answer": "an answer of somebody's own loop",
}
"""Kinds of requests that cannot be asked again from what is stored of them, with the reason."""

_OF_ENDS = {"end_ids": "eos_token_id", "pad_id": "pad_token_id"}


class LiveModel:
    """A live model that is asked stored questions. Made by `live_model`."""

    def __init__(self, model: Any, cache: Cache) -> None:
        self.model = lazy.awake(model)
        self._cache = cache
        self._seam = Seam(cache)
        self._watch = self._seam.watch(self.model)
        self.manifest: Manifest
        self.environment: Environment
        self.manifest, self.environment = self._seam.look(self.model, self._watch)

    def ask(
        self,
        asked: Sequence[tuple[Digest, Question, Mapping[str, Any]]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[dict[Digest, Result], dict[Digest, str]]:
        """The answers to questions of this model and environment; and why there are none to the others.

        Args:
            asked: key, question and settings of each.
        """
        refused: dict[Digest, str] = {}
        scored: dict[str, list[tuple[Digest, Question]]] = {}
        done = 0
        for key, question, settings in asked:
            if question.kind == "loglikelihood":
                scored.setdefault(str(settings.get("softmax_dtype", "")), []).append((key, question))
                continue
            try:
                self._generate(question, settings)
            except UncacheableError as error:
                refused[key] = error.message
            done += 1
            progress(done, len(asked))
        for name, some in scored.items():
            try:
                dtype = getattr(torch, name, None)
                rows = [(_ids(question.tokens), _ids(question.inputs["continuation"])) for _, question in some]
                score_rows(self._cache, self.model, rows, Scoring(dtype if isinstance(dtype, torch.dtype) else None))
            except (UncacheableError, KeyError, TypeError) as error:
                refused |= dict.fromkeys((key for key, _ in some), str(error))
            done += len(some)
            progress(done, len(asked))
        self._cache.flush()
        found = self._cache.store.get_many([key for key, _, _ in asked])
        answers = {key: entry.result for key, entry in found.items() if isinstance(entry, Entry)}
        for key, _, _ in asked:
            if key not in answers:
                refused.setdefault(key, "its call cannot be rebuilt: another key came of it")
        return answers, refused

    def margins(self, forks: Sequence[tuple[bytes, Sequence[int], int, int]]) -> list[float | None]:
        """By how many nats the second of two tokens is more likely than the first; None where that cannot be told.

        Args:
            forks: a prompt, what both answers have in common, and the two tokens in which they differ.
        """
        if not forks:
            return []
        rows = [([*_ids(prompt), *common], [token]) for prompt, common, *both in forks for token in both]
        try:
            scores = score_rows(self._cache, self.model, rows, Scoring())
        except (UncacheableError, RuntimeError, ValueError, TypeError):  # an encoder–decoder model scores nothing
            return [None] * len(forks)
        found = [float(unpack_logprobs(score.logprobs)[0]) for score in scores]
        return [theirs - mine for mine, theirs in zip(found[::2], found[1::2], strict=True)]

    def _generate(self, question: Question, settings: Mapping[str, Any]) -> None:
        """One row, through the seam of `generate`."""
        inputs = dict(question.inputs)
        ids = _ids(inputs.get("padded") or inputs.get("span") or question.tokens)
        mask = list(inputs["mask"]) if "mask" in inputs else [1] * len(ids)
        device = self.model.device
        arguments = {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.tensor([mask], device=device),
            "generation_config": _config(settings),
            **settings.get("arguments", {}),
        }
        model = self.model if hasattr(type(self.model), "generate") else unwrap(self.model)
        with torch.no_grad():
            self._seam.generate(self.model, functools.partial(_bare_generate(model), model), (), arguments)


@contextmanager
def live_model(model: Any) -> Iterator[LiveModel]:
    """A model to be asked, beside whatever session this process has.

    Raises:
        UncacheableError: it cannot be fingerprinted exactly.
    """
    with tempfile.TemporaryDirectory(prefix="evalcache-recompute-") as folder:
        cache = Cache(Path(folder) / "cache", policy=Policy.REFRESH, match="portable")
        try:
            yield LiveModel(model, cache)
        finally:
            cache.store.close()
            shutil.rmtree(cache.directory, ignore_errors=True)


def load_model(path: str, environment: Mapping[str, Any]) -> Any:
    """A checkpoint, loaded as the model was that a stored environment tells of.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"
        attention = (environment.get("kernels") or {}).get("", [""])[0]
        given = {"attn_implementation": attention} if attention else {}
        dtype = getattr(torch, str(environment.get("dtype")), None)
        model = getattr(transformers, kind).from_pretrained(path, dtype=dtype or "auto", **given)
        return model.to(str(environment.get("device") or "cpu").split("+")[-1]).eval()
    except (OSError, ValueError, RuntimeError, ImportError, AssertionError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}", hint="give the folder of its checkpoint", path=path) from error


def _config(settings: Mapping[str, Any]) -> Any:
    """The settings as they acted, as a config from which the engine resolves the same ones.

    Raises:
        UncacheableError: something acted that is not among them.
    """
    from transformers import GenerationConfig

    values = dict(settings)
    for name, what in (("processors", "a logits processor"), ("criteria", "a stopping criterion"), ("tokenizer", "stop strings")):
        if values.pop(name, None):
            raise UncacheableError("argument", f"{what} of the caller's took part")
    values.pop("arguments", None)
    for name, setting in _OF_ENDS.items():
        if values.get(name) not in (None, []):
            values[setting] = values[name]
        values.pop(name, None)
    if not values.get("min_new_tokens"):
        values.pop("min_new_tokens", None)
    try:
        return GenerationConfig(**values)
    except (TypeError, ValueError) as error:
        raise UncacheableError("argument", str(error)) from error


def _ids(data: bytes) -> list[int]:
    return unpack_tokens(data).tolist()
