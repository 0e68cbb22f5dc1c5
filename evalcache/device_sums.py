"""Change detection on a device: one position-weighted 64-bit sum per tensor, made where the tensor lies.

A tensor on a GPU cannot be hashed by xxh3 without a copy to the host, so a check sums its 32-bit words, each times its own
fixed odd random 64-bit weight, modulo 2^64 (multilinear hashing). Words are 32 bits wide under 64-bit weights because with 64-bit
words two flipped sign bits cancel for certain: 2^63·r + 2^63·s = 0 for odd r and s. Here any change of one word is always seen,
and a change of several is missed with probability 2^-32 at most. An XOR (`torch.hash_tensor`) misses permutations and constant
fills.

Cost: reads every byte once; some 24 bytes of traffic a word. One transfer to the host for all tensors of a device.
Source: D. Lemire, O. Kaser, "Strongly universal string hashing is fast", 2014, §3 (multilinear).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

_CHUNK_WORDS = 1 << 22
_MIX = 0x9E3779B97F4A7C15


@functools.lru_cache(maxsize=16)
def _weights(device: torch.device, words: int) -> torch.Tensor:
    """Fixed odd 64-bit weights, equal on every device: drawn on the host from a generator of our own."""
    generator = torch.Generator().manual_seed(_MIX & 0x7FFFFFFF)
    low = torch.randint(-(1 << 62), 1 << 62, (_CHUNK_WORDS,), generator=generator, dtype=torch.int64)[:words]
    return (low * 2 + 1).to(device)


def tensor_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The weighted sum of one tensor's words. Shape: ``() int64`` on the tensor's device."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if rest := -data.numel() % 4:
        data = torch.nn.functional.pad(data, (0, rest))
    words = data.view(torch.int32)
    weights = _weights(words.device, _CHUNK_WORDS)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64)
        part = (chunk * weights[: chunk.numel()]).sum()
        # Horner's rule over chunks with an odd factor: the position of a chunk counts too.
        total = total * (_MIX - (1 << 64)) + part
    return total


def device_sums(tensors: Mapping[int, torch.Tensor]) -> dict[int, int]:
    """The sums of many tensors, fetched with one transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for key, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(key)
    found: dict[int, int] = {}
    for keys in by_device.values():
        sums = torch.stack([tensor_sum(tensors[key]) for key in keys]).tolist()
        found.update(zip(keys, sums, strict=True))
    return found
