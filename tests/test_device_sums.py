"""Sums on a device must see what an XOR does not: permutations, constant fills, two flipped signs, the place of a chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evalcache import device_sums as module
from evalcache.device_sums import device_sums, tensor_sum


def total(tensor: torch.Tensor) -> int:
    return int(tensor_sum(tensor))


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 words, so that small tensors have many."""
    monkeypatch.setattr(module, "_CHUNK_WORDS", 16)
    module._weights.cache_clear()
    yield
    module._weights.cache_clear()


def test_what_an_xor_misses_is_seen() -> None:
    ones = torch.ones(64)
    assert total(ones) != total(ones * 2)
    matrix = torch.arange(64.0).reshape(8, 8)
    assert total(matrix) != total(matrix.flip(0)) != total(matrix.t())
    flipped = torch.ones(64)
    flipped[3] = flipped[40] = -1.0
    assert total(flipped) != total(ones)


@pytest.mark.usefixtures("short_chunks")
def test_the_place_of_a_chunk_counts() -> None:
    words = torch.arange(64, dtype=torch.int32)
    swapped = torch.cat([words[16:32], words[:16], words[32:]])
    assert total(words) != total(swapped)
    assert total(words) != total(words.roll(16))
    last = words.clone()
    last[63] += 1
    assert total(last) != total(words)


@pytest.mark.parametrize("size", range(1, 10))
def test_every_byte_of_an_odd_tail_counts(size: int) -> None:
    data = torch.arange(size, dtype=torch.uint8)
    sums = {total(data)}
    for place in range(size):
        changed = data.clone()
        changed[place] ^= 0x80
        sums.add(total(changed))
    assert len(sums) == size + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64, torch.float16])
def test_every_dtype_and_layout_is_read(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    wide = torch.empty(3, 8, dtype=dtype)[:, ::2].copy_(tensor)
    assert total(tensor) == total(wide)
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[5 if dtype != torch.complex64 else 8] ^= 1
    assert total(changed) != total(tensor)


def test_lazily_conjugated_and_negated_tensors_are_what_they_show() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 1j])
    assert total(tensor.conj()) == total(tensor.conj().resolve_conj()) != total(tensor)
    assert total(tensor.conj().imag) == total(tensor.conj().imag.clone())


def test_empty_tensors_and_scalars_have_sums() -> None:
    assert total(torch.zeros(0)) == 0
    assert total(torch.tensor(1.0)) != total(torch.tensor(2.0))


def test_many_tensors_are_fetched_at_once() -> None:
    tensors = {number: torch.full((3,), float(number)) for number in range(5)}
    assert device_sums(tensors) == {number: total(tensor) for number, tensor in tensors.items()}
    assert device_sums({}) == {}


def test_the_weights_are_odd_and_the_same_in_every_process() -> None:
    weights = module._weights(torch.device("cpu"), module._CHUNK_WORDS)
    assert bool((weights % 2 != 0).all())
    assert weights[:3].tolist() == FIRST_WEIGHTS


FIRST_WEIGHTS = [-4080018525897299063, 2527110411064538081, -1175372596400747997]

words = st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(words, st.data())
def test_any_change_of_one_word_is_seen(values: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(values) - 1))
    value = data.draw(st.integers(-(1 << 31), (1 << 31) - 1).filter(lambda one: one != values[place]))
    changed = [*values[:place], value, *values[place + 1 :]]
    assert total(torch.tensor(values, dtype=torch.int32)) != total(torch.tensor(changed, dtype=torch.int32))


@settings(max_examples=150, deadline=None)
@given(words, st.randoms(use_true_random=False))
def test_any_other_order_is_seen(values: list[int], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    same = total(torch.tensor(values, dtype=torch.int32)) == total(torch.tensor(shuffled, dtype=torch.int32))
    assert same == (shuffled == values)


@settings(max_examples=100, deadline=None)
@given(words, words)
def test_different_words_have_different_sums(left: list[int], right: list[int]) -> None:
    size = min(len(left), len(right))
    one, other = torch.tensor(left[:size], dtype=torch.int32), torch.tensor(right[:size], dtype=torch.int32)
    assert (total(one) == total(other)) == bool((one == other).all())
