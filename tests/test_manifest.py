"""Manifests: a root over everything, differences as a person would say them, and bytes that can be read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build
from torch import nn

from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CanonicalError
from evalcache.manifest import Manifest, ModuleRecord, TensorRecord, group_names
from evalcache.weights import fingerprint


def record(name: str, *tensors: str, **parts: str) -> ModuleRecord:
    owned = {tensor: TensorRecord(digest_bytes(tensor.encode()), "float32", (2, 3), 24) for tensor in tensors}
    about = {kind: digest_bytes(text.encode()) for kind, text in parts.items()}
    return ModuleRecord(digest_bytes(name.encode()), name, owned, about)


@pytest.fixture(scope="module")
def llama() -> Manifest:
    return fingerprint(build("llama"))


def changed(*edit: Any) -> Manifest:
    model = build("llama")
    for one in edit:
        one(model)
    return fingerprint(model)


def add_one(*paths: str) -> Any:
    def edit(model: nn.Module) -> None:
        for path in paths:
            part = model.get_submodule(path) if path in dict(model.named_modules()) else None
            for tensor in [model.get_parameter(path)] if part is None else part.parameters():
                tensor.data += 1

    return edit


def test_differences_are_said_as_a_person_would(llama: Manifest) -> None:
    assert str(llama.diff(changed())) == "no difference"
    assert not llama.diff(changed())
    assert str(llama.diff(changed(add_one("model.layers.1", "model.norm", "lm_head")))) == (
        "layers.1.*, norm, lm_head: 11 of 23 tensors"
    )
    assert str(llama.diff(changed(add_one("model.layers.0", "model.layers.1")))) == "layers.*: 18 of 23 tensors"
    assert str(llama.diff(changed(add_one("model.layers.0.mlp.up_proj.weight")))) == "layers.0.mlp.up_proj: 1 of 23 tensors"
    assert str(llama.diff(changed(add_one("model.layers.0.mlp")))) == "layers.0.mlp.*: 3 of 23 tensors"


def test_what_is_no_tensor_is_said_too(llama: Manifest) -> None:
    def epsilon(model: Any) -> None:
        model.model.norm.variance_epsilon = 0.5

    def config(model: Any) -> None:
        model.config.rms_norm_eps = 0.5

    def layer(model: Any) -> None:
        del model.model.layers[1]

    def activation(model: Any) -> None:
        model.model.layers[0].mlp.act_fn = nn.GELU().eval()

    assert str(llama.diff(changed(epsilon))) == "attributes of norm"
    assert str(llama.diff(changed(config))) == "config"
    assert str(llama.diff(changed(layer))) == "layers.1.*: 9 of 23 tensors; removed: layers.1"
    assert "class of layers.0.mlp.act_fn" in str(llama.diff(changed(activation)))


def test_the_order_is_that_of_the_model(llama: Manifest) -> None:
    names = list(dict(build("llama").named_parameters()))
    assert [name for name in llama.tensors if name in set(names)] == sorted(names, key=list(llama.tensors).index)
    assert list(llama.modules) == [name for name, _ in build("llama").named_modules()]


def test_a_subset_is_what_would_have_been_fingerprinted_alone(llama: Manifest) -> None:
    model = build("llama")
    alone = fingerprint(model.model.layers[0].mlp)
    subset = llama.subset("model.layers.0.mlp")
    assert list(subset.modules) == list(alone.modules)
    assert subset.tensors == alone.tensors
    assert {path: subset.modules[path] for path in subset.modules if path} == {
        path: alone.modules[path] for path in alone.modules if path
    }
    assert llama.subset("").modules == llama.modules
    with pytest.raises(KeyError):
        llama.subset("model.layers.7")


def test_modules_that_two_models_share_have_equal_digests(llama: Manifest) -> None:
    other = changed(add_one("lm_head"))
    shared = {path for path in llama.modules if llama.modules[path].digest == other.modules[path].digest}
    assert "model.layers.0" in shared
    assert set(llama.modules) - shared == {"", "lm_head"}


def test_bytes_can_be_read_again(llama: Manifest) -> None:
    again = Manifest.from_bytes(llama.to_bytes())
    assert again == llama
    assert again.root == llama.root
    assert dict(again.about) == dict(llama.about)
    assert list(again.modules) == list(llama.modules)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff\xff", b"\x81\x01", b"\x84\x01\x02\x03\x04"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CanonicalError):
        Manifest.from_bytes(data)


def test_sizes_count_a_tied_tensor_once() -> None:
    root = record("root", "a")
    manifest = Manifest({"": root, "one": record("one", "b"), "two": record("two", "b")})
    assert manifest.size_bytes == 48
    assert set(manifest.tensors) == {"a", "one.b", "two.b"}


def test_the_root_covers_the_configs_and_the_root_module() -> None:
    one = Manifest({"": record("root")}, {"config": digest_bytes(b"1")})
    assert one.root != Manifest({"": record("root")}, {"config": digest_bytes(b"2")}).root
    assert one.root != Manifest({"": record("root")}).root
    assert one.root != Manifest({"": record("other")}, {"config": digest_bytes(b"1")}).root
    assert one.root == Manifest({"": record("root")}, {"config": digest_bytes(b"1")}, {"name": "x"}).root
    assert one == Manifest({"": record("root")}, {"config": digest_bytes(b"1")}, {"name": "x"})


def test_numbered_siblings_are_joined() -> None:
    names = [f"model.layers.{number}.{part}.weight" for number in range(12) for part in ("q", "k")] + ["lm_head.weight"]
    assert group_names([name for name in names if ".3." in name or ".4." in name or ".5." in name], names) == ["layers.3-5.*"]
    assert group_names([name for name in names if name.endswith("q.weight") and ".1" in name], names) == [
        "layers.1.q", "layers.10-11.q"
    ]  # fmt: skip
    assert group_names(["lm_head.weight", "model.layers.7.k.weight"], names) == ["layers.7.k", "lm_head"]
    assert group_names(names, names) == ["model.*", "lm_head"]
    assert group_names(["new.weight"], names) == ["new"]
    assert group_names([], names) == []


paths = st.lists(st.text("ab01.", min_size=1, max_size=5).filter(lambda text: ".." not in text), unique=True, max_size=4)


@settings(max_examples=60, deadline=None)
@given(paths, paths)
def test_a_difference_is_empty_exactly_between_equals(left: list[str], right: list[str]) -> None:
    one = Manifest({"": record("root"), **{path: record(path, "w") for path in left}})
    other = Manifest({"": record("root"), **{path: record(path, "w") for path in right}})
    assert bool(one.diff(other)) == (set(left) != set(right))
    assert set(one.diff(other).tensors) == set(other.diff(one).tensors) == set(one.tensors) ^ set(other.tensors)
    assert Manifest.from_bytes(one.to_bytes()) == one
    assert isinstance(one.root, Digest)


def test_dtype_and_shape_are_told(llama: Manifest) -> None:
    tensor = llama.tensors["lm_head.weight"]
    assert (tensor.dtype, tensor.shape, tensor.size_bytes) == ("float32", (128, 32), 128 * 32 * 4)
    assert fingerprint(build("llama").to(torch.bfloat16)).tensors["lm_head.weight"].dtype == "bfloat16"
