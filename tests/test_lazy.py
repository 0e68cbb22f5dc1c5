"""A known checkpoint sleeps until it is needed, and is never taken for another one."""

from __future__ import annotations

import functools
import shutil

import pytest
import tiny
import torch
from served import in_a_run
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedModel

import evalcache.integrations.transformers as floor
from evalcache.integrations import lazy
from evalcache.integrations.seam import Seam


@pytest.fixture
def folder(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path):
    """Runs on one cache folder: see `in_a_run`."""
    return functools.partial(in_a_run, tmp_path / "cache")


def ids(seed=0):
    return torch.randint(3, 100, (4, 8), generator=torch.Generator().manual_seed(seed))


def ask(path, seed=0, **load):
    model = AutoModelForCausalLM.from_pretrained(path, **load)
    return model.generate(
        input_ids=ids(seed), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
    )


def test_second_run_does_not_load(folder, run):
    bare = ask(folder)
    cold, first = run(ask, folder)
    warm, second = run(ask, folder)
    assert torch.equal(cold, bare) and torch.equal(warm, bare)
    assert (first.model_loads, first.misses) == (1, 4)
    assert (second.model_loads, second.hits, second.misses) == (0, 4, 0)


def test_it_is_served_although_peft_is_imported_after_it_was_loaded(folder, run):
    def late(path):
        model = AutoModelForCausalLM.from_pretrained(path)
        cache = Seam.installed.cache
        floor.install(cache)  # as the import of PEFT has it done again
        return model.generate(
            input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
        )

    cold, _ = run(ask, folder)
    warm, counts = run(late, folder)
    assert torch.equal(warm, cold) and (counts.model_loads, counts.hits) == (0, 4)


def test_a_miss_wakes_it(folder, run):
    run(ask, folder)
    bare = ask(folder, 1)
    woken, counts = run(ask, folder, 1)
    assert torch.equal(woken, bare)
    assert (counts.model_loads, counts.misses, sum(counts.uncacheable.values())) == (1, 4, 0)
    assert run(ask, folder, 1)[1].model_loads == 0


@pytest.mark.parametrize("how", ["moved", "sharded", "bin"])
def test_copies_sleep_too(folder, run, tmp_path, how):
    run(ask, folder)
    copy = tmp_path / "elsewhere"
    if how == "moved":
        shutil.move(folder, copy)
    elif how == "sharded":
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(copy, max_shard_size="20KB")
    else:
        shutil.copytree(folder, copy)
        torch.save(LlamaForCausalLM.from_pretrained(folder).state_dict(), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    counts = run(ask, copy)[1]
    assert (counts.model_loads, counts.hits, counts.misses) == (0, 4, 0)


def test_other_weights_are_loaded(folder, run):
    run(ask, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(folder)
    bare = ask(folder)
    served, counts = run(ask, folder)
    assert torch.equal(served, bare)
    assert (counts.model_loads, counts.hits) == (1, 0)


def test_other_load_arguments_are_another_model(folder, run):
    run(ask, folder)
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    out = bare.generate(input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False)

    def script():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.generate(
            input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
        )

    served, counts = run(script)
    assert torch.equal(served, out)
    assert (counts.model_loads, counts.hits) == (1, 0)
    assert run(script)[1].model_loads == 0


def test_asleep_it_answers_as_the_model_would(folder, run):
    run(ask, folder)
    real = LlamaForCausalLM.from_pretrained(folder)

    def script():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert lazy.is_asleep(model)
        assert isinstance(model, nn.Module) and isinstance(model, PreTrainedModel) and isinstance(model, LlamaForCausalLM)
        assert model.__class__ is LlamaForCausalLM
        assert model.device == real.device and model.dtype == real.dtype and model.training is False
        assert model.eval() is model and model.to("cpu") is model
        assert model.config.to_dict() == real.config.to_dict()
        assert model.generation_config.to_dict() == real.generation_config.to_dict()
        assert model.can_generate() and model.main_input_name == "input_ids" and model.base_model_prefix == "model"
        assert lazy.is_asleep(model)
        return model

    assert run(script)[1].model_loads == 0


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: model(input_ids=ids()).logits,
        lambda model: list(model.parameters()),
        lambda model: model.model.layers[0],
        lambda model: model.state_dict(),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model, "anything", 1),
        repr,
    ],
)
def test_anything_else_wakes_it(folder, run, touch):
    run(ask, folder)

    def script():
        model = AutoModelForCausalLM.from_pretrained(folder)
        touch(model)
        assert not lazy.is_asleep(model)

    assert run(script)[1].model_loads == 1


def test_weights_edited_after_waking_are_seen(folder, run):
    run(ask, folder)

    def script():
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        return model.generate(
            input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
        )

    bare = script()
    served, counts = run(script)
    assert torch.equal(served, bare)
    assert counts.hits == 0


def test_config_edited_asleep(folder, run):
    run(ask, folder)

    def script():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.output_attentions = False
        model.config.use_cache = False
        model.config.anything = 3
        out = model.generate(
            input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
        )
        assert model.config.anything == 3
        return out

    bare = script()
    served, counts = run(script)
    assert torch.equal(served, bare)
    assert (counts.hits, counts.model_loads) == (0, 1)


def test_generation_config_set_asleep(folder, run):
    def script():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=2)
        model.generation_config.repetition_penalty = 1.5
        return model.generate(input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long))

    run(ask, folder)
    bare = script()
    for expected_loads in (1, 0):
        served, counts = run(script)
        assert torch.equal(served, bare)
        assert counts.model_loads == expected_loads


def test_class_patched_while_asleep(folder, run, monkeypatch):
    from transformers.models.llama import modeling_llama

    run(ask, folder)
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: -3 * forward(self, x))
    bare = ask(folder)
    served, counts = run(ask, folder)
    assert torch.equal(served, bare)
    assert counts.hits == 0 and counts.uncacheable["patched"] == 4


def test_sampling_asleep_goes_on_as_it_would_have(folder, run):
    def script():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(folder)
        out = model.generate(input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=True)
        return out, torch.rand(4)

    bare = script()
    for loads in (1, 0):
        served, counts = run(script)
        assert torch.equal(served[0], bare[0]) and torch.equal(served[1], bare[1])
        assert counts.model_loads == loads


def test_missing_weights_are_never_promised(folder, run):
    """A head that is made up at random when loading is another model each time."""
    from transformers import AutoModelForSequenceClassification

    def script():
        torch.manual_seed(0)
        return type(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3))

    for _ in range(2):
        assert run(script)[1].model_loads == 1


def test_replaced_file_wakes_as_what_it_is(folder, run):
    """The files are replaced between ``from_pretrained`` and the first miss: what runs is what is keyed."""
    run(ask, folder)
    other = tiny.build("llama", seed=9)
    other.save_pretrained(folder.parent / "other")

    def script():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert lazy.is_asleep(model)
        shutil.copytree(folder.parent / "other", folder, dirs_exist_ok=True)  # as somebody else would, unseen
        return model.generate(
            input_ids=ids(3), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
        )

    served, counts = run(script)
    assert torch.equal(
        served,
        other.generate(input_ids=ids(3), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False),
    )
    assert counts.misses == 4
    assert run(ask, folder, 3)[1].hits == 4


def test_under_an_adapter(folder, run):
    """PEFT keeps the stand-in as its base model: what is fingerprinted is the real one, with its adapters."""
    import peft

    def script():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = peft.get_peft_model(
            base, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
        ).eval()
        return model.generate(
            input_ids=ids(), attention_mask=torch.ones(4, 8, dtype=torch.long), max_new_tokens=5, do_sample=False
        )

    run(ask, folder)
    bare = script()
    for hits in (0, 4):
        served, counts = run(script)
        assert torch.equal(served, bare)
        assert (counts.hits, sum(counts.uncacheable.values())) == (hits, 0)


def test_inside_a_module_of_ones_own(folder, run):
    """A user's module that holds the stand-in is fingerprinted through it."""
    from evalcache.weights import fingerprint

    class Holder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.eval()

        def forward(self, tokens):
            return self.inner(input_ids=tokens).logits

    real = fingerprint(Holder(LlamaForCausalLM.from_pretrained(folder)))
    run(ask, folder)
    held, _ = run(lambda: fingerprint(Holder(AutoModelForCausalLM.from_pretrained(folder))))
    assert held.root == real.root
