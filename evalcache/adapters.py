"""PEFT: which adapters act in a model right now, and what of them shapes the answer.

PEFT keeps its state beside the module tree: in underscore attributes, and in dictionaries keyed by the adapters' names. A layer
whose adapters do not act is its base layer, so that a model with its adapters off is the base model; of acting ones everything
counts except their names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from evalcache.errors import FingerprintError

_KINDS = ("lora", "ia3", "loha", "lokr")
_KNOWN_TUNERS = tuple(f"peft.tuners.{name}." for name in _KINDS)
# Others (activated LoRA, Arrow, …) look at the prompt or at other adapters through configurations outside of the layer.
_KNOWN_VARIANTS = "Dora"
_INERT = frozenset(
    "training _disable_adapters merged_adapters _active_adapter kwargs _caches ephemeral_gpu_offload adapter_layer_names "
    "other_param_names lora_variant _hf_hook _old_forward".split()
)
# Fields of an adapter's config that may hold anything; of others, the default only. None of these makes the adapter of the base's
# weights, or of files beside its own.
_FIELDS = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout alpha rank_dropout module_dropout fan_in_fan_out bias use_rslora use_dora "
    "modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern feedforward_modules "
    "decompose_both decompose_factor rank_dropout_scale use_effective_conv2d".split()
)
_BEGINNINGS = ("init_lora_weights", "init_ia3_weights", "init_weights")
_STRUCTURE = frozenset("_modules _parameters _buffers _non_persistent_buffers_set _is_full_backward_hook".split())


@functools.cache
def is_adapted_layer(cls: type) -> bool:
    """Whether a class is one of PEFT's layers around a base layer."""
    return any(base.__module__ == "peft.tuners.tuners_utils" and base.__name__ == "BaseTunerLayer" for base in cls.__mro__)


def is_peft_model(module: Any) -> bool:
    """Whether a module is PEFT's model around a base model."""
    return any(cls.__module__ == "peft.peft_model" and cls.__name__ == "PeftModel" for cls in type(module).__mro__)


def adapted_model(module: Any) -> list[nn.Module]:
    """What to look through in a PEFT model: the objects between it and the model whose layers are adapted, and that model.

    A prompt-learning adapter lives outside of the layers: nothing is looked through unless it is disabled.
    """
    if module.active_peft_config.is_prompt_learning:
        return [module.base_model] if module._adapters_disabled else []
    tuner = module.base_model
    return [tuner, tuner.model] if hasattr(tuner, "model") else [tuner]


def acting_adapters(module: Any, path: str) -> list[str]:
    """The names of the adapters that act in one layer, none where its forward calls nothing but the base layer.

    Raises:
        FingerprintError: ``unsupported``, the adapter is of an unknown kind or about to be unmerged.
    """
    cls = type(module)
    if not cls.__module__.startswith(_KNOWN_TUNERS) or "base_layer" not in module.__dict__["_modules"]:
        raise FingerprintError(path, f"adapter of unknown kind {cls.__name__}", "unsupported")
    if module.merged_adapters:
        if module.disable_adapters:
            raise FingerprintError(path, "merged adapters that are disabled are unmerged by the next forward", "unsupported")
        return []  # merged weights lie in the base layer
    if module.disable_adapters:
        return []
    names = [name for name in module.active_adapters if any(name in getattr(module, kind) for kind in module.adapter_layer_names)]
    for name, variant in (getattr(module, "lora_variant", None) or {}).items():
        if name in names and not type(variant).__name__.startswith(_KNOWN_VARIANTS):
            raise FingerprintError(path, f"adapter variant {type(variant).__name__}", "unsupported")
    return names


def adapter_state(module: Any, names: list[str]) -> list[tuple[str, Any]]:
    """What an adapted layer holds for its acting adapters, by a name in which the adapter is its position.

    Returns:
        Modules, tensors and plain values; the base layer is not among them.
    """
    values = module.__dict__
    found: list[tuple[str, Any]] = []
    held = {**values["_modules"], **values["_parameters"], **values["_buffers"]}
    plain = {name: value for name, value in values.items() if name not in _INERT and not _is_structure(name)}
    for kind, value in [*sorted(held.items()), *sorted(plain.items())]:
        if kind == "base_layer" or value is None:
            continue
        if isinstance(value, (nn.ModuleDict, nn.ParameterDict, Mapping)):
            found += [(f"{kind}.{place}", value[name]) for place, name in enumerate(names) if name in value]
        else:
            found.append((kind, value))
    variants = getattr(module, "lora_variant", None) or {}
    found += [(f"variant.{place}", type(variants[name])) for place, name in enumerate(names) if name in variants]
    return found


def is_determined(config: Any) -> bool:
    """Whether an adapter with this config is what its own files, its base and the call that loads it make of it."""
    if str(getattr(config.peft_type, "value", config.peft_type)).lower() not in _KINDS:
        return False
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name in _BEGINNINGS:
            if value not in (True, False, "gaussian"):  # others are made of the base's weights, or change these
                return False
        elif field.name not in _FIELDS and value != default:
            return False
    return True


def _is_structure(name: str) -> bool:
    return name in _STRUCTURE or name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
