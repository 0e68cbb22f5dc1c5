"""Attributes of a module: plain values by value and type, objects by what they hold, anything unknown refused."""

from __future__ import annotations

import dataclasses
import enum
import functools
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evalcache.errors import FingerprintError
from evalcache.weights import Fingerprinter, fingerprint


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Settings:
    scale: float = 1.0

    def apply(self, x: float) -> float:
        return x * self.scale


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


def scaled(x: Any, by: float = 1.0) -> Any:
    return x * by


def root(value: Any) -> Any:
    module = nn.Identity().eval()
    module.thing = value
    return fingerprint(module).root


DIFFERENT: dict[str, list[Any]] = {
    "numbers": [0, 0.0, -0.0, False, None, 1, 1.0, True, "1", b"1", 1 << 80, -(1 << 80), 1j, float("nan"), float("inf"), 5e-324],
    "sequences": [[], (), {}, set(), [1], (1,), {1}, {"1": 1}, {1: 1}, [[1]], [(1,)], "[1]", ["1"], [1.0], [True]],
    "nested": [{"a": {"b": 1}}, {"a": {"b": 2}}, {"a": [1, {"b": 1}]}, OrderedDict(a=1)],
    "order": [[1, 2], [2, 1], {"a": 1, "b": 2}, {"b": 2, "a": 1}],
    "enums": [Colour.RED, Colour.BLUE, 1, "RED"],
    "arrays": [np.zeros(2), np.zeros((2, 1)), np.zeros(2, np.float32), np.float64(0), np.zeros(2, int), np.array([-0.0, 0.0])],
    "tensors": [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.tensor([0.0, 1.0]), [torch.zeros(2)]],
    "torch": [torch.float32, torch.bfloat16, torch.Size([1]), (1,), torch.contiguous_format],
    "objects": [Settings(), Settings(2.0), Plain(1), Plain(2), Plain(Plain(1)), Plain([1])],
    "functions": [scaled, *[functools.partial(scaled, by=by) for by in (1.0, 2.0)], torch.relu, torch.nn.functional.relu],
    "bound": [Settings().apply, Settings(2.0).apply, Settings.apply],
    "classes": [Settings, Plain, nn.Linear, int, Colour],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_values_are_different(kind: str) -> None:
    values = DIFFERENT[kind]
    assert len({root(value) for value in values}) == len(values)
    assert [root(value) for value in values] == [root(value) for value in values]


def test_a_change_inside_an_object_is_seen() -> None:
    module = nn.Identity().eval()
    module.things = {"list": [1, 2], "object": Plain([1]), "array": np.zeros(2), "tensor": torch.zeros(2)}
    checks = Fingerprinter(module)
    roots = [checks.manifest().root]
    module.things["list"].append(3)
    roots.append(checks.manifest().root)
    module.things["object"].value.append(2)
    roots.append(checks.manifest().root)
    module.things["array"][0] = 1
    roots.append(checks.manifest().root)
    module.things["tensor"].numpy()[1] = 1
    roots.append(checks.manifest().root)
    assert len({*roots}) == 5


def test_equal_values_of_other_memory_are_equal() -> None:
    assert root([1, "a", {"b": (2.0,)}]) == root([1, "a", {"b": (2.0,)}])
    assert root({1, 2, 3}) == root({3, 2, 1})
    assert root(Plain([1])) == root(Plain([1]))


@pytest.mark.parametrize(
    "value",
    [object(), np.array([object()]), iter([1]), (n for n in [1]), memoryview(b"1")],
    ids=["object", "array of objects", "iterator", "generator", "memoryview"],
)
def test_what_has_no_exact_encoding_is_refused(value: Any) -> None:
    with pytest.raises(FingerprintError) as refused:
        fingerprint(nn.Sequential(hold(value)).eval())
    assert refused.value.module == "0"
    assert refused.value.reason in ("unhashable", "code")


def hold(value: Any) -> nn.Module:
    module = nn.Identity()
    module.thing = value
    return module


def test_endless_values_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(FingerprintError, match="inside itself"):
        root(endless)


def test_names_that_shape_nothing_are_left_out() -> None:
    module = nn.Identity().eval()
    before = fingerprint(module).root
    module._is_hf_initialized = True
    module.warnings_issued = {"a": True}
    assert fingerprint(module).root == before
    module.lock = threading.Lock()
    locked = fingerprint(module).root
    module.lock = threading.Lock()
    assert fingerprint(module).root == locked
