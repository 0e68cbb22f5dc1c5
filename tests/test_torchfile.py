"""Files of torch.save: read as torch reads them, without torch and without running what is in them."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evalcache.checkpoint import fingerprint_checkpoint
from evalcache.errors import CheckpointError
from evalcache.leaf import leaf_digest
from evalcache.torchfile import read_torch_file


def saved(value: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: str(
            leaf_digest(
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
        )
        for name, tensor in tensors.items()
    }


def fingerprinted(folder: Path, data: bytes) -> dict[str, str]:
    (folder / "f.bin").write_bytes(data)
    return {name: str(record.digest) for name, record in fingerprint_checkpoint(folder / "f.bin").tensors.items()}


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def test_every_dtype_and_layout(tmp_path: Path) -> None:
    bytes_ = torch.arange(96, dtype=torch.uint8)
    tensors = {
        str(dtype)[6:]: (bytes_ % 2 if dtype is torch.bool else bytes_).clone().view(dtype).reshape(2, -1) for dtype in DTYPES
    }
    grid = torch.arange(24.0).reshape(2, 3, 4)
    tensors |= {
        "transposed": grid.transpose(0, 2),
        "part": grid[:, 1:, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "empty_transposed": torch.zeros(3, 0).T,
        "ones": torch.ones(1, 1, 5)[:, :, :1],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    assert fingerprinted(tmp_path, saved(tensors)) == digests(tensors)
    assert fingerprinted(tmp_path, saved(OrderedDict(tensors), pickle_protocol=4)) == digests(tensors)


def test_a_state_dict_with_its_metadata(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert fingerprinted(tmp_path, saved(model.state_dict())) == digests(model.state_dict())


def test_tensors_that_share_memory_lie_in_one_place() -> None:
    whole = torch.arange(6.0)
    data = memoryview(saved({"a": whole, "b": whole, "second": whole[3:]}))
    found = {tensor.name: tensor for tensor in read_torch_file("f", data).tensors}
    assert found["a"].offset == found["b"].offset == found["second"].offset - 12


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.folder),)


def torch_zip(pickled: bytes, **records: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    data = saved({"weight": torch.ones(1), "attack": Attack(tmp_path / "made")})
    with pytest.raises(CheckpointError, match="mkdir"):
        read_torch_file("pytorch_model.bin", memoryview(data))
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Attack(tmp_path / "made")))
    assert (tmp_path / "made").exists()  # it would have worked


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    """The same archive with another pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            target.writestr(member.filename, content)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return buffer.getvalue()


ONE = saved({"weight": torch.arange(100, dtype=torch.float32)})
LIES = {
    "not an archive": (b"PK\x03\x04 and no more", "not a file of torch.save"),
    "before torch 1.6": (saved({"a": torch.ones(1)}, _use_new_zipfile_serialization=False), "not a file of torch.save"),
    "cut": (ONE[:-40], "not a file of torch.save"),
    "an archive of something else": (torch_zip(b"").replace(b"data.pkl", b"data.txt"), "one data.pkl"),
    "compressed": (compressed(saved({"a": torch.zeros(1000)})), "compressed"),
    "a program": (torch_zip(pickle.dumps({}), **{"constants.pkl": b""}), "TorchScript"),
    "other byte order": (torch_zip(pickle.dumps({}), byteorder=b"big"), "byte order"),
    "a list": (saved([torch.ones(1)]), "tensors by name"),
    "a tensor": (saved(torch.ones(1)), "tensors by name"),
    "a training state": (saved({"step": 3, "model": {"a": torch.ones(1)}}), "not a tensor"),
    "names that are numbers": (saved({1: torch.ones(1)}), "not a tensor"),
    "sparse": (saved({"a": torch.ones(2, 2).to_sparse()}), "_get_layout"),
    "expanded": (saved({"a": torch.ones(1).expand(1 << 40)}), "more elements than its storage"),
    "longer than its storage": (edited(ONE, b"Kd\x85", b"Ke\x85"), "past its storage"),
    "storage of another size": (edited(ONE, b"cpuq\x06Kd", b"cpuq\x06Kc"), "another size than declared"),
    "storage that is not there": (edited(ONE, b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"), "not there"),
    "another function": (edited(ONE, b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), "_rebuild_tensor_v9"),
    "no end": (torch_zip(b"\x80\x02}"), "state dict"),
    "no pickle": (torch_zip(b"\xff\xff"), "state dict"),
    "stack that is empty": (torch_zip(b"\x80\x02s."), "state dict"),
    "state of a tensor": (edited(ONE, b"Rq\rs", b"R}bs"), "state"),
    "no tensors": (torch_zip(pickle.dumps({}, protocol=2)), "no tensors"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_state_dict_is_refused(lie: str, tmp_path: Path) -> None:
    data, what = LIES[lie]
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=what) as caught:
        fingerprint_checkpoint(tmp_path)
    assert caught.value.path.endswith("pytorch_model.bin")
    assert caught.value.hint


@given(st.binary(max_size=40))
def test_any_pickle_is_read_or_refused(data: bytes) -> None:
    for pickled in (data, b"\x80\x02" + data, b"\x80\x02}" + data + b"."):
        try:
            assert isinstance(read_torch_file("f", memoryview(torch_zip(pickled))).tensors, list)
        except CheckpointError as error:
            assert error.path == "f"


def test_it_does_not_need_torch(tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(ONE)
    code = (
        "import sys; from evalcache.checkpoint import fingerprint_checkpoint as f;"
        "print(len(f(sys.argv[1]).tensors), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f.bin")], capture_output=True, text=True, check=True)
    assert run.stdout == "1 False\n"
