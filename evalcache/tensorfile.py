"""Tensors in a safetensors file: where each one lies, from a header that is believed in nothing.

The format: 8 bytes little-endian length, a JSON header of that length, then the tensors' bytes, which must cover the rest of
the file without holes or overlaps. A header that breaks a rule is refused with the rule and the offending values, because
readers that disagree about such a file would load different weights from the same bytes.

Source: https://github.com/huggingface/safetensors/blob/main/README.md#format, and its ``attacks/``.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from evalcache.errors import CheckpointError
from evalcache.structs import Frozen

HEADER_LIMIT_BYTES = 100_000_000
"""Longest header, as in the reference reader."""

_DIMENSION_LIMIT = 1 << 63

# safetensors code → (torch's short name, bits). F4 is two to a byte, which torch counts as one element.
DTYPES = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "U16": ("uint16", 16), "I16": ("int16", 16),
    "U32": ("uint32", 32), "I32": ("int32", 32), "U64": ("uint64", 64), "I64": ("int64", 64),
    "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F32": ("float32", 32), "F64": ("float64", 64), "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8), "F8_E8M0": ("float8_e8m0fnu", 8), "F4": ("float4_e2m1fn_x2", 4),
}  # fmt: skip


class StoredTensor(Frozen):
    """One tensor in a file.

    Args:
        name: full dotted name.
        dtype: torch's short name. shape: as torch has it.
        offset: of its first byte in the file. size_bytes: of its elements, row-major.
        stride: distance between neighbours along each dimension in elements, where the elements do not lie row-major.
        item_bytes: of one element; used with ``stride`` only.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    stride: tuple[int, ...] | None = None
    item_bytes: int = 1


class FileContent(Frozen):
    """What is in a file of tensors.

    Args:
        tensors: in the order of their bytes.
        metadata: text by name, without ``format``, which says by which framework the file was written.
    """

    tensors: list[StoredTensor]
    metadata: Mapping[str, str]


def read_safetensors(path: str, data: memoryview) -> FileContent:
    """The content of a safetensors file.

    Args:
        path: for messages. data: the whole file.

    Raises:
        CheckpointError: the file breaks a rule of the format. Fields: ``path``, ``expected``, ``found``.
    """
    if len(data) < 8:
        _refuse(path, "is too short for a safetensors file", "8 bytes or more", len(data))
    length = int.from_bytes(data[:8], "little")
    if length > HEADER_LIMIT_BYTES:
        _refuse(path, "has a header that is too long", f"at most {HEADER_LIMIT_BYTES} bytes", length)
    start = 8 + length
    if start > len(data):
        _refuse(path, "has a header that ends past the file", f"at most {len(data) - 8} bytes", length)
    header = parse_json(path, bytes(data[8:start]), unique=True)
    if data[8:9] != b"{":
        _refuse(path, "has a header that does not begin with a brace", b"{", bytes(data[8:9]))
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(text) is not str for text in metadata.values()):
        _refuse(path, "has __metadata__ that is not text by name", "a map of text", metadata)
    tensors = [_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps another tensor" if tensor.offset < position else "leaves a hole before it"
            _refuse(path, f"tensor {tensor.name!r} {what}", position - start, tensor.offset - start)
        position += tensor.size_bytes
    if position != len(data):
        what = "has tensors that end past the file" if position > len(data) else "has bytes after its last tensor"
        _refuse(path, what, len(data) - start, position - start)
    return FileContent(tensors, {name: text for name, text in metadata.items() if name != "format"})


def _tensor(path: str, name: str, entry: Any, start: int) -> StoredTensor:
    where = f"tensor {name!r}"
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{where} is not described by three fields", ["dtype", "shape", "data_offsets"], entry)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in DTYPES:
        _refuse(path, f"{where} has an unknown dtype", sorted(DTYPES), code, "a newer evalcache may know it")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < _DIMENSION_LIMIT for size in shape):
        _refuse(path, f"{where} has a shape that is not a list of sizes", "integers from 0 on", shape)
    if type(offsets) is not list or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        _refuse(path, f"{where} has offsets that are not two positions", "[begin, end]", offsets)
    begin, end = offsets
    dtype, bits = DTYPES[code]
    size_bits = math.prod(shape) * bits
    if size_bits % 8 or end - begin != size_bits // 8:
        _refuse(path, f"{where} has another size than its dtype and shape", size_bits / 8, end - begin)
    if bits == 4:
        if not shape or shape[-1] % 2:
            _refuse(path, f"{where} packs two to a byte in an odd row", "an even last size", shape)
        shape = [*shape[:-1], shape[-1] // 2]
    return StoredTensor(name, dtype, tuple(shape), start + begin, end - begin)


def parse_json(path: str, text: bytes, *, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON text, as the standard library's reader (and so transformers) understands it.

    Args:
        path: for messages. unique: refuse names that occur twice in one object; else the last one counts.

    Raises:
        CheckpointError: it is not one JSON object. Fields: ``path``, ``expected``, ``found``.
    """
    hook: Callable[[list[tuple[str, Any]]], Mapping[str, Any]] | None = None
    if unique:

        def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = dict(pairs)
            if len(names) != len(pairs):
                twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
                _refuse(path, "names something twice", "unique names", twice)
            return names

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON: {error}", hint="copy or download it again", path=path, expected="JSON", found=str(error)
        ) from error
    if type(found) is not dict:
        _refuse(path, "is not a JSON object", "an object", type(found).__name__)
    return found


def _refuse(path: str, what: str, expected: Any, found: Any, hint: str = "copy or download the file again") -> NoReturn:
    raise CheckpointError(
        f"{path} {what}: expected {expected}, found {reprlib.repr(found)}",
        hint=hint,
        path=path,
        expected=expected,
        found=found,
    )
