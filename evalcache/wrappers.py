"""What stands around a model without changing what it computes: compiled, data-parallel and PEFT's own objects."""

from __future__ import annotations

from torch import nn

from evalcache.adapters import adapted_model, is_peft_model

# Wrappers that change where a model runs, not what it computes: class name → attribute with the wrapped model.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside compiled and data-parallel wrappers, and inside a PEFT model whose adapters sit in the layers."""
    return unwrapped(module)[-1]


def unwrapped(module: nn.Module) -> list[nn.Module]:
    """All that is looked through, and last the model itself."""
    found = [module]
    while True:
        module = found[-1]
        wrapped = _WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None
        inner = [getattr(module, wrapped)] if wrapped else adapted_model(module) if is_peft_model(module) else []
        if not inner:
            return found
        found += inner
