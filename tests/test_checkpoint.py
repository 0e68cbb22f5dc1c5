"""Manifests of checkpoint files: the same weights are the same model however they are stored, and every byte counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from evalcache.checkpoint import fingerprint_checkpoint
from evalcache.errors import CheckpointError
from evalcache.filememo import SETTLED_NS, FileMemo, FileStamp
from evalcache.manifest import Manifest
from evalcache.weights import fingerprint

TIED = ("gpt2", "qwen2", "t5", "bart")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama as transformers saves it. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def settled_memo() -> FileMemo:
    """A memo by whose clock every file of this test has settled."""
    return FileMemo(clock_ns=lambda: time.time_ns() + SETTLED_NS)


def as_bin(folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Turns a folder of safetensors into one of torch.save."""
    torch.save(load_file(folder / "model.safetensors") if state is None else state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_leaves_are_those_of_the_live_model(saved: Path) -> None:
    live = {name: record.digest for name, record in fingerprint(build("llama")).tensors.items()}
    stored = fingerprint_checkpoint(saved)
    assert stored.tensors
    assert {name: record.digest for name, record in stored.tensors.items()}.items() <= live.items()
    assert stored.about == {"parameters": build("llama").num_parameters(), "bytes": 4 * build("llama").num_parameters()}


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("other name"))


def resharded(folder: Path) -> Path:
    model = build("llama")
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def converted(folder: Path) -> Path:
    as_bin(folder)
    return folder


def converted_in_shards(folder: Path) -> Path:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(state)}
    for file in set(placed.values()):
        torch.save({name: tensor for name, tensor in state.items() if placed[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def in_another_order(folder: Path) -> Path:
    state = load_file(folder / "model.safetensors")
    as_bin(folder, dict(reversed(state.items())))
    return folder


def linked(folder: Path) -> Path:
    """As a hub's cache lays it out: snapshots of links to blobs without a suffix."""
    blobs, snapshot = folder.with_name("blobs"), folder.with_name("snapshots") / "main"
    folder.rename(blobs)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(blobs.iterdir()):
        (snapshot / file.name).symlink_to(file.rename(blobs / f"{number:064x}"))
    return snapshot


def single_file(folder: Path) -> Path:
    return (folder / "model.safetensors").rename(folder / "weights.safetensors")


@pytest.mark.parametrize(
    "move", [renamed, resharded, converted, converted_in_shards, in_another_order, linked, single_file], ids=lambda f: f.__name__
)
def test_a_copy_is_the_same_model(saved: Path, folder: Path, move: Callable[[Path], Path]) -> None:
    before, after = fingerprint_checkpoint(saved), fingerprint_checkpoint(move(folder))
    assert after == before
    assert after.root == before.root
    assert after.to_bytes() == before.to_bytes()


@pytest.mark.parametrize("name", TIED)
def test_a_state_dict_with_tied_names_is_the_same_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    before = fingerprint_checkpoint(tmp_path)
    as_bin(tmp_path, model.state_dict())
    assert set(model.state_dict()) > set(before.tensors)
    assert fingerprint_checkpoint(tmp_path) == before
    # Without the config's word for it, a file with a head and one without are two models: the second would make a random head.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert set(fingerprint_checkpoint(tmp_path).tensors) == set(model.state_dict())


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    model = build("qwen2")
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    as_bin(tmp_path, state | {"lm_head.weight": state["lm_head.weight"].clone()})
    assert "lm_head.weight" in fingerprint_checkpoint(tmp_path).tensors


def test_every_tensor_counts(folder: Path) -> None:
    before = fingerprint_checkpoint(folder)
    state = load_file(folder / "model.safetensors")
    roots = {before.root}
    for name, tensor in state.items():
        changed = tensor.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        save_file(state | {name: changed}, folder / "model.safetensors")
        after = fingerprint_checkpoint(folder)
        assert before.diff(after).tensors == (name,)
        roots.add(after.root)
    assert len(roots) == 1 + len(state)


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "missing", "swapped"])
def test_everything_in_a_header_counts(folder: Path, change: str) -> None:
    before = fingerprint_checkpoint(folder)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    other = "model.layers.0.mlp.gate_proj.weight"
    if change == "name":
        state["model.layers.0.mlp.up_proj.bias"] = state.pop(name)
    elif change == "dtype":
        state[name] = state[name].view(torch.int32)
    elif change == "shape":
        state[name] = state[name].reshape(state[name].shape[::-1])
    elif change == "missing":
        del state[name]
    else:
        state[name], state[other] = state[other], state[name]
    save_file(state, folder / "model.safetensors")
    assert fingerprint_checkpoint(folder).root != before.root


def test_metadata_counts_where_it_says_more_than_who_wrote_the_file(folder: Path) -> None:
    # torchao's quantised weights are put together by what it says.
    before = fingerprint_checkpoint(folder)
    state = load_file(folder / "model.safetensors")
    roots = []
    for metadata in (
        {"format": "mlx"},
        None,
        {"format": "pt", "lm_head.weight": "blocks of 32"},
        {"lm_head.weight": "blocks of 64"},
    ):
        save_file(state, folder / "model.safetensors", metadata=metadata)
        roots += [fingerprint_checkpoint(folder, memo=memo).root for memo in [settled_memo()] * 2]
    assert roots[:4] == [before.root] * 4
    assert len(set(roots)) == 3
    save_file(state, folder / "model.safetensors", metadata={"lm_head.weight": "blocks of 32"})
    assert str(before.diff(fingerprint_checkpoint(folder))) == "config of (root)"


def test_shards_whose_metadata_disagree_are_refused(folder: Path) -> None:
    resharded(folder)
    for number, shard in enumerate(sorted(folder.glob("model-*.safetensors"))[:2]):
        save_file(load_file(shard), shard, metadata={"blocks": str(number)})
    with pytest.raises(CheckpointError, match="metadata"):
        fingerprint_checkpoint(folder)


def test_modules_follow_from_names(saved: Path) -> None:
    manifest = fingerprint_checkpoint(saved)
    assert list(manifest.modules["model.layers.0.mlp.up_proj"].tensors) == ["weight"]
    assert manifest.modules["model.layers"].tensors == {}
    assert {module.class_name for module in manifest.modules.values()} == {""}
    layers = [manifest.subset(f"model.layers.{number}").root for number in range(2)]
    assert layers[0] != layers[1]


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    save_file({f"layers.{number}.weight": torch.zeros(1) for number in range(11)}, tmp_path / "model.safetensors")
    assert list(fingerprint_checkpoint(tmp_path).tensors) == [f"layers.{number}.weight" for number in range(11)]


# Never to be changed: what has been remembered about checkpoints is found by these.
GOLDEN = "b4998474f3c8b07c7532c0692443cd07"


def test_golden(tmp_path: Path) -> None:
    header = b'{"a.b.weight":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},'
    header += b'"a.scale":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(8)))
    assert fingerprint_checkpoint(tmp_path).root.hex == GOLDEN


# --- which files are meant ------------------------------------------------------------------------------------------------------


def test_safetensors_come_before_bin_as_in_transformers(folder: Path) -> None:
    before = fingerprint_checkpoint(folder)
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")
    assert fingerprint_checkpoint(folder) == before
    assert list(fingerprint_checkpoint(folder, use_safetensors=False).tensors) == ["weight"]
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        fingerprint_checkpoint(folder, use_safetensors=False)


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_variant_is_another_model(folder: Path, shards: str) -> None:
    build("llama", seed=1).save_pretrained(folder, variant="other", max_shard_size=shards)
    found = fingerprint_checkpoint(folder, variant="other")
    build("llama", seed=1).save_pretrained(folder.with_name("plain"))
    assert found == fingerprint_checkpoint(folder.with_name("plain")) != fingerprint_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no weights"):
        fingerprint_checkpoint(folder, variant="third")


def test_a_config_may_name_its_weights(folder: Path) -> None:
    before = fingerprint_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    assert fingerprint_checkpoint(folder) == before
    for outside in ("../copy/mine.safetensors", str(folder / "mine.safetensors"), 3):
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": outside}))
        with pytest.raises(CheckpointError, match="outside the folder"):
            fingerprint_checkpoint(folder)


def index_without_shard(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def index_of_wrong_place(folder: Path) -> None:
    edit_index(folder, lambda placed: placed | {min(placed): placed[max(placed)]})


def index_with_more(folder: Path) -> None:
    edit_index(folder, lambda placed: placed | {"more": placed[min(placed)]})


def index_with_less(folder: Path) -> None:
    edit_index(folder, lambda placed: {name: file for name, file in placed.items() if name != "model.norm.weight"})


def index_that_leads_away(folder: Path) -> None:
    edit_index(folder, lambda placed: {name: f"../{folder.name}/{file}" for name, file in placed.items()})


def index_of_nothing(folder: Path) -> None:
    edit_index(folder, lambda placed: {})


def index_of_numbers(folder: Path) -> None:
    edit_index(folder, lambda placed: dict.fromkeys(placed, 1))


def index_that_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def edit_index(folder: Path, change: Callable[[dict], dict]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


@pytest.mark.parametrize(
    ("lie", "what"),
    [
        (index_without_shard, "not there"),
        (index_of_wrong_place, "disagree"),
        (index_with_more, "disagree"),
        (index_with_less, "disagree"),
        (index_that_leads_away, "beside it"),
        (index_of_nothing, "beside it"),
        (index_of_numbers, "beside it"),
        (index_that_is_no_json, "not JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_lying_index_is_refused(folder: Path, lie: Callable[[Path], None], what: str) -> None:
    resharded(folder)
    lie(folder)
    with pytest.raises(CheckpointError, match=what) as caught:
        fingerprint_checkpoint(folder)
    assert {"path", "expected", "found"} <= set(caught.value.fields)
    assert caught.value.hint


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        fingerprint_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no weights"):
        fingerprint_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="empty"):
        fingerprint_checkpoint(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensors"):
        fingerprint_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", ".x", "a.", "a..b"])
def test_a_name_with_an_empty_part_is_refused(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="empty part"):
        fingerprint_checkpoint(tmp_path)


# --- memory of files ------------------------------------------------------------------------------------------------------------


def planted(folder: Path, memo: FileMemo) -> Manifest:
    """Makes the memo tell something else about the folder's file than is in it, so that a reader shows whom it asked."""
    other = folder.with_name("other.safetensors")
    save_file({"planted": torch.ones(1)}, other)
    found = fingerprint_checkpoint(other, memo=memo)
    fact = memo.recall("safetensors 1", FileStamp.of(other))
    assert memo.remember("safetensors 1", FileStamp.of(folder / "model.safetensors"), fact, memo.now_ns())
    return found


def test_an_unchanged_file_is_not_read_again_unless_asked_to(folder: Path) -> None:
    memo = settled_memo()
    before = fingerprint_checkpoint(folder, memo=memo)
    assert fingerprint_checkpoint(folder, memo=memo) == before
    plant = planted(folder, memo)
    assert fingerprint_checkpoint(folder, memo=memo) == plant
    assert fingerprint_checkpoint(folder) == plant  # the memo in the cache folder is the one that is asked when none is given
    assert fingerprint_checkpoint(folder, rehash=True) == before
    # A rehash by a clock that trusts the file corrects the memo.
    assert fingerprint_checkpoint(folder, memo=memo, rehash=True) == before
    assert fingerprint_checkpoint(folder, memo=memo) == before


def test_what_is_known_of_a_file_depends_on_the_format_that_its_name_says(folder: Path) -> None:
    memo = settled_memo()
    fingerprint_checkpoint(folder, memo=memo)
    (folder / "pytorch_model.bin").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        fingerprint_checkpoint(folder, memo=memo, use_safetensors=False)


def test_a_new_file_is_read_each_time(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.utime(file)
    before = fingerprint_checkpoint(folder)
    assert FileMemo().recall("safetensors 1", FileStamp.of(file)) is None
    assert fingerprint_checkpoint(folder) == before


@pytest.mark.parametrize("by", ["writing", "replacing"])
def test_a_file_replaced_under_the_same_name_size_and_mtime_is_read_again(folder: Path, by: str) -> None:
    file, memo = folder / "model.safetensors", settled_memo()
    before, status = fingerprint_checkpoint(folder, memo=memo), file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # longer than the kernel's clock tick, by which ctime counts
    if by == "writing":
        with file.open("r+b") as handle:
            handle.write(data)
    else:
        file.with_suffix(".new").write_bytes(data)
        file.with_suffix(".new").replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert len(before.diff(fingerprint_checkpoint(folder, memo=memo)).tensors) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    with pytest.raises(CheckpointError, match="while it was read"):
        fingerprint_checkpoint(folder, progress=lambda done, total: os.utime(file))


def test_a_file_that_is_replaced_while_it_is_read_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    copy = shutil.copy2(file, folder.with_name("copy.safetensors"))

    def replace(done: int, total: int) -> None:
        if os.path.exists(copy):
            os.replace(copy, file)

    with pytest.raises(CheckpointError, match="while it was read"):
        fingerprint_checkpoint(folder, progress=replace)


def test_progress_goes_up_to_all_bytes(folder: Path) -> None:
    for path in (folder, resharded(folder), converted_tied(folder)):
        memo = settled_memo()
        for _ in ("hashed", "known"):
            told: list[tuple[int, int]] = []
            fingerprint_checkpoint(path, memo=memo, progress=lambda done, total, told=told: told.append((done, total)))
            assert told == sorted(told)
            assert {total for _, total in told} == {told[-1][0]}


def converted_tied(folder: Path) -> Path:
    model = build("gpt2")
    other = folder.with_name("tied")
    model.save_pretrained(other)
    as_bin(other, model.state_dict())
    return other


def test_large_files_are_hashed_by_two_threads_to_the_same_manifest(tmp_path: Path) -> None:
    state = {f"layers.{number}.weight": torch.arange(number, number + (1 << 20)) for number in range(6)}  # 48 MiB
    save_file(state, tmp_path / "model.safetensors")
    whole = fingerprint_checkpoint(tmp_path)
    parts = {}
    for name, tensor in state.items():
        save_file({name: tensor}, tmp_path / "part.safetensors")
        parts |= fingerprint_checkpoint(tmp_path / "part.safetensors").tensors
    assert whole.tensors == parts
    with pytest.raises(KeyboardInterrupt):
        fingerprint_checkpoint(tmp_path, rehash=True, progress=interrupt)


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_the_same_in_every_process(saved: Path) -> None:
    code = (
        "import sys; from evalcache.checkpoint import fingerprint_checkpoint as f;"
        "print(f(sys.argv[1], rehash=True).root, 'torch' in sys.modules)"
    )
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code, saved],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout == f"{fingerprint_checkpoint(saved).root} False\n"
