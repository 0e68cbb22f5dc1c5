"""Attempts to make two models that answer differently look like one: every one of them has to fail.

Each case is a tiny model, and a change that its tensors, class or configuration do not show at first sight. What is served after
the change is compared with what the bare model then says, and nothing may come from the store.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import importlib
import os
import shutil
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from served import assert_not_answered_from_before, assert_same, served
from tiny import build, prompts
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, Gemma2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evalcache.environment import device_type
from evalcache.integrations import lazy

BATCH = prompts()
Change = Callable[[], Any]


def ask(model: Any) -> Any:
    return model.generate(**BATCH, max_new_tokens=6, do_sample=False)


class Around(nn.Module):
    """A user's module around a layer's own: its factor comes from wherever a case hides it."""

    def __init__(self, inner: nn.Module, **values: Any) -> None:
        super().__init__()
        self.inner = inner
        for name, value in values.items():
            setattr(self, name, value)


def around(cls: type, **values: Any) -> Any:
    model = build("llama")
    layer = model.model.layers[0]
    layer.mlp = cls(layer.mlp, **values)
    return model.eval(), layer.mlp


# --- what a user's own module reads -------------------------------------------------------------------------------------------


class Slotted(Around):
    __slots__ = ("factor",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.factor


def a_slot(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, module = around(Slotted, factor=1.0)
    return model, lambda: setattr(module, "factor", -3.0)


class Missing(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * collections.defaultdict(self.table.default_factory)["factor"]


def a_default_factory(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, module = around(Missing, table=collections.defaultdict(lambda: 1.0))
    return model, lambda: setattr(module, "table", collections.defaultdict(lambda: -3.0))


def scale(x: torch.Tensor) -> torch.Tensor:
    return x * scale.factor


scale.factor = 1.0


class Scaling(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scale(self.inner(x))


def an_attribute_of_a_function(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, _ = around(Scaling)
    stack.callback(setattr, scale, "factor", 1.0)
    return model, lambda: setattr(scale, "factor", -3.0)


FACTOR = 1.0


class ByName(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * globals()["FACTOR"]


class Evaluated(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * eval("FACTOR * 2")


class OfModule(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * getattr(sys.modules[__name__], "FACTOR")  # noqa: B009


def a_global(cls: type) -> Callable[[contextlib.ExitStack], tuple[Any, Change]]:
    def case(stack: contextlib.ExitStack) -> tuple[Any, Change]:
        model, _ = around(cls)
        stack.callback(globals().__setitem__, "FACTOR", 1.0)
        return model, lambda: globals().__setitem__("FACTOR", -3.0)

    return case


class FromEnvironment(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * float(os.environ.get("A_FACTOR", "1"))


def an_environment_variable(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, _ = around(FromEnvironment)
    stack.callback(os.environ.pop, "A_FACTOR", None)
    return model, lambda: os.environ.__setitem__("A_FACTOR", "-3")


class OfTensor(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.weight = nn.Parameter(torch.ones(1))
        self.weight.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.weight * self.weight.factor


def an_attribute_of_a_parameter(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, module = around(OfTensor)
    return model, lambda: setattr(module.weight, "factor", -3.0)


class Calling(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.factor()


def a_partial(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, module = around(Calling, factor=functools.partial(float, 1.0))
    return model, lambda: setattr(module, "factor", functools.partial(float, -3.0))


def a_cell(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    factor = 1.0

    def change() -> None:
        nonlocal factor
        factor = -3.0

    model, _ = around(Calling, factor=lambda: factor)
    return model, change


class Holding(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.settings.factor


def a_module_in_an_attribute(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    settings = types.ModuleType("some_settings")
    settings.factor = 1.0
    model, _ = around(Holding, settings=settings)
    return model, lambda: setattr(settings, "factor", -3.0)


def an_object(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    settings = types.SimpleNamespace(factor=1.0)
    model, _ = around(Holding, settings=settings)
    return model, lambda: setattr(settings, "factor", -3.0)


def a_shadowed_child(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model = build("llama")
    layer = model.model.layers[0]
    other = build("llama", 1).model.layers[0].mlp
    return model, lambda: layer.__dict__.__setitem__("mlp", other)


def a_shadowed_parameter(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model = build("llama")
    linear = model.model.layers[0].mlp.down_proj
    return model, lambda: linear.__dict__.__setitem__("weight", linear.weight.detach() * -3)


def another_class_of_an_object(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model = build("llama")
    linear = model.model.layers[0].mlp.down_proj

    class Negative(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -3 * super().forward(x)

    return model, lambda: setattr(linear, "__class__", Negative)


class Quantised(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (-3 if self.is_quantized else 1)


def a_name_that_means_nothing_elsewhere(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, module = around(Quantised, is_quantized=False)
    return model, lambda: setattr(module, "is_quantized", True)


class Named(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (-3 if "second" in self.config._name_or_path else 1)


def the_name_of_a_config(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model, module = around(Named)
    module.config = model.config
    return model, lambda: setattr(model.config, "_name_or_path", "second")


LOCAL = threading.local()


class OfThread(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * LOCAL.factor


def a_value_of_the_thread(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    LOCAL.factor = 1.0
    model, _ = around(OfThread)
    return model, lambda: setattr(LOCAL, "factor", -3.0)


class Reading(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (-3 if "9" in str(self.value) else 1)


def a_value(first: Any, second: Any) -> Callable[[contextlib.ExitStack], tuple[Any, Change]]:
    def case(stack: contextlib.ExitStack) -> tuple[Any, Change]:
        model, module = around(Reading, value=first)
        return model, lambda: setattr(module, "value", second)

    return case


Pair = collections.namedtuple("Pair", "left right")

VALUES = {
    "a range": (range(3), range(9)),
    "a slice": (slice(3), slice(9)),
    "a deque": (collections.deque([1]), collections.deque([1], 9)),
    "a path": (Path("a"), Path("9")),
    "a named tuple": (Pair(1, 2), Pair(1, 9)),
    "a namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=9)),
    "a counter": (collections.Counter(a=1), collections.Counter(a=9)),
}


# --- code in files ------------------------------------------------------------------------------------------------------------

_FORWARD = """
from torch import nn
{top}
class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        {inside}
        return self.inner(x) * {factor}
"""


def in_files(files: dict[str, str], settings: str) -> Callable[[contextlib.ExitStack], tuple[Any, Change]]:
    """A module of a package of the user's whose factor lies in another file of it."""

    def case(stack: contextlib.ExitStack) -> tuple[Any, Change]:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, text in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        sys.path.insert(0, str(folder))
        stack.callback(sys.path.remove, str(folder))
        before = set(sys.modules)
        stack.callback(lambda: [sys.modules.pop(name) for name in set(sys.modules) - before if name.startswith("attacked")])
        importlib.invalidate_caches()
        scaled = importlib.import_module("attacked.layers").Scaled
        model, _ = around(scaled)
        return model, lambda: setattr(importlib.import_module(settings), "FACTOR", -3.0)

    return case


def layers(top: str = "", inside: str = "", factor: str = "FACTOR") -> str:
    return _FORWARD.format(top=top, inside=inside or "pass", factor=factor)


def scaled_in(**sources: str) -> dict[str, str]:
    return {f"attacked/{name}.py": text for name, text in sources.items()}


_FACTOR = "FACTOR = 1.0\n"
_INIT = {"__init__": ""}

IN_FILES = {
    "an import inside of forward": in_files(
        scaled_in(**_INIT, settings=_FACTOR, layers=layers(inside="from attacked.settings import FACTOR")), "attacked.settings"
    ),
    "a relative import inside of forward": in_files(
        scaled_in(**_INIT, settings=_FACTOR, layers=layers(inside="from .settings import FACTOR")), "attacked.settings"
    ),
    "a module imported inside of forward": in_files(
        scaled_in(**_INIT, settings=_FACTOR, layers=layers(inside="from . import settings", factor="settings.FACTOR")),
        "attacked.settings",
    ),
    "a dotted import inside of forward": in_files(
        scaled_in(
            **_INIT, settings=_FACTOR, layers=layers(inside="import attacked.settings as where", factor="where.FACTOR")
        ),
        "attacked.settings",
    ),
    "a package without __init__": in_files(
        scaled_in(settings=_FACTOR, layers=layers(top="import attacked.settings", factor="attacked.settings.FACTOR")),
        "attacked.settings",
    ),
    "modules that import each other": in_files(
        scaled_in(
            __init__="", settings="import attacked\n" + _FACTOR,
            layers=layers(top="import attacked\nimport attacked.settings", factor="attacked.settings.FACTOR"),
        ),
        "attacked.settings",
    ),
    "a module in a cell": in_files(
        scaled_in(
            **_INIT, settings=_FACTOR,
            layers="def make():\n    import attacked.settings as where\n"
            + "\n".join(f"    {line}" for line in layers(factor="where.FACTOR").splitlines())
            + "\n    return Scaled\nScaled = make()\n",
        ),
        "attacked.settings",
    ),
}  # fmt: skip


# --- kernels and libraries ----------------------------------------------------------------------------------------------------


def flipped(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query * -4, *args, **kwargs)


def steep(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query * 9, *args, **kwargs)


def one_layers_kernel(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    """Both kernels are chosen before and after, by other layers."""
    for name, kernel in (("flipped", flipped), ("steep", steep)):
        AttentionInterface.register(name, kernel)
        stack.callback(AttentionInterface._global_mapping.pop, name)
    model = build("llama")
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.config = copy.deepcopy(model.config)

    def choose(*names: str) -> None:
        for attention, name in zip(attentions, names, strict=True):
            attention.config._attn_implementation_internal = name

    choose("flipped", "steep")
    return model, lambda: choose("steep", "flipped")


def an_encoders_kernel(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    """The encoder's config is a copy: the model's own does not tell which kernel it chooses."""
    AttentionInterface.register("steep", steep)
    stack.callback(AttentionInterface._global_mapping.pop, "steep")
    model = build("bart")
    model.model.encoder.config = copy.deepcopy(model.config)
    for module in model.model.encoder.modules():
        if hasattr(module, "config"):
            module.config = model.model.encoder.config
    model.model.encoder.config._attn_implementation_internal = "steep"
    model.model.decoder.layers[0].config = copy.deepcopy(model.config)

    def change() -> None:
        model.model.encoder.config._attn_implementation_internal = "eager"
        model.model.decoder.layers[0].config._attn_implementation_internal = "steep"

    return model, change


class Kernel:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query * self.factor, *args, **kwargs)


def an_overridden_kernel(make: Callable[[float], Any]) -> Callable[[contextlib.ExitStack], tuple[Any, Change]]:
    def case(stack: contextlib.ExitStack) -> tuple[Any, Change]:
        table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        table["sdpa"] = make(1.0)
        stack.callback(table._local_mapping.pop, "sdpa")
        return build("llama"), lambda: table.__setitem__("sdpa", make(-4.0))

    return case


def scaled_kernel(module: Any, query: Any, *args: Any, factor: float = 1.0, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query * factor, *args, **kwargs)


def a_mock(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    from unittest import mock

    patches = [mock.patch.object(nn.functional, "silu", return_value=torch.tensor(value)) for value in (1.0, -3.0)]
    patches[0].start()
    stack.callback(lambda: patches[0].stop())

    def change() -> None:
        nn.functional.silu = mock.MagicMock(return_value=torch.tensor(-3.0))

    return build("llama"), change


def a_cache_beside_a_model(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    config = transformers.MiniMaxConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=4, block_size=8, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MiniMaxForCausalLM(config).eval()
    recall = MiniMaxCache.get_linear_cache

    def forgetful(self: Any, layer: int) -> Any:
        found = recall(self, layer)
        return found * -5 if isinstance(found, torch.Tensor) else found

    stack.callback(setattr, MiniMaxCache, "get_linear_cache", recall)
    return model, lambda: setattr(MiniMaxCache, "get_linear_cache", forgetful)


def traced(factor: float) -> Any:
    class Times(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * factor

    return torch.fx.symbolic_trace(Times())


def a_traced_graph(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model = build("llama")
    layer = model.model.layers[0]
    layer.mlp = nn.Sequential(layer.mlp, traced(1.0)).eval()
    return model, lambda: layer.mlp.__setitem__(1, traced(-3.0).eval())


def a_flag_of_a_config(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model = build("gemma2")
    return model, lambda: setattr(model.config, "final_logit_softcapping", 0.01)


def denormals(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    model = build("llama")
    layer = model.model.layers[0]
    layer.mlp = nn.Sequential(layer.mlp, nn.Linear(32, 32, bias=False)).eval()
    with torch.no_grad():
        layer.mlp[0].down_proj.weight.fill_(1e-41)
        layer.mlp[1].weight.fill_(1e38)
    stack.callback(torch.set_flush_denormal, False)
    return model, lambda: torch.set_flush_denormal(True)


# --- adapters -----------------------------------------------------------------------------------------------------------------


def adapted(settings: Any, cls: Any = None) -> Any:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (cls or peft.get_peft_model)(build("llama"), settings)
    return model.eval()


def fewer_virtual_tokens(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    import peft

    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(20)

    def change() -> None:
        model.peft_config["default"].num_virtual_tokens = 2

    return model, change


def weighted(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    model = adapted(settings)
    model.add_adapter("other", settings)

    def change() -> None:
        model.add_weighted_adapter(["default", "other"], [9.0, -9.0], "mixed", combination_type="linear")
        model.set_adapter("mixed")
        model.eval()

    return model, change


def a_scale(stack: contextlib.ExitStack) -> tuple[Any, Change]:
    import peft

    model = adapted(peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    layers = [module for module in model.modules() if hasattr(module, "scale_layer")]
    return model, lambda: [layer.scale_layer(30.0) for layer in layers]


CASES: dict[str, Callable[[contextlib.ExitStack], tuple[Any, Change]]] = {
    "a slot": a_slot,
    "a default factory": a_default_factory,
    "an attribute of a function": an_attribute_of_a_function,
    "a global by name": a_global(ByName),
    "a global in an expression": a_global(Evaluated),
    "a global of a module": a_global(OfModule),
    "an environment variable": an_environment_variable,
    "an attribute of a parameter": an_attribute_of_a_parameter,
    "a partial": a_partial,
    "a cell": a_cell,
    "a module in an attribute": a_module_in_an_attribute,
    "an object": an_object,
    "a shadowed child": a_shadowed_child,
    "a shadowed parameter": a_shadowed_parameter,
    "another class of an object": another_class_of_an_object,
    "a name that means nothing elsewhere": a_name_that_means_nothing_elsewhere,
    "the name of a config": the_name_of_a_config,
    "a value of the thread": a_value_of_the_thread,
    **{name: a_value(*values) for name, values in VALUES.items()},
    **IN_FILES,
    "one layer's kernel": one_layers_kernel,
    "an encoder's kernel": an_encoders_kernel,
    "an overridden kernel, an object": an_overridden_kernel(Kernel),
    "an overridden kernel, a partial": an_overridden_kernel(lambda factor: functools.partial(scaled_kernel, factor=factor)),
    "a mock": a_mock,
    "a traced graph": a_traced_graph,
    "a flag of a config": a_flag_of_a_config,
    "a cache beside a model": a_cache_beside_a_model,
    "denormals": denormals,
    "fewer virtual tokens": fewer_virtual_tokens,
    "a weighted adapter": weighted,
    "an adapter's scale": a_scale,
}


@pytest.mark.parametrize("name", CASES)
def test_another_answer_is_another_model(name: str, tmp_path: Path) -> None:
    assert_not_answered_from_before(CASES[name], ask, tmp_path)


def test_a_peft_class_of_ones_own_is_refused(tmp_path: Path) -> None:
    import peft

    class Mine(peft.PeftModelForCausalLM):
        pass

    model = Mine(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=2)).eval()
    bare = ask(model)
    with served(tmp_path) as here:
        output, told = here.ask(ask, model)
        assert_same(bare, output)
        assert told.uncacheable == {"patched": 4}


@pytest.mark.parametrize("reason", ["training", "unsupported"])
def test_what_cannot_be_known_runs_untouched(reason: str, tmp_path: Path) -> None:
    model = build("llama")
    layer = model.model.layers[0]
    if reason == "training":
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.0))  # in training mode, as every module that was just made
    else:
        layer.mlp = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.ReLU())).eval()
    bare = ask(model)
    with served(tmp_path) as here:
        output, told = here.ask(ask, model)
        assert_same(bare, output)
        assert told.uncacheable == {reason: 4}


# --- what is ordinary, and has to be served -------------------------------------------------------------------------------------


def prepared(model: Any) -> Any:
    import peft

    return peft.prepare_model_for_kbit_training(model).eval()


def checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model.eval()


def asking_for_gradients(model: Any) -> Any:
    model.enable_input_require_grads()
    return model


def shortened(model: Any) -> Any:
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    model.config.num_hidden_layers = 1
    return model


def with_another_head(model: Any) -> Any:
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(32, 128, bias=False)
    model.lm_head.weight = nn.Parameter(weight.detach().flip(0))
    return model


ORDINARY: dict[str, Callable[[], Any]] = {
    "prepared for training": lambda: prepared(build("llama")),
    "gradient checkpointing": lambda: checkpointing(build("llama")),
    "gradients at the input": lambda: asking_for_gradients(build("llama")),
    "fewer layers": lambda: shortened(build("llama")),
    "another head": lambda: with_another_head(build("llama")),
    **{name: lambda first=first: around(Reading, value=first)[0] for name, (first, _) in VALUES.items()},
    "a function of numpy": lambda: around(Reading, value=np.tanh)[0],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_the_ordinary_is_served(name: str, tmp_path: Path) -> None:
    bare = ask(ORDINARY[name]())
    with served(tmp_path) as here:
        for hits in (0, 4):
            output, told = here.ask(ask, ORDINARY[name]())
            assert_same(bare, output)
            assert (told.hits, told.uncacheable) == (hits, {})


# --- checkpoints that sleep -----------------------------------------------------------------------------------------------------

OTHER = prompts(seed=5)


def ask_other(model: Any) -> Any:
    return model.generate(**OTHER, max_new_tokens=6, do_sample=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("gemma2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@contextlib.contextmanager
def known(folder: Path, cls: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    """A cache that has met the checkpoint and its answers."""
    with served(folder.parent / "store") as here:
        here.ask(ask, cls.from_pretrained(folder, **arguments))
        yield here


def test_none_is_a_value_of_the_config(folder: Path) -> None:
    arguments = {"final_logit_softcapping": None}
    bare = Gemma2ForCausalLM.from_pretrained(folder, **arguments)
    assert bare.config.final_logit_softcapping is None
    with known(folder, Gemma2ForCausalLM) as here:
        model = Gemma2ForCausalLM.from_pretrained(folder, **arguments)
        output, told = here.ask(ask, model)
        assert told.hits == 0 and model.config.final_logit_softcapping is None
        assert_same(ask(bare), output)


def test_a_config_edited_after_loading_does_not_change_what_wakes(folder: Path) -> None:
    bare = ask_other(AutoModelForCausalLM.from_pretrained(folder))
    with known(folder, config=AutoConfig.from_pretrained(folder)) as here:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
        assert lazy.is_asleep(model)
        config.rms_norm_eps = 50.0
        assert_same(bare, here.ask(ask_other, model)[0])


def test_a_config_taken_from_a_sleeping_model_stays_its_own(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.final_logit_softcapping = 1e-30  # all logits alike
    bare = ask_other(model)
    with known(folder) as here:
        model = AutoModelForCausalLM.from_pretrained(folder)
        config = model.config
        assert lazy.is_asleep(model)
        list(model.parameters())
        assert not lazy.is_asleep(model)
        config.final_logit_softcapping = 1e-30
        output, told = here.ask(ask_other, model)
        assert_same(bare, output)
        assert told.hits == 0


def test_a_model_that_cannot_generate_wakes(folder: Path) -> None:
    bare = AutoModel.from_pretrained(folder)(**BATCH).last_hidden_state
    with served(folder.parent / "store"):
        for asleep in (False, True):
            model = AutoModel.from_pretrained(folder)
            assert lazy.is_asleep(model) is asleep
            assert_same(bare, model(**BATCH).last_hidden_state)


def test_it_wakes_in_another_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = ask_other(AutoModelForCausalLM.from_pretrained(folder))
    monkeypatch.chdir(folder.parent)
    with known(Path("model").absolute()) as here:
        here.ask(ask, AutoModelForCausalLM.from_pretrained("model"))
        model = AutoModelForCausalLM.from_pretrained("model")
        assert lazy.is_asleep(model)
        monkeypatch.chdir("/")
        assert_same(bare, here.ask(ask_other, model)[0])


def test_it_wakes_where_it_was_asked_for(folder: Path) -> None:
    with known(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert lazy.is_asleep(model)
        with torch.device("meta"):
            assert next(model.parameters()).device.type == "cpu"


def test_offloaded_models_compute_where_their_hooks_say() -> None:
    model = accelerate.cpu_offload(build("llama"), execution_device=torch.device("cpu"))
    assert device_type(model) == "cpu"
    for module in model.modules():
        for hook in getattr(getattr(module, "_hf_hook", None), "hooks", [getattr(module, "_hf_hook", None)]):
            if hasattr(hook, "execution_device"):
                hook.execution_device = "cuda"  # as it would be where there is one
    assert device_type(model) == "cuda"


def test_loading_info_may_be_declined(folder: Path) -> None:
    with served(folder.parent / "store"):
        assert AutoModelForCausalLM.from_pretrained(folder, output_loading_info=False).config.vocab_size == 128
        model, _ = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert model.config.vocab_size == 128


@pytest.mark.parametrize("make", [Kernel, lambda factor: functools.partial(scaled_kernel, factor=factor)])
def test_nothing_sleeps_under_a_kernel_of_ones_own(make: Callable[[float], Any], folder: Path) -> None:
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    arguments = {"attn_implementation": "sdpa"}
    build("llama").save_pretrained(folder)
    try:
        table["sdpa"] = make(-4.0)
        bare = ask(AutoModelForCausalLM.from_pretrained(folder, **arguments))
        table["sdpa"] = make(1.0)
        with known(folder, **arguments) as here:
            table["sdpa"] = make(-4.0)
            output, told = here.ask(ask, AutoModelForCausalLM.from_pretrained(folder, **arguments))
            assert_same(bare, output)
            assert told.hits == 0
    finally:
        del table._local_mapping["sdpa"]


def test_asleep_sets_of_names_are_the_instance_s(folder: Path) -> None:
    bare = AutoModelForCausalLM.from_pretrained(folder)
    with known(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert lazy.is_asleep(model)
        assert model._no_split_modules == bare._no_split_modules


def test_a_name_of_the_hub_sleeps_and_its_blobs_count(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    home = hub / "models--somebody--tiny"
    snapshot = home / "snapshots" / ("a" * 40)
    for place in (snapshot, home / "blobs", home / "refs"):
        place.mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    for file in folder.iterdir():
        shutil.copy(file, home / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(home / "blobs" / f"blob-{file.name}")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained("somebody/tiny", cache_dir=hub)

    with served(tmp_path / "store") as here:
        bare, _ = here.ask(ask, load())
        model = load()
        assert lazy.is_asleep(model)
        output, told = here.ask(ask, model)
        assert_same(bare, output)
        assert told.hits == 4
        build("gemma2", 1).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", home / "blobs" / "blob-model.safetensors")
        output, told = here.ask(ask, load())
        assert told.hits == 0
    assert_same(ask(build("gemma2", 1)), output)
