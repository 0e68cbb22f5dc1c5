"""What stands around a model without changing what it computes: compiled, data-parallel and PEFT's own objects."""

from __future__ import annotations

from torch import nn

from evalcache.adapters import adapted_model, is_peft_model

# Wrappers that change where a model runs, not what it computes: class name → attribute with the wrapped model.
AWAKE = "__evalcache_awake__"
"""Name of the method by which the class of a stand-in hands over what it stands for."""
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside compiled and data-parallel wrappers, and inside a PEFT model whose adapters sit in the layers."""
    return unwrapped(module)[-1]


def awake(module: nn.Module) -> nn.Module:
    """The module itself; the real one where a sleeping model of ours stands for it, in a PEFT model, say."""
    wake = getattr(type(module), AWAKE, None)
    return module if wake is None else wake(module)


def unwrapped(module: nn.Module) -> list[nn.Module]:
    """All that is looked through, and last the model itself."""
    found = [awake(module)]
    while True:
        module = found[-1] = awake(found[-1])
        wrapped = _WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None
        inner = [getattr(module, wrapped)] if wrapped else adapted_model(module) if is_peft_model(module) else []
        if not inner:
            return found
        found += inner
