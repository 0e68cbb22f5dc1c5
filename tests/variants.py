"""A model's folder, changed as people change it: copies that are the same model, and edits that make it another one.

Each variant says what it is to a cache: which weights it has, and what else of it shapes an answer. `matrix_cells.py` derives
from that what each cell of the matrix must show, without asking evalcache.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BASE = "base"
WORD = " the"  # whose merge the other tokenizer lacks
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
OTHER_TEMPLATE = CHAT_TEMPLATE.replace("': '", "' says: '")


def same(folder: Path) -> None:
    """The same files at another place."""


def edit(folder: Path, change: Callable[[Any], Any], **saving: Any) -> None:
    """Load the model, change it, and save it in place of the old one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    changed = change(model)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    (model if changed is None else changed).save_pretrained(folder, **saving)


def sharded(folder: Path) -> None:
    """In several files."""
    edit(folder, lambda model: None, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def renamed(folder: Path) -> None:
    """Under another name, in files of other names."""
    from safetensors import safe_open

    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    file.rename(folder / "other-name.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "other-name.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config_of("config.json", _name_or_path="somebody/else")(folder)


def as_bin(folder: Path) -> None:
    """As a pickle of torch."""
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def head_tuned(folder: Path) -> None:
    """A few steps of training on the last layer and the head."""

    def tune(model: Any) -> None:
        # Tied embeddings are the head, too.
        parameters = [*model.model.layers[-1].parameters(), model.get_output_embeddings().weight]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        ids = torch.arange(300, 364).view(2, 32)
        for _ in range(5):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    edit(folder, tune)


def one_ulp(folder: Path) -> None:
    """One weight, by the smallest step there is."""

    def nudge(model: Any) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight.data
        weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(9.0))

    edit(folder, nudge)


def config_of(name: str, **values: Any) -> Callable[[Path], None]:
    """Other values in one of its JSON files."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_merges(folder: Path) -> None:
    """The same vocabulary, and no merge that makes one token of `WORD`: texts without it have the same ids as before."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    merges = tokenizer["model"]["merges"]
    kept = [one for one in merges if "".join(one if isinstance(one, list) else one.split(" ")) != WORD.replace(" ", "Ġ")]
    assert len(kept) < len(merges)
    tokenizer["model"]["merges"] = kept
    path.write_text(json.dumps(tokenizer))


def other_template(folder: Path) -> None:
    """Another way to write a chat down."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(folder)


def half(folder: Path) -> None:
    """A copy in bfloat16."""
    edit(folder, lambda model: model.to(torch.bfloat16))


def lora(folder: Path) -> None:
    """An adapter, in a folder of its own within the model's, with the tokenizer beside it as trainers save it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    model.save_pretrained(folder / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, folder / "adapter")


def merged(folder: Path) -> None:
    """The same adapter, merged into the weights."""
    from peft import PeftModel

    lora(folder)
    edit(folder, lambda model: PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload())
    shutil.rmtree(folder / "adapter")


@dataclass(frozen=True)
class Variant:
    """One variant.

    Args:
        make: changes a copy of the model's folder.
        model: variants with the same name here are one model to a cache; None means that it is one of its own.
        penalty: its generation config has a setting that acts. template, merges: its tokenizer's, where not the usual ones.
        adapter: it is a model with an adapter beside it.
        kind: what it is a case of; of each kind one is tried in every run of the tests.
    """

    make: Callable[[Path], None]
    model: str | None
    kind: str
    penalty: bool = False
    template: str = ""
    merges: str = ""
    dtype: str = "float32"
    adapter: bool = False


_ROPE = {"rope_type": "default", "rope_theta": 5.0}
VARIANTS: dict[str, Variant] = {
    "original": Variant(same, BASE, "original"),
    "moved": Variant(same, BASE, "same weights"),
    "resharded": Variant(sharded, BASE, "same weights"),
    "renamed": Variant(renamed, BASE, "same weights"),
    ".bin": Variant(as_bin, BASE, "same weights"),
    "last layer and head tuned": Variant(head_tuned, None, "other weights"),
    "one weight by one ulp": Variant(one_ulp, None, "other weights"),
    "other rope_theta": Variant(config_of("config.json", rope_parameters=_ROPE), None, "config"),
    "other generation_config.json": Variant(
        config_of("generation_config.json", repetition_penalty=3.0), BASE, "generation config", penalty=True
    ),
    "other chat template": Variant(other_template, BASE, "template", template="other"),
    "other merges": Variant(other_merges, BASE, "merges", merges="other"),
    "bfloat16": Variant(half, None, "bfloat16", dtype="bfloat16"),
    "LoRA adapter": Variant(lora, None, "adapter", adapter=True),
    "LoRA merged": Variant(merged, None, "other weights"),
}
# The one that is hardest to notice, or to recognise.
ONE_OF_EACH_KIND = (
    "original", "resharded", "one weight by one ulp", "other rope_theta", "other generation_config.json", "other chat template",
    "other merges", "bfloat16", "LoRA adapter",
)  # fmt: skip
assert {VARIANTS[name].kind for name in ONE_OF_EACH_KIND} == {variant.kind for variant in VARIANTS.values()}


def make(name: str, original: Path, place: Path) -> Path:
    """Make a variant of the model in ``original`` as a new folder at ``place``."""
    shutil.copytree(original, place)
    VARIANTS[name].make(place)
    return place
