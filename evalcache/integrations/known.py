"""What is written down of a model that was loaded, and the hollow one that is made of it while the weights sleep."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from evalcache.attributes import is_config
from evalcache.code import version_of_distribution
from evalcache.integrations.lazy import is_same
from evalcache.integrations.packing import name_of, pack, unpack
from evalcache.weights import library_digests

_VERSIONS = ("transformers", "torch", "accelerate", "peft", "bitsandbytes", "torchao", "optimum", "optimum-quanto", "safetensors")


def runtime() -> list[Any]:
    """What beside files and arguments decides what a load makes of them."""
    return [
        {name: found for name in _VERSIONS if (found := version_of_distribution(name))},
        [str(torch.get_default_dtype()), str(torch.get_default_device())],
        sys.version_info[:2],
    ]


def describe(model: Any, manifest: Any) -> dict[str, Any]:
    """What has to be known of a model so that it may sleep next time."""
    classes = sorted({name_of(type(one)) for one in model.modules()})
    return {
        "root": manifest.root.value,
        "classes": classes,
        "code": library_digests(classes),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def names_of(module: torch.nn.Module) -> list[str]:
    """The attributes that a module itself has."""
    return sorted({*vars(module), *module._parameters, *module._buffers, *module._modules})


def hollow_model(cls: Any, folder: Path, path: Any, kwargs: dict[str, Any], record: dict[str, Any]) -> Any:
    """An instance of the model's class that holds its config and generation config, and no module at all."""
    from transformers import GenerationConfig

    try:
        config = kwargs.get("config")
        config = copy.deepcopy(config) if config is not None else cls.config_class.from_pretrained(folder)
        apply(config, record["config"])
        config._name_or_path = str(path)
        hollow = cls.__new__(cls)
        torch.nn.Module.__init__(hollow)
        hollow.config = config
        hollow.name_or_path = config.name_or_path
        if record["generation"]:
            hollow.generation_config = GenerationConfig.from_dict(dict(record["generation"]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return hollow


def changed(before: Any, after: Any) -> list[list[Any]]:
    """What loading has set in a config, by attribute; in the configs inside of it too."""
    changes = []
    for name, value in vars(after).items():
        known = vars(before).get(name)
        if is_config(value) and type(known) is type(value):
            if inside := changed(known, value):
                changes.append([name, ["config", inside]])
        elif name != "_name_or_path" and not (name in vars(before) and is_same(known, value)):
            changes.append([name, ["value", pack(value)]])
    return changes


def apply(config: Any, changes: list[list[Any]]) -> None:
    """Make the `changed` ones again."""
    for name, (kind, content) in changes:
        if kind == "config":
            apply(vars(config)[name], content)
        else:
            setattr(config, name, unpack(content))
