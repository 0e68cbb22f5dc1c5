"""Tensors in a file of ``torch.save``: where each one lies, without running the pickle in it and without torch.

Such a file is a zip archive of uncompressed storages with a small pickle that says which tensor is which part of which storage. A
pickle is a program; ours is read by an interpreter of the few instructions that describing a state dict takes. It can make
dicts, tuples and records of this file, and calls nothing. Whatever else a file asks for is refused.

Source: torch/serialization.py (``_save``), torch/_utils.py (``_rebuild_tensor_v2``, ``_v3``), Python's pickletools.
"""

from __future__ import annotations

import io
import math
import pickletools
import reprlib
import struct
import zipfile
from typing import Any, NoReturn

from evalcache.errors import CheckpointError
from evalcache.structs import Frozen
from evalcache.tensorfile import HEADER_LIMIT_BYTES, FileContent, StoredTensor

_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_ITEM_BYTES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "bool": 1, "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
}  # fmt: skip
_HINT = "save it again with model.save_pretrained(folder), which writes safetensors"
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class _Name(Frozen):
    module: str
    name: str


class _Storage(Frozen):
    kind: str
    key: str
    elements: int


class _View(Frozen):
    """A tensor: part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


class _Mark:
    """Where a group of values begins on the stack."""


def read_torch_file(path: str, data: memoryview) -> FileContent:
    """The content of a file that ``torch.save(state_dict)`` wrote.

    Tensors that share memory come out as tensors at the same offset.

    Args:
        path: for messages. data: the whole file.

    Raises:
        CheckpointError: it is no such file, or holds something else than tensors by name.
    """
    records = _records(path, data)
    names = [name for name in records if name.endswith("/data.pkl")]
    if len(names) != 1 or names[0].count("/") != 1:
        _refuse(path, "is not a file of torch.save", "one data.pkl", names)
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records:
        _refuse(path, "is a TorchScript program", "a state dict", "constants.pkl")
    order = records.get(f"{prefix}byteorder")
    if order is not None and bytes(data[order[0] : order[0] + order[1]]) != b"little":
        _refuse(path, "was written on a machine with another byte order", "little", bytes(data[order[0] : order[0] + order[1]]))
    offset, size = records[names[0]]
    if size > HEADER_LIMIT_BYTES:
        _refuse(path, "has a table of contents that is too long", f"at most {HEADER_LIMIT_BYTES} bytes", size)
    state = _described(path, bytes(data[offset : offset + size]))
    if type(state) is not dict:
        _refuse(path, "does not hold tensors by name", "a state dict", type(state).__name__)
    tensors = []
    for name, view in state.items():
        if type(name) is not str or type(view) is not _View:
            _refuse(path, f"{name!r} is not a tensor", "a tensor", type(view).__name__)
        tensors.append(_located(path, name, view, records.get(f"{prefix}data/{view.storage.key}")))
    return FileContent(sorted(tensors, key=lambda tensor: tensor.offset), {})


def _records(path: str, data: memoryview) -> dict[str, tuple[int, int]]:
    """Record name → (offset, size) of a zip archive whose records are all stored as they are."""
    try:
        with zipfile.ZipFile(_Window(data)) as archive:
            members = archive.infolist()
    # RuntimeError: an encrypted record, or a kind of archive that zipfile does not read.
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a file of torch.save, or of a torch older than 1.6: {error}",
            hint=_HINT, path=path, expected="a zip archive", found=str(error),
        ) from error  # fmt: skip
    records: dict[str, tuple[int, int]] = {}
    for member in members:
        start = member.header_offset
        if member.filename in records:
            _refuse(path, "holds two records of one name", "unique names", member.filename)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
            _refuse(path, f"record {member.filename} is compressed or encrypted", "plain bytes", member.compress_type)
        if start + _LOCAL_HEADER.size > len(data):
            _refuse(path, f"record {member.filename} lies past the end", len(data), start)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data, start)
        start += _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic != b"PK\x03\x04" or start + member.file_size > len(data):
            _refuse(path, f"record {member.filename} does not lie in the file", len(data), start + member.file_size)
        records[member.filename] = (start, member.file_size)
    return records


class _Window(io.RawIOBase):
    """A file object over bytes in memory that copies only what is read."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if at < 0:
            raise ValueError(f"negative position {at}")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        stop = len(self._data) if size is None or size < 0 else self._at + size
        found = bytes(self._data[self._at : stop])
        self._at += len(found)
        return found


def _located(path: str, name: str, view: _View, record: tuple[int, int] | None) -> StoredTensor:
    if record is None:
        _refuse(path, f"tensor {name!r} names a storage that is not there", "a storage", view.storage.key)
    item = _ITEM_BYTES.get(view.dtype)
    if item is None:
        _refuse(path, f"tensor {name!r} has an unknown dtype", sorted(_ITEM_BYTES), view.dtype)
    offset, stored_bytes = record
    kind = view.storage.kind
    declared = view.storage.elements * (1 if kind == "UntypedStorage" else _ITEM_BYTES[_STORAGES[kind]])
    if declared != stored_bytes:
        _refuse(path, f"the storage of tensor {name!r} has another size than declared", declared, stored_bytes)
    numbers = (view.offset, *view.shape, *view.stride)
    if len(view.shape) != len(view.stride) or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        _refuse(path, f"tensor {name!r} has no proper shape", "sizes and strides from 0 on", (view.shape, view.stride))
    count = math.prod(view.shape)
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True)) if count else -1
    if (last + 1) * item > stored_bytes:
        _refuse(path, f"tensor {name!r} ends past its storage", stored_bytes, (last + 1) * item)
    if count * item > stored_bytes:
        # An expanded tensor, whose elements lie on each other: written out it could be of any size.
        _refuse(path, f"tensor {name!r} has more elements than its storage", stored_bytes, count * item)
    stride = None if _is_row_major(view) else view.stride
    return StoredTensor(name, view.dtype, view.shape, offset + view.offset * item, count * item, stride, item)


def _is_row_major(view: _View) -> bool:
    step = 1
    for size, found in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size > 1 and found != step:
            return math.prod(view.shape) == 0
        step *= size
    return True


def _described(path: str, pickle: bytes) -> Any:
    """What a pickle describes, in terms of dicts, tuples, numbers, text and the records above."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def group() -> list[Any]:
        """The values since the last mark, which are taken off the stack."""
        for at in range(len(stack) - 1, -1, -1):
            if type(stack[at]) is _Mark:
                values = stack[at + 1 :]
                del stack[at:]
                return values
        raise IndexError("no mark")

    def take(count: int) -> tuple[Any, ...]:
        if len(stack) < count:
            raise IndexError("the stack is empty")
        values = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return values

    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(_Mark())
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                    | "BINUNICODE8"
                ):  # fmt: skip
                    stack.append(argument)
                case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(take({"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}[opcode.name]))
                case "TUPLE":
                    stack.append(tuple(group()))
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    (value,) = take(1)
                    stack[-1].append(value)
                case "APPENDS":
                    values = group()
                    stack[-1].extend(values)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    key, value = take(2)
                    stack[-1][key] = value
                case "SETITEMS":
                    values = group()
                    stack[-1].update(zip(values[::2], values[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_Name(*str(argument).split(" ")))
                case "STACK_GLOBAL":
                    stack.append(_Name(*take(2)))
                case "BINPERSID":
                    stack.append(_storage(path, take(1)[0]))
                case "REDUCE":
                    stack.append(_rebuilt(path, *take(2)))
                case "BUILD":
                    # Attributes of an OrderedDict: the version numbers that `state_dict` leaves in `_metadata`.
                    take(1)
                    if type(stack[-1]) is not dict:
                        _refuse(path, "sets the state of an object", "a state dict", type(stack[-1]).__name__)
                case name:
                    _refuse(path, "asks for more than a state dict takes", "tensors by name", name)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} does not describe a state dict: {error}", hint=_HINT, path=path, expected="a state dict", found=str(error)
        ) from error
    _refuse(path, "does not describe a state dict", "an end", "no end")


def _storage(path: str, identity: Any) -> _Storage:
    match identity:
        case ("storage", _Name("torch" | "torch.storage", kind), str(key), str(), int(elements)) if (
            kind in _STORAGES or kind == "UntypedStorage"
        ) and elements >= 0:
            return _Storage(kind, key, elements)
    _refuse(path, "names something else than a storage", "storages of numbers", identity)


def _rebuilt(path: str, function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name("collections", "OrderedDict"), ():
            return {}
        case _Name("torch", "Size"), ((*sizes,),):
            return tuple(sizes)
        case _Name("torch._utils", "_rebuild_parameter"), (_View() as view, _, _):
            return view
        case _Name("torch._utils", "_rebuild_tensor_v2"), (_Storage(kind) as storage, offset, tuple(shape), tuple(stride), _, _):
            if kind in _STORAGES:
                return _View(storage, offset, shape, stride, _STORAGES[kind])
        case (
            _Name("torch._utils", "_rebuild_tensor_v3"),
            (_Storage() as storage, offset, tuple(shape), tuple(stride), _, _, _Name("torch", dtype)),
        ):
            return _View(storage, offset, shape, stride, dtype)
    said = f"{function.module}.{function.name}" if type(function) is _Name else type(function).__name__
    _refuse(path, f"is made by {said}", "plain tensors", said)


def _refuse(path: str, what: str, expected: Any, found: Any) -> NoReturn:
    raise CheckpointError(
        f"{path} {what}: expected {expected}, found {reprlib.repr(found)}",
        hint=_HINT,
        path=path,
        expected=expected,
        found=reprlib.repr(found),
    )
