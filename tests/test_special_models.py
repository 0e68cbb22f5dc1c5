"""Models that libraries have changed: adapted, quantised, offloaded, dispatched, sharded. The FACTS of each, on real objects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import build, prompts
from torch import nn

from evalcache.errors import FingerprintError
from evalcache.weights import Fingerprinter, fingerprint, unwrap

TARGETS = ["q_proj", "down_proj"]


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts(2, 8)).logits


def adapted(config: Any = None, seed: int = 0) -> Any:
    """An adapted llama whose adapter does something."""
    torch.manual_seed(seed)
    model = get_peft_model(build("llama"), config or LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.1)).eval()
    fill(model)
    return model


def fill(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_")):
            nn.init.normal_(parameter, std=0.3)


def reason(model: Any) -> str:
    with pytest.raises(FingerprintError) as refused:
        fingerprint(model)
    return refused.value.reason


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=TARGETS),
        LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
        LoraConfig(r=2, target_modules=["embed_tokens"]),
        IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules=TARGETS),
        LoKrConfig(r=2, target_modules=TARGETS),
    ],
    ids=["lora", "dora", "embedding", "ia3", "loha", "lokr"],
)
def test_a_disabled_adapter_is_the_base_model(config: Any) -> None:
    base = fingerprint(build("llama"))
    model = adapted(config)
    checks = Fingerprinter(model)
    acting, said = checks.manifest(), answer(model)
    assert acting.root != base.root
    with model.disable_adapter():
        assert not torch.equal(answer(model), said)
        off = checks.manifest()
        assert off.root == base.root
        assert off.modules == base.modules
        assert fingerprint(unwrap(model)).root == base.root
    assert checks.manifest().root == acting.root
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.view(-1)[0] += 1
    assert checks.manifest().root != acting.root


def test_everything_of_an_acting_adapter_counts_except_its_name() -> None:
    model = adapted(seed=1)
    checks = Fingerprinter(model)
    before = checks.manifest().root
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    assert checks.manifest().root != before
    layer.scaling["default"] /= 2
    assert checks.manifest().root == before
    layer.fan_in_fan_out = True
    assert checks.manifest().root != before
    layer.fan_in_fan_out = False
    torch.manual_seed(1)
    named = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.1), adapter_name="mine").eval()
    fill(named)
    assert torch.equal(answer(named), answer(model))
    assert fingerprint(named).root == before


def test_adapters_of_one_model_are_told_apart() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    fill(model)
    checks = Fingerprinter(model)
    roots = [checks.manifest().root]
    model.set_adapter("other")
    model.eval()
    roots.append(checks.manifest().root)
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        model.eval()
        roots.append(checks.manifest().root)
    assert len({*roots}) == 4
    model.set_adapter("default")
    assert checks.manifest().root == roots[0]
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["other"].weight.data += 1
    assert checks.manifest().root == roots[0], "it does not act"


def test_a_merged_adapter_lies_in_the_weights() -> None:
    base, model = fingerprint(build("llama")).root, adapted()
    checks = Fingerprinter(model)
    before = checks.manifest().root
    model.merge_adapter()
    merged = checks.manifest()
    assert merged.root not in (before, base)
    plain = build("llama")
    plain.load_state_dict({
        name.replace(".base_layer", ""): value
        for name, value in model.base_model.model.state_dict().items()
        if "lora_" not in name
    })  # fmt: skip
    assert fingerprint(plain).root == merged.root
    model.base_model.disable_adapter_layers()
    assert reason(model) == "unsupported"  # the next forward unmerges
    model.base_model.enable_adapter_layers()
    assert fingerprint(model.merge_and_unload().eval()).root == merged.root


def test_unknown_kinds_of_adapters_are_refused() -> None:
    assert reason(get_peft_model(build("llama"), VeraConfig(r=2, target_modules=["q_proj"])).eval()) == "unsupported"
    activated = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    assert reason(get_peft_model(build("llama"), activated).eval()) == "unsupported"


def test_modules_kept_beside_the_originals_count() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    checks = Fingerprinter(model)
    before = checks.manifest().root
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    after = checks.manifest().root
    assert after != before
    with model.disable_adapter():
        assert checks.manifest().root not in (before, after)


@pytest.mark.parametrize(
    "config",
    [kind(task_type="CAUSAL_LM", num_virtual_tokens=3) for kind in (PromptTuningConfig, PrefixTuningConfig)],
    ids=["prompt", "prefix"],
)
def test_prompt_learning_counts_although_it_lies_outside_the_layers(config: Any) -> None:
    roots = set()
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(build("llama"), config).eval()
        assert unwrap(model) is model
        roots.add(fingerprint(model).root)
    assert len(roots) == 2
    checks = Fingerprinter(model)
    before = checks.manifest().root
    with model.disable_adapter():
        assert unwrap(model) is model.base_model
        assert checks.manifest().root == fingerprint(build("llama")).root
    assert checks.manifest().root == before
    model.active_peft_config.num_virtual_tokens = 2
    assert checks.manifest().root != before


def test_patches_and_hooks_of_the_peft_model_itself_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    handle = model.base_model.register_forward_hook(lambda module, args, output: None)
    assert reason(model) == "hook"
    handle.remove()
    original = PeftModel.forward
    monkeypatch.setattr(PeftModel, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    assert reason(model) == "patched"
    monkeypatch.undo()
    layer = type(model.base_model.model.model.layers[0].self_attn.q_proj)
    monkeypatch.setattr(layer, "forward", lambda self, x: x)
    assert reason(model) == "patched"
    with model.disable_adapter():
        assert reason(model) == "patched"


# --- quantisation -----------------------------------------------------------------------------------------------------


def test_torchao() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised() -> Any:
        model = build("llama")
        quantize_(model, Int8WeightOnlyConfig())
        return model

    model = quantised()
    checks = Fingerprinter(model)
    before = checks.manifest()
    assert before.root == fingerprint(quantised()).root != fingerprint(build("llama")).root
    said = answer(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    names = [name for name in weight.__tensor_flatten__()[0] if "scale" in name]
    getattr(weight, names[0]).mul_(2)
    assert not torch.equal(answer(model), said)
    assert before.diff(checks.manifest()).tensors == ("model.layers.0.mlp.up_proj.weight",)


def test_quanto() -> None:
    from optimum.quanto import freeze, qint8, quantize

    model = build("llama")
    quantize(model, weights=qint8)
    freeze(model)
    model.eval()
    checks = Fingerprinter(model)
    before, said = checks.manifest().root, answer(model)
    assert before != fingerprint(build("llama")).root
    weight = model.model.layers[0].mlp.up_proj.weight
    weight._scale.mul_(2)
    assert not torch.equal(answer(model), said)
    assert checks.manifest().root != before


def test_bitsandbytes_eight_bits() -> None:
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 64, bias=False).state_dict())
    model = nn.Sequential(layer.to("cpu")).eval()
    checks = Fingerprinter(model)
    before = checks.manifest().root
    assert checks.manifest().root == before
    layer.weight.data[0, 0] += 1
    assert checks.manifest().root != before
    layer.weight.data[0, 0] -= 1
    assert checks.manifest().root == before
    if layer.weight.SCB is not None:
        layer.weight.SCB[0] += 1
        assert checks.manifest().root != before


def test_bitsandbytes_four_bits_with_their_quantisation_state() -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 64, bias=False).state_dict())
    model = nn.Sequential(layer.to("cpu")).eval()
    assert layer.weight.quant_state is not None
    x = torch.ones(1, 64)
    checks = Fingerprinter(model)
    checks.manifest()
    said = model(x)  # the first forward on a CPU may choose a layout, and round the scales for it
    before = checks.manifest().root
    assert torch.equal(model(x), said)
    assert checks.manifest().root == before
    layer.weight.quant_state.absmax[0] *= 2
    assert not torch.equal(model(x), said)
    assert checks.manifest().root != before


def test_a_check_leaves_four_bits_in_the_layout_that_their_forward_chose(tmp_path: Path) -> None:
    """A CPU with AVX512 reads another layout than the one that is saved; going to and fro rounds, and is another model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    first, said = answer(model), answer(model)
    checks = Fingerprinter(model)
    before = checks.manifest().root
    for _ in range(2):
        assert torch.equal(answer(model), said) and torch.equal(said, first)
        assert checks.manifest().root == before


# --- placement --------------------------------------------------------------------------------------------------------


def test_offloaded_and_dispatched_models_are_the_same_model(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    before = fingerprint(build("llama"))
    offloaded = cpu_offload(build("llama"), execution_device="cpu")
    assert next(offloaded.parameters()).is_meta
    assert fingerprint(offloaded).root == before.root
    on_disk = disk_offload(build("llama"), str(tmp_path), execution_device="cpu")
    assert fingerprint(on_disk).root == before.root
    dispatched = dispatch_model(build("llama"), {"model": "cpu", "lm_head": "disk"}, offload_dir=str(tmp_path / "other"))
    assert fingerprint(dispatched).root == before.root
    assert torch.equal(answer(dispatched), answer(build("llama")))
    checks = Fingerprinter(offloaded)
    checks.manifest()
    offloaded.model.norm._hf_hook.weights_map["weight"][0] += 1
    assert before.diff(checks.manifest()).tensors == ("model.norm.weight",)


def test_a_method_patched_before_accelerate_came_is_refused() -> None:
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    model = build("llama")
    model.model.norm.forward = lambda x: x
    add_hook_to_module(model.model.norm, AlignDevicesHook(execution_device="cpu"))
    assert reason(model) == "patched"

    class Mine(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 2

    model = build("llama")
    add_hook_to_module(model.model.norm, Mine())
    assert reason(model) == "hook"


def test_shards_are_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(2, 2)).eval()
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
        assert reason(model) == "sharded"
        assert reason(fully_shard(nn.Sequential(nn.Linear(2, 2)), mesh=mesh).eval()) == "sharded"
    finally:
        dist.destroy_process_group()
        os.environ.pop("MASTER_ADDR", None)


def test_parametrised_weights_count_with_what_makes_them() -> None:
    from torch.nn.utils.parametrizations import weight_norm
    from torch.nn.utils.parametrize import register_parametrization

    class Double(nn.Module):
        by = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.by

    model = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)).eval()
    before = fingerprint(model).root
    register_parametrization(model[1], "weight", Double())
    model.eval()
    checks = Fingerprinter(model)
    doubled = checks.manifest().root
    assert doubled != before
    Double.by = 3.0
    assert checks.manifest().root not in (doubled, before)
