"""An adapter on a sleeping base sleeps with it, and is never taken for another one."""

from __future__ import annotations

import functools
import json
import os
import shutil

import peft
import pytest
import tiny
import torch
from opened import Opened
from safetensors.torch import load_file, save_file
from served import in_a_run
from transformers import AutoModelForCausalLM

from evalcache.integrations import lazy
from evalcache.integrations.draws import count_draws, skip_draws

TARGETS = ["q_proj", "v_proj"]


def some(values, fast, ids=None):
    """Parameters of a test, of which the usual suite takes those at ``fast``; the whole suite takes all."""
    ids = list(ids or map(str, values))
    marks = [() if place in fast else pytest.mark.campaign for place in range(len(ids))]
    return [pytest.param(value, id=name, marks=mark) for value, name, mark in zip(values, ids, marks, strict=True)]


def make(base, folder, seed=1, config=None, name="default"):
    """Save an adapter that was not trained, but might have been: none of its weights is zero."""
    torch.manual_seed(seed)
    config = config or peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=name)
    with torch.no_grad():
        for which, parameter in model.named_parameters():
            if any(part in which for part in ("lora_", "ia3_", "hada_", "lokr_", "modules_to_save")):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(base, tmp_path):
    return make(base, tmp_path / "adapter")


@pytest.fixture
def run(tmp_path):
    """Runs on one cache folder: see `in_a_run`."""
    return functools.partial(in_a_run, tmp_path / "cache")


def ids(seed=0):
    return torch.randint(3, 100, (4, 8), generator=torch.Generator().manual_seed(seed))


def generate(model, seed=0, **more):
    more = {"max_new_tokens": 5, "do_sample": False} | more
    return model.generate(input_ids=ids(seed), attention_mask=torch.ones(4, 8, dtype=torch.long), **more)


def load(base, adapter, load=None, **more):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **(load or {})), adapter, **more)


def ask(base, adapter, seed=0, **more):
    return generate(load(base, adapter, **more), seed)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_second_run_does_not_load(base, run, tmp_path, task):
    adapter = make(base, tmp_path / "adapter", config=peft.LoraConfig(r=4, target_modules=TARGETS, task_type=task))
    bare = ask(base, adapter)
    assert not torch.equal(bare, generate(AutoModelForCausalLM.from_pretrained(base)))
    cold, first = run(ask, base, adapter)
    warm, second = run(ask, base, adapter)
    assert torch.equal(cold, bare) and torch.equal(warm, bare)
    assert (first.model_loads, first.misses, sum(first.uncacheable.values())) == (1, 4, 0)
    assert (second.model_loads, second.hits, second.misses) == (0, 4, 0)


def test_neither_weights_nor_adapter_are_read(base, adapter, run, monkeypatch):
    monkeypatch.setattr("evalcache.filememo.SETTLED_NS", 0)  # files that were written just now are known again, too
    with Opened(base / "model.safetensors", adapter / "adapter_model.safetensors") as opened:
        run(ask, base, adapter)
        assert len(set(opened.files())) == 2
        warm, counts = run(ask, base, adapter)
        assert opened.files() == []
    assert (counts.model_loads, counts.hits) == (0, 4)
    assert torch.equal(warm, ask(base, adapter))


def test_a_miss_wakes_both(base, adapter, run):
    run(ask, base, adapter)
    bare = ask(base, adapter, 1)
    woken, counts = run(ask, base, adapter, 1)
    assert torch.equal(woken, bare)
    assert (counts.model_loads, counts.misses, sum(counts.uncacheable.values())) == (1, 4, 0)
    assert run(ask, base, adapter, 1)[1].model_loads == 0


@pytest.mark.campaign
def test_a_second_adapter_on_a_known_base(base, adapter, run, tmp_path):
    """Its base wakes for it the first time, and sleeps from then on."""
    other = make(base, tmp_path / "other", seed=2)
    run(ask, base, adapter)
    bare = ask(base, other)
    for loads, hits in ((1, 0), (0, 4)):
        served, counts = run(ask, base, other)
        assert torch.equal(served, bare)
        assert (counts.model_loads, counts.hits) == (loads, hits)
    assert run(ask, base, adapter)[1].model_loads == 0


KINDS = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "gaussian": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian", task_type="CAUSAL_LM"),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "up_proj"], task_type="CAUSAL_LM"),
    "head": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", some(KINDS, fast=[0, 2]))
def test_kinds_of_adapters_and_the_draws_after_them(base, run, tmp_path, kind):
    """Making an adapter draws from the script's generator; what the script draws next is the same with and without the load."""
    adapter = make(base, tmp_path / "adapter", config=KINDS[kind]())

    def script():
        torch.manual_seed(7)
        model = load(base, adapter)
        drawn = torch.rand(3), torch.randn(20)
        return generate(model), generate(model, do_sample=True), *drawn, torch.rand(3)

    bare = script()
    for loads in (1, 0):
        served, counts = run(script)
        assert all(map(torch.equal, served, bare))
        assert (counts.model_loads, sum(counts.uncacheable.values())) == (loads, 0)


UNTOLD = {
    "pissa": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", some(UNTOLD, fast=[0]))
def test_other_kinds_are_loaded_each_time(base, run, tmp_path, kind):
    adapter = make(base, tmp_path / "adapter", config=UNTOLD[kind]())
    bare = ask(base, adapter)
    for _ in range(2):
        served, counts = run(ask, base, adapter)
        assert torch.equal(served, bare)
        assert counts.model_loads == 1


def test_weights_that_are_not_in_the_file_are_never_promised(base, adapter, run):
    """What a load draws for them is another adapter each time."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: one for name, one in weights.items() if "layers.1." not in name}, adapter / "adapter_model.safetensors")
    for _ in range(2):
        with pytest.warns(UserWarning, match="missing adapter keys"):
            assert run(ask, base, adapter)[1].model_loads == 1


# --- never another one ----------------------------------------------------------------------------------------------------


def edit_config(**changes):
    def edit(base, adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_weights(base, adapter):
    """Other bytes under the same name, size and mtime."""
    file = adapter / "adapter_model.safetensors"
    before = file.stat()
    weights = load_file(file)
    save_file({name: -one if "lora_A" in name else one for name, one in weights.items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def edit_base(base, adapter):
    tiny.build("llama", seed=9).save_pretrained(base)


EDITS = {
    "alpha": edit_config(lora_alpha=64),
    "weights": edit_weights,
    "base": edit_base,
    "rslora": edit_config(use_rslora=True),
    "targets": edit_config(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("settled", some([True, False], fast=[0]))
@pytest.mark.parametrize("edit", some(EDITS.values(), fast=[0, 1], ids=EDITS))
def test_what_was_edited_is_loaded(base, adapter, run, edit, settled, monkeypatch):
    if settled:
        monkeypatch.setattr("evalcache.filememo.SETTLED_NS", 0)
    before, _ = run(ask, base, adapter)
    edit(base, adapter)
    bare = ask(base, adapter)
    assert not torch.equal(before, bare)
    served, counts = run(ask, base, adapter)
    assert torch.equal(served, bare)
    assert (counts.model_loads, counts.hits) == (1, 0)
    assert run(ask, base, adapter)[1].model_loads == 0


@pytest.mark.campaign
@pytest.mark.parametrize("files", some(["bin", "moved"], fast=[0]))
def test_copies_sleep_too(base, adapter, run, tmp_path, files):
    run(ask, base, adapter)
    copy = tmp_path / "elsewhere"
    shutil.move(adapter, copy)
    if files == "bin":
        torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
        (copy / "adapter_model.safetensors").unlink()
    counts = run(ask, base, copy)[1]
    assert (counts.model_loads, counts.hits) == (0, 4)


ARGUMENTS = {
    "dtype": {"load": {"dtype": torch.bfloat16}},
    "adapter_name": {"adapter_name": "mine"},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "autocast_adapter_dtype": {"autocast_adapter_dtype": False},
}


@pytest.mark.parametrize("more", some(ARGUMENTS.values(), fast=[0, 1], ids=ARGUMENTS))
def test_other_arguments_are_another_load(base, adapter, run, more):
    run(ask, base, adapter)
    if "load" in more:
        run(lambda: ask(base, adapter, load=more["load"], autocast_adapter_dtype=False))
    bare = ask(base, adapter, **more)
    for loads in (1, 0):
        served, counts = run(lambda: ask(base, adapter, **more))
        assert torch.equal(served, bare)
        assert counts.model_loads == loads


UNKNOWN = {"is_trainable": True, "unheard_of": 1, "config": True, "ephemeral_gpu_offload": True, "key_mapping": {"x": "y"}}


@pytest.mark.parametrize("more", some([{name: value} for name, value in UNKNOWN.items()], fast=[0], ids=UNKNOWN))
def test_arguments_that_are_not_known_load(base, adapter, run, more):
    def script():
        given = more | ({"config": peft.PeftConfig.from_pretrained(adapter)} if "config" in more else {})
        model = load(base, adapter, **given)
        assert type(model) is peft.PeftModelForCausalLM
        return generate(model.eval())

    run(ask, base, adapter)
    bare = script()
    for _ in range(2):
        served, counts = run(script)
        assert torch.equal(served, bare)
        assert counts.model_loads == 1


@pytest.mark.campaign
def test_other_versions_are_another_load(base, adapter, run, monkeypatch):
    from evalcache.integrations import known

    run(ask, base, adapter)
    found = known.version_of_distribution
    monkeypatch.setattr(known, "version_of_distribution", lambda name: "0" if name == "peft" else found(name))
    assert run(ask, base, adapter)[1].model_loads == 1


def test_an_edited_base_is_another_one(base, adapter, run):
    """Between its load and the adapter's, by whatever means: nothing is told of what comes of it, and nothing is served."""

    def script(edit):
        model = AutoModelForCausalLM.from_pretrained(base)
        edit(model)
        return generate(peft.PeftModel.from_pretrained(model, adapter))

    def weights(model):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-1)

    def settings(model):
        model.config.rms_norm_eps = 0.5

    def hook(model):
        model.lm_head.register_forward_hook(lambda module, args, output: -output)

    # Of a base that is new to the store, and of one that sleeps.
    for edit in (weights, hook, settings):
        bare = script(edit)
        for _ in range(2):
            served, counts = run(script, edit)
            assert torch.equal(served, bare)
            assert counts.model_loads == 1
    plain = ask(base, adapter)
    for _ in range(2):
        assert torch.equal(run(ask, base, adapter)[0], plain)


def test_class_patched_while_asleep(base, adapter, run, monkeypatch):
    from peft.tuners.lora import layer

    run(ask, base, adapter)
    forward = layer.Linear.forward
    monkeypatch.setattr(layer.Linear, "forward", lambda self, x, *args, **kwargs: -3 * forward(self, x, *args, **kwargs))
    bare = ask(base, adapter)
    served, counts = run(ask, base, adapter)
    assert torch.equal(served, bare)
    assert counts.hits == 0 and counts.uncacheable["patched"] == 4


def test_replaced_files_wake_as_what_they_are(base, adapter, run, tmp_path):
    run(ask, base, adapter)
    other = make(base, tmp_path / "other", seed=2)

    def script():
        model = load(base, adapter)
        assert lazy.is_asleep(model)
        shutil.copy(other / "adapter_model.safetensors", adapter)
        return generate(model, 3)

    served, counts = run(script)
    assert torch.equal(served, ask(base, other, 3))
    assert counts.misses == 4
    assert run(ask, base, adapter, 3)[1].hits == 4


# --- asleep, it is what it would be ----------------------------------------------------------------------------------------


def test_asleep_it_answers_as_the_model_would(base, adapter, run):
    run(ask, base, adapter)
    real = load(base, adapter)

    def script():
        model = load(base, adapter)
        assert isinstance(model, peft.PeftModel) and isinstance(model, peft.PeftModelForCausalLM)
        assert isinstance(model, torch.nn.Module) and model.__class__ is peft.PeftModelForCausalLM
        assert model.active_adapter == real.active_adapter and model.active_adapters == real.active_adapters
        assert model.device == real.device and model.dtype == real.dtype and model.training is real.training
        assert model.eval() is model and model.to("cpu") is model and model.tie_weights() is None
        assert model.config.to_dict() == real.config.to_dict() and model.name_or_path == real.name_or_path
        assert model.generation_config.to_dict() == real.generation_config.to_dict()
        assert model.can_generate() and model.main_input_name == real.main_input_name
        assert model.num_parameters() == real.num_parameters()
        for name in ("hf_device_map", "anything", "is_loaded_in_8bit"):
            assert hasattr(model, name) is hasattr(real, name)
        assert lazy.is_asleep(model)

    assert run(script)[1].model_loads == 0


def disabled(model):
    with model.disable_adapter():
        return generate(model)


def switched(model):
    model.load_adapter(model.peft_config["default"].base_model_name_or_path.replace("model", "other"), "other")
    model.set_adapter("other")
    return generate(model)


def settings(model):
    model.generation_config = type(model.generation_config)(max_new_tokens=3, pad_token_id=0, repetition_penalty=1.5)
    return generate(model, max_new_tokens=None)


USES = {
    "disabled": disabled,
    "switched": switched,
    "settings": settings,
    "merged": lambda model: generate(model.merge_and_unload()),
    "base": lambda model: generate(model.get_base_model()),
    "forward": lambda model: model(input_ids=ids()).logits,
    "config": lambda model: torch.tensor(model.peft_config["default"].r + len(model.peft_config["default"].target_modules)),
    "inner": lambda model: generate(model.base_model.model),
    "parameters": lambda model: torch.tensor([parameter.numel() for parameter in model.parameters()]),
    "trainable": lambda model: torch.tensor(model.get_nb_trainable_parameters()),
    "dtype": lambda model: generate(model.to(torch.bfloat16)),
    "train": lambda model: generate(model.train().eval()),
    "repr": lambda model: torch.tensor(len(repr(model))),
}


@pytest.mark.parametrize("use", some(USES.values(), fast=range(4), ids=USES))
def test_anything_else_wakes_it(base, adapter, run, tmp_path, use):
    make(base, tmp_path / "other", seed=2)
    bare = use(load(base, adapter))
    run(ask, base, adapter)
    for _ in range(2):
        served, counts = run(lambda: use(load(base, adapter)))
        assert torch.equal(served, bare)
        assert (counts.model_loads, sum(counts.uncacheable.values())) == (1, 0)


def test_the_base_is_adapted_in_its_place(base, adapter, run):
    """Whoever holds the base has the adapter in it; before it came, the base was itself."""

    def script():
        model = AutoModelForCausalLM.from_pretrained(base)
        alone = generate(model)
        adapted = peft.PeftModel.from_pretrained(model, adapter)
        same = adapted.get_base_model() is model
        return alone, generate(model), generate(adapted), torch.tensor([same, hasattr(model, "peft_config")])

    bare = script()
    assert not torch.equal(bare[0], bare[1])
    for _ in range(3):
        served, _ = run(script)
        assert all(map(torch.equal, served, bare))


@pytest.mark.campaign
def test_held_by_its_base_only(base, adapter, run):
    def script():
        model = AutoModelForCausalLM.from_pretrained(base)
        peft.PeftModel.from_pretrained(model, adapter)
        return generate(model)

    bare = script()
    run(ask, base, adapter)
    for _ in range(2):
        assert torch.equal(run(script)[0], bare)


def test_an_adapter_that_is_gone_when_it_wakes(base, adapter, run):
    """Then the base alone is never taken for the adapted model."""
    run(ask, base, adapter)

    def script():
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.PeftModel.from_pretrained(model, adapter)
        assert lazy.is_asleep(adapted)
        shutil.rmtree(adapter)
        for one in (adapted, model, adapted, model):
            with pytest.raises(Exception, match="adapter"):
                generate(one, 1)

    run(script)


def test_woken_in_inference_mode_it_can_be_trained(base, adapter, run):
    run(ask, base, adapter)

    def script():
        model = load(base, adapter)
        with torch.inference_mode():
            generate(model, 1)
        assert not any(parameter.is_inference() for parameter in model.parameters())

    run(script)


@pytest.mark.campaign
def test_auto_class_of_peft(base, adapter, run):
    def script():
        return generate(peft.AutoPeftModelForCausalLM.from_pretrained(adapter))

    bare = script()
    for loads in (1, 0):
        served, counts = run(script)
        assert torch.equal(served, bare)
        assert counts.model_loads == loads


@pytest.mark.campaign
def test_policies(base, adapter, run):
    bare = ask(base, adapter)
    for policy, loads, hits in (("read_only", 1, 0), ("use", 1, 0), ("read_only", 0, 4), ("refresh", 1, 0), ("off", 0, 0)):
        served, counts = run(lambda: ask(base, adapter), policy=policy)
        assert torch.equal(served, bare)
        assert (counts.model_loads, counts.hits) == (loads, hits), policy


# --- draws ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("already", [0, 1, 623, 624])
@pytest.mark.parametrize("count", [0, 1, 623, 624, 625, 1248, 5000])
def test_draws_are_counted_and_skipped(already, count):
    torch.manual_seed(3)
    torch.empty(already).uniform_()
    before = torch.get_rng_state()
    torch.empty(count).uniform_()
    after = torch.get_rng_state()
    assert count_draws(before, after) == count
    torch.set_rng_state(before)
    skip_draws([count, []])
    assert torch.equal(torch.get_rng_state(), after)


def test_other_changes_of_a_generator_are_no_draws(monkeypatch):
    monkeypatch.setattr("evalcache.integrations.draws._MOST_DRAWS", 100_000)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.randn(1)  # draws two words and keeps half of what it made
    assert count_draws(before, torch.get_rng_state()) is None
    torch.manual_seed(4)
    assert count_draws(before, torch.get_rng_state()) is None


# --- a smaller vocabulary, as lm_eval makes it before it adds an adapter --------------------------------------------------------


def cut(base, adapter=None, rows=101, use=lambda embeddings: None, **more):
    model = AutoModelForCausalLM.from_pretrained(base)
    use(model.resize_token_embeddings(rows, **more))
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return generate(model.eval())


@pytest.mark.parametrize("adapted", some([True, False], fast=[0]))
@pytest.mark.parametrize("architecture", some(["qwen2", "llama"], fast=[0]))
def test_a_smaller_vocabulary_sleeps(run, tmp_path, architecture, adapted, monkeypatch):
    monkeypatch.setattr("evalcache.filememo.SETTLED_NS", 0)
    base = tmp_path / "model"
    tiny.build(architecture).save_pretrained(base)
    adapter = make(base, tmp_path / "adapter") if adapted else None

    def script():
        torch.manual_seed(7)
        return cut(base, adapter), torch.rand(3)

    bare = script()
    for loads in (1, 0):
        with Opened(base / "model.safetensors") as opened:
            served, counts = run(script)
            assert bool(opened.files()) is bool(loads)
        assert all(map(torch.equal, served, bare))
        assert (counts.model_loads, counts.hits, sum(counts.uncacheable.values())) == (loads, 4 - 4 * loads, 0)
    # Another size is another model, and the whole one is, too.
    for rows in (100, 128):
        bare = cut(base, adapter, rows)
        for _ in range(2):
            assert torch.equal(run(cut, base, adapter, rows)[0], bare)


@pytest.mark.parametrize("more", some([{}, {"mean_resizing": False}], fast=[0]))
def test_a_larger_vocabulary_is_made_each_time(base, run, more):
    """Its new rows are drawn."""

    def script(seed):
        torch.manual_seed(seed)
        return cut(base, rows=140, **more), torch.rand(3)

    for seed in (1, 2):
        bare = script(seed)
        served, counts = run(script, seed)
        assert all(map(torch.equal, served, bare))
        assert counts.model_loads == 1


@pytest.mark.campaign
def test_whoever_uses_the_embeddings_wakes_the_model(base, run):
    def negate(embeddings):
        assert isinstance(embeddings, torch.nn.Embedding)
        with torch.no_grad():
            embeddings.weight.neg_()

    run(cut, base)
    bare = cut(base, use=negate)
    for hits in (0, 4):
        served, counts = run(lambda: cut(base, use=negate))
        assert torch.equal(served, bare)
        assert (counts.model_loads, counts.hits) == (1, hits)


def test_a_miss_after_a_cut(base, adapter, run):
    def script(seed):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(101)
        assert model.config.vocab_size == 101
        model = peft.PeftModel.from_pretrained(model, adapter)
        out = generate(model, seed)
        assert model.config.vocab_size == 101
        return out

    run(script, 0)
    bare = script(1)
    served, counts = run(script, 1)
    assert torch.equal(served, bare)
    assert (counts.model_loads, counts.misses, sum(counts.uncacheable.values())) == (1, 4, 0)
    assert run(script, 1)[1].model_loads == 0


# --- adapters that transformers puts in, and quantisers ------------------------------------------------------------------------


def ask_folder(folder, seed=0, **more):
    return generate(AutoModelForCausalLM.from_pretrained(folder, **more), seed)


def alone(base, adapter):
    return adapter


def beside(base, adapter):
    """The adapter's files beside the model's."""
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, base)
    return base


@pytest.mark.parametrize("place", some([alone, beside], fast=[0], ids=["alone", "beside"]))
def test_a_folder_with_an_adapter_sleeps(base, adapter, run, place, monkeypatch):
    monkeypatch.setattr("evalcache.filememo.SETTLED_NS", 0)
    plain = ask_folder(base)
    folder = place(base, adapter)

    def script(seed=0):
        torch.manual_seed(7)
        return ask_folder(folder, seed), torch.rand(3)

    bare, other = script(), script(1)
    assert not torch.equal(bare[0], plain)
    for loads in (1, 0):
        with Opened(base / "model.safetensors", folder / "adapter_model.safetensors") as opened:
            served, counts = run(script)
            assert bool(opened.files()) is bool(loads)
        assert all(map(torch.equal, served, bare))
        assert (counts.model_loads, counts.hits, sum(counts.uncacheable.values())) == (loads, 4 - 4 * loads, 0)
    woken, counts = run(script, 1)
    assert all(map(torch.equal, woken, other))
    assert (counts.model_loads, counts.misses, sum(counts.uncacheable.values())) == (1, 4, 0)

    # What was edited, or is asked for otherwise, is loaded.
    for edit in (edit_weights, edit_config(lora_alpha=64), edit_base):
        edit(base, folder)
        bare = script()
        for loads in (1, 0):
            served, counts = run(script)
            assert all(map(torch.equal, served, bare)) and counts.model_loads == loads
    (folder / "adapter_config.json").unlink()
    if place is beside:
        assert torch.equal(run(ask_folder, folder)[0], ask_folder(folder))


def test_an_adapter_folder_that_stands_for_the_model(base, adapter, run):
    """It knows of its adapter as the loaded model does, and its base is not it."""
    real = AutoModelForCausalLM.from_pretrained(adapter)

    def script():
        model = AutoModelForCausalLM.from_pretrained(adapter)
        asleep = lazy.is_asleep(model)
        assert model.config.to_dict() == real.config.to_dict() and model.name_or_path == real.name_or_path
        assert model._hf_peft_config_loaded is True and model.active_adapters() == ["default"]
        assert model.peft_config["default"].r == real.peft_config["default"].r
        model.disable_adapters()
        assert torch.equal(generate(model), plain)
        return asleep

    plain = ask_folder(base)
    run(ask_folder, base)
    assert [run(script)[0] for _ in range(2)] == [False, True]
    assert torch.equal(run(ask_folder, base)[0], plain)


def test_a_base_without_all_of_its_weights_is_never_promised(base, adapter, run):
    """What is told after an adapter has come is about the adapter alone."""
    weights = load_file(base / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):
        torch.manual_seed(0)
        bare = ask_folder(adapter)
        torch.manual_seed(0)
        served, counts = run(ask_folder, adapter)
        assert torch.equal(served, bare) and counts.model_loads == 1


def torchao():
    pytest.importorskip("torchao", reason="needs torchao (llm-evalcache[test])")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto(weights):
    pytest.importorskip("optimum.quanto", reason="needs optimum.quanto (llm-evalcache[test])")
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


def bitsandbytes(**more):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (llm-evalcache[test])")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**more)


QUANTISERS = {
    "torchao": torchao,
    "quanto 8": lambda: quanto("int8"),
    "quanto 4": lambda: quanto("int4"),
}


@pytest.mark.parametrize("name", some(QUANTISERS, fast=[0, 1]))  # the other one is compiled when it is first used
def test_quantised_models_sleep(base, run, name, monkeypatch):
    monkeypatch.setattr("evalcache.filememo.SETTLED_NS", 0)
    settings = QUANTISERS[name]()
    real = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)

    def script(seed=0):
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
        if lazy.is_asleep(model):
            assert vars(model.config).keys() == vars(real.config).keys()
            assert vars(model.config.quantization_config) == vars(real.config.quantization_config)
            assert type(model.config.quantization_config) is type(real.config.quantization_config)
            assert (model.dtype, model.device) == (real.dtype, real.device) and lazy.is_asleep(model)
        return generate(model, seed)

    bare, other = script(), script(1)
    for loads in (1, 0):
        with Opened(base / "model.safetensors") as opened:
            served, counts = run(script)
            assert bool(opened.files()) is bool(loads)
        assert torch.equal(served, bare)
        assert (counts.model_loads, counts.hits, sum(counts.uncacheable.values())) == (loads, 4 - 4 * loads, 0)
    woken, counts = run(script, 1)
    assert torch.equal(woken, other)
    assert (counts.model_loads, counts.misses, sum(counts.uncacheable.values())) == (1, 4, 0)


@pytest.mark.campaign
def test_other_settings_of_a_quantiser_are_another_load(base, run):
    given = [{}, *({"quantization_config": make()} for make in QUANTISERS.values())]
    bare = [ask_folder(base, **one) for one in given]
    for loads in (1, 0):
        for one, expected in zip(given, bare, strict=True):
            served, counts = run(lambda one=one: ask_folder(base, **one))
            assert torch.equal(served, expected) and counts.model_loads == loads


def test_bitsandbytes_on_a_cpu_is_loaded_each_time(base, run):
    """Its first forward lays the weights out anew: that call is never stored. The calls after it are."""
    settings = bitsandbytes(load_in_8bit=True)

    def script():
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
        return generate(model), generate(model)

    bare = script()
    for hits in (0, 1):
        served, counts = run(script)
        assert all(map(torch.equal, served, bare))
        assert (counts.model_loads, bool(counts.hits), bool(counts.misses)) == (1, bool(hits), not hits)
        assert counts.uncacheable["changed"]


def test_an_adapter_on_a_quantised_base(base, adapter, run):
    settings = {"quantization_config": quanto("int8")}
    bare = ask(base, adapter, load=settings)
    for loads in (1, 0):
        served, counts = run(lambda: ask(base, adapter, load=settings))
        assert torch.equal(served, bare)
        assert (counts.model_loads, sum(counts.uncacheable.values())) == (loads, 0)


def test_lm_eval_with_an_adapter_reads_no_weights(tmp_path, store_folder, monkeypatch):
    """The harness cuts the vocabulary to its tokenizer's, and then loads the adapter."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (llm-evalcache[lm-eval])")
    from harness_tasks import make_model, make_tasks
    from lm_eval.tasks import TaskManager

    import evalcache
    from evalcache import session as sessions

    monkeypatch.setattr("evalcache.filememo.SETTLED_NS", 0)
    base = make_model(tmp_path / "model")
    adapter = make(base, tmp_path / "adapter")
    manager = TaskManager(include_path=str(make_tasks(tmp_path / "tasks")), include_defaults=False)

    def evaluate():
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={base},peft={adapter},dtype=float32",
            tasks=["tiny_mc", "tiny_gen"],
            task_manager=manager,
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
        )
        return {task: [one["resps"] for one in samples] for task, samples in results["samples"].items()}

    bare = evaluate()
    for loads in (1, 0):
        with Opened(base / "model.safetensors", adapter / "adapter_model.safetensors") as opened:
            with evalcache.enable(store_folder) as session:
                counts = session.cache.counts
                assert evaluate() == bare
            assert bool(opened.files()) is bool(loads)
        sessions._current = None
        assert (counts.model_loads, bool(counts.misses), bool(counts.hits)) == (loads, bool(loads), not loads)
        assert sum(counts.uncacheable.values()) == 0
