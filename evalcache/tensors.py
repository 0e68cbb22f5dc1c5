"""One tensor → its record: which tensors have bytes that can be read exactly, where, and how.

Plain tensors are hashed as they lie in memory; the subclasses of quantisation libraries through their parts; anything else
raises `FingerprintError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from evalcache.canonical import digest_canonical
from evalcache.errors import FingerprintError
from evalcache.leaf import leaf_digest
from evalcache.manifest import TensorRecord

_SHARDED = frozenset({"DTensor", "ShardedTensor"})
_PARALLEL_FROM_BYTES = 512 << 20  # below, the threads of a busy machine cost more than they bring
_PORTION_BYTES = 32 << 20  # a thread's task; one for every small tensor would cost as much as its hashing
_RECURSED = ("torchao.", "optimum.quanto.")


def hash_tensor(tensor: torch.Tensor) -> TensorRecord:
    """The record of a plain tensor. Cost: one pass; a copy unless it is contiguous and in host memory."""
    dtype = dtype_name(tensor.dtype)
    shape = tuple(tensor.shape)
    return TensorRecord(leaf_digest(dtype, shape, tensor_bytes(tensor)), dtype, shape, tensor.nbytes)


def hash_tensors(tensors: Mapping[int, torch.Tensor]) -> Iterator[tuple[int, TensorRecord]]:
    """The records of readable tensors in host memory, in order; large models in threads, for xxhash releases the GIL.

    Cost: one pass at 20+ GB/s and thread; some 10 µs a tensor.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) < _PARALLEL_FROM_BYTES:
        for key, tensor in tensors.items():
            yield key, hash_tensor(tensor)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(4, cores)) as pool:
        for records in pool.map(_hash_portion, _portions(tensors)):
            yield from records


def _portions(tensors: Mapping[int, torch.Tensor]) -> list[list[tuple[int, torch.Tensor]]]:
    portions: list[list[tuple[int, torch.Tensor]]] = [[]]
    size_bytes = 0
    for item in tensors.items():
        if size_bytes >= _PORTION_BYTES:
            portions.append([])
            size_bytes = 0
        portions[-1].append(item)
        size_bytes += item[1].nbytes
    return portions


def _hash_portion(portion: list[tuple[int, torch.Tensor]]) -> list[tuple[int, TensorRecord]]:
    return [(key, hash_tensor(tensor)) for key, tensor in portion]


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """A tensor's row-major bytes as a uint8 array: a view for contiguous tensors in host memory, else a copy.

    Raises:
        FingerprintError: a sparse, nested or quantised layout has no such bytes.
    """
    if not _is_strided(tensor):
        raise FingerprintError("", f"layout {tensor.layout}, dtype {tensor.dtype} has no row-major bytes")
    tensor = tensor.detach().as_subclass(torch.Tensor)
    tensor = tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """torch's short name of a dtype."""
    return str(dtype).removeprefix("torch.")


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether `hash_tensor` can read a tensor's bytes as they are."""
    return _is_plain(tensor) and not tensor.is_meta and _is_strided(tensor)


def special_record(tensor: torch.Tensor, path: str, record: Callable[[Any], TensorRecord], encode: Callable) -> TensorRecord:
    """The record of a tensor that is not simply readable.

    Args:
        tensor: a parameter, a buffer, or a tensor found elsewhere. path: of the module that holds it, for the error.
        record: of an inner tensor. encode: (value, path) → canonical value, for what a subclass keeps beside its tensors.

    Raises:
        FingerprintError: it is sharded, on the meta device, or of an unknown kind.
    """
    name = type(tensor).__name__
    if name in _SHARDED or type(tensor).__module__.startswith("torch.distributed"):
        raise FingerprintError(path, f"{name}: this process sees one shard only", "sharded")
    if tensor.is_meta:
        raise FingerprintError(path, "a tensor on the meta device has no bytes")
    if not _is_plain(tensor) and hasattr(tensor, "__tensor_flatten__"):
        if not type(tensor).__module__.startswith(_RECURSED):
            raise FingerprintError(path, f"tensor subclass {type(tensor).__module__}.{name} is not known")
        return _flattened(tensor, path, record, encode)
    # The bytes of bitsandbytes' parameters are plain; what else they need (quant_state, SCB) is in the module's saved state.
    if not _is_plain(tensor) and not type(tensor).__module__.startswith("bitsandbytes."):
        raise FingerprintError(path, f"tensor subclass {type(tensor).__module__}.{name} is not known")
    try:
        return hash_tensor(tensor)
    except (FingerprintError, RuntimeError, TypeError) as error:
        problem = error.problem if isinstance(error, FingerprintError) else f"dtype {tensor.dtype} cannot be read: {error}"
        raise FingerprintError(path, problem) from error


def _flattened(tensor: Any, path: str, record: Callable[[Any], TensorRecord], encode: Callable) -> TensorRecord:
    names, context = tensor.__tensor_flatten__()
    inner = [(name, record(getattr(tensor, name))) for name in names]
    parts = [[name, one.digest.value] for name, one in inner]
    about = [type(tensor).__qualname__, str(tensor.dtype), list(tensor.shape)]
    digest = digest_canonical(["subclass", about, parts, encode(context, path)])
    return TensorRecord(digest, dtype_name(tensor.dtype), tuple(tensor.shape), sum(one.size_bytes for _, one in inner))


def owned_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers of a model, shared ones as often as they are owned."""
    for child in module.modules():
        values = child.__dict__
        for kind in ("_parameters", "_buffers"):
            for tensor in values.get(kind, {}).values():  # a compiled program has none: it is refused where it is met
                if tensor is not None:
                    yield tensor


def module_tensors(module: nn.Module, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What one module owns itself, by name; offloaded tensors from the map that accelerate's hook fetches them from.

    Raises:
        FingerprintError: an offloaded tensor is not in that map.
    """
    hook = module.__dict__.get("_hf_hook")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in sorted(module.__dict__[kind].items()):
            if tensor is None:
                continue
            if hook is not None and tensor.is_meta and (weights := _offloaded(hook)) is not None:
                try:
                    tensor = weights[name]
                except KeyError as error:
                    raise FingerprintError(path, f"offloaded tensor {name} is not in the weights map") from error
            yield name, tensor


def _offloaded(hook: Any) -> Any:
    """The map from which an accelerate hook fetches a module's offloaded tensors, if it has one."""
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "weights_map", None) is not None:
            return one.weights_map
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and not hasattr(
        tensor.data if isinstance(tensor, nn.Parameter) else tensor, "__tensor_flatten__"
    )


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
