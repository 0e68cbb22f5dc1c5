"""What is keyed changes the key, and what is not does not: each field in turn, through `generate` of real models.

Every case asks twice. Where something that counts has changed, nothing may be served; where nothing has, everything must be; and
in both cases the answer is the one that the bare model gives.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Told, assert_same, served
from tiny import EOS, PAD, ROPE_DEPENDENT, build, prompts
from transformers import AttentionInterface, GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor
from words import SENTENCES, train_tokenizer

BATCH = prompts()
WORDS = train_tokenizer()
DRAW = {"do_sample": True}
MANY_ENDS = [EOS, *range(20, 50)]


@dataclass
class Ask:
    """One call: a model, how it is made ready, and the arguments."""

    model: Callable[[], Any] = lambda: build("llama")
    settings: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] = contextlib.nullcontext
    batch: dict[str, Any] = field(default_factory=lambda: BATCH)
    drop: tuple[str, ...] = ()
    seed: int = 0

    def run(self, model: Any) -> Any:
        arguments = {"max_new_tokens": 6, "do_sample": False, **self.batch, **self.settings}
        torch.manual_seed(self.seed)
        return model.generate(**{name: value for name, value in arguments.items() if name not in self.drop})


def second_is(first: Ask, second: Ask, folder: Path) -> Told:
    """How the second of two calls is counted, after it was compared with the bare model's answer."""
    one, two = first.model(), second.model()
    with second.around():
        bare = second.run(two)
    with served(folder) as here:
        with first.around():
            _, told = here.ask(first.run, one)
        assert told.uncacheable == {} and told.hits == 0
        with second.around():
            output, told = here.ask(second.run, two)
        assert_same(bare, output)
        assert told.uncacheable == {}
    return told


def edited(edit: Callable[[Any], Any], name: str = "llama") -> Callable[[], Any]:
    def make() -> Any:
        model = build(name)
        with torch.no_grad():
            edit(model)
        return model

    return make


def configured(**values: Any) -> Callable[[], Any]:
    """The model with an edited generation_config, as a file edited beside the weights gives."""
    return edited(lambda model: [setattr(model.generation_config, name, value) for name, value in values.items()])


def made(config_edit: Callable[[Any], Any], name: str = "llama") -> Callable[[], Any]:
    """The same weights under an edited config."""

    def make() -> Any:
        model = build(name)
        config = type(model.config).from_dict(model.config.to_dict())
        config_edit(config)
        with torch.random.fork_rng(devices=[]):
            again = type(model)(config)
        again.load_state_dict(model.state_dict())
        return again.eval()

    return make


def one_ulp(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


def asking(**settings: Any) -> Ask:
    return Ask(settings=settings)


def sampling(**settings: Any) -> Ask:
    return Ask(settings={"do_sample": True, **settings})


def beams(**settings: Any) -> Ask:
    return Ask(settings={"num_beams": 3, **settings})


def precision(value: str) -> Callable[[], Any]:
    @contextlib.contextmanager
    def around() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(value)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    return around


def default_dtype(dtype: torch.dtype) -> Callable[[], Any]:
    @contextlib.contextmanager
    def around() -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return around


def autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype)


def turned(dimension: int) -> dict[str, Any]:
    return {name: tensor.flip(dimension) for name, tensor in BATCH.items()}


def masked(row: int, place: int) -> dict[str, Any]:
    mask = BATCH["attention_mask"].clone()
    mask[row, place] = 0
    return {"input_ids": BATCH["input_ids"][row : row + 1], "attention_mask": mask[row : row + 1]}


def whole_row(row: int = 0) -> dict[str, Any]:
    return {name: tensor[row : row + 1] for name, tensor in BATCH.items()}


def with_token(place: int, token: int) -> dict[str, Any]:
    ids = BATCH["input_ids"][:1].clone()
    ids[0, place] = token
    return {"input_ids": ids, "attention_mask": BATCH["attention_mask"][:1]}


def positions(shift: int) -> torch.Tensor:
    return (BATCH["attention_mask"].cumsum(1) - 1).clamp(min=0) * shift


def text(template: str | None = None, plain: bool = False, sentences: Any = SENTENCES, **settings: Any) -> dict[str, Any]:
    words = train_tokenizer(sentences)
    question = "what is the key"
    if template is not None:
        words.chat_template = template
    if plain:
        return dict(words(question, return_tensors="pt", return_token_type_ids=False, **settings))
    turns = [{"role": "user", "content": question}]
    return dict(words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True))


OTHER_TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ 'assistant: ' }}"
_BIAS = {"sequence_bias": [[[5], 2.0]]}

CHANGES: dict[str, tuple[Ask, Ask]] = {
    # the model
    "a weight, by one ulp": (Ask(), Ask(edited(one_ulp))),
    "another seed's weights": (Ask(), Ask(lambda: build("llama", 1))),
    "a buffer": (Ask(), Ask(edited(lambda model: model.model.rotary_emb.inv_freq.mul_(0.9)))),
    "an attribute": (Ask(), Ask(edited(lambda model: setattr(model.model.norm, "variance_epsilon", 0.5)))),
    "rms_norm_eps": (Ask(), Ask(made(lambda config: setattr(config, "rms_norm_eps", 0.5)))),
    "rope_theta": (Ask(), Ask(made(lambda config: config.rope_parameters.update(rope_theta=50.0)))),
    "an activation": (Ask(), Ask(made(lambda config: setattr(config, "hidden_act", "gelu")))),
    "dtype": (Ask(), Ask(edited(lambda model: model.to(torch.bfloat16)))),
    "another class with the same weights' shapes": (Ask(), Ask(lambda: build("mistral"))),
    # the environment
    "eager attention": (Ask(), Ask(edited(lambda model: model.set_attn_implementation("eager")))),
    "autocast": (Ask(), Ask(around=autocast(torch.bfloat16))),
    "autocast to another type": (Ask(around=autocast(torch.bfloat16)), Ask(around=autocast(torch.float16))),
    "matmul precision": (Ask(), Ask(around=precision("medium"))),
    "default dtype": (Ask(), Ask(around=default_dtype(torch.float64))),
    "compiled in place": (Ask(), Ask(edited(lambda model: model.model.layers[0].mlp.compile(backend="eager")))),
    # generation_config.json
    "end ids in generation_config": (Ask(), Ask(configured(eos_token_id=[EOS, 9]))),
    "repetition_penalty in generation_config": (Ask(), Ask(configured(repetition_penalty=1.5))),
    "do_sample in generation_config": (Ask(drop=("do_sample",)), Ask(configured(do_sample=True), drop=("do_sample",))),
    "max_new_tokens in generation_config": (
        Ask(configured(max_new_tokens=4), drop=("max_new_tokens",)),
        Ask(configured(max_new_tokens=5), drop=("max_new_tokens",)),
    ),
    # settings
    "max_new_tokens": (Ask(), asking(max_new_tokens=7)),
    "max_length": (asking(max_new_tokens=None, max_length=16), asking(max_new_tokens=None, max_length=17)),
    "min_new_tokens": (asking(eos_token_id=MANY_ENDS), asking(eos_token_id=MANY_ENDS, min_new_tokens=4)),
    "min_length": (asking(eos_token_id=MANY_ENDS), asking(eos_token_id=MANY_ENDS, min_length=16)),
    "num_beams": (Ask(), beams()),
    "more beams": (beams(), beams(num_beams=4)),
    "length_penalty": (beams(eos_token_id=MANY_ENDS), beams(eos_token_id=MANY_ENDS, length_penalty=-2.0)),
    "early_stopping": (beams(eos_token_id=MANY_ENDS), beams(eos_token_id=MANY_ENDS, early_stopping=True)),
    "early_stopping never": (beams(early_stopping=True), beams(early_stopping="never")),
    "num_return_sequences": (beams(), beams(num_return_sequences=2)),
    "repetition_penalty": (Ask(), asking(repetition_penalty=1.5)),
    "no_repeat_ngram_size": (Ask(), asking(no_repeat_ngram_size=1)),
    "encoder_repetition_penalty, of a decoder": (Ask(), asking(encoder_repetition_penalty=2.0)),
    "encoder_no_repeat_ngram_size, of a decoder": (Ask(), asking(encoder_no_repeat_ngram_size=1)),
    "end ids": (Ask(), asking(eos_token_id=MANY_ENDS)),
    "no end id": (Ask(), asking(eos_token_id=[])),
    "pad id": (Ask(), asking(pad_token_id=3)),
    "suppress_tokens": (Ask(), asking(suppress_tokens=[47, 117])),
    "begin_suppress_tokens": (Ask(), asking(begin_suppress_tokens=list(range(3, 90)))),
    "bad_words_ids": (Ask(), asking(bad_words_ids=[[117]])),
    "sequence_bias": (Ask(), asking(**_BIAS)),
    "forced_eos_token_id": (Ask(), asking(forced_eos_token_id=9)),
    "forced_bos_token_id": (Ask(), asking(forced_bos_token_id=9)),
    "exponential_decay_length_penalty": (
        asking(eos_token_id=MANY_ENDS),
        asking(eos_token_id=MANY_ENDS, exponential_decay_length_penalty=(1, 3.0)),
    ),
    "renormalize_logits": (beams(), beams(renormalize_logits=True)),
    "remove_invalid_values": (Ask(), asking(remove_invalid_values=True)),
    "guidance_scale": (Ask(batch=whole_row()), Ask(batch=whole_row(), settings={"guidance_scale": 2.0})),
    "use_cache": (Ask(), asking(use_cache=False)),
    "cache_implementation": (Ask(), asking(cache_implementation="static")),
    "stop_strings": (
        asking(stop_strings=["e"], tokenizer=WORDS),
        asking(stop_strings=["a"], tokenizer=WORDS),
    ),
    "stop_strings of another tokenizer": (
        asking(stop_strings=["e"], tokenizer=WORDS),
        asking(stop_strings=["e"], tokenizer=train_tokenizer(["entirely other text, eeee"])),
    ),
    "scores asked for": (
        asking(return_dict_in_generate=True),
        asking(return_dict_in_generate=True, output_scores=True),
    ),
    "do_sample": (Ask(), sampling()),
    "temperature": (sampling(), sampling(temperature=0.3)),
    "top_k": (sampling(), sampling(top_k=2)),
    "top_p": (sampling(), sampling(top_p=0.2)),
    "min_p": (sampling(), sampling(min_p=0.3)),
    "typical_p": (sampling(), sampling(typical_p=0.3)),
    "epsilon_cutoff": (sampling(), sampling(epsilon_cutoff=0.03)),
    "seed": (sampling(), Ask(settings=DRAW, seed=1)),
    "samples a prompt": (sampling(), sampling(num_return_sequences=2)),
    "the order of a sampled batch": (sampling(), Ask(settings=DRAW, batch=turned(0))),
    # the prompt
    "a token": (Ask(batch=whole_row()), Ask(batch=with_token(4, 99))),
    "a hole in the mask": (Ask(batch=whole_row()), Ask(batch=masked(0, 5))),
    "another hole": (Ask(batch=masked(0, 5)), Ask(batch=masked(0, 6))),
    "a last token masked": (Ask(batch=whole_row()), Ask(batch=masked(0, 11))),
    "no mask where there was one": (
        Ask(batch=whole_row(3)),
        Ask(batch=whole_row(3), settings={"attention_mask": torch.ones(1, 12, dtype=torch.long)}),
    ),
    "position ids": (Ask(), asking(position_ids=positions(2))),
    "other position ids": (asking(position_ids=positions(1)), asking(position_ids=positions(2))),
    "a chat template": (Ask(batch=text()), Ask(batch=text(OTHER_TEMPLATE))),
    "a tokenizer that gives other ids": (
        Ask(batch=text(plain=True)),
        Ask(batch=text(plain=True, sentences=("what is", "the key"))),
    ),
    "a decoder's beginning": (
        Ask(lambda: build("t5"), {"decoder_input_ids": torch.tensor([[PAD, 9]] * 4)}),
        Ask(lambda: build("t5"), {"decoder_input_ids": torch.tensor([[PAD, 10]] * 4)}),
    ),
    "an encoder without a mask": (
        Ask(lambda: build("t5"), batch=whole_row(3)),
        Ask(lambda: build("t5"), batch={"input_ids": BATCH["input_ids"][3:]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_counts_changes_the_key(name: str, tmp_path: Path) -> None:
    first, second = CHANGES[name]
    assert second_is(first, second, tmp_path).hits == 0


def padded(batch: dict[str, Any], left: int, filler: int) -> dict[str, Any]:
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (left, 0), value=filler),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (left, 0)),
    }


def encoder_padded(right: int) -> dict[str, Any]:
    row = whole_row()
    return {name: torch.nn.functional.pad(tensor, (0, right)) for name, tensor in row.items()}


def as_config(**settings: Any) -> Ask:
    return Ask(settings={"generation_config": GenerationConfig(**settings)}, drop=("max_new_tokens", "do_sample"))


def beside_padding(**settings: Any) -> tuple[Ask, Ask]:
    return Ask(batch=whole_row(), settings=settings), Ask(batch=padded(whole_row(), 5, PAD), settings=settings)


SAME: dict[str, tuple[Ask, Ask]] = {
    "a copy of the model": (Ask(), Ask()),
    "another name": (Ask(), Ask(edited(lambda model: setattr(model.config, "_name_or_path", "somewhere/else")))),
    "labels": (Ask(), Ask(edited(lambda model: setattr(model.config, "id2label", {0: "no", 1: "yes"})))),
    "an unused setting for training": (Ask(), Ask(edited(lambda model: model.requires_grad_(False)))),
    "temperature without sampling": (Ask(), asking(temperature=0.3)),
    "top_p, top_k, min_p, typical_p without sampling": (Ask(), asking(top_p=0.3, top_k=3, min_p=0.1, typical_p=0.4)),
    "length_penalty without beams": (Ask(), asking(length_penalty=2.0)),
    "early_stopping without beams": (Ask(), asking(early_stopping=True)),
    "explicit defaults": (
        Ask(),
        asking(num_beams=1, use_cache=True, num_return_sequences=1, repetition_penalty=1.0, no_repeat_ngram_size=0),
    ),
    "explicit end and pad ids": (Ask(), asking(eos_token_id=EOS, pad_token_id=PAD)),
    "an end id as a list": (asking(eos_token_id=EOS), asking(eos_token_id=[EOS])),
    "end ids in another order": (asking(eos_token_id=[2, 9, 7]), asking(eos_token_id=[9, 7, 2, 2])),
    "max_length for as many new tokens": (Ask(), asking(max_new_tokens=None, max_length=18)),
    "min_length for as many new tokens": (asking(min_new_tokens=4), asking(min_length=16)),
    "a generation config object": (Ask(), as_config(max_new_tokens=6, do_sample=False)),
    "the model's generation config": (
        Ask(), Ask(configured(max_new_tokens=6, do_sample=False), drop=("max_new_tokens", "do_sample"))
    ),
    "a generation config over the model's": (
        asking(repetition_penalty=1.5), Ask(configured(repetition_penalty=9.0), {"repetition_penalty": 1.5})
    ),
    "one stop string as a list": (
        asking(stop_strings="e", tokenizer=WORDS), asking(stop_strings=["e"], tokenizer=WORDS)
    ),
    "a start token of a decoder": (Ask(), asking(decoder_start_token_id=5)),
    "return_dict_in_generate": (Ask(), asking(return_dict_in_generate=True)),
    "logits_to_keep as the engine sets it": (asking(logits_to_keep=1), asking(logits_to_keep=1)),
    "padded width": (Ask(batch=whole_row()), Ask(batch=padded(whole_row(), 5, PAD))),
    "what padding is made of": (Ask(batch=padded(whole_row(), 5, PAD)), Ask(batch=padded(whole_row(), 3, 77))),
    "an encoder's padding": (
        Ask(lambda: build("t5"), batch=whole_row()), Ask(lambda: build("t5"), batch=encoder_padded(4))
    ),
    "a mask of ones, or none": (Ask(batch=whole_row()), Ask(batch=whole_row(), drop=("attention_mask",))),
    "a mask of booleans": (Ask(), Ask(settings={"attention_mask": BATCH["attention_mask"].bool()})),
    "a mask that the pad ids tell": (Ask(), Ask(drop=("attention_mask",))),
    "prompts of int32": (Ask(), Ask(settings={"input_ids": BATCH["input_ids"].int()})),
    "the order of a batch": (Ask(), Ask(batch=turned(0))),
    "a part of a batch": (Ask(), Ask(batch={name: tensor[1:3] for name, tensor in BATCH.items()})),
    "position ids under padding": (
        asking(position_ids=positions(1)),
        asking(position_ids=positions(1).where(BATCH["attention_mask"] == 1, torch.tensor(5))),
    ),
    "a chat template, for prompts without chat": (Ask(batch=text(plain=True)), Ask(batch=text(OTHER_TEMPLATE, plain=True))),
    "a tokenizer with the same ids": (
        Ask(batch=text(plain=True)),
        Ask(batch=text(plain=True, padding="longest")),
    ),
    "seed without sampling": (Ask(), Ask(seed=9)),
    "inference_mode": (Ask(), Ask(around=torch.inference_mode)),
    "a compiled wrapper": (Ask(), Ask(lambda: torch.compile(build("llama"), backend="eager"))),
    "min_new_tokens beside padding": beside_padding(eos_token_id=MANY_ENDS, min_new_tokens=4),
    "a growing penalty beside padding": beside_padding(
        eos_token_id=MANY_ENDS, exponential_decay_length_penalty=(2, 1.5), max_new_tokens=9
    ),
    "a forced end beside padding": beside_padding(forced_eos_token_id=9),
    "a suppressed beginning beside padding": beside_padding(begin_suppress_tokens=list(range(3, 90))),
    "an explicit end of the pad's id beside padding": beside_padding(pad_token_id=EOS, eos_token_id=EOS),
    "a repetition penalty beside padding": (
        Ask(batch=whole_row(), settings={"repetition_penalty": 1.5}),
        Ask(batch=padded(whole_row(), 4, PAD), settings={"repetition_penalty": 1.5}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_count_leaves_the_key(name: str, tmp_path: Path) -> None:
    first, second = SAME[name]
    told = second_is(first, second, tmp_path)
    assert told.misses == 0 and told.hits > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[PAD, 5], [6]]},
        {"sequence_bias": [[[PAD, 5], 2.0]]},
        {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_padding_counts_where_a_processor_reads_it(settings: dict[str, Any], tmp_path: Path) -> None:
    row = whole_row()
    first, second = Ask(batch=row, settings=settings), Ask(batch=padded(row, 3, PAD), settings=settings)
    assert second_is(first, second, tmp_path).hits == 0


# --- rows that depend on each other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROPE_DEPENDENT)
def test_a_row_beside_a_long_one_is_another_request_where_the_rope_depends_on_the_longest(name: str, tmp_path: Path) -> None:
    model, wide = build(name), prompts(2, 24, seed=3)
    short = {key: tensor[1:, 16:] for key, tensor in wide.items()}  # eight tokens, the last row's own
    Ask(batch=short).run(model)  # the first forward leaves a tensor more in the model
    bare_short, bare_wide = Ask(batch=short).run(model), Ask(batch=wide).run(model)
    Ask(batch=short).run(model)
    with served(tmp_path) as here:
        for hits in (0, 1):
            output, told = here.ask(Ask(batch=short).run, model)
            assert_same(bare_short, output)
            assert told.hits == hits and not told.uncacheable
        output, told = here.ask(Ask(batch=wide).run, model)
        assert_same(bare_wide, output)
        assert told.hits == 0
    assert not torch.equal(bare_short[0, -6:], bare_wide[1, -6:])


def test_rows_of_a_recurrent_model_are_one_request(tmp_path: Path) -> None:
    model = build("rwkv")
    Ask().run(model)  # rescales its weights
    part = {name: tensor[:2] for name, tensor in BATCH.items()}
    bare = Ask(batch=part).run(model)
    with served(tmp_path) as here:
        assert here.ask(Ask().run, model)[1] == Told(0, 1, 0, {})
        assert here.ask(Ask().run, model)[1] == Told(1, 0, 0, {})
        output, told = here.ask(Ask(batch=part).run, model)
        assert_same(bare, output)
        assert told == Told(0, 1, 0, {})


def test_an_attention_kernel_of_one_s_own_counts_by_what_it_does(tmp_path: Path) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def register(factor: float) -> None:
        def scaled(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            return sdpa_attention_forward(module, query * factor, *args, **kwargs)

        AttentionInterface.register("scaled", scaled)

    model, bare = build("llama"), {}
    try:
        register(1.0)
        model.set_attn_implementation("scaled")
        for factor in (1.0, 4.0):
            register(factor)
            bare[factor] = Ask().run(model)
        assert not torch.equal(bare[1.0], bare[4.0])
        with served(tmp_path) as here:
            for factor in (1.0, 4.0, 1.0, 4.0):
                register(factor)
                output, told = here.ask(Ask().run, model)
                assert_same(bare[factor], output)
                assert told.hits in (0, 4)
            register(1.0)
            here.ask(Ask().run, build("llama"))
    finally:
        del AttentionInterface._global_mapping["scaled"]


# --- adapters ----------------------------------------------------------------------------------------------------------------


def lora(*names: str, seed: int = 0) -> Any:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        model = peft.get_peft_model(build("llama"), settings, names[0])
        for name in names[1:]:
            model.add_adapter(name, settings)
    return model.eval()


def test_an_adapter_counts_while_it_acts(tmp_path: Path) -> None:
    model, ask = lora("one", "two"), Ask()
    base = ask.run(build("llama"))
    bare = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        bare[name] = ask.run(model)
    assert not torch.equal(bare["one"], bare["two"])
    with served(tmp_path) as here:
        assert_same(base, here.ask(ask.run, build("llama"))[0])
        for hits in (0, 4):
            for name in ("one", "two"):
                model.set_adapter(name)
                output, told = here.ask(ask.run, model)
                assert_same(bare[name], output)
                assert told.hits == hits and not told.uncacheable
        # Switched off, it is the model below, whose answers are there.
        with model.disable_adapter():
            output, told = here.ask(ask.run, model)
        assert_same(base, output)
        assert told.hits == 4
        # Under another name, it is the same adapter.
        output, told = here.ask(ask.run, lora("another name"))
        assert_same(bare["one"], output)
        assert told.hits == 4
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["two"].weight.mul_(1.01)
        assert here.ask(ask.run, model)[1].hits == 0
        model.base_model.model.model.layers[0].self_attn.q_proj.scaling["two"] = 3.0
        assert here.ask(ask.run, model)[1].hits == 0


def test_a_merged_adapter_is_a_model_of_its_own(tmp_path: Path) -> None:
    model, merged, ask = lora("one"), lora("one").merge_and_unload(), Ask()
    bare = ask.run(merged)
    with served(tmp_path) as here:
        here.ask(ask.run, model)
        output, told = here.ask(ask.run, merged)
        assert_same(bare, output)
        assert told.hits == 0 and not told.uncacheable
        # The same weights without any adapter: the same model.
        plain = build("llama")
        plain.load_state_dict(merged.state_dict())
        assert here.ask(ask.run, plain)[1].hits == 4


def test_two_prompt_tuning_adapters_are_two_models(tmp_path: Path) -> None:
    import peft

    def tuned(seed: int, tokens: int = 4) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
            model = peft.get_peft_model(build("llama"), settings)
            with torch.no_grad():
                model.prompt_encoder["default"].embedding.weight.mul_(2.0)
        return model.eval()

    ask = Ask()
    bare = {seed: ask.run(tuned(seed)) for seed in (0, 1)}
    base = ask.run(build("llama"))
    assert not torch.equal(bare[0], bare[1])
    with served(tmp_path) as here:
        assert here.ask(ask.run, build("llama"))[1].misses == 4
        for hits in (0, 4):
            for seed in (0, 1):
                output, told = here.ask(ask.run, tuned(seed))
                assert_same(bare[seed], output)
                assert told.hits == hits and not told.uncacheable
        assert_same(base, here.ask(ask.run, build("llama"))[0])


def test_a_generation_config_set_on_an_adapted_model_counts(tmp_path: Path) -> None:
    ask = Ask(drop=("max_new_tokens",))

    def limited(number: int) -> Any:
        model = lora("one")
        model.generation_config = GenerationConfig(max_new_tokens=number, eos_token_id=EOS, pad_token_id=PAD)
        return model

    bare = {number: ask.run(limited(number)) for number in (3, 5)}
    with served(tmp_path) as here:
        for number in (3, 5):
            output, told = here.ask(ask.run, limited(number))
            assert_same(bare[number], output)
            assert told.hits == 0 and not told.uncacheable
        assert here.ask(ask.run, limited(3))[1].hits == 4


def test_a_quantised_copy_is_another_model(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised() -> Any:
        model = build("llama")
        quantize_(model, Int8WeightOnlyConfig())
        return model

    told = second_is(Ask(), Ask(quantised), tmp_path / "first")
    assert told.hits == 0
    assert second_is(Ask(quantised), Ask(quantised), tmp_path / "second").hits == 4


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def test_copies_of_a_checkpoint_are_one_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ask = Ask()
    build("llama").save_pretrained(tmp_path / "one")
    build("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "renamed")
    shutil.copytree(tmp_path / "one", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(build("llama").state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with served(tmp_path / "store") as here:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        bare, told = here.ask(ask.run, model)
        assert told == Told(0, 4, 0, {})
        for folder in ("one", "shards", "elsewhere/renamed", "bin"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            output, told = here.ask(ask.run, model)
            assert_same(bare, output)
            assert told == Told(4, 0, 0, {}), folder


@pytest.mark.parametrize("change", ["weights", "config.json", "generation_config.json", "dtype", "attn_implementation"])
def test_a_changed_checkpoint_or_load_is_another_model(change: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ask, folder = Ask(), tmp_path / "one"
    build("llama").save_pretrained(folder)
    arguments: dict[str, Any] = {}
    with served(tmp_path / "store") as here:
        for _ in range(2):
            here.ask(ask.run, AutoModelForCausalLM.from_pretrained(folder))
        assert here.cache.counts.hits == 4
        if change == "weights":
            edited(one_ulp)().save_pretrained(folder)
        elif change.endswith(".json"):
            name, value = ("rms_norm_eps", 0.5) if change == "config.json" else ("repetition_penalty", 3.0)
            told_by_file = json.loads((folder / change).read_text())
            (folder / change).write_text(json.dumps(told_by_file | {name: value}))
        else:
            arguments = {"dtype": torch.bfloat16} if change == "dtype" else {"attn_implementation": "eager"}
        output, told = here.ask(ask.run, AutoModelForCausalLM.from_pretrained(folder, **arguments))
        assert told == Told(0, 4, 0, {})
    assert_same(ask.run(AutoModelForCausalLM.from_pretrained(folder, **arguments)), output)


# --- strict matching -----------------------------------------------------------------------------------------------------------

STRICT: dict[str, tuple[Ask, Ask, bool]] = {
    "the same call": (Ask(), Ask(), True),
    "inactive settings": (Ask(), asking(temperature=0.5), True),
    "a padded width": (Ask(batch=whole_row()), Ask(batch=padded(whole_row(), 5, PAD)), False),
    "a part of the batch": (Ask(), Ask(batch={name: tensor[1:3] for name, tensor in BATCH.items()}), False),
    "the order of the batch": (Ask(), Ask(batch=turned(0)), False),
    "a neighbour": (Ask(), Ask(batch={"input_ids": BATCH["input_ids"].clone().index_fill_(0, torch.tensor([1]), 7)}), False),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_matching_keys_the_batch_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALCACHE_MATCH", "strict")
    first, second, same = STRICT[name]
    told = second_is(first, second, tmp_path)
    assert (told.hits > 0) is same and (told.misses == 0) is same


def test_strict_and_portable_answers_are_kept_apart(tmp_path: Path) -> None:
    model = build("llama")
    with served(tmp_path, match="strict") as here:
        assert here.ask(Ask().run, model)[1].misses == 4
    with served(tmp_path, match="portable") as here:
        assert here.ask(Ask().run, model)[1].misses == 4
    for match in ("strict", "portable"):
        with served(tmp_path, match=match) as here:
            assert here.ask(Ask().run, model)[1].hits == 4
