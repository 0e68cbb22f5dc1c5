"""Attacks on serving: calls of tables, bare, cold, warm and partly warm; a difference is a wrong hit, or in the way."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import io
import logging
import multiprocessing
import pickle
import random
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from served import assert_same, assert_same_outcome, outcome, served
from tiny import EOS, PAD, build, prompts
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.logits_process import DiaEOSDelayPatternLogitsProcessor
from transformers.generation.utils import GenerationMixin
from words import train_tokenizer

import evalcache
import evalcache.integrations.seam as seam
import evalcache.integrations.transformers as floor
from evalcache.cache import Cache
from evalcache.integrations import scoring
from evalcache.integrations.generators import generator_states, restore_generators
from evalcache.integrations.settings import effective_settings

Call = Callable[[Any], Any]
WORDS = train_tokenizer()
BATCH = prompts()
ONE = prompts(1)
ENDS = [EOS, *range(20, 50)]
CHAT = [[{"role": "user", "content": "what is the key"}], [{"role": "user", "content": "the model"}]]


def greedy(**settings: Any) -> Call:
    """A call with the usual left-padded batch; ``...`` leaves an argument out."""
    given = {**BATCH, "max_new_tokens": 6, "do_sample": False, **settings}
    given = {name: value for name, value in given.items() if value is not ...}
    return lambda model: model.generate(**given)


def rows(*places: int, **settings: Any) -> Call:
    return greedy(**{name: value[list(places)] for name, value in BATCH.items()}, **settings)


def llama() -> Any:
    return build("llama")


def without_pad() -> Any:
    model = build("llama")
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    return model


def without_start() -> Any:
    model = build("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    return model


def of_class(cls: type) -> Callable[[], Any]:
    def make() -> Any:
        model = build("llama")
        model.__class__ = cls
        return model

    return make


# --- wrong hits: calls one after the other, of which none may answer another --------------------------------------------------

KW = {"return_dict_in_generate": True}
SCORES = {**KW, "output_scores": True}
DECODED = torch.tensor([[2, 5], [2, 6], [2, 5], [2, 9]])
HOLES = torch.tensor([[2, 0, 5], [2, 0, 6], [2, 0, 5], [2, 0, 9]])

SEQUENCES: dict[str, tuple[Callable[[], Any], list[Call]]] = {
    "a begin id that starts the answer": (
        without_start,
        [greedy(bos_token_id=5), greedy(bos_token_id=77), greedy(bos_token_id=5)],
    ),
    "an end id given twice, sampled beams": (
        llama,
        [greedy(num_beams=2, do_sample=True, eos_token_id=ids) for ids in ([EOS], [EOS, EOS], EOS)],
    ),
    "an assistant's own stop": (
        llama,
        [
            greedy(**SCORES, eos_token_id=[], **more)
            for more in ({}, {"is_assistant": True, "assistant_confidence_threshold": 0.9})
        ],
    ),
    "low memory": (llama, [greedy(num_beams=3), greedy(num_beams=3, low_memory=True), greedy(low_memory=True)]),
    "lengths": (llama, [greedy(max_new_tokens=..., max_length=length) for length in (16, 12, 5, 17)]),
    "contrastive, groups, constraints": (
        llama,
        [
            greedy(num_beams=4),
            greedy(top_k=4),
            greedy(penalty_alpha=0.6, top_k=4),
            greedy(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
            greedy(num_beams=4, force_words_ids=[[5]]),
            greedy(dola_layers="high"),
        ],
    ),
    "guidance": (llama, [greedy(guidance_scale=1.5), rows(0, 1, guidance_scale=1.5), rows(3, 2, guidance_scale=1.5), greedy()]),
    "end ids as tensors": (
        llama,
        [greedy(eos_token_id=ids) for ids in (torch.tensor([2, 30]), [30, 2], torch.tensor(2), 2, [2, 2], torch.tensor([2, 2]))],
    ),
    "pad id as a tensor": (llama, [greedy(pad_token_id=pad, eos_token_id=ENDS) for pad in (torch.tensor(3), 3, 4)]),
    "masks of other types": (
        llama,
        [greedy(attention_mask=BATCH["attention_mask"].to(dtype)) for dtype in (torch.bool, torch.uint8, torch.int8, torch.long)],
    ),
    "answers begun by the caller": (
        lambda: build("bart"),
        [
            greedy(decoder_input_ids=DECODED),
            greedy(decoder_input_ids=HOLES),
            greedy(decoder_input_ids=HOLES, decoder_attention_mask=(HOLES != 0).long()),
            greedy(decoder_input_ids=DECODED, num_beams=2, num_return_sequences=2),
            greedy(decoder_start_token_id=7),
            greedy(decoder_start_token_id=torch.tensor(7)),
            greedy(decoder_start_token_id=[7, 8, 9, 7]),
            greedy(forced_bos_token_id=11),
            greedy(),
            greedy(decoder_input_ids=DECODED[:1]),
            greedy(decoder_input_ids=DECODED, max_new_tokens=..., max_length=5),
        ],
    ),
    "an encoder without a mask": (
        lambda: build("t5"),
        [greedy(attention_mask=...), greedy(), greedy(attention_mask=torch.ones_like(BATCH["input_ids"]))],
    ),
    "strides": (
        llama,
        [
            greedy(**{name: value.t().contiguous().t() for name, value in BATCH.items()}),
            lambda model: model.generate(
                ONE["input_ids"].expand(3, -1), position_ids=torch.arange(12).expand(3, -1), max_new_tokens=3
            ),
        ],
    ),
    "int32": (llama, [greedy(input_ids=BATCH["input_ids"].int(), num_beams=beams) for beams in (1, 2)]),
    "int32, encoder and decoder": (
        lambda: build("t5"),
        [greedy(input_ids=BATCH["input_ids"].int(), num_beams=n) for n in (1, 2)],
    ),
    "nothing but padding": (llama, [greedy(input_ids=torch.zeros(2, 5, dtype=torch.long), attention_mask=...)]),
    "a token that is none in one row": (
        llama,
        [greedy(), greedy(input_ids=BATCH["input_ids"].clone().index_fill_(1, torch.tensor(11), 500))],
    ),
    "samples and other draws": (
        llama,
        [
            greedy(),
            greedy(do_sample=True),
            lambda model: [greedy(do_sample=True)(model), torch.rand(2), greedy(do_sample=True)(model), torch.randn(3)],
            greedy(do_sample=True, num_return_sequences=2),
            lambda model: [greedy()(model), torch.rand(2)],
        ],
    ),
    "a generation config that is edited": (
        llama,
        [
            lambda model: (
                settings := GenerationConfig(max_new_tokens=5),
                model.generate(**BATCH, generation_config=settings),
                setattr(settings, "repetition_penalty", 1.7),
                model.generate(**BATCH, generation_config=settings),
                settings.to_dict(),
                model.generation_config.to_dict(),
            )[1::2]
        ],
    ),
    "autocast in between": (llama, [greedy(), lambda model: torch.autocast("cpu", torch.bfloat16)(greedy())(model), greedy()]),
    "a default device": (
        llama,
        [lambda model: [torch.set_default_device("cpu"), greedy()(model), torch.set_default_device(None)][1]],
    ),
    "an exact copy, edited": (
        llama,
        [lambda model: (greedy()(model), twin := copy.deepcopy(model), twin.lm_head.weight.data.neg_(), greedy()(twin))[-1]],
    ),
    "through pickle": (llama, [lambda model: greedy()(pickle.loads(pickle.dumps(model)))]),
    "compiled": (llama, [lambda model: greedy()(torch.compile(model, backend="eager"))]),
    "how the method looks": (
        llama,
        [lambda model: [str(inspect.signature(model.generate)), inspect.ismethod(model.generate), model.generate.__name__]],
    ),
    "a chat pipeline in batches": (
        llama,
        [
            lambda model: pipeline("text-generation", model, tokenizer=WORDS)(
                CHAT, max_new_tokens=5, batch_size=2, do_sample=False
            )
        ],
    ),
    "a pipeline that stops": (
        llama,
        [lambda model: pipeline("text-generation", model, tokenizer=WORDS)(["the", "what"], max_new_tokens=5, stop_sequence="e")],
    ),
    "a pipeline's tensors": (
        llama,
        [lambda model: pipeline("text-generation", model, tokenizer=WORDS)("the", max_new_tokens=5, return_tensors=True)],
    ),
    "stop strings, several beams": (
        llama,
        [greedy(**ONE, stop_strings=["e", "th"], tokenizer=WORDS, num_beams=3, num_return_sequences=3, max_new_tokens=12)],
    ),
    "beams that return a dict": (llama, [greedy(num_beams=3, **KW), greedy(num_beams=3), greedy(num_beams=3, **KW)]),
    "beams of an encoder and decoder that return a dict": (
        lambda: build("bart"),
        [greedy(num_beams=3, num_return_sequences=2, **KW)],
    ),
    "ranks in step": (llama, [greedy(), greedy(synced_gpus=True)]),
    "ids of a type that no embedding takes": (llama, [greedy(), greedy(input_ids=BATCH["input_ids"].short())]),
}


@pytest.mark.parametrize(("make", "calls"), SEQUENCES.values(), ids=SEQUENCES)
def test_no_call_is_answered_by_another(make: Callable[[], Any], calls: list[Call], tmp_path: Path) -> None:
    model = make()
    bare = [(outcome(functools.partial(call, model)), torch.get_rng_state()) for call in calls]
    for _ in range(2):
        model = make()
        with served(tmp_path) as here:
            for call, (expected, state) in zip(calls, bare, strict=True):
                found, _ = here.ask(outcome, functools.partial(call, model))
                assert_same_outcome(expected, found)
                assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["keeps state", "keeps none"])
def test_a_processor_that_is_used_again_goes_on_as_it_would_have(kind: str, tmp_path: Path) -> None:
    def twice(model: Any) -> Any:
        one = DiaEOSDelayPatternLogitsProcessor([1], 9, 16) if kind == "keeps state" else RepetitionPenaltyLogitsProcessor(1.3)
        processors = LogitsProcessorList([one])
        first = greedy(logits_processor=processors, max_new_tokens=8)(model)
        return [first, rows(3, 2, 1, 0, logits_processor=processors, max_new_tokens=8)(model)]

    model = llama()
    bare = twice(model)
    for warm in (False, True):
        with served(tmp_path) as here:
            found, told = here.ask(twice, model)
            assert_same(bare, found)
            assert told.hits == (2 if warm and kind == "keeps none" else 0)
            assert ("processor" in told.uncacheable) is (kind == "keeps state")


class Centred(LogitsProcessor):
    """Mixes the rows of a batch."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 5 * scores.mean(0, keepdim=True)


class AllAtOnce(StoppingCriteria):
    """Ends all rows with the first of them."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), bool((input_ids[:, -1] > 100).any()))


class OwnProcessors(LlamaForCausalLM):
    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return LogitsProcessorList([*super()._get_logits_processor(*args, **kwargs), Centred()])


class OwnCriteria(LlamaForCausalLM):
    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        return StoppingCriteriaList([*super()._get_stopping_criteria(*args, **kwargs), AllAtOnce()])


@pytest.mark.parametrize("cls", [OwnProcessors, OwnCriteria])
def test_rows_of_a_class_with_its_own_decoding_are_not_taken_apart(cls: type, tmp_path: Path) -> None:
    model = of_class(cls)()
    calls = [rows(0, 1, 2, 3), rows(1, 2), rows(1), rows(0)]
    bare = [call(model) for call in calls]
    with served(tmp_path) as here:
        for call, expected in zip(calls, bare, strict=True):
            assert_same(expected, here.ask(call, model)[0])


class Noisy(LlamaForCausalLM):
    """Draws in its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.randn_like(output.logits)
        return output


@pytest.mark.parametrize("kind", ["generate", "loglikelihood"])
def test_a_model_that_draws_goes_on_drawing(kind: str, tmp_path: Path) -> None:
    model = of_class(Noisy)()
    pairs = [("the model", " is asked"), ("what", " is kept")]

    def ask(cache: Cache | None) -> list[Any]:
        torch.manual_seed(1)
        if kind == "generate":
            return [greedy()(model), greedy()(model), torch.rand(3)]
        return [scoring.loglikelihood(model, WORDS, pairs, cache=cache) for _ in range(2)] + [torch.rand(3)]

    bare = ask(None)
    for _ in range(2):
        with served(tmp_path) as here:
            assert_same(bare, here.ask(ask, here.cache)[0])


def test_log_likelihoods_are_those_of_the_bare_model_in_any_order(tmp_path: Path) -> None:
    model = llama()
    pairs = [
        ("the model", " is asked"),
        ("what", " is kept"),
        ("the cache", " keeps"),
        ("the model", " is asked"),
        ("the", " key"),
    ]
    bare = scoring.loglikelihood(model, WORDS, pairs, cache=None)
    for hits in (0, 4):
        with served(tmp_path) as here:
            some = scoring.loglikelihood(model, WORDS, pairs[1:3], cache=here.cache, batch_tokens=8)
            found, told = here.ask(scoring.loglikelihood, model, WORDS, pairs[::-1], cache=here.cache)
            assert told.hits == (2 if not hits else 4) and told.duplicates == 1
            for one, other in zip([*some, *found], [*bare[1:3], *bare[::-1]], strict=True):
                assert one.is_greedy is other.is_greedy
                assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)


# --- rows in other company ----------------------------------------------------------------------------------------------------

ALONE_OR_NOT = {
    "early stopping": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    "never early": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 2.0},
    "short ones first": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -2.0},
    "nearly all tokens end": {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": list(range(3, 110))},
    "beams with a pad id": {"num_beams": 2, "pad_token_id": 30},
    "a pad id among the end ids": {"pad_token_id": 30},
    "no pad id": {"pad_token_id": None, "eos_token_id": [33, *range(40, 80)]},
    "beams that may not repeat": {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "lengths that decay": {"repetition_penalty": 0.7, "min_new_tokens": 4, "exponential_decay_length_penalty": (2, 1.8)},
    "suppressed and forced": {"suppress_tokens": [5, 30], "begin_suppress_tokens": [31, 32], "forced_eos_token_id": 9},
    "guidance": {"guidance_scale": 1.7},
    "biases": {"sequence_bias": {(5,): 3.0, (6, 7): 9.0, (1, 2, 3): 4.0}},
    "beams with hardly a word allowed": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "bad_words_ids": [[n] for n in range(3, 120)],
    },
    "prefill in chunks": {"prefill_chunk_size": 4},
    "a static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("settings", ALONE_OR_NOT)
def test_rows_are_the_same_alone_and_in_any_company(name: str, settings: str, tmp_path: Path) -> None:
    if name == "bart" and {"guidance_scale", "prefill_chunk_size"} & set(ALONE_OR_NOT[settings]):
        pytest.skip("of decoders only")
    batch, model, drawn = prompts(6, 10, seed=3), build(name), random.Random(0)
    if name == "bart":
        batch = {key: value.flip(1) for key, value in batch.items()}
    given = {"do_sample": False, "eos_token_id": ENDS, "max_new_tokens": 9, **ALONE_OR_NOT[settings]}
    groups = [[3], [1], list(range(6)), [5], *(drawn.sample(range(6), 3) for _ in range(2))]
    bare = [model.generate(**{key: value[group] for key, value in batch.items()}, **given) for group in groups]
    hits = 0
    with served(tmp_path) as here:
        for group, expected in zip(groups, bare, strict=True):
            found, told = here.ask(model.generate, **{key: value[group] for key, value in batch.items()}, **given)
            assert_same(expected, found)
            hits += told.hits
    assert hits == 2 + 1 + 3 + 3


# --- what a hit looks like ----------------------------------------------------------------------------------------------------


def test_each_step_of_a_hit_has_memory_of_its_own(tmp_path: Path) -> None:
    model, call = llama(), greedy(**SCORES)
    bare = call(model)
    with served(tmp_path) as here:
        here.ask(call, model)
        found, told = here.ask(call, model)
        assert told.hits == 1
    sizes = [step.untyped_storage().nbytes() for step in found.scores]
    assert sizes == [step.untyped_storage().nbytes() for step in bare.scores]
    assert all(step._base is None for step in found.scores)


@pytest.mark.parametrize("settings", [{}, SCORES, {"num_beams": 2}], ids=str)
def test_hits_inside_inference_mode_are_inference_tensors(settings: dict[str, Any], tmp_path: Path) -> None:
    model = llama()

    @torch.inference_mode()
    def ask() -> list[bool]:
        output = greedy(**settings)(model)
        parts = [output] if isinstance(output, torch.Tensor) else [output.sequences, *output.scores]
        return [part.is_inference() for part in parts]

    with served(tmp_path) as here:
        for hits in (0, 1):
            found, told = here.ask(ask)
            assert all(found) and bool(told.hits) == bool(hits)


def test_transition_scores_of_a_hit_are_those_of_the_bare_call(tmp_path: Path) -> None:
    model, call = llama(), greedy(num_beams=3, num_return_sequences=2, **SCORES)

    def score() -> torch.Tensor:
        output = call(model)
        return model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)

    bare = score()
    with served(tmp_path) as here:
        for _ in range(2):
            found, told = here.ask(score)
            assert_same(bare, found)
        assert told.hits == 1


# --- a wrapped model is the same model ----------------------------------------------------------------------------------------


class WithoutPrompt(LlamaForCausalLM):
    """Returns the new tokens only, as many a user's class does."""

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> Any:
        output = super().generate(input_ids=input_ids, **settings)
        return output[:, input_ids.shape[1] :] if isinstance(output, torch.Tensor) else output


class AsText(LlamaForCausalLM):
    """Takes other arguments, and returns lists."""

    def generate(self, prompt_ids: torch.Tensor, *, number: int = 4) -> list[list[int]]:
        return super().generate(prompt_ids, max_new_tokens=number, do_sample=False).tolist()


def edited_copy(model: Any) -> Any:
    greedy()(model)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.neg_()
    return greedy()(twin)


def reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return greedy()(torch.load(file, weights_only=False))


LOOKS = {
    "an edited copy": (llama, edited_copy),
    "pickle": (llama, lambda model: greedy()(pickle.loads(pickle.dumps(model)))),
    "torch.save": (llama, reloaded),
    "signature": (llama, lambda model: list(inspect.signature(model.generate).parameters)),
    "a method": (llama, lambda model: [inspect.ismethod(model.generate), model.generate.__self__ is model]),
    "its own generate, without the prompt": (of_class(WithoutPrompt), greedy()),
    "its own generate, other arguments": (of_class(AsText), lambda model: model.generate(ONE["input_ids"])),
    "compiled": (llama, lambda model: greedy()(torch.compile(model, backend="eager"))),
    "a config by position": (llama, lambda model: model.generate(ONE["input_ids"], GenerationConfig(max_new_tokens=3))),
}


@pytest.mark.parametrize(("make", "call"), LOOKS.values(), ids=LOOKS)
def test_a_wrapped_model_is_as_it_was(make: Callable[[], Any], call: Call, tmp_path: Path) -> None:
    bare = call(make())
    for _ in range(2):
        cache = Cache(tmp_path)
        try:
            assert_same_outcome(bare, outcome(lambda cache=cache: call(floor.wrap(make(), cache))))
        finally:
            cache.close()


@pytest.mark.parametrize("cls", [WithoutPrompt, AsText])
def test_a_class_s_own_generate_is_served_below_it(cls: type, tmp_path: Path) -> None:
    call = greedy() if cls is WithoutPrompt else lambda model: model.generate(ONE["input_ids"], number=3)
    bare = call(of_class(cls)())
    for hits in (False, True):
        with served(tmp_path) as here:
            found, told = here.ask(call, of_class(cls)())
            assert_same(bare, found)
            assert bool(told.hits) is hits and not told.uncacheable


# --- in the way ---------------------------------------------------------------------------------------------------------------

ERRORS: dict[str, Call] = {
    "no new token": greedy(max_new_tokens=0),
    "a list": lambda model: model.generate([[1, 2, 3]], max_new_tokens=3),
    "no token": lambda model: model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3),
    "one dimension": lambda model: model.generate(torch.tensor([4, 5, 6]), max_new_tokens=3),
    "an id of 41 bits": lambda model: model.generate(torch.tensor([[4, 5, 1 << 40]]), max_new_tokens=3),
    "ids of floats": lambda model: model.generate(torch.tensor([[4.0, 5.0]]), max_new_tokens=3),
    "stop strings without a tokenizer": greedy(stop_strings="e"),
    "an argument that is none": greedy(temperatur=1.0),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_shows_nothing_of_ours(name: str, tmp_path: Path) -> None:
    bare = outcome(lambda: ERRORS[name](llama()))
    assert isinstance(bare, Exception) and bare.__context__ is None
    with served(tmp_path) as here:
        found, _ = here.ask(outcome, lambda: ERRORS[name](llama()))
    assert type(found) is type(bare) and str(found) == str(bare)
    assert found.__context__ is None


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def told_by(call: Callable[[], Any]) -> list[str]:
    """Every warning of the engine and of Python while a call runs."""
    from transformers.utils import logging as engine

    engine.warning_once.cache_clear()
    verbosity, handler, logger = engine.get_verbosity(), Told(), logging.getLogger("transformers")
    engine.set_verbosity_warning()
    logger.addHandler(handler)
    torch.manual_seed(5)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        logger.removeHandler(handler)
        engine.set_verbosity(verbosity)
    return sorted([*handler.said, *(str(one.message) for one in caught)])


TURNED = {name: value.flip(1) for name, value in BATCH.items()}
WARNINGS = {
    "both lengths": (llama, greedy(max_length=40)),
    "both least lengths": (llama, greedy(min_new_tokens=2, min_length=3)),
    "no mask and no pad id": (without_pad, greedy(attention_mask=...)),
    "temperature, greedy": (llama, greedy(temperature=0.3, top_p=0.5)),
    "a config and arguments": (
        llama,
        lambda model: model.generate(**BATCH, generation_config=GenerationConfig(max_new_tokens=4), max_new_tokens=3),
    ),
    "a negative end id": (llama, greedy(eos_token_id=-1)),
    "the default length": (llama, greedy(max_new_tokens=...)),
    "a least length out of reach": (llama, greedy(min_new_tokens=50)),
    "padding on the right": (llama, greedy(**TURNED)),
    "padding on the right, encoder and decoder": (lambda: build("bart"), greedy(**TURNED)),
    "a pad id at the right, no mask": (llama, greedy(input_ids=TURNED["input_ids"], attention_mask=...)),
    "longer than the positions": (llama, greedy(max_new_tokens=300, eos_token_id=[])),
    "as long as the positions": (llama, greedy(max_new_tokens=..., max_length=257, eos_token_id=[])),
    "one longer than the positions": (llama, greedy(max_new_tokens=..., max_length=258, eos_token_id=[])),
    "no longer than the positions": (llama, greedy(max_new_tokens=300, eos_token_id=ENDS)),
    "a processor twice": (
        llama,
        greedy(repetition_penalty=1.2, logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])),
    ),
    "a criterion twice": (llama, greedy(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(15)]))),
}


@pytest.mark.parametrize(("make", "call"), WARNINGS.values(), ids=WARNINGS)
def test_a_call_warns_as_the_bare_one_does(make: Callable[[], Any], call: Call, tmp_path: Path) -> None:
    model = make()
    bare = told_by(lambda: call(model))
    with served(tmp_path) as here:
        assert told_by(lambda: call(model)) == bare
        here.cache.flush()
        assert told_by(lambda: call(model)) == bare
        assert here.cache.counts.hits > 0


@pytest.mark.parametrize("name", ["the default length", "padding on the right", "a processor twice"])
def test_a_sleeping_checkpoint_warns_as_the_bare_model_does(name: str, tmp_path: Path) -> None:
    call = WARNINGS[name][1]
    llama().save_pretrained(tmp_path / "model")
    bare = told_by(lambda: call(LlamaForCausalLM.from_pretrained(tmp_path / "model")))
    for loads in (1, 0):
        with served(tmp_path / "cache") as here:
            assert told_by(lambda: call(LlamaForCausalLM.from_pretrained(tmp_path / "model"))) == bare
            assert here.cache.counts.model_loads == loads


@pytest.mark.parametrize("then", ["nothing", "another answers", "another is loaded"])
def test_a_model_that_the_script_deletes_is_gone(then: str, tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    model = llama()
    # Modules with such hooks are cycles.
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True, execution_device="cpu"))
    alive: list[bool] = []
    plain = GPT2LMHeadModel.__init__

    class Seen(GPT2LMHeadModel):
        def __init__(self, *args: Any) -> None:
            alive.append(found() is not None)
            plain(self, *args)

    with served(tmp_path / "cache") as here:
        greedy()(model)
        found = weakref.ref(model)
        if then != "nothing":
            greedy(repetition_penalty=1.2)(model)
            assert seam.Seam.of(here.cache).watch(model).pending, "a check of so small a model takes long, as its batches go"
        del model
        gc.collect()
        assert (found() is None) is (then == "nothing")
        if then == "another answers":
            greedy()(build("gpt2"))
            gc.collect()
        elif then == "another is loaded":
            Seen.from_pretrained(tmp_path / "gpt2")
            assert alive == [False]
        assert found() is None
    with served(tmp_path / "cache") as here:
        assert here.ask(greedy(), llama())[1].hits == 4
        assert here.ask(greedy(repetition_penalty=1.2), llama())[1].hits == (0 if then == "nothing" else 4)


def test_an_answer_between_two_steps_of_training_is_stored(tmp_path: Path) -> None:
    with served(tmp_path) as here:
        model = llama()
        for _ in range(3):
            greedy()(model)
            with torch.no_grad():
                model.lm_head.weight.neg_()
        here.cache.flush()
        assert here.cache.counts.not_stored == 0


def test_a_patch_of_the_user_s_above_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = GenerationMixin.generate
    cache = Cache(tmp_path)
    try:
        floor.install(cache)
        inner = GenerationMixin.generate

        def mine(self: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(self, *args, **kwargs)

        GenerationMixin.generate = mine
        floor.install(cache)  # what happens when PEFT is imported later
        assert GenerationMixin.generate is mine
        floor.uninstall()
        assert GenerationMixin.generate is mine
    finally:
        GenerationMixin.generate = bare
        floor.uninstall()
        cache.close()


@pytest.mark.parametrize("settings", [{}, SCORES], ids=str)
def test_a_fault_of_ours_after_the_batch_does_not_cost_the_answer(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for the device's memory running out where a batch's scores are joined.
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    model, call = llama(), greedy(**settings)
    bare = call(model)
    with served(tmp_path) as here:
        greedy(repetition_penalty=1.1)(model)
        monkeypatch.setattr(seam.outputs, "to_array", no_memory)
        monkeypatch.setattr(seam.outputs, "pack_tokens", no_memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(bare, call(model))
        monkeypatch.undo()
        here.cache.flush()


def test_a_batch_that_is_not_stored_is_counted_by_its_rows(tmp_path: Path) -> None:
    processors = LogitsProcessorList([DiaEOSDelayPatternLogitsProcessor([1], 9, 16)])
    with served(tmp_path) as here:
        assert here.ask(greedy(logits_processor=processors), llama())[1].uncacheable == {"processor": 4}


VMAP = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from served import served
from tiny import build, prompts
with served(Path({folder!r})) as here:
    model = build("llama")
    for number in range(2):
        _, told = here.ask(model.generate, **prompts(), max_new_tokens=3, repetition_penalty=1.0 + number)
        print(told.uncacheable)
        torch.vmap(torch.sum)(torch.ones(2, 2))
    mine = torch.library.Library("aten", "IMPL")
    mine.impl("addr", lambda *args, **settings: args[0], "FuncTorchBatched")
    _, told = here.ask(model.generate, **prompts(), max_new_tokens=3)
    print(*told.uncacheable)
"""


def test_a_script_that_uses_vmap_is_still_served(tmp_path: Path) -> None:
    code = VMAP.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.split() == ["{}", "{}", "patched"]


@pytest.mark.parametrize("damage", ["removed", "overwritten"])
def test_a_store_that_is_lost_meanwhile_costs_a_warning(damage: str, tmp_path: Path) -> None:
    model, calls = llama(), [greedy(), greedy(repetition_penalty=1.2)]
    bare = [call(model) for call in calls]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        here = stack.enter_context(served(tmp_path / "cache"))
        here.ask(calls[0], model)
        if damage == "removed":
            shutil.rmtree(tmp_path / "cache")
        else:
            for file in (tmp_path / "cache" / "store").glob("cache.db*"):
                file.write_bytes(b"garbage" * 1000)
        for call, expected in zip(calls, bare, strict=True):
            assert_same(expected, here.ask(call, model)[0])


def test_an_interrupted_call_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = llama(), greedy()
    bare = call(model)
    with served(tmp_path) as here:
        here.ask(greedy(repetition_penalty=1.1), model)
        began: list[int] = []
        original = seam.measured

        @contextlib.contextmanager
        def measured(*args: Any) -> Any:
            with original(*args) as watch:
                began.append(len(model._forward_hooks))
                yield watch
                raise KeyboardInterrupt

        monkeypatch.setattr(seam, "measured", measured)
        with pytest.raises(KeyboardInterrupt):
            call(model)
        monkeypatch.undo()
        assert began == [1] and not model._forward_hooks
        found, told = here.ask(call, model)
        assert_same(bare, found)
        assert told.hits == 0 and told.misses == 4


def test_a_run_that_may_only_read_ends_with_a_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with evalcache.enable(tmp_path, policy="read_only"):
        greedy()(llama())
    told = capsys.readouterr().err
    assert "4 misses" in told and "not known" not in told


# --- threads, processes, generators -------------------------------------------------------------------------------------------


def test_threads_that_ask_one_model_at_once(tmp_path: Path) -> None:
    model = llama()
    bare = [rows(row)(model) for row in range(4)]
    with served(tmp_path) as here:
        for _ in range(2):
            found: list[Any] = [None] * 4

            def ask(row: int, into: list[Any] = found) -> None:
                into[row] = rows(row)(model)

            threads = [threading.Thread(target=ask, args=(row,), daemon=True) for row in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert_same(bare, found)
            here.cache.flush()
        assert (here.cache.counts.hits, here.cache.counts.misses) == (4, 4)


class Answers(torch.utils.data.Dataset):
    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Any:
        return rows(row)(self.model)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_workers_that_were_forked_answer_as_the_bare_ones(tmp_path: Path) -> None:
    model = llama()
    bare = list(torch.utils.data.DataLoader(Answers(model)))
    loader = torch.utils.data.DataLoader(Answers(model), num_workers=2, multiprocessing_context="fork")
    with served(tmp_path) as here:
        here.ask(rows(0), model)
        for _ in range(2):
            assert_same(bare, list(loader))
        found, told = here.ask(greedy(), model)
        assert_same(torch.cat(bare).reshape(4, -1), found)
        assert told.hits == 4


def test_the_generator_of_another_kind_of_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for a device that is not here.
    state = [torch.arange(4, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    before = generator_states(torch.device("mps"))
    assert len(before) == 2 and torch.equal(before[1], torch.arange(4, dtype=torch.uint8))
    state[0] = torch.zeros(4, dtype=torch.uint8)
    restore_generators(before, torch.device("mps"))
    assert torch.equal(state[0], before[1])


def test_only_what_acts_is_in_the_settings() -> None:
    model = build("t5")

    def settings(**given: Any) -> dict[str, Any]:
        config, _ = model._prepare_generation_config(None, **given)
        model._prepare_special_tokens(config, True, device=torch.device("cpu"), batch_size=1)
        config.max_length = 20
        return effective_settings(config, 1, True)

    assert settings(decoder_start_token_id=5) == settings(decoder_start_token_id=5, bos_token_id=7)
    assert settings(decoder_start_token_id=5) != settings(decoder_start_token_id=6)
    assert settings(eos_token_id=[2, 2]) == settings(eos_token_id=2) == settings(eos_token_id=torch.tensor(2))
    assert settings(eos_token_id=[2, 2], num_beams=2) != settings(eos_token_id=2, num_beams=2)
    assert settings(eos_token_id=[3, 2], num_beams=2) == settings(eos_token_id=[2, 3], num_beams=2)
    assert settings(pad_token_id=PAD) != settings(pad_token_id=3)
