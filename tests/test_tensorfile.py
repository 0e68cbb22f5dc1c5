"""Safetensors headers: what the reference implementation writes is read alike, and every way to lie is refused by name.

Source of the lies: https://github.com/huggingface/safetensors/tree/main/attacks
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from evalcache.errors import CheckpointError
from evalcache.tensorfile import DTYPES, HEADER_LIMIT_BYTES, parse_json, read_safetensors


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from its parts; ``length`` is what it claims about its header."""
    text = header if type(header) is bytes else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = packed({"__metadata__": {"format": "pt"}, "b": entry(8, 16), "a": entry(0, 8)}, bytes(16))


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    start = len(GOOD) - 16
    found = [(t.name, t.dtype, t.shape, t.offset - start, t.size_bytes) for t in read_safetensors("f", memoryview(GOOD)).tensors]
    assert found == [("a", "float32", (2,), 0, 8), ("b", "float32", (2,), 8, 8)]


LIES = {
    "empty file": (b"", "too short"),
    "cut in its length": (GOOD[:7], "too short"),
    "cut in its header": (GOOD[:40], "past the file"),
    "cut in its tensors": (GOOD[:-1], "end past the file"),
    "bytes behind the last tensor": (GOOD + b"x", "after its last tensor"),
    "header of exabytes": (packed(b"{}", length=2**64 - 1), "too long"),
    "header over the limit": (packed(b"{}", length=HEADER_LIMIT_BYTES + 1), "too long"),
    "header of no bytes": (packed(b""), "not JSON"),
    "header that begins with a space": (packed(b" {}"), "brace"),
    "header that is a list": (packed([1]), "not a JSON object"),
    "header that is not UTF-8": (packed(b'{"\xff": 1}'), "not JSON"),
    "header nested without end": (packed(b'{"a":' * 100_000), "not JSON"),
    "metadata that is no text": (packed({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is a list": (packed({"__metadata__": []}), "__metadata__"),
    "a name twice": (packed(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "twice"),
    "a field twice": (packed(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "twice"),
    "an entry that is no map": (packed({"a": 1}), "three fields"),
    "a field too many": (packed({"a": entry() | {"more": 1}}, bytes(8)), "three fields"),
    "a field too few": (packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "three fields"),
    "unknown dtype": (packed({"a": entry(dtype="F33")}, bytes(8)), "unknown dtype"),
    "dtype that is no text": (packed({"a": entry(dtype=["F32"])}, bytes(8)), "unknown dtype"),
    "negative size": (packed({"a": entry(shape=[-1, -2])}, bytes(8)), "list of sizes"),
    "fractional size": (packed({"a": entry(shape=[2.0])}, bytes(8)), "list of sizes"),
    "truth as a size": (packed({"a": entry(0, 4, shape=[True])}, bytes(4)), "list of sizes"),
    "shape that is a number": (packed({"a": entry(shape=2)}, bytes(8)), "list of sizes"),
    "size over 63 bits beside a zero": (packed({"a": entry(0, 0, shape=[0, 2**63])}), "list of sizes"),
    "shape whose product wraps to the size": (packed({"a": entry(shape=[2**62 + 1, 4])}, bytes(8)), "another size"),
    "offsets in reverse": (packed({"a": entry(8, 0)}, bytes(8)), "another size"),
    "negative offset": (packed({"a": entry(-8, 0)}, bytes(8)), "two positions"),
    "fractional offset": (packed({"a": entry(0.0, 8)}, bytes(8)), "two positions"),
    "truth as an offset": (packed({"a": entry(False, 8)}, bytes(8)), "two positions"),
    "three offsets": (packed({"a": entry() | {"data_offsets": [0, 8, 16]}}, bytes(16)), "two positions"),
    "larger than its shape": (packed({"a": entry(0, 9)}, bytes(9)), "another size"),
    "two tensors in one place": (packed({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "two tensors that overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "a hole at the beginning": (packed({"a": entry(8, 16)}, bytes(16)), "hole"),
    "a hole between": (packed({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "hole"),
    "a tensor past the end": (packed({"a": entry(0, 8), "b": entry(8, 16)}, bytes(12)), "end past the file"),
    "half a byte": (packed({"a": entry(0, 1, dtype="F4", shape=[1])}, bytes(1)), "another size"),
    "half a byte in each row": (packed({"a": entry(0, 1, dtype="F4", shape=[2, 1])}, bytes(1)), "odd row"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str) -> None:
    data, what = LIES[lie]
    with pytest.raises(CheckpointError, match=what) as caught:
        read_safetensors("model.safetensors", memoryview(data))
    assert caught.value.path == "model.safetensors"
    assert caught.value.hint
    assert {"expected", "found"} <= set(caught.value.fields)
    assert len(str(caught.value)) < 1000


TORCH = [getattr(torch, name) for name, _ in DTYPES.values() if hasattr(torch, name)]
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@given(
    st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(TORCH), SHAPES))
)
def test_what_the_reference_writes_is_read_alike(described: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {}
    for name, (dtype, shape) in described.items():
        shape = shape or [1] if dtype == torch.float4_e2m1fn_x2 else shape  # two to a byte: a scalar cannot be written
        ones = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.uint8) % 2
        tensors[name] = ones.view(dtype).reshape(shape)
    data = memoryview(save(tensors))
    found = read_safetensors("f", data).tensors
    assert {t.name: (f"torch.{t.dtype}", t.shape) for t in found} == {
        n: (str(t.dtype), tuple(t.shape)) for n, t in tensors.items()
    }
    for tensor in found:
        stored = bytes(data[tensor.offset : tensor.offset + tensor.size_bytes])
        assert stored == tensors[tensor.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, packed(data)):
        try:
            assert isinstance(read_safetensors("f", memoryview(text)).tensors, list)
        except CheckpointError as error:
            assert error.path == "f"


def test_json_is_read_as_transformers_reads_it() -> None:
    assert parse_json("f", b'{"a": 1, "a": 2, "b": Infinity}') == {"a": 2, "b": math.inf}
