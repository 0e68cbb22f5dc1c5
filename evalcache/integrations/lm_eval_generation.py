"""lm-evaluation-harness: ``generate_until``, one request at a time where rows do not depend on each other.

What comes back is text that the harness has cut, so its key holds the harness's version, the stop strings and the tokenizer.
Where the end id is the only stop there is, the request is the same as a plain script's, and so is its entry: token ids.

A sampled call draws from the generators in the order of its requests: all of them together are one Action, which is served whole
and leaves the generators as they would have been.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.digest import digest_bytes
from evalcache.errors import UncacheableError
from evalcache.integrations import lazy
from evalcache.integrations.clients import LM_EVAL, version_of_client
from evalcache.integrations.generation import Call
from evalcache.integrations.generators import generator_states, restore_generators
from evalcache.integrations.lm_eval_answers import Row, cut, generate_until
from evalcache.integrations.lm_eval_requests import Asked, canonical_settings, read_request, refuse_mixtures
from evalcache.integrations.outputs import to_array, to_tensor
from evalcache.integrations.processors import tokenizer_digest
from evalcache.integrations.seam import AnotherModelError, Seam, not_again
from evalcache.manifest import Manifest
from evalcache.records import Action, Cost, Environment, Fields, Request, Result, pack_tokens, unpack_tokens
from evalcache.serving import Labels, Serving
from evalcache.structs import Struct, field, replace
from evalcache.watch import Watch
from evalcache.weights import tensor_bytes

_CHUNK = 128  # requests that are resolved together
_log = logging.getLogger("lm_eval.evalcache")


class Generations:
    """Serves ``generate_until`` of one process."""

    def __init__(self, cache: Cache, client: str) -> None:
        self.cache = cache
        self._client = client
        self._version = version_of_client(LM_EVAL)

    def serve(
        self,
        lm: Any,
        original: Callable[..., Any],
        requests: Sequence[Any],
        labels: Labels,
        around: Callable[[], contextlib.AbstractContextManager[Any]],
        disable_tqdm: bool = False,
    ) -> list[str]:
        """Texts of the requests in their order.

        Raises:
            UncacheableError: they cannot be keyed; nothing was computed.
        """
        asked = [read_request(lm, one) for one in requests]
        if not asked:
            return original(lm, requests, disable_tqdm)
        refuse_mixtures(asked)
        seam = Seam.of(self.cache)
        watch = seam.watch(lm._model)
        texts: dict[int, str] = {}
        with watch.lock, not_again():
            for sampled in (False, True):
                places = [place for place, one in enumerate(asked) if one.sampled == sampled]
                if not places:
                    continue
                part = _Part(self, lm, original, requests, asked, labels, places, disable_tqdm)
                with around():
                    try:
                        texts |= part.serve(seam, watch)
                    except AnotherModelError:  # what woke is not what was promised: ask again, of what is there
                        texts |= part.serve(seam, watch)
        for place, one in enumerate(asked):
            lm.cache_hook.add_partial("generate_until", (one.text, one.given), texts[place])
        return [texts[place] for place in range(len(asked))]


class _Part(Struct):
    """The requests of a call that are served in one way: all that are greedy, or all that are sampled."""

    owner: Generations
    lm: Any
    original: Callable[..., Any]
    requests: Sequence[Any]
    asked: Sequence[Asked]
    labels: Labels
    places: list[int]
    disable_tqdm: bool
    known: dict[Any, tuple[Fields, Fields]] = field(default_factory=dict)

    def serve(self, seam: Seam, watch: Watch) -> dict[int, str]:
        manifest, environment = seam.look(self.lm._model, watch)
        calls = self._resolve(seam, manifest, environment)
        labels = Labels(
            [self.labels.tasks[place] for place in self.places], [self.labels.documents[place] for place in self.places]
        )
        if self.asked[self.places[0]].sampled:
            return self._serve_sampled(seam, watch, manifest, environment, calls)
        requests = [self._keyed(call, row, self.asked[place]) for place, (call, row) in zip(self.places, calls, strict=True)]
        actions = [Action(manifest.root, request, environment) for request in requests]
        with self.owner.cache.serving(watch, actions, client=self.owner._client, labels=labels) as serving:
            missing = serving.missing
            _log.info(f"evalcache: generate_until {len(actions) - len(missing)}/{len(actions)} stored, {len(missing)} to run")
            if missing:
                seam.wake(self.lm._model, watch, manifest)
                with self._bar(len(missing)) as bar:
                    for mine in serving.claims(self._batches(missing, calls)):
                        self._compute(mine, calls, serving, bar)
        return {place: self._text(place, result) for place, result in zip(self.places, serving.results(), strict=True)}

    # --- keys ----------------------------------------------------------------------------------------------------------

    def _resolve(self, seam: Seam, manifest: Manifest, environment: Environment) -> list[tuple[Call, int]]:
        """For each place, the resolved call that asks it and its row in that call."""
        found: dict[int, tuple[Call, int]] = {}
        groups: dict[bytes, list[int]] = {}
        for place in self.places:
            groups.setdefault(Fields(canonical_settings(self.asked[place].kwargs)).canonical, []).append(place)
        for members in groups.values():
            for start in range(0, len(members), _CHUNK):
                chunk = members[start : start + _CHUNK]
                kwargs = dict(self.asked[chunk[0]].kwargs)
                new = kwargs.pop("max_gen_toks")
                if "max_length" in kwargs:
                    raise UncacheableError("unsupported", "max_length among the harness's generation settings")
                ids, mask = self._encode([self.asked[place].text for place in chunk], new)
                if not kwargs.get("do_sample"):
                    kwargs.pop("temperature", None)
                arguments = {
                    "input_ids": ids,
                    "attention_mask": mask,
                    "max_length": ids.shape[1] + new,
                    "pad_token_id": self.lm.tokenizer.pad_token_id,
                    "use_cache": True,
                    **kwargs,
                }
                call, _ = seam.resolve(self.lm._model, _bare_generate(self.lm._model), manifest, environment, arguments)
                if not call.samples and call.whole:
                    raise UncacheableError("unsupported", "rows of this model depend on each other")
                if not call.samples and self.lm.batch_size != 1 and any("padded" in one.inputs for one in call.requests):
                    raise UncacheableError("unsupported", "rows of this model depend on their padding")
                self._refuse_leaks(call, self.asked[chunk[0]].until)
                found |= {place: (call, row) for row, place in enumerate(chunk)}
        return [found[place] for place in self.places]

    def _encode(self, texts: list[str], new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids as the harness encodes a batch; the row is the same whatever stands beside it.

        Raises:
            UncacheableError: the harness would look at the first prompt of a batch, and they differ in what it looks for.
        """
        from lm_eval.models.utils import has_bos_prefix

        most = self.lm.max_length - new
        begin = getattr(self.lm.tokenizer, "bos_token", None)
        if most <= 0 or len({has_bos_prefix(text, begin) for text in texts}) > 1:
            raise UncacheableError("argument", "no room for a prompt, or start tokens in some prompts only")
        side = self.lm.tokenizer.padding_side
        try:
            with _quiet():
                return self.lm.tok_batch_encode(texts, left_truncate_len=most, truncation=self.lm.truncation)
        finally:
            self.lm.tokenizer.padding_side = side

    def _refuse_leaks(self, call: Call, until: Sequence[str]) -> None:
        """Refuse what would show in a row's text that its neighbours were not done yet: a row goes on until they are.

        Raises:
            UncacheableError: a stop string that the harness's text does not show and at which the engine does not stop, or a mark
                at the end of the thoughts, of which the last one counts.
        """
        if self.lm.batch_size == 1:
            return
        if self.lm.think_end_token is not None:
            raise UncacheableError("criterion", "think_end_token in batches")
        tokenizer = self.lm.tokenizer
        hidden = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {
            *tokenizer.all_special_tokens
        }
        for term in until:
            if any(token in term for token in hidden):
                ends = term in hidden and tokenizer.convert_tokens_to_ids(term) in call.end_ids
                if not ends:
                    raise UncacheableError("criterion", f"the engine does not stop at {term!r}")

    def _keyed(self, call: Call, row: int, one: Asked) -> Request:
        request = call.requests[row]
        if self._plain(call, one):
            return request
        return replace(request, kind="generate_until", settings=self._settings(request.settings, one))

    def _plain(self, call: Call, one: Asked) -> bool:
        """Whether the end id alone stops this request, so that any script's answer to it is the harness's too."""
        eos = self.lm.eot_token_id
        return eos in call.end_ids and one.until == (self.lm.tok_decode(eos, skip_special_tokens=False),)

    def _settings(self, settings: Fields, one: Asked) -> Fields:
        place = (id(settings), one.until)
        if place not in self.known:
            how = {
                "client": [self.owner._client, self.owner._version],
                "until": list(one.until),
                "think_end_token": self.lm.think_end_token,
                "tokenizer": tokenizer_digest(self.lm.tokenizer),
            }
            self.known[place] = (settings, Fields(dict(settings) | how))
        return self.known[place][1]

    # --- computing -----------------------------------------------------------------------------------------------------

    def _batches(self, missing: Sequence[int], calls: Sequence[tuple[Call, int]]) -> list[list[int]]:
        """The batches that the harness would make, in its order: other processes may take some of them over."""
        if self.lm.batch_size == "auto":  # which is found out anew in each call of the harness
            return [list(missing)]
        groups: dict[bytes, list[int]] = {}
        for position in missing:
            groups.setdefault(Fields(canonical_settings(self._asked(position).kwargs)).canonical, []).append(position)

        def order(position: int) -> tuple[int, str]:
            call, row = calls[position]
            return -int(call.mask[row].sum()), self._asked(position).text

        size = int(self.lm.batch_size)
        ordered = [sorted(members, key=order) for members in groups.values()]
        return [members[start : start + size] for members in ordered for start in range(0, len(members), size)]

    def _asked(self, position: int) -> Asked:
        return self.asked[self.places[position]]

    def _bar(self, total: int) -> Any:
        """The harness's own bar, one for all batches."""
        from lm_eval.models.huggingface import tqdm

        disable = self.disable_tqdm or self.lm.rank != 0
        return tqdm(total=total, disable=disable, desc="Running generate_until requests")

    def _compute(self, missing: Sequence[int], calls: Sequence[tuple[Call, int]], serving: Serving, bar: Any) -> None:
        """Have the harness answer the missing requests, and take each answer as it comes."""

        def take(numbered: int, text: str, made: Row) -> None:
            position = missing[numbered]
            call, _ = calls[position]
            plain = self._plain(call, self._asked(position))
            serving.put(
                position,
                Result(
                    tokens=pack_tokens(made.tokens),
                    # Text that the harness has cut is nobody else's.
                    text=None if plain else text,
                    finish_reason="stop" if len(made.tokens) and int(made.tokens[-1]) in call.end_ids else made.reason,
                    cost=made.cost,
                ),
            )
            bar.update(1)

        self._run([self.places[position] for position in missing], take, calls[0][0], True)

    def _run(self, places: Sequence[int], take: Callable[[int, str, Row], None], call: Call, disable_tqdm: bool) -> list[str]:
        requests, asked = [self.requests[place] for place in places], [self.asked[place] for place in places]
        return generate_until(self.lm, self.original, requests, asked, call, self.owner.cache.meter, take, disable_tqdm)

    def _text(self, place: int, result: Result) -> str:
        if result.text is not None:
            return result.text
        return cut(self.lm, unpack_tokens(result.tokens).tolist(), self.asked[place].until)

    # --- samples -------------------------------------------------------------------------------------------------------

    def _serve_sampled(
        self, seam: Seam, watch: Watch, manifest: Manifest, environment: Environment, calls: Sequence[tuple[Call, int]]
    ) -> dict[int, str]:
        """All sampled requests of a call, in their order, as one Action with the states of the generators."""
        lm, device = self.lm, self.lm.device
        asked = []
        for place, (call, row) in zip(self.places, calls, strict=True):
            ids = call.ids[row][call.mask[row] != 0]
            # A batch's own request holds the settings; ids and generators of the chunk in which it was resolved are no part here.
            settings = self._settings(call.requests[0].settings, self.asked[place])
            asked.append([pack_tokens(ids.cpu().numpy()), settings.digest.value])
        states = [digest_bytes(tensor_bytes(state)).value for state in generator_states(device)]
        batching = [str(lm.batch_size), lm.max_batch_size, float(lm.batch_schedule)]
        settings = Fields({"client": [self.owner._client, self.owner._version], "batching": batching})
        request = Request("generate_until_call", b"", settings, {"requests": asked, "generators": states})
        texts: list[str] = []

        def compute(_: Sequence[int]) -> Iterator[tuple[int, Result]]:
            seam.wake(lm._model, watch, manifest)
            costs: list[Cost] = []
            tokens: list[int] = []

            def take(_: int, __: str, made: Row) -> None:
                costs.append(made.cost)
                tokens.extend(int(token) for token in made.tokens)

            texts.extend(self._run(self.places, take, calls[0][0], self.disable_tqdm))
            arrays = {f"generator.{place}": to_array(state) for place, state in enumerate(generator_states(device))}
            total = Cost(
                sum(cost.seconds for cost in costs),
                sum(cost.prompt_tokens for cost in costs),
                sum(cost.completion_tokens for cost in costs),
                costs[0].device,
                max(cost.batch_size for cost in costs),
            )
            yield 0, Result(tokens=pack_tokens(tokens), scalars={"texts": list(texts)}, arrays=arrays, cost=total)

        tasks = ", ".join(dict.fromkeys(self.labels.tasks[place] for place in self.places))
        (result,) = self.owner.cache.serve(
            watch, [Action(manifest.root, request, environment)], compute, client=self.owner._client, labels=Labels([tasks], [""])
        )
        if not texts:
            texts = [str(text) for text in result.scalars["texts"]]
            stored = {name: to_tensor(array) for name, array in result.arrays.items()}
            restore_generators([stored[name] for name in sorted(stored)], device)
            _log.info(f"evalcache: generate_until {len(texts)} sampled requests stored, as one call")
        return dict(zip(self.places, texts, strict=True))


def _bare_generate(model: Any) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        return lazy.awake(model).generate(*args, **kwargs)

    return generate


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of prompts that it cuts when it runs them; not once more because they were looked up."""
    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
