"""Identity of checkpoints: what `from_pretrained` reads counts, where and how it is stored does not."""

from __future__ import annotations

import ast
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CanonicalError, CheckpointError, CorruptEntryWarning
from evalcache.identity import CheckpointIdentity, CheckpointIndex, identify_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama and a LoRA adapter for it, as transformers and PEFT save them. Not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    model = build("llama")
    model.save_pretrained(root / "base")
    model.config._name_or_path = str(root / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(root / "base")
    tuned.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(saved / "base", tmp_path / "base"))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


def edit(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; a field of None goes."""
    fields = json.loads(file.read_text()) | changes
    gone = {name for name, value in changes.items() if value is None}
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in gone}))


# --- what does not matter -------------------------------------------------------------------------------------------------------


def moved(folder: Path) -> Path:
    return folder.rename(folder.with_name("renamed"))


def resharded(folder: Path) -> Path:
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def as_bin(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def downloaded(folder: Path) -> Path:
    edit(folder / "config.json", _name_or_path="org/model", _commit_hash="f00")
    return folder


def of_another_version(folder: Path) -> Path:
    edit(folder / "config.json", transformers_version="5.22.0")
    edit(folder / "generation_config.json", transformers_version="5.22.0")
    return folder


def laid_out_otherwise(folder: Path) -> Path:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(fields.items()))))
    return folder


def with_other_files(folder: Path) -> Path:
    """A tokenizer, a chat template, a README, results, and code that no config names."""
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "results.json", "modeling_unused.py", "training_args.bin"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "change",
    [moved, resharded, as_bin, downloaded, of_another_version, laid_out_otherwise, with_other_files],
    ids=lambda f: f.__name__,
)
def test_a_copy_is_the_same_checkpoint(saved: Path, folder: Path, change: Callable[[Path], Path]) -> None:
    assert identify_checkpoint(change(folder)).digest == identify_checkpoint(saved / "base").digest


# --- what matters ---------------------------------------------------------------------------------------------------------------


def weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] += 1e-6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a weight": weight,
    "a config field": lambda folder: edit(folder / "config.json", rms_norm_eps=1e-5),
    "a config field's type": lambda folder: edit(folder / "config.json", attention_dropout=0),
    "a config field gone": lambda folder: edit(folder / "config.json", vocab_size=None),
    "architectures": lambda folder: edit(folder / "config.json", architectures=["MistralForCausalLM"]),
    "dtype": lambda folder: edit(folder / "config.json", dtype="bfloat16"),
    "name of a part": lambda folder: edit(folder / "config.json", text_config={"_name_or_path": "org/other"}),
    "not from transformers": lambda folder: edit(folder / "config.json", transformers_version=None),
    "a generation setting": lambda folder: edit(folder / "generation_config.json", do_sample=True),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "own generate": lambda folder: write(folder / "custom_generate/generate.py", "def generate(model): ..."),
}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_another_checkpoint(saved: Path, folder: Path, change: str) -> None:
    CHANGES[change](folder)
    assert identify_checkpoint(folder).digest != identify_checkpoint(saved / "base").digest


def test_a_config_of_another_version_counts_where_the_config_names_it(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.5.0.0.json")
    before = identify_checkpoint(folder)
    edit(folder / "config.json", configuration_files=["config.5.0.0.json"])
    named = identify_checkpoint(folder)
    edit(folder / "config.5.0.0.json", rms_norm_eps=1e-5)
    assert len({before.digest, named.digest, identify_checkpoint(folder).digest}) == 3


def test_code_counts_with_what_it_imports(folder: Path) -> None:
    write(folder / "modeling_own.py", "from .parts import norm\nimport torch\nfrom .deep.layer import Layer\nclass Own: ...\n")
    write(folder / "parts.py", "from .more import eps\ndef norm(): ...\n")
    write(folder / "more.py", "from .parts import norm\neps = 1e-6\n")  # in a circle
    write(folder / "deep/layer.py", "class Layer: ...\n")
    write(folder / "unused.py", "eps = 1\n")
    edit(folder / "config.json", auto_map={"AutoConfig": None, "AutoModelForCausalLM": ["modeling_own.Own", None]})
    before = identify_checkpoint(folder)
    assert {"modeling_own.py", "parts.py", "more.py", "deep/layer.py"} <= set(before.files)
    assert "unused.py" not in before.files
    digests = {before.digest}
    for name in ("modeling_own.py", "parts.py", "more.py", "deep/layer.py"):
        write(folder / name, (folder / name).read_text() + "#")
        digests.add(identify_checkpoint(folder).digest)
    assert len(digests) == 5
    write(folder / "unused.py", "eps = 2\n")
    assert identify_checkpoint(folder).digest in digests


def test_code_of_another_repository_is_refused(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModel": "org/other--modeling_own.Own"})
    with pytest.raises(CheckpointError, match="another repository"):
        identify_checkpoint(folder)


def test_a_dtype_that_must_be_inferred_is_known_only_if_there_is_one(folder: Path) -> None:
    # `dtype="auto"` then takes the first tensor's of the first file, or an index's word for it.
    edit(folder / "config.json", dtype=None)
    before = identify_checkpoint(folder)
    assert identify_checkpoint(as_bin(folder)).digest == before.digest
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    edit(folder / "config.json", dtype=None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    edit(folder / "model.safetensors.index.json", metadata=index["metadata"] | {"dtype": "bfloat16"})
    assert identify_checkpoint(folder).digest != before.digest
    build("llama").half().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.norm.weight": state["model.norm.weight"].float()}, folder / "model.safetensors")
    assert identify_checkpoint(folder).digest != before.digest
    edit(folder / "config.json", dtype=None)
    with pytest.raises(CheckpointError, match="names no dtype"):
        identify_checkpoint(folder)


# --- adapters -------------------------------------------------------------------------------------------------------------------


def test_an_adapter_alone_is_another_checkpoint_than_its_base(saved: Path) -> None:
    base, tuned = identify_checkpoint(saved / "base"), identify_checkpoint(saved / "adapter")
    assert tuned.tensors == base.tensors
    assert tuned.files["base"] == base.digest
    assert tuned.digest != base.digest


def test_an_adapter_follows_its_base_by_content(saved: Path, folder: Path, adapter: Path) -> None:
    before = identify_checkpoint(saved / "adapter").digest
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
    assert identify_checkpoint(adapter).digest == before
    weight(folder)
    assert identify_checkpoint(adapter).digest != before


def test_an_adapter_whose_base_is_elsewhere_is_refused(adapter: Path) -> None:
    for name in ("org/model", None, str(adapter)):
        edit(adapter / "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match="not a local model"):
            identify_checkpoint(adapter)


def test_an_adapter_inside_a_models_folder_counts(saved: Path, folder: Path) -> None:
    seen = {identify_checkpoint(folder).digest}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved / "adapter" / name, folder)
    seen.add(identify_checkpoint(folder).digest)
    edit(folder / "adapter_config.json", base_model_name_or_path="org/model")  # not read: the folder holds a model
    assert identify_checkpoint(folder).digest in seen
    edit(folder / "adapter_config.json", lora_alpha=99)
    seen.add(identify_checkpoint(folder).digest)
    state = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    seen.add(identify_checkpoint(folder).digest)
    assert len(seen) == 4
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert identify_checkpoint(folder).digest in seen
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no adapter"):
        identify_checkpoint(folder)


# --- refusals -------------------------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_folder_is_refused(folder: Path) -> None:
    for path in (folder / "nothing", folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match="not a checkpoint folder"):
            identify_checkpoint(path)
    for text in ("", "[]", "{", '{"a": 100000000000000000000}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            identify_checkpoint(folder)


# --- index ----------------------------------------------------------------------------------------------------------------------

IDENTITY = CheckpointIdentity(digest_bytes(b"tensors"), {"config.json": digest_bytes(b"config")})
RECORD = {"root": b"\x01" * 16, "environment": {"dtype": "float32"}, "code": [1, None, 2.5]}

# Never to be changed: what has been remembered about checkpoints is found by these.
GOLDEN_IDENTITY = "736d5e2eea163d679b80c1a49035a3bb"
GOLDEN_KEY = "5ffc027e75629bae879fb91688f22c82"


def test_golden() -> None:
    assert IDENTITY.digest.hex == GOLDEN_IDENTITY
    assert CheckpointIndex.key(IDENTITY, {"dtype": "auto"}, {"torch": "2.13.0"}).hex == GOLDEN_KEY


def test_every_part_of_an_index_key_counts() -> None:
    other = CheckpointIdentity(IDENTITY.tensors, {"config.json": IDENTITY.tensors})
    fewer = CheckpointIdentity(IDENTITY.tensors, {})
    keys = [
        CheckpointIndex.key(IDENTITY, {"dtype": "auto"}, {"torch": "2"}),
        CheckpointIndex.key(other, {"dtype": "auto"}, {"torch": "2"}),
        CheckpointIndex.key(fewer, {"dtype": "auto"}, {"torch": "2"}),
        CheckpointIndex.key(IDENTITY, {"dtype": "float32"}, {"torch": "2"}),
        CheckpointIndex.key(IDENTITY, {}, {"torch": "2"}),
        CheckpointIndex.key(IDENTITY, {"dtype": "auto"}, {"torch": "3"}),
        CheckpointIndex.key(IDENTITY, {"dtype": "auto"}, {"torch": "2", "peft": "1"}),
        CheckpointIndex.key(IDENTITY, {"torch": "2"}, {"dtype": "auto"}),
    ]
    assert len(set(keys)) == len(keys)
    with pytest.raises(CanonicalError):
        CheckpointIndex.key(IDENTITY, {"dtype": torch.float32}, {})


def test_what_was_remembered_is_recalled_by_another_process(store_folder: Path) -> None:
    key = CheckpointIndex.key(IDENTITY, {}, {})
    assert CheckpointIndex().recall(key) is None
    CheckpointIndex().remember(key, RECORD)
    assert CheckpointIndex(store_folder / "checkpoints.sqlite").recall(key) == RECORD
    code = (
        "import sys; from evalcache.identity import *; from evalcache.digest import Digest;"
        "print(CheckpointIndex(sys.argv[1]).recall(Digest.parse(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, store_folder / "checkpoints.sqlite", str(key)]
    assert ast.literal_eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == RECORD
    CheckpointIndex().remember(key, RECORD | {"root": b"\x02" * 16})
    assert CheckpointIndex().recall(key) == RECORD | {"root": b"\x02" * 16}
    assert CheckpointIndex().recall(Digest(bytes(16))) is None


def test_a_record_that_cannot_be_written_down_is_refused(store_folder: Path) -> None:
    with pytest.raises(CanonicalError):
        CheckpointIndex().remember(Digest(bytes(16)), {"dtype": torch.float32})
    assert not store_folder.exists()


def test_a_damaged_record_is_absent(store_folder: Path) -> None:
    key = CheckpointIndex.key(IDENTITY, {}, {})
    CheckpointIndex().remember(key, RECORD)
    with sqlite3.connect(store_folder / "checkpoints.sqlite") as connection:
        connection.execute("UPDATE kept SET value = value || x'00'")
    with pytest.warns(CorruptEntryWarning):
        assert CheckpointIndex().recall(key) is None
