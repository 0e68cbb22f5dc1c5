"""Attempts to have an answer served that the bare model as it stands would not give. Each has to miss, or to be uncacheable.

Every case is a model, a change of something that shapes its answer, and the same call before and after it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import os
import random
import shutil
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served import assert_not_answered_from_before, assert_same, served
from tiny import build, prompts
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from words import train_tokenizer

import evalcache
from evalcache.cache import Cache
from evalcache.integrations import lazy
from evalcache.library_code import LibraryCode
from evalcache.lookups import computes_attributes, computes_globals, environment_names
from evalcache.weights import fingerprint

BATCH = prompts()
Case = Callable[[contextlib.ExitStack], tuple[Any, Callable[[], Any]]]


def ask(model: Any, **settings: Any) -> Any:
    return model.generate(**BATCH, max_new_tokens=8, do_sample=False, **settings)


# --- what a user's own forward reads ----------------------------------------------------------------------------------------

SETTINGS = types.ModuleType("settings_of_a_user")
NAME = "A_FACTOR_OF_OURS"


class Around(nn.Module):
    """A user's module around a layer's own; each case multiplies by a factor that comes from elsewhere."""

    def __init__(self, inner: nn.Module, which: Any = None) -> None:
        super().__init__()
        self.inner = inner
        self.which = which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.factor()


class ByComputedAttribute(Around):
    def factor(self) -> float:
        return getattr(SETTINGS, self.which)


class ByVars(Around):
    def factor(self) -> float:
        return vars(SETTINGS)[self.which]


class ByComputedGlobal(Around):
    def factor(self) -> float:
        return globals()[self.which].FACTOR


class OfPython(Around):
    def factor(self) -> float:
        return factor_of_everybody  # noqa: F821 - put among Python's own names


class OfALibrary(Around):
    def factor(self) -> float:
        return np.factor_of_ours


class OfALibrarysFunction(Around):
    def factor(self) -> float:
        return float(np.tanh(0.5))


class OfAComputedVariable(Around):
    def factor(self) -> float:
        return float(os.environ[self.which])


class OfANamedVariable(Around):
    def factor(self) -> float:
        return float(os.environ.get(NAME, "1"))


class OfAPartial(Around):
    def factor(self) -> float:
        return self.which.factor


def around(cls: type, which: Any = None) -> Any:
    model = build("llama")
    layer = model.model.layers[0]
    layer.mlp = cls(layer.mlp, which)
    return model.eval()


def reading(cls: type, owner: Any, name: str, which: Any = None, values: tuple[Any, Any] = (1.0, -3.0)) -> Case:
    def case(stack: contextlib.ExitStack) -> tuple[Any, Callable[[], Any]]:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        setter = (
            functools.partial(patch.setenv, name)
            if owner is os.environ
            else functools.partial(patch.setattr, owner, name, raising=False)
        )
        setter(values[0])
        return around(cls, which), lambda: setter(values[1])

    return case


def cached_weights(stack: contextlib.ExitStack) -> tuple[Any, Callable[[], Any]]:
    """Within `cached()` a weight is computed once: what comes of later values is not what the model answers."""
    from torch.nn.utils import parametrize

    model = build("llama")
    layer = model.model.layers[0].mlp.down_proj
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    model.eval()
    stack.enter_context(parametrize.cached())
    assert layer.weight is not None
    return model, lambda: parametrize._cache.update({(id(layer), "weight"): layer.weight * -3})


def a_closure_of_a_library(stack: contextlib.ExitStack) -> tuple[Any, Callable[[], Any]]:
    """What a decorated method of transformers wraps, replaced within its closure: no name is bound anew."""
    model = build("llama").eval()
    cells = type(model.model).forward.__closure__
    cell = next(cell for cell in cells if callable(cell.cell_contents))
    original = cell.cell_contents
    stack.callback(setattr, cell, "cell_contents", original)

    def turned(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        (output if hasattr(output, "last_hidden_state") else output[0]).last_hidden_state.neg_()
        return output

    return model, lambda: setattr(cell, "cell_contents", turned)


PARTIAL = functools.partial(float, 1)
CASES: dict[str, Case] = {
    "an attribute by a computed name": reading(ByComputedAttribute, SETTINGS, "FACTOR", "FACTOR"),
    "an entry of a module's names": reading(ByVars, SETTINGS, "FACTOR", "FACTOR"),
    "a global by a computed name": reading(ByComputedGlobal, SETTINGS, "FACTOR", "SETTINGS"),
    "a name put among Python's own": reading(OfPython, builtins, "factor_of_everybody"),
    "a name put into a library": reading(OfALibrary, np, "factor_of_ours"),
    "a function put into a library": reading(OfALibrarysFunction, np, "tanh", values=(math.tanh, lambda x: -3.0)),
    "a variable by a computed name": reading(OfAComputedVariable, os.environ, NAME, NAME, ("1", "-3")),
    "a variable by a global name": reading(OfANamedVariable, os.environ, NAME, values=("1", "-3")),
    "an attribute of a partial": reading(OfAPartial, PARTIAL, "factor", PARTIAL),
    "cached weights": cached_weights,
    "a closure of a library": a_closure_of_a_library,
}


@pytest.mark.parametrize("name", CASES)
def test_a_changed_model_is_not_answered_from_before(name: str, tmp_path: Path) -> None:
    assert_not_answered_from_before(CASES[name], ask, tmp_path)


def test_a_closure_that_is_filled_or_emptied_is_seen() -> None:
    def make() -> Any:
        filled, empty = 1, None
        return lambda: (filled, empty)

    code = LibraryCode()
    for place, change in ((0, lambda cell: delattr(cell, "cell_contents")), (1, lambda cell: setattr(cell, "cell_contents", 2))):
        function = make()
        inside = [cell.cell_contents for cell in function.__closure__]
        code._cells = [cell for cell, value in zip(function.__closure__, inside, strict=True) if value is not None]
        code._contents_of_cells = [value for value in inside if value is not None]
        code._empty_cells = [cell for cell, value in zip(function.__closure__, inside, strict=True) if value is None]
        assert code.guard()
        names = function.__code__.co_freevars
        change(function.__closure__[names.index(("filled", "empty")[place])])
        assert not code.guard()


class FromPython(Around):
    def factor(self) -> float:
        return random.choice([1.0, -3.0, 5.0])


class FromNumpy(Around):
    def factor(self) -> float:
        return float(np.random.randn())


@pytest.mark.parametrize("cls", [FromPython, FromNumpy])
def test_a_model_that_draws_from_other_generators_is_not_served(cls: type, tmp_path: Path) -> None:
    model = around(cls)
    with served(tmp_path) as here:
        for _ in range(2):
            _, told = here.ask(ask, model)
            assert told.hits == told.misses == 0 and told.uncacheable == {"unsupported": 4}


def test_a_type_that_a_library_function_takes_by_default_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = fingerprint(model).root
    monkeypatch.setattr(nn.functional.softmax, "__defaults__", (None, 3, torch.float16))
    assert fingerprint(model).root != before


def test_strict_matching_keys_the_number_of_threads(tmp_path: Path) -> None:
    model, threads = build("llama"), torch.get_num_threads()
    with served(tmp_path, match="strict") as here:
        here.ask(ask, model)
        assert here.ask(ask, model)[1].hits == 4
        try:
            torch.set_num_threads(threads + 1)
            assert here.ask(ask, model)[1].hits == 0
        finally:
            torch.set_num_threads(threads)


@pytest.mark.campaign
@pytest.mark.parametrize("asked_before", [False, True])
def test_each_part_of_a_4_bit_weight_counts(asked_before: bool, tmp_path: Path) -> None:
    """In the layout of the file, and in that which the first forward on a CPU chooses."""
    pytest.importorskip("bitsandbytes")
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(**settings, pad_token_id=0)).save_pretrained(tmp_path / "model")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=four, device_map="cpu").eval()
    if asked_before:
        ask(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    states = [weight.quant_state, getattr(weight.quant_state, "state2", None)]
    held = [(name, one) for state in states if state is not None for name, one in vars(state).items()]
    # That layout has the offset in its factors, and the one beside them acts no more.
    parts = [one for name, one in held if isinstance(one, torch.Tensor) and not (asked_before and name == "offset")]
    before = fingerprint(model).root
    assert len(parts) >= 2
    for part in [weight.data, *parts]:
        kept = part.clone()
        part.view(-1)[0] += 1
        assert fingerprint(model).root != before
        part.copy_(kept)
        assert fingerprint(model).root == before


# --- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.campaign  # quanto computes for most of a minute
def test_a_quantised_cache_reaches_into_padding(tmp_path: Path) -> None:
    settings = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 2, "residual_length": 128, "q_group_size": 32},
    }
    model, batch = build("llama"), prompts(6, 16, seed=1)

    def alone(row: int) -> Any:
        start = int(batch["attention_mask"][row].argmax()) // 2 * 2
        one = {name: tensor[row : row + 1, start:] for name, tensor in batch.items()}
        return model.generate(**one, max_new_tokens=24, do_sample=False, **settings)[:, 16 - start :]

    def together() -> Any:
        return model.generate(**batch, max_new_tokens=24, do_sample=False, **settings)

    rows, bare = [alone(row) for row in range(6)], together()
    assert any(not torch.equal(row[0, :8], new[:8]) for row, new in zip(rows, bare[:, 16:], strict=True)), (
        "padding does not matter"
    )
    with served(tmp_path) as here:
        for row in range(6):
            assert_same(rows[row], here.ask(alone, row)[0])
        output, told = here.ask(together)
        assert_same(bare, output)
        assert told.hits == 0


# --- a loop of one's own ----------------------------------------------------------------------------------------------------

ASKED = evalcache.named("somebody's model", version="1")
QUESTIONS = ["what is kept", "the model is"]
Loop = Callable[[contextlib.ExitStack], tuple[Callable[[list[str]], list[str]], Callable[[], Any]]]


def texts_of(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    return tokenizer.batch_decode(model.generate(**batch, do_sample=False)[:, batch["input_ids"].shape[1] :])


def settings_of_a_second_model(stack: contextlib.ExitStack) -> Any:
    model, tokenizer = build("llama"), train_tokenizer()
    model.generation_config.max_new_tokens = 4
    return lambda questions: texts_of(model, tokenizer, questions), lambda: setattr(model.generation_config, "max_new_tokens", 9)


def precision_of_a_second_model(stack: contextlib.ExitStack) -> Any:
    model, tokenizer = build("llama"), train_tokenizer()

    def compute(questions: list[str]) -> list[str]:
        with torch.no_grad():
            return [str(model(**tokenizer(one, return_tensors="pt")).logits.sum().item()) for one in questions]

    return compute, lambda: stack.enter_context(torch.autocast("cpu", torch.bfloat16))


def templates(stack: contextlib.ExitStack) -> Any:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "other": "x"}

    def compute(questions: list[str]) -> list[str]:
        return [tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False) for one in questions]

    return compute, lambda: tokenizer.chat_template.update(default="Q: {{ messages[0]['content'] }}")


def inputs_of_a_tokenizer(stack: contextlib.ExitStack) -> Any:
    tokenizer = train_tokenizer()
    return (lambda questions: [str(sorted(tokenizer(one))) for one in questions]), lambda: setattr(
        tokenizer, "model_input_names", ["input_ids"]
    )


def a_variable(stack: contextlib.ExitStack) -> Any:
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setenv(NAME, "1")
    return (lambda questions: [one + os.environ[NAME] for one in questions]), lambda: patch.setenv(NAME, "2")


def an_array(stack: contextlib.ExitStack) -> Any:
    values = np.ones(3)
    return (lambda questions: [f"{one} {values.sum()}" for one in questions]), lambda: values.fill(2)


LOOPS: dict[str, Loop] = {
    "settings of a second model": settings_of_a_second_model,
    "precision of a second model": precision_of_a_second_model,
    "several chat templates": templates,
    "inputs of a tokenizer": inputs_of_a_tokenizer,
    "a variable by a global name": a_variable,
    "an array in place": an_array,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_changed_loop_is_not_answered_from_before(name: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, contextlib.closing(Cache(tmp_path)) as cache:
        compute, change = LOOPS[name](stack)

        def run() -> list[str]:
            return evalcache.run(QUESTIONS, model=ASKED, compute=compute, cache=cache)

        before = compute(QUESTIONS)
        assert run() == before == run() and cache.counts.hits == 2
        change()
        after = compute(QUESTIONS)
        assert after != before, "the change changes no answer"
        assert run() == after and cache.counts.hits == 2


def test_settings_of_a_model_inside_another_count(tmp_path: Path) -> None:
    class Judge(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

    judge, tokenizer = Judge(build("llama")).eval(), train_tokenizer()
    settings = judge.model.generation_config
    settings.max_new_tokens = 4
    with contextlib.closing(Cache(tmp_path)) as cache:

        def run() -> list[str]:
            return evalcache.run(
                QUESTIONS, model=judge, compute=lambda asked: texts_of(judge.model, tokenizer, asked), cache=cache
            )

        assert run() == run() == texts_of(judge.model, tokenizer, QUESTIONS) and cache.counts.hits == 2
        settings.max_new_tokens = 9
        assert run() == texts_of(judge.model, tokenizer, QUESTIONS)


# --- names that stand in no code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "computed"),
    [
        ("lambda s: getattr(s, 'a')", False),
        ("lambda s: getattr(s, 'a', None)", False),
        ("lambda s: getattr(s.b(1, 2), 'a', 'b')", False),
        ("lambda s: getattr(getattr(s, 'a'), 'b')", False),
        ("lambda s: [getattr(one, 'a') for one in s]", False),
        ("lambda s, n: getattr(s, n)", True),
        ("lambda s, n: getattr(s, n, 'a')", True),
        ("lambda s: getattr(s, f'a{s}')", True),
        ("lambda s: getattr(getattr(s, 'a'), s.b)", True),
        ("lambda s: map(getattr, s)", True),
        ("lambda s: vars(s)", True),
        ("lambda s: [getattr(s, one) for one in s]", True),
    ],
)
def test_computed_attributes_are_told_from_written_ones(source: str, computed: bool) -> None:
    assert computes_attributes(eval(source).__code__) is computed


@pytest.mark.parametrize(
    ("source", "computed"),
    [
        ("lambda: globals()['A']", False),
        ("lambda: globals().get('A')", False),
        ("lambda: eval('A * 2')", False),
        ("lambda s: globals()[s]", True),
        ("lambda s: eval(s('a'))", True),
        ("lambda s: print(globals())", True),
    ],
)
def test_computed_globals_are_told_from_written_ones(source: str, computed: bool) -> None:
    assert computes_globals(eval(source).__code__) is computed


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("lambda: os.environ['A']", {"A"}),
        ("lambda: os.environ.get('A') or os.getenv('B', 'c')", {"A", "B"}),
        ("lambda: 'A' in os.environ", {"A"}),
        ("lambda: os.environ[NAME]", {NAME}),
        ("lambda s: [os.environ[s] for _ in s]", None),
        ("lambda: os.environ['A' + NAME]", None),
        ("lambda s: os.environ.get(s.name, '1')", None),
        ("lambda: dict(os.environ)", None),
    ],
)
def test_variables_by_written_names_are_known(source: str, names: set[str] | None) -> None:
    assert environment_names(eval(source).__code__, globals()) == names


# --- files that change ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that the cache has met, and that sleeps from then on."""
    build("llama").save_pretrained(tmp_path / "model")
    for _ in range(2):
        with served(tmp_path / "cache") as here:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
            here.ask(ask, model)
    assert lazy.is_asleep(model)
    return tmp_path / "model"


def test_a_model_that_sleeps_is_read_before_its_files_are_written(folder: Path) -> None:
    before = ask(AutoModelForCausalLM.from_pretrained(folder), repetition_penalty=1.3)
    with served(folder.parent / "cache") as here:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert lazy.is_asleep(model)
        build("llama", 1).save_pretrained(folder)
        assert_same(before, here.ask(ask, model, repetition_penalty=1.3)[0])
        assert not torch.equal(before, ask(AutoModelForCausalLM.from_pretrained(folder), repetition_penalty=1.3))


def test_files_that_somebody_else_has_written_are_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama", 1).save_pretrained(folder.parent / "other")
    with served(folder.parent / "cache") as here:
        model = AutoModelForCausalLM.from_pretrained(folder)
        shutil.copy(folder.parent / "other" / "model.safetensors", folder)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            output, counted = here.ask(ask, model, repetition_penalty=1.3)
        assert_same(ask(AutoModelForCausalLM.from_pretrained(folder), repetition_penalty=1.3), output)
        assert counted.hits == 0
    assert "has changed on disk" in " ".join([str(one.message) for one in told]) + capsys.readouterr().err


def test_weights_that_a_config_names_count(folder: Path) -> None:
    def load() -> Any:
        config = AutoConfig.from_pretrained(folder)
        config.transformers_weights = "second.safetensors"
        return AutoModelForCausalLM.from_pretrained(folder, config=config)

    for seed in (1, 2):
        build("llama", seed).save_pretrained(folder.parent / "other")
        shutil.copy(folder.parent / "other" / "model.safetensors", folder / "second.safetensors")
        bare = ask(load())
        for _ in range(2):
            with served(folder.parent / "cache") as here:
                assert_same(bare, here.ask(ask, load())[0])
