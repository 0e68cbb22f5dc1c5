"""What cannot be keyed exactly runs as if evalcache were not there: same output or same error, counted with its reason."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import prompt_tuned
from served import assert_same, assert_same_outcome, outcome, served
from tiny import EOS, PAD, build, prompts
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from words import train_tokenizer

from evalcache.cache import Cache
from evalcache.records import UNCACHEABLE_REASONS

WORDS = train_tokenizer()
BATCH = prompts()


class Watching(TextStreamer):
    """A user's own streamer."""


class Favour(LogitsProcessor):
    """A user's own processor."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 7] += 3.0
        return scores


class Once(StoppingCriteria):
    """A user's own criterion, with state per row."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] > 14, dtype=torch.bool)


class Settings(GenerationConfig):
    """A user's own kind of generation config."""


def greedy(model: Any, **settings: Any) -> Any:
    return model.generate(**{**BATCH, "max_new_tokens": 5, "do_sample": False, **settings})


def lora_of_two() -> Any:
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        model = peft.get_peft_model(build("llama"), settings, "one")
        model.add_adapter("two", settings)
    return model.eval()


def hooked() -> Any:
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def patched_instance() -> Any:
    model = build("llama")
    original = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: original(x) * 2
    return model


def strange_attribute() -> Any:
    model = build("llama")
    model.model.layers[0].notes = iter([1, 2])
    return model


def with_settings(**values: Any) -> Any:
    model = build("llama")
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    return model


def cache_of(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


ONE = {"input_ids": BATCH["input_ids"][:1], "attention_mask": BATCH["attention_mask"][:1]}

# reason and a name → the model, and a call of it
CALLS: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    ("adapter_names", "an adapter for each row"): (
        lora_of_two,
        lambda model: greedy(model, adapter_names=["one", "two", "one", "__base__"]),
    ),
    ("argument", "an unknown argument"): (lambda: build("llama"), lambda model: greedy(model, temperatur=0.3)),
    ("argument", "a mask of four dimensions"): (
        lambda: build("llama"),
        lambda model: greedy(model, attention_mask=torch.ones(4, 1, 12, 12)),
    ),
    ("argument", "a mask of floats"): (
        lambda: build("llama"),
        lambda model: greedy(model, attention_mask=torch.full((4, 12), 0.5)),
    ),
    ("argument", "a mask of twos"): (
        lambda: build("llama"),
        lambda model: greedy(model, attention_mask=2 * BATCH["attention_mask"]),
    ),
    ("argument", "two prompts"): (lambda: build("llama"), lambda model: greedy(model, inputs=BATCH["input_ids"])),
    ("argument", "a generation config of one's own"): (
        lambda: build("llama"),
        lambda model: model.generate(**BATCH, generation_config=Settings(max_new_tokens=4, do_sample=False)),
    ),
    ("argument", "a generation config that holds an object"): (lambda: with_settings(notes={1, 2}), greedy),
    ("argument", "positions in three sections"): (
        lambda: build("llama"),
        lambda model: model.generate(**prompts(3), position_ids=torch.arange(12).expand(3, 3, 12), max_new_tokens=3),
    ),
    ("argument", "positions of another shape"): (
        lambda: build("llama"),
        lambda model: greedy(model, position_ids=torch.arange(12)[None]),
    ),
    ("argument", "a beam too many"): (lambda: build("llama"), lambda model: greedy(model, num_return_sequences=3, num_beams=2)),
    ("argument", "token types for a model without"): (
        lambda: build("llama"),
        lambda model: greedy(model, token_type_ids=torch.zeros(4, 12, dtype=torch.long)),
    ),
    ("argument", "negative prompts"): (
        lambda: build("llama"),
        lambda model: model.generate(**ONE, negative_prompt_ids=ONE["input_ids"].flip(1), guidance_scale=1.5, max_new_tokens=4),
    ),
    ("argument", "outputs of an encoder"): (
        lambda: build("t5"),
        lambda model: model.generate(**BATCH, encoder_outputs=model.encoder(**BATCH), max_new_tokens=4),
    ),
    ("assistant", "another model proposes"): (
        lambda: build("llama"),
        lambda model: model.generate(**ONE, assistant_model=build("llama", 1), max_new_tokens=5, do_sample=False),
    ),
    ("assistant", "the prompt proposes"): (
        lambda: build("llama"),
        lambda model: model.generate(**ONE, prompt_lookup_num_tokens=3, max_new_tokens=5, do_sample=False),
    ),
    ("criterion", "one's own"): (
        lambda: build("llama"),
        lambda model: greedy(model, stopping_criteria=StoppingCriteriaList([Once()])),
    ),
    ("hook", "a forward hook"): (hooked, greedy),
    ("max_time", "as a setting"): (lambda: build("llama"), lambda model: greedy(model, max_time=60.0)),
    ("max_time", "as a criterion"): (
        lambda: build("llama"),
        lambda model: greedy(model, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(60.0)])),
    ),
    ("output", "attentions"): (
        lambda: build("llama"),
        lambda model: greedy(model, output_attentions=True, return_dict_in_generate=True).sequences,
    ),
    ("output", "hidden states"): (
        lambda: build("llama"),
        lambda model: greedy(model, output_hidden_states=True, return_dict_in_generate=True),
    ),
    ("past_key_values", "a cache"): (lambda: build("llama"), lambda model: greedy(model, past_key_values=cache_of(model))),
    ("patched", "a method of one instance"): (patched_instance, greedy),
    ("processor", "one's own"): (
        lambda: build("llama"),
        lambda model: greedy(model, logits_processor=LogitsProcessorList([Favour()])),
    ),
    ("processor", "a function that allows"): (
        lambda: build("llama"),
        lambda model: greedy(model, prefix_allowed_tokens_fn=lambda row, ids: [5, 6, 7, 8]),
    ),
    ("streamer", "one's own"): (
        lambda: build("llama"),
        lambda model: model.generate(**ONE, streamer=Watching(WORDS), max_new_tokens=4, do_sample=False),
    ),
    ("training", "training mode"): (lambda: build("llama").train(), greedy),
    ("unhashable", "an attribute of unknown content"): (strange_attribute, greedy),
    ("unsupported", "embeddings as the prompt"): (
        lambda: build("llama"),
        lambda model: model.generate(inputs_embeds=model.get_input_embeddings()(BATCH["input_ids"]), max_new_tokens=4),
    ),
    ("unsupported", "no prompt"): (lambda: build("llama"), lambda model: model.generate(max_new_tokens=4, do_sample=False)),
    ("unsupported", "contrastive search"): (
        lambda: build("llama"),
        lambda model: greedy(model, penalty_alpha=0.5, top_k=3),
    ),
    ("unsupported", "prompt tuning without max_new_tokens"): (
        prompt_tuned,
        lambda model: model.generate(**BATCH, max_length=20, do_sample=False),
    ),
    ("unsupported", "a start that is no start token"): (
        lambda: build("t5"),
        lambda model: model.generate(**BATCH, decoder_input_ids=torch.full((4, 2), 9), max_new_tokens=4),
    ),
}
ELSEWHERE = {
    "changed": "test_transformers.py",
    "code": "test_code.py",
    "internal": "below",
    "threads": "below",
    "off": "below",
    "gradients": "log-likelihoods and forward calls only: generate never builds a graph",
    "sharded": "test_weights.py",
    "too_large": "test_cache.py",
}


@pytest.mark.parametrize(("reason", "name"), CALLS)
def test_the_call_runs_untouched_and_is_counted(reason: str, name: str, tmp_path: Path) -> None:
    make, call = CALLS[reason, name]
    bare = outcome(functools.partial(call, make()))
    model = make()
    with served(tmp_path) as here:
        for _ in range(2):
            found, told = here.ask(outcome, functools.partial(call, model))
            assert_same_outcome(bare, found)
            if not isinstance(bare, Exception):
                assert set(told.uncacheable) == {reason}
            assert told.hits == told.misses == 0


def test_every_reason_is_met_by_some_test() -> None:
    assert {reason for reason, _ in CALLS} | set(ELSEWHERE) == set(UNCACHEABLE_REASONS)


def test_samples_from_a_second_thread_are_not_cached(tmp_path: Path) -> None:
    model = build("llama")
    found = []
    with served(tmp_path) as here:
        _, told = here.ask(greedy, model, do_sample=True)
        assert told.misses == 1
        thread = threading.Thread(target=lambda: found.append(here.ask(greedy, model, do_sample=True)[1]))
        thread.start()
        thread.join()
        assert found[0].uncacheable == {"threads": 4}
        thread = threading.Thread(target=lambda: found.append(here.ask(greedy, model)[1]))
        thread.start()
        thread.join()
        assert found[1].misses == 4 and not found[1].uncacheable


def test_the_policy_off_touches_nothing(tmp_path: Path) -> None:
    model = build("llama")
    bare = greedy(model)
    with served(tmp_path, policy="off") as here:
        output, told = here.ask(greedy, model)
        assert_same(bare, output)
        assert (told.hits, told.misses) == (0, 0)
    with served(tmp_path) as here:
        assert here.ask(greedy, model)[1].misses == 4


def test_a_failure_of_our_own_warns_and_the_call_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    bare = greedy(model)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a fault of ours")

    with served(tmp_path) as here:
        monkeypatch.setattr(Cache, "open", broken)
        with pytest.warns(UserWarning, match="a fault of ours"):
            output = greedy(model)
        monkeypatch.undo()
        assert_same(bare, output)
        assert here.cache.counts.uncacheable == {"internal": 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"temperature": -1.0, "do_sample": True},
        {"num_return_sequences": 2},
        {"stop_strings": ["a"]},
        {"pad_token_id": "x"},
        {"attention_mask": torch.ones(3, 12, dtype=torch.long)},
        {"max_length": 3, "max_new_tokens": None},
        {"eos_token_id": "</s>"},
    ],
    ids=str,
)
def test_a_wrong_call_fails_as_the_bare_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama")
    bare = outcome(lambda: greedy(model, **settings))
    with served(tmp_path) as here:
        here.ask(greedy, model)
        for _ in range(2):
            found, told = here.ask(outcome, lambda: greedy(model, **settings))
            assert type(found) is type(bare) and str(found) == str(bare)
            assert told.hits == 0


def test_the_library_s_criteria_are_cached_as_whole_batches(tmp_path: Path) -> None:
    # A criterion for the end replaces the configured end ids, which then stand in the middle of rows.
    from transformers import EosTokenCriteria

    model = build("llama")
    criteria = StoppingCriteriaList([EosTokenCriteria([90, 91]), MaxLengthCriteria(20)])
    ends = [EOS, *range(20, 60)]
    for batch in (BATCH, ONE):
        bare = greedy(model, stopping_criteria=criteria, eos_token_id=ends, pad_token_id=PAD, max_new_tokens=8, **batch)
        with served(tmp_path) as here:
            for _ in range(2):
                output, told = here.ask(
                    greedy, model, stopping_criteria=criteria, eos_token_id=ends, pad_token_id=PAD, max_new_tokens=8, **batch
                )
                assert_same(bare, output)
            assert told.hits == 1
