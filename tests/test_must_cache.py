"""What people ordinarily do is cached: caution must never become an excuse. Each call of one table, bare, cold, and warm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import lora, prompt_tuned
from served import assert_same, served
from tiny import EOS, PAD, build, prompts
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, pipeline
from words import train_tokenizer

Call = Callable[[], Any]
WORDS = train_tokenizer()


def generate(model: Any, **settings: Any) -> Call:
    """``generate`` on the usual left-padded batch; greedy unless said otherwise."""
    arguments = {**prompts(), "max_new_tokens": 6, "do_sample": False, **settings}
    return lambda: model.generate(**arguments)


def without(model: Any, *names: str, **settings: Any) -> Call:
    arguments = {**prompts(), "max_new_tokens": 6, "do_sample": False, **settings}
    return lambda: model.generate(**{name: value for name, value in arguments.items() if name not in names})


def of(model: Any, *args: Any, **settings: Any) -> Call:
    """``generate`` with these arguments and no others."""
    return lambda: model.generate(*args, **settings)


def seeded(call: Call) -> Call:
    def run() -> Any:
        torch.manual_seed(3)
        return [call(), torch.rand(2)]

    return run


def inside(context: Callable[[], Any], call: Call) -> Call:
    def run() -> Any:
        with context():
            return call()

    return run


def adjusted(name: str, **values: Any) -> Any:
    model = build(name)
    for key, value in values.items():
        setattr(model.generation_config, key, value)
    return model


def used(model: Any) -> Any:
    """The model after its first forward, which leaves a tensor more in some."""
    model.generate(**prompts(1, 4), max_new_tokens=2)
    return model


def chat() -> Call:
    model = build("llama")
    turns = [{"role": "user", "content": "what is the key"}]

    def run() -> Any:
        encoded = WORDS.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return model.generate(**encoded, max_new_tokens=6, do_sample=False)

    return run


def piped(**settings: Any) -> Call:
    pipe = pipeline("text-generation", model=build("llama"), tokenizer=WORDS, device="cpu")
    return lambda: pipe(["the model", "a question has one answer"], max_new_tokens=5, **settings)


def piped_chat() -> Call:
    pipe = pipeline("text-generation", model=build("llama"), tokenizer=WORDS, device="cpu")
    return lambda: pipe([{"role": "user", "content": "what is the key"}], max_new_tokens=5, do_sample=False)


def tokenized(**settings: Any) -> Call:
    model = build("llama")
    batch = WORDS(["the cache keeps", "what"], padding=True, return_tensors="pt")
    return lambda: WORDS.batch_decode(model.generate(**batch, max_new_tokens=6, do_sample=False, **settings))


def right_padded() -> dict[str, torch.Tensor]:
    batch = prompts()
    return {key: value.flip(1) for key, value in batch.items()}


TABLE: dict[str, Callable[[], Call]] = {
    "plain greedy": lambda: without(build("llama"), "attention_mask", input_ids=prompts(1)["input_ids"]),
    "a batch padded on the left": lambda: generate(build("llama")),
    "a batch without an attention mask": lambda: without(build("llama"), "attention_mask"),
    "a positional prompt": lambda: of(build("llama"), prompts()["input_ids"], max_new_tokens=4),
    "nothing but a prompt": lambda: of(build("llama"), **prompts(1, 4)),
    "beams": lambda: generate(build("llama"), num_beams=3),
    "beams with a length penalty": lambda: generate(build("gpt2"), num_beams=2, length_penalty=0.3, early_stopping=True),
    "all beams returned": lambda: generate(build("llama"), num_beams=3, num_return_sequences=3),
    "sampling with a seed": lambda: seeded(generate(build("llama"), do_sample=True)),
    "sampling with top_p": lambda: seeded(generate(build("llama"), do_sample=True, temperature=0.7, top_p=0.9, top_k=0)),
    "several samples a prompt": lambda: seeded(generate(build("llama"), do_sample=True, num_return_sequences=3)),
    "beam sampling": lambda: seeded(generate(build("llama"), do_sample=True, num_beams=2)),
    "a chat template": chat,
    "a tokenizer's batch, decoded": tokenized,
    "pipeline, greedy": lambda: piped(do_sample=False),
    "pipeline, sampled": lambda: seeded(piped(do_sample=True, temperature=0.9)),
    "pipeline, batched": lambda: piped(do_sample=False, batch_size=2, return_full_text=False),
    "pipeline, chat": piped_chat,
    "return_dict_in_generate": lambda: generate(build("llama"), return_dict_in_generate=True),
    "output_scores": lambda: generate(build("llama"), return_dict_in_generate=True, output_scores=True),
    "output_logits of one prompt": lambda: generate(build("qwen2"), return_dict_in_generate=True, output_logits=True),
    "beam scores": lambda: generate(build("llama"), num_beams=2, return_dict_in_generate=True, output_scores=True),
    "stop strings": lambda: tokenized(stop_strings=["e", "the key"], tokenizer=WORDS),
    "one stop string": lambda: tokenized(stop_strings="e", tokenizer=WORDS),
    "several end ids": lambda: generate(build("llama"), eos_token_id=[EOS, *range(20, 50)]),
    "a GenerationConfig": lambda: without(
        build("llama"),
        "max_new_tokens",
        "do_sample",
        generation_config=GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=EOS),
    ),
    "model.generation_config edited": lambda: without(
        adjusted("llama", max_new_tokens=4, do_sample=False, repetition_penalty=1.3), "max_new_tokens", "do_sample"
    ),
    "pad = end": lambda: generate(build("llama"), pad_token_id=EOS),
    "no pad id": lambda: without(adjusted("llama", pad_token_id=None), "attention_mask", input_ids=prompts(1)["input_ids"]),
    "max_length only": lambda: without(build("llama"), "max_new_tokens", max_length=17),
    "min_new_tokens": lambda: generate(build("llama"), min_new_tokens=3, eos_token_id=[EOS, *range(20, 50)]),
    "repetition_penalty": lambda: generate(build("llama"), repetition_penalty=1.4),
    "no_repeat_ngram_size": lambda: generate(build("llama"), no_repeat_ngram_size=2, max_new_tokens=12),
    "bad_words_ids": lambda: generate(build("llama"), bad_words_ids=[[5], [6, 7]]),
    "suppress_tokens": lambda: generate(build("llama"), suppress_tokens=[5, 6, 7]),
    "sequence_bias": lambda: generate(build("llama"), sequence_bias=[[[5], 2.0], [[6, 7], -3.0]]),
    "one of the library's processors": lambda: generate(
        build("llama"), logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)])
    ),
    "use_cache=False": lambda: generate(build("llama"), use_cache=False),
    "a static cache": lambda: generate(build("llama"), cache_implementation="static"),
    "position ids": lambda: generate(build("llama"), position_ids=(prompts()["attention_mask"].cumsum(1) - 1).clamp(min=0)),
    "encoder and decoder": lambda: of(build("t5"), **right_padded(), max_new_tokens=6),
    "encoder and decoder, beams": lambda: of(
        build("bart"), **right_padded(), max_new_tokens=6, num_beams=3, no_repeat_ngram_size=3
    ),
    "a forced language": lambda: of(build("m2m_100"), **right_padded(), forced_bos_token_id=9, max_new_tokens=6),
    "LoRA": lambda: generate(lora()),
    "LoRA, encoder and decoder": lambda: of(lora("t5", "SEQ_2_SEQ_LM"), **right_padded(), max_new_tokens=6),
    "prompt tuning": lambda: generate(prompt_tuned()),
    "bfloat16": lambda: generate(build("llama").to(torch.bfloat16)),
    "a mixture of experts": lambda: generate(build("mixtral")),
    "a state-space model": lambda: generate(build("mamba2")),
    "compiled": lambda: generate(torch.compile(build("llama"), backend="eager")),
    "inference_mode": lambda: inside(torch.inference_mode, generate(build("llama"))),
    "no_grad": lambda: inside(torch.no_grad, generate(build("llama"))),
    "autocast": lambda: inside(lambda: torch.autocast("cpu", torch.bfloat16), generate(build("llama"))),
    "a long rope, short rows": lambda: generate(used(build("phi3_longrope")), **prompts(4, 8)),
    "a dynamic rope, short rows": lambda: generate(build("llama_dynamic"), **prompts(4, 8)),
}


@pytest.mark.parametrize("name", TABLE)
def test_an_ordinary_call_is_served_the_second_time(name: str, tmp_path: Path) -> None:
    call = TABLE[name]()
    with contextlib.ExitStack() as stack:
        bare = call()
        cold = stack.enter_context(served(tmp_path))
        output, told = cold.ask(call)
        assert_same(bare, output)
        assert told.uncacheable == {} and told.hits == 0 and told.misses > 0
    fresh = TABLE[name]()
    with served(tmp_path) as warm:
        for again in (fresh, call):
            output, told = warm.ask(again)
            assert_same(bare, output)
            assert told.uncacheable == {} and told.misses == 0 and told.hits > 0


def test_the_table_holds_what_was_promised() -> None:
    assert len(TABLE) >= 20
