"""Leaf: one digest per (dtype, shape, bytes), the same for ever, whatever object holds the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evalcache.leaf import leaf_digest
from evalcache.weights import fingerprint

DTYPES = ["float32", "bfloat16", "float16", "int64", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"]
LEAVES = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4).map(tuple), st.binary(max_size=24))

# Never to be changed: every digest that a store holds rests on them.
GOLDEN = [
    ("float32", (2, 2), bytes(range(16)), "38898a28e33f28ba34e09d68bd66721d"),
    ("bfloat16", (8,), bytes(range(16)), "6f0ba23481c7b153d8da398b8c11723b"),
    ("bool", (), b"\x01", "83fb328bceb3761cf37e5ea1cca87b14"),
    ("float32", (0, 3), b"", "699f0aac22a79e6ba0133c360b0c65ca"),
]


@pytest.mark.parametrize(("dtype", "shape", "data", "expected"), GOLDEN)
def test_golden(dtype: str, shape: tuple[int, ...], data: bytes, expected: str) -> None:
    assert leaf_digest(dtype, shape, data).hex == expected


@given(LEAVES, LEAVES)
def test_two_leaves_are_equal_exactly_when_their_parts_are(one: tuple, other: tuple) -> None:
    assert (leaf_digest(*one) == leaf_digest(*other)) == (one == other)


@given(LEAVES)
def test_every_part_counts(leaf: tuple) -> None:
    dtype, shape, data = leaf
    neighbours = {
        leaf_digest(*leaf),
        leaf_digest(DTYPES[DTYPES.index(dtype) - 1], shape, data),
        leaf_digest(dtype, (*shape, 1), data),
        leaf_digest(dtype, (1, *shape), data) if shape != (1,) * len(shape) else leaf_digest(dtype, (*shape, 2), data),
        leaf_digest(dtype, shape, data + b"\x00"),
        leaf_digest(dtype, shape, b"\x00" + data) if data.strip(b"\x00") else leaf_digest(dtype, shape, data + b"\x01"),
    }
    assert len(neighbours) == 6


@given(LEAVES)
def test_the_kind_of_buffer_and_sequence_does_not_count(leaf: tuple) -> None:
    dtype, shape, data = leaf
    assert leaf_digest(dtype, list(shape), memoryview(bytearray(data))) == leaf_digest(dtype, shape, data)


def test_a_live_tensor_has_the_digest_of_its_bytes() -> None:
    module = torch.nn.Linear(3, 2).eval()
    data = module.weight.detach().numpy().tobytes()
    assert fingerprint(module).tensors["weight"].digest == leaf_digest("float32", (2, 3), data)
