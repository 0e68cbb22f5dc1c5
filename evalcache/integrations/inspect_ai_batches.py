"""inspect_ai: one of the provider's requests as a row of its own, and its batches row by row. Nothing of inspect_ai in here.

A greedy row ends by its own end id or by its own stop string, and what follows is padding as long as the batch goes on: the row
is the same in every batch, and the same as a plain script's ``generate`` of this one prompt, whose entry it shares. What is no
such row (samples, log-probabilities, a model whose rows depend on each other) is refused here.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StopStringCriteria
from transformers.generation.utils import GenerationMixin

from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.code import unwrap_ours
from evalcache.digest import Digest
from evalcache.environment import device_name
from evalcache.errors import CanonicalError, UncacheableError
from evalcache.integrations import generation, lazy
from evalcache.integrations.generation import Call
from evalcache.integrations.outputs import assemble_rows, row_results, sequences
from evalcache.integrations.processors import tokenizer_digest
from evalcache.integrations.seam import AnotherModelError, Seam, not_again
from evalcache.integrations.timing import Stopwatch, measured, share
from evalcache.manifest import Manifest
from evalcache.records import Action, Environment, Fields, Request, Result, pack_tokens, unpack_tokens
from evalcache.serving import Labels, Serving
from evalcache.structs import Frozen, Struct, replace
from evalcache.weights import unwrap

CLIENT = "inspect_ai"


class Row(Frozen):
    """One request: how it is keyed, and how many tokens its prompt has."""

    request: Request
    prompt_tokens: int


class Asked(Struct):
    """One of the provider's requests on its way.

    Args:
        input: the provider's own record of it. task, document: of the sample in which it is asked.
        output: the provider's record of the answer, where it was stored; error: what to raise instead.
        looked_up: whether that has been done. served: whether the answer was not computed for it.
    """

    input: Any
    model: Any
    task: str
    document: str
    row: Row | None = None
    output: Any = None
    error: BaseException | None = None
    looked_up: bool = False
    served: bool = False


def model_of(generator: Any) -> Any:
    """The model whose own ``generate`` the provider would call; None where it is anything else, which runs as it does."""
    function = getattr(generator, "func", None)
    if not isinstance(function, types.MethodType) or not hasattr(generator, "keywords"):
        return None
    if isinstance(function.__self__, Seam):  # a sleeping model's, which stands first among the arguments
        model = generator.args[0] if generator.args else None
        found = lazy.sleep_of(model).cls.generate if type(model) is lazy.LazyModel else None
    else:
        model, found = function.__self__, function.__func__
        if generator.args:
            return None
    own = vars(GenerationMixin)["generate"]
    return model if found is not None and unwrap_ours(found) is unwrap_ours(own) else None


class _Kind(Frozen):
    """What all requests with the same settings have in common."""

    settings: Fields
    fill_id: int


_kinds: dict[Digest, _Kind] = {}


def encode_one(asked: Asked, seam: Seam, manifest: Manifest, environment: Environment) -> Row:
    """How a request is keyed, whatever batch it will be in.

    Raises:
        UncacheableError: its answer depends on its batch, or cannot be keyed.
    """
    given, stops = _without_stops(asked.input.generator.keywords)
    if given.get("max_new_tokens") is None:
        raise UncacheableError("unsupported", "an answer whose length depends on the width of its batch")
    encoded = asked.input.tokenizer([asked.input.input])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    kept = ids[mask != 0]
    if not len(kept):
        raise UncacheableError("unsupported", "an empty prompt")
    # Settings are resolved once and not for each prompt: that takes longer than all the rest.
    try:
        known = [
            manifest.root.value,
            environment.keyed.digest.value,
            given,
            asked.model.generation_config.to_dict(),
            [] if stops is None else [list(stops.stop_strings), _digest_of(asked.input.tokenizer)],
        ]
        name = digest_canonical(known)
    except (CanonicalError, AttributeError) as error:
        raise UncacheableError("argument", str(error)) from error
    kind = _kinds.get(name)
    if kind is None:
        kind = _kinds[name] = _resolve_kind(asked, given, stops, seam, manifest, environment, ids, mask)
    if asked.input.decoder(sequences=[[kind.fill_id]]) != [""]:
        raise UncacheableError("unsupported", "padding of a batch shows in the texts of its rows")
    return Row(Request("generate", pack_tokens(kept.numpy()), kind.settings), len(kept))


def _resolve_kind(
    asked: Asked,
    given: dict[str, Any],
    stops: StopStringCriteria | None,
    seam: Seam,
    manifest: Manifest,
    environment: Environment,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> _Kind:
    # As it may stand in a batch: beside another row, with padding before it.
    ids, mask = (torch.nn.functional.pad(tensor, (1, 0)).expand(2, -1).contiguous() for tensor in (ids, mask))
    arguments = generation.bind((), given | {"input_ids": ids, "attention_mask": mask})
    call, _ = seam.resolve(asked.model, _bare(asked.model), manifest, environment, arguments)
    request = _requests(call, stops, asked.input.tokenizer)[0]
    if request.inputs or request.settings["min_new_tokens"]:
        raise UncacheableError("unsupported", "a row that depends on the width of its batch")
    return _Kind(request.settings, call.fill_id)


def serve_batch(
    cache: Cache, seam: Seam, generator: Any, tokenizer: Any, asked: Sequence[Asked | None], prompt: dict[str, torch.Tensor]
) -> Any:
    """What ``generator(**prompt)`` returns: rows that are stored, and the others computed at the width that they came with.

    Raises:
        UncacheableError: they are not rows of their own; nothing was computed.
    """
    given, stops = _without_stops(generator.keywords)
    model = model_of(generator)
    batch = _Batch(cache, seam, model, generation.bind((), given | prompt), stops, tokenizer, asked)
    watch = seam.watch(model)
    with watch.lock, not_again():
        try:
            return batch.serve(watch)
        except AnotherModelError:  # what woke is not what was promised: ask again, of what is there
            return batch.serve(watch)


class _Batch(Struct):
    cache: Cache
    seam: Seam
    model: Any
    arguments: dict[str, Any]
    stops: StopStringCriteria | None
    tokenizer: Any
    asked: Sequence[Asked | None]

    def serve(self, watch: Any) -> Any:
        manifest, environment = self.seam.look(self.model, watch)
        call, _ = self.seam.resolve(self.model, _bare(self.model), manifest, environment, self.arguments)
        requests = _requests(call, self.stops, self.tokenizer)
        recorded = dict(environment.recorded) | {"batch_rows": call.rows, "width": int(call.ids.shape[1])}
        environment = Environment(environment.keyed, recorded)
        actions = [Action(manifest.root, request, environment) for request in requests]
        labels = Labels([one.task if one else "" for one in self.asked], [one.document if one else "" for one in self.asked])
        output, computed, batches = None, [], 0
        with self.cache.serving(watch, actions, client=CLIENT, labels=labels) as serving:
            # As one batch, at its own width; without what another process computes right now.
            for missing in serving.claims([serving.missing]):
                self.seam.wake(self.model, watch, manifest)
                output = self._compute(call, missing, serving)
                computed, batches = [*computed, *missing], batches + 1
        for place in set(range(len(actions))) - set(computed):
            if (one := self.asked[place]) is not None:
                one.served = True
        if batches == 1 and len(computed) == len(actions):
            return output  # everything was computed: what the engine returned, untouched
        return assemble_rows(call, serving.results())

    def _compute(self, call: Call, missing: Sequence[int], serving: Serving) -> Any:
        chosen = generation.select_rows(call, missing)
        noted = None if self.stops is None else _Noted(self.stops)
        if noted is not None:
            chosen["stopping_criteria"] = [noted]
        real = lazy.awake(self.model)
        with measured(unwrap(real), call.ids.device, self.cache.meter) as timer:
            output = real.generate(**chosen)
        try:
            results = _results(call, output, missing, noted, timer)
        except Exception as error:
            # The eval has its answers, whatever we failed at: where all of them were computed, these.
            self.cache.warn(f"this batch is not stored, evalcache failed on it: {type(error).__name__}: {error}")
            failed = UncacheableError("internal", f"{type(error).__name__}: {error}")
            if len(missing) < call.rows:
                raise failed from error
            self.cache.uncacheable(failed.reason, failed.detail, requests=call.rows, seconds=timer.total_s, client=CLIENT)
            return output
        for position, result in zip(missing, results, strict=True):
            serving.put(position, result)
        return output


class _Noted(StoppingCriteria):
    """The provider's stop strings, and at which step they ended which row."""

    def __init__(self, inner: StopStringCriteria) -> None:
        self._inner = inner
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = self._inner(input_ids, scores, **kwargs)
        self._steps.append(done)
        return done

    def ends(self) -> list[int | None]:
        """For each row the step after which its stop string was there, None where that never was."""
        steps = torch.stack(self._steps).cpu()
        return [int(row.nonzero()[0]) if bool(row.any()) else None for row in steps.T]


def _results(call: Call, output: Any, missing: Sequence[int], noted: _Noted | None, timer: Stopwatch) -> list[Result]:
    results = row_results(call, output, len(missing))
    if noted is not None:
        results = [
            _cut(result, end, sequences(output)[row, call.prefix.shape[1] :])
            for row, (result, end) in enumerate(zip(results, noted.ends(), strict=True))
        ]
    counts = [len(result.tokens) // 4 for result in results]
    prompts = [int(call.mask[row].sum()) for row in missing]
    costs = share(timer, prompts, counts, device_name(call.ids.device.type))
    return [replace(result, cost=cost) for result, cost in zip(results, costs, strict=True)]


def _cut(result: Result, end: int | None, row: torch.Tensor) -> Result:
    """A row up to its stop string, where that came before its end id."""
    if end is None or end + 1 >= len(result.tokens) // 4:
        return result
    return replace(result, tokens=pack_tokens(row[: end + 1].cpu().numpy()), finish_reason="stop")


def _requests(call: Call, stops: StopStringCriteria | None, tokenizer: Any) -> list[Request]:
    if call.whole or call.samples or call.returned != 1 or call.encoder_decoder:
        raise UncacheableError("unsupported", "rows that depend on their batch")
    if stops is None:
        return call.requests
    if not call.end_ids:
        raise UncacheableError("criterion", "stop strings without an end id: a row goes on until its neighbours are done")
    # As transformers has them where they are given as `stop_strings`, which makes the same criterion of them.
    known = {"stop_strings": [str(one) for one in stops.stop_strings], "tokenizer": _digest_of(tokenizer)}
    settings = Fields(dict(call.requests[0].settings) | known)
    return [replace(request, settings=settings) for request in call.requests]


def _without_stops(keywords: dict[str, Any]) -> tuple[dict[str, Any], StopStringCriteria | None]:
    given = dict(keywords)
    criteria = given.pop("stopping_criteria", None)
    if not criteria:
        return given, None
    if len(criteria) != 1 or type(criteria[0]) is not StopStringCriteria:
        raise UncacheableError("criterion", "stopping criteria that are not the provider's stop strings")
    return given, criteria[0]


_digests: weakref.WeakKeyDictionary[Any, tuple[int, bytes]] = weakref.WeakKeyDictionary()


def _digest_of(tokenizer: Any) -> bytes:
    """Digest of the provider's tokenizer, read again when it has grown: a large one takes a tenth of a second."""
    tokenizer = getattr(tokenizer, "func", tokenizer)
    size = len(tokenizer)
    known = _digests.get(tokenizer)
    if known is None or known[0] != size:
        known = _digests[tokenizer] = (size, tokenizer_digest(tokenizer))
    return known[1]


def _bare(model: Any) -> Any:
    return lambda *args, **kwargs: lazy.awake(model).generate(*args, **kwargs)


def text_of(asked: Asked, result: Result) -> tuple[str, int]:
    """A stored row as the provider decodes it, and how many tokens it has."""
    tokens = unpack_tokens(result.tokens).tolist()
    return asked.input.decoder(sequences=[tokens])[0], len(tokens)
