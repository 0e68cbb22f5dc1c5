"""A change of a model's answer must change its root: tensors, attributes, wrappers; and what changes no answer must not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import build, prompts
from torch import nn

from evalcache import tensors
from evalcache.errors import FingerprintError
from evalcache.weights import Fingerprinter, fingerprint, tensor_bytes, unwrap


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model that no test changes for good."""
    return build("llama")


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts(2, 8)).logits


def weight(model: Any) -> torch.Tensor:
    return model.model.layers[1].mlp.up_proj.weight


# --- every change of a tensor or attribute is seen ------------------------------------------------------------------------


def one_ulp(model: Any) -> None:
    with torch.no_grad():
        flat = weight(model).view(-1)
        flat[5] = torch.nextafter(flat[5], torch.tensor(9.0))


def through_data(model: Any) -> None:
    weight(model).data.mul_(1.5)


def through_numpy(model: Any) -> None:
    weight(model).detach().numpy()[0, 0] += 1


def fused_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(**prompts(2, 8)).logits.sum().backward()
    optimizer.step()
    model.zero_grad()


def under_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        weight(model).add_(0.5)


def permuted(model: Any) -> None:
    weight(model).data.copy_(weight(model).data.flip(0))


def twos(model: Any) -> None:
    model.model.norm.weight.data.fill_(2.0)


def minus_zero(model: Any) -> None:
    weight(model).data[0, 0] = -0.0


def nan_payload(model: Any) -> None:
    weight(model).data.view(torch.int32)[0, 0] = 0x7FC00001


def swapped_tensors(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight, mlp.gate_proj.weight = mlp.gate_proj.weight, mlp.up_proj.weight


def swapped_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def rope_frequencies(model: Any) -> None:  # a buffer that is not persistent
    model.model.rotary_emb.inv_freq[1] *= 2


def new_buffer(model: Any) -> None:
    model.model.norm.register_buffer("shift", torch.zeros(1))


def epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.1


def scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def integer_for_float(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1


def negative_zero_attribute(model: Any) -> None:
    model.model.layers[0].self_attn.attention_dropout = -0.0


def activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU().eval()


def activation_function(model: Any) -> None:
    del model.model.layers[0].mlp.act_fn
    model.model.layers[0].mlp.act_fn = torch.nn.functional.gelu


def config_field(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def rope_theta(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 500.0


def untied_and_moved(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)


def half(model: Any) -> None:
    model.to(torch.bfloat16)


def removed_layer(model: Any) -> None:
    del model.model.layers[1]


def replaced_by_identity(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity().eval()


def bias_added(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.zeros(128))


def plain_tensor_attribute(model: Any) -> None:
    model.model.norm.steering = torch.ones(3)


def list_of_modules(model: Any) -> None:
    model.model.norm.others = [nn.Linear(2, 2).eval()]


def other_thread(model: Any) -> None:
    thread = threading.Thread(target=through_data, args=(model,))
    thread.start()
    thread.join()


CHANGES = [
    one_ulp, through_data, through_numpy, fused_step, under_inference_mode, permuted, twos, minus_zero, nan_payload,
    swapped_tensors, swapped_layers, rope_frequencies, new_buffer, epsilon, scaling, integer_for_float,
    negative_zero_attribute, activation, activation_function, config_field, rope_theta, untied_and_moved, half, removed_layer,
    replaced_by_identity, bias_added,
    plain_tensor_attribute, list_of_modules, other_thread,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_by_the_next_check_and_by_a_new_one(change: Callable[[Any], None]) -> None:
    model = build("llama")
    weight(model).data[0, 0] = 0.0
    checks = Fingerprinter(model)
    before = checks.manifest()
    assert checks.manifest().root == before.root
    change(model)
    after = checks.manifest()
    assert after.root != before.root
    assert after.root == fingerprint(model).root
    assert before.diff(after)


def test_a_change_undone_is_the_old_model() -> None:
    model = build("llama")
    checks = Fingerprinter(model)
    before = checks.manifest()
    old, said = weight(model).detach().clone(), answer(model)
    through_data(model)
    assert not torch.equal(answer(model), said)
    assert checks.manifest().root != before.root
    weight(model).data.copy_(old)
    model.config.rms_norm_eps, eps = 0.5, model.config.rms_norm_eps
    assert checks.manifest().root != before.root
    model.config.rms_norm_eps = eps
    assert checks.manifest().root == before.root


def test_a_nan_of_another_payload_is_seen() -> None:
    model = build("llama")
    words = weight(model).data.view(torch.int32)
    words[0, 0] = 0x7FC00000
    before = fingerprint(model).root
    words[0, 0] = 0x7FC00001
    assert fingerprint(model).root != before


def test_tied_weights_are_hashed_once_and_untied_ones_apart() -> None:
    model = build("qwen2")
    before = fingerprint(model)
    assert before.tensors["lm_head.weight"] == before.tensors["model.embed_tokens.weight"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    same_function = fingerprint(model).root
    model.model.embed_tokens.weight.data[5] += 1
    assert fingerprint(model).root not in (before.root, same_function)
    assert before.diff(fingerprint(model)).tensors == ("model.embed_tokens.weight",)


# --- what is no change ------------------------------------------------------------------------------------------------


def test_what_changes_no_answer_changes_no_root(shared: Any) -> None:
    before = fingerprint(shared).root
    shared.requires_grad_(False)
    shared(**prompts(1, 4), output_hidden_states=True, output_attentions=False)  # leaves permanent hooks
    shared.config._name_or_path = "elsewhere"
    shared.generation_config.max_new_tokens = 3
    assert fingerprint(shared).root == before


def test_wrappers_are_looked_through(shared: Any) -> None:
    before = fingerprint(shared)
    compiled = torch.compile(shared, backend="eager")
    parallel = nn.DataParallel(shared).eval()
    assert fingerprint(compiled).root == fingerprint(parallel).root == before.root
    assert unwrap(compiled) is unwrap(parallel) is shared


def test_hooks_and_backends_of_a_wrapper_are_refused(shared: Any) -> None:
    parallel = nn.DataParallel(shared).eval()
    parallel.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(FingerprintError, match="forward_hooks") as refused:
        fingerprint(parallel)
    assert refused.value.reason == "hook"
    compiled = torch.compile(shared, backend=lambda graph, inputs: graph.forward)
    with pytest.raises(FingerprintError, match="backend"):
        fingerprint(compiled)


def test_a_model_compiled_in_place_is_another(shared: Any) -> None:
    before = fingerprint(shared).root
    try:
        shared.compile(backend="eager")
        assert fingerprint(shared).root != before
        shared.compile(backend=lambda graph, inputs: graph.forward)
        with pytest.raises(FingerprintError, match="compiled"):
            fingerprint(shared)
    finally:
        shared._compiled_call_impl = None
    shared.forward = torch.compile(shared.forward, backend="eager")
    assert fingerprint(shared).root != before
    del shared.forward
    assert fingerprint(shared).root == before


def test_our_own_patches_leave_the_root_alone(tmp_path: Any) -> None:
    import evalcache.integrations.transformers as floor
    from evalcache.cache import Cache

    model = build("llama")
    before = fingerprint(model).root
    cache = Cache(tmp_path)
    try:
        assert fingerprint(floor.wrap(model, cache)).root == before
        floor.install(cache)
        assert fingerprint(build("llama")).root == before
    finally:
        floor.uninstall()
        cache.close()


# --- special tensors --------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """One tensor as a buffer; a parameter must be a float."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor)
        self.eval()


def root(tensor: torch.Tensor) -> Any:
    return fingerprint(Holder(tensor)).root


SPECIAL = {
    "bf16": torch.arange(6, dtype=torch.bfloat16),
    "fp8": torch.arange(6).to(torch.float8_e4m3fn),
    "fp8_e5m2": torch.arange(6).to(torch.float8_e5m2),
    "complex": torch.arange(6).to(torch.complex64) * 1j,
    "bool": torch.tensor([True, False, True]),
    "int8": torch.arange(6, dtype=torch.int8),
    "uint16": torch.arange(6, dtype=torch.int32).to(torch.uint16),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tensors_have_a_digest_that_layout_does_not_change(name: str) -> None:
    tensor = SPECIAL[name]
    assert root(tensor) == root(tensor.clone())
    if tensor.numel() > 1:
        spread = torch.stack([tensor.view(torch.uint8).reshape(tensor.numel(), -1)] * 2, dim=1)[:, 0].clone()
        assert spread.numel() == tensor.nbytes
        wide = torch.empty(tensor.numel() * 2, dtype=tensor.dtype)[::2].copy_(tensor)
        assert not wide.is_contiguous()
        assert root(wide) == root(tensor)
        changed = tensor.clone()
        changed.view(torch.uint8)[0] ^= 1
        assert root(changed) != root(tensor)
        assert root(tensor.reshape(1, -1)) != root(tensor)


def test_views_are_hashed_by_what_they_show() -> None:
    assert root(torch.ones(1).expand(5)) == root(torch.ones(5))
    matrix = torch.arange(6.0).reshape(2, 3)
    assert root(matrix.t()) == root(matrix.t().contiguous()) != root(matrix)
    complex_ = torch.tensor([1 + 2j, 3 - 1j])
    assert root(complex_.conj()) == root(complex_.conj().resolve_conj()) != root(complex_)
    assert root(complex_.conj().imag) == root(complex_.conj().imag.resolve_neg())


def test_same_bytes_of_another_dtype_are_another_tensor() -> None:
    floats = torch.ones(4)
    assert root(floats) != root(floats.view(torch.int32))


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])], ids=["sparse", "nested"]
)
def test_layouts_without_row_major_bytes_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(FingerprintError) as refused:
        fingerprint(nn.Sequential(Holder(tensor)).eval())
    assert refused.value.module == "0"


def test_meta_tensors_are_refused_by_name() -> None:
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(FingerprintError, match="meta device") as refused:
        fingerprint(model)
    assert refused.value.module == "model.layers.1.mlp.gate_proj"
    assert refused.value.reason == "unhashable"


def test_unknown_tensor_subclasses_are_refused() -> None:
    class Mine(torch.Tensor):
        pass

    with pytest.raises(FingerprintError, match="Mine is not known"):
        root(torch.ones(3).as_subclass(Mine))


def test_training_mode_is_refused(shared: Any) -> None:
    shared.model.layers[0].mlp.train()
    with pytest.raises(FingerprintError) as refused:
        fingerprint(shared)
    shared.eval()
    assert (refused.value.reason, refused.value.module) == ("training", "model.layers.0.mlp")


# --- the walk ---------------------------------------------------------------------------------------------------------


def test_a_contiguous_tensor_is_read_in_place() -> None:
    tensor = torch.arange(12, dtype=torch.bfloat16)
    view = tensor_bytes(nn.Parameter(tensor))
    assert view.ctypes.data == tensor.data_ptr()
    assert view.nbytes == 24


def test_progress_tells_of_every_byte() -> None:
    torch.manual_seed(0)
    large = nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(4)]).eval()
    seen = []
    with_progress = fingerprint(large, lambda done, total: seen.append((done, total)))
    total = sum(p.nbytes for p in large.parameters())
    assert seen[-1] == (total, total)
    parts = {path: fingerprint(layer).modules[""].tensors for path, layer in large.named_children()}
    assert {path: with_progress.modules[path].tensors for path in parts} == parts


def test_modules_that_hold_each_other_have_an_end() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    model[0].__dict__["neighbours"] = [model, model[1], nn.Linear(1, 1).eval()]
    before = fingerprint(model).root
    assert fingerprint(model).root == before
    model[0].__dict__["neighbours"][2].weight.data += 1
    assert fingerprint(model).root != before
    model.add_module("itself", model)
    with pytest.raises(FingerprintError, match="inside itself"):
        fingerprint(model)


def test_equal_modules_have_equal_digests_wherever_they_stand() -> None:
    layer = build("llama").model.layers[0]
    alone = fingerprint(layer)
    listed = fingerprint(nn.ModuleList([nn.Identity(), layer]).eval())
    assert fingerprint(nn.Sequential(layer).eval()).modules["0"].digest == listed.modules["1"].digest
    assert alone.modules["mlp"].digest == fingerprint(nn.Sequential(layer).eval()).modules["0.mlp"].digest


def test_extra_state_counts() -> None:
    class Extra(nn.Linear):
        note = 1

        def get_extra_state(self) -> Any:
            return {"note": type(self).note}

        def set_extra_state(self, state: Any) -> None: ...

    module = Extra(2, 2).eval()
    before = fingerprint(module).root
    Extra.note = 2
    assert fingerprint(module).root != before


def test_about_says_what_a_person_wants_to_know(shared: Any) -> None:
    about = fingerprint(shared).about
    assert about["class"] == "LlamaForCausalLM"
    assert about["parameters"] == sum(p.numel() for p in shared.parameters())


def test_the_fingerprinter_does_not_keep_the_model_alive() -> None:
    checks = Fingerprinter(nn.Linear(2, 2).eval())
    with pytest.raises(FingerprintError, match="gone"):
        checks.manifest()


def test_threads_and_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    alone = fingerprint(model)
    monkeypatch.setattr(tensors, "_PARALLEL_FROM_BYTES", 0)
    for portion_bytes in (1, 1000, 1 << 20):
        monkeypatch.setattr(tensors, "_PORTION_BYTES", portion_bytes)
        assert fingerprint(model) == alone
