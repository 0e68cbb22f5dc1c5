"""A live `nn.Module` → Manifest: every byte of every tensor, and all else in the modules that shapes their answer.

The live module is the truth: what a checkpoint's files say may be cast, fused, quantised or adapted while loading. One walk
serves both the first fingerprint and every later check; what makes a check cheap is that unchanged Python state is recognised by
comparison, tensors in host memory are hashed at memory speed, and tensors on a device are summed there (`device_sums.py`).

What cannot be hashed exactly raises `FingerprintError`, which names the module.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from evalcache.attributes import AttributeEncoder
from evalcache.canonical import digest_canonical
from evalcache.code import ORIGINAL, LibraryCode, UserCode, is_library_class
from evalcache.device_sums import device_sums
from evalcache.digest import Digest
from evalcache.errors import FingerprintError
from evalcache.leaf import leaf_digest
from evalcache.manifest import Manifest, ModuleRecord, TensorRecord

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while tensors are hashed."""

# Wrappers that change where a model runs, not what it computes: (class name, attribute with the wrapped model).
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule", "DTensor", "DeepSpeedEngine", "ShardedTensor"})
_RECURSED = ("torchao.", "optimum.quanto.")
_TUNERS = ("peft.tuners.lora", "peft.tuners.ia3", "peft.tuners.loha", "peft.tuners.lokr")
_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "accelerate.hooks", "evalcache.")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
_PARALLEL_FROM_BYTES = 32 << 20

_library = LibraryCode()


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside compiled and data-parallel wrappers, and inside a PEFT model whose adapters sit in the layers."""
    while True:
        name = type(module).__name__
        if name in _WRAPPERS:
            module = getattr(module, _WRAPPERS[name])
        elif _is_peft_model(module) and not module.active_peft_config.is_prompt_learning:
            module = module.base_model.model if hasattr(module.base_model, "model") else module.base_model
        else:
            return module


def fingerprint(module: nn.Module, progress: Progress | None = None) -> Manifest:
    """The manifest of a live module.

    Args:
        module: any module; wrappers that change nothing but the place are looked through.
        progress: told about bytes as they are hashed.

    Raises:
        FingerprintError: a tensor, attribute, hook or method that cannot be hashed exactly; names the module.

    Cost: one pass over all bytes (20+ GB/s in host memory; a copy to the host for each tensor on a device), and some
    10 µs a module.
    """
    return Fingerprinter(module).manifest(progress)


class Fingerprinter:
    """Fingerprints one model again and again: `manifest` reads every byte each time, and reuses what comparison allows.

    Not thread-safe; hold one per model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._records: dict[str, tuple[Any, ModuleRecord]] = {}
        self._sums: dict[int, tuple[torch.Tensor, Any, TensorRecord]] = {}

    def manifest(self, progress: Progress | None = None) -> Manifest:
        """The manifest of the model as it is now. Raises and costs: see `fingerprint`."""
        _refuse_interception()
        _library.guard()
        walk = _Walk(self, progress)
        module = unwrap(self._module)
        walk.hash_tensors(module)
        walk.visit(module, "")
        return Manifest(walk.modules, walk.encoder.config_digests(), _describe(self._module, module))


class _Walk:
    """One pass over a model."""

    def __init__(self, owner: Fingerprinter, progress: Progress | None) -> None:
        self._owner = owner
        self._progress = progress
        self._leaves: dict[int, TensorRecord] = {}
        self._kept: list[Any] = []
        self._classes: dict[type, Digest] = {}
        self._user = UserCode(_library, self._encode_object)
        self._path = ""
        self.encoder = AttributeEncoder(self._encode_code, self._encode_object)
        self.modules: dict[str, ModuleRecord] = {}

    # --- tensors -------------------------------------------------------------------------------------------------------

    def hash_tensors(self, module: nn.Module) -> None:
        """Hash all plain tensors first: large ones in threads (xxhash releases the GIL), device ones in one round trip."""
        host: dict[int, torch.Tensor] = {}
        device: dict[int, torch.Tensor] = {}
        for tensor in _owned_tensors(module):
            if _is_plain(tensor) and not tensor.is_meta:
                (host if tensor.device.type == "cpu" else device)[id(tensor)] = tensor
        self._kept += [*host.values(), *device.values()]
        total = sum(t.nbytes for t in host.values()) + sum(t.nbytes for t in device.values())
        done = 0

        def finished(key: int, tensor: torch.Tensor, record: TensorRecord) -> None:
            nonlocal done
            self._leaves[key] = record
            done += tensor.nbytes
            if self._progress:
                self._progress(done, total)

        if total < _PARALLEL_FROM_BYTES:
            for key, tensor in host.items():
                finished(key, tensor, _hash_tensor(tensor))
        else:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                for (key, tensor), record in zip(host.items(), pool.map(_hash_tensor, host.values()), strict=True):
                    finished(key, tensor, record)
        for key, total_sum in device_sums(device).items():
            tensor = device[key]
            known = self._owner._sums.get(key)
            signature = (total_sum, tensor.dtype, tuple(tensor.shape), tensor.device)
            if known is None or known[0] is not tensor or known[1] != signature:
                known = self._owner._sums[key] = (tensor, signature, _hash_tensor(tensor))
            finished(key, tensor, known[2])
        if len(self._owner._sums) > 2 * len(device):
            self._owner._sums = {key: value for key, value in self._owner._sums.items() if key in device}

    def _tensor(self, tensor: torch.Tensor) -> TensorRecord:
        found = self._leaves.get(id(tensor))
        if found is not None:
            return found
        self._kept.append(tensor)
        name = type(tensor).__name__
        if name in _SHARDED or type(tensor).__module__.startswith("torch.distributed"):
            raise FingerprintError(self._path, f"{name}: this process sees one shard only", "sharded")
        if tensor.is_meta:
            raise FingerprintError(self._path, "a tensor on the meta device has no bytes")
        if not _is_plain(tensor) and hasattr(tensor, "__tensor_flatten__"):
            if not type(tensor).__module__.startswith(_RECURSED):
                raise FingerprintError(self._path, f"tensor subclass {type(tensor).__module__}.{name} is not known")
            record = self._flattened(tensor)
        elif _is_plain(tensor) or _is_bitsandbytes(tensor):
            record = _hash_tensor(tensor)
        else:
            raise FingerprintError(self._path, f"tensor subclass {type(tensor).__module__}.{name} is not known")
        self._leaves[id(tensor)] = record
        return record

    def _flattened(self, tensor: Any) -> TensorRecord:
        names, context = tensor.__tensor_flatten__()
        inner = [(name, self._tensor(getattr(tensor, name))) for name in names]
        parts = [[name, record.digest.value] for name, record in inner]
        about = [type(tensor).__qualname__, str(tensor.dtype), list(tensor.shape)]
        digest = digest_canonical(["subclass", about, parts, self.encoder.encode(context, self._path)])
        size = sum(record.size_bytes for _, record in inner)
        return TensorRecord(digest, _dtype_name(tensor.dtype), tuple(tensor.shape), size)

    # --- modules -------------------------------------------------------------------------------------------------------

    def visit(self, module: nn.Module, path: str) -> Digest:
        """Record ``module`` and all below it under ``path``; returns its digest."""
        self._path = path
        self._refuse_hooks(module, path)
        if _is_tuner(module):
            return self._visit_tuner(module, path)
        tensors = {name: self._tensor(tensor) for name, tensor in self._own_tensors(module, path)}
        parts = {"code": self._class_code(type(module), path)}
        values = module.__dict__
        attributes = self.encoder.module_attributes(module, path)
        if attributes is not None:
            parts["attributes"] = attributes
        if not path and _library.patches:
            parts["patches"] = digest_canonical({name: digest.value for name, digest in _library.patches.items()})
        if extra := self._extra_state(module, path):
            parts["extra"] = digest_canonical(extra)
        # A place is kept before the children's, so that the manifest is in the order of the model's own traversal.
        self.modules[path] = _PENDING
        children = []
        for name, child in values["_modules"].items():
            if child is not None:
                children.append([name, self.visit(child, f"{path}.{name}" if path else name)])
        return self._record(path, _class_name(type(module)), tensors, parts, children)

    def _record(self, path: str, class_name: str, tensors: dict, parts: dict, children: list) -> Digest:
        signature = (class_name, tensors, parts, children)
        known = self._owner._records.get(path)
        if known is None or known[0] != signature:
            content = [
                class_name,
                [[name, tensor.digest.value] for name, tensor in tensors.items()],
                {kind: digest.value for kind, digest in parts.items()},
                [[name, digest.value] for name, digest in children],
            ]
            known = self._owner._records[path] = (signature, ModuleRecord(digest_canonical(content), class_name, tensors, parts))
        self.modules[path] = known[1]
        return known[1].digest

    def _own_tensors(self, module: nn.Module, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        hook = module.__dict__.get("_hf_hook")
        for kind in ("_parameters", "_buffers"):
            for name, tensor in sorted(module.__dict__[kind].items()):
                if tensor is None:
                    continue
                if tensor.is_meta and (weights := _offloaded(hook)) is not None:
                    try:
                        tensor = weights[name]
                    except KeyError as error:
                        raise FingerprintError(path, f"offloaded tensor {name} is not in the weights map") from error
                yield name, tensor

    def _extra_state(self, module: nn.Module, path: str) -> list[Any]:
        """What a class adds to its saved state beside parameters and buffers (bitsandbytes' quantisation state, …)."""
        cls = type(module)
        if cls._save_to_state_dict is nn.Module._save_to_state_dict and cls.get_extra_state is nn.Module.get_extra_state:
            return []
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", True)
        owned = {*module.__dict__["_parameters"], *module.__dict__["_buffers"]}
        return [
            [name, self._tensor(value).digest.value if isinstance(value, torch.Tensor) else self.encoder.encode(value, path)]
            for name, value in sorted(saved.items())
            if name not in owned
        ]

    def _visit_tuner(self, module: Any, path: str) -> Digest:
        """A PEFT layer: its base layer while no adapter acts, else base layer and acting adapters in order, names left out."""
        if not type(module).__module__.startswith(_TUNERS):
            raise FingerprintError(path, f"adapter of unknown kind {type(module).__name__}", "unsupported")
        self.modules[path] = _PENDING
        base = self.visit(module.base_layer, f"{path}.base_layer" if path else "base_layer")
        self._path = path
        inner = self.modules[f"{path}.base_layer" if path else "base_layer"]
        names = [
            name for name in module.active_adapters if any(name in getattr(module, kind) for kind in module.adapter_layer_names)
        ]
        merged = list(module.merged_adapters)
        if merged and module.disable_adapters:
            raise FingerprintError(path, "merged adapters that are disabled are unmerged by the next forward", "unsupported")
        if module.disable_adapters or not names or merged:
            # Merged weights lie in the base layer, and the forward calls nothing but the base layer.
            self.modules[path] = inner
            return base
        adapters = []
        tensors: dict[str, TensorRecord] = {}
        for adapter in names:
            acting = []
            for kind in (*module.adapter_layer_names, *module.other_param_names):
                holder = getattr(module, kind, None)
                if holder is None or adapter not in holder:
                    continue
                value = holder[adapter]
                if isinstance(value, nn.Module):
                    acting.append([kind, self.visit(value, f"{path}.{kind}.{adapter}").value])
                elif isinstance(value, torch.Tensor):
                    tensors[f"{kind}.{adapter}"] = self._tensor(value)
                    acting.append([kind, tensors[f"{kind}.{adapter}"].digest.value])
                else:
                    acting.append([kind, self.encoder.encode(value, path)])
            adapters.append(acting)
        switches = {
            name: self.encoder.encode(_of_adapters(value, names), path)
            for name, value in sorted(module.__dict__.items())
            if name in ("fan_in_fan_out", "use_dora", "use_rslora", "lora_bias", "scaling", "cast_input_dtype_enabled")
        }
        if any(adapter in (getattr(module, "lora_variant", None) or {}) for adapter in names):
            switches["variant"] = [
                type(module.lora_variant[name]).__qualname__ if name in module.lora_variant else "" for name in names
            ]
        parts = {
            "code": self._class_code(type(module), path),
            "adapter": digest_canonical([adapters, switches]),
        }
        return self._record(path, _class_name(type(module)), tensors, parts, [["base_layer", base]])

    # --- code ----------------------------------------------------------------------------------------------------------

    def _class_code(self, cls: type, path: str) -> Digest:
        found = self._classes.get(cls)
        if found is None:
            try:
                found = self._classes[cls] = _library.digest(cls) if is_library_class(cls) else self._user.digest(cls)
            except FingerprintError as error:
                raise FingerprintError(path, error.problem, error.reason) from error
        return found

    def _encode_code(self, value: Any, path: str) -> Any:
        """Canonical value of a function or class that a module holds as an attribute (an activation, say)."""
        if isinstance(value, type) and is_library_class(value):
            return ["class", f"{value.__module__}.{value.__qualname__}"]
        try:
            return ["code", self._user.digest(value).value]
        except FingerprintError as error:
            raise FingerprintError(path, error.problem, error.reason) from error

    def _encode_object(self, value: Any, path: str | None = None) -> Any:
        path = self._path if path is None else path
        if isinstance(value, torch.Tensor):
            return ["tensor", self._tensor(value).digest.value]
        if isinstance(value, nn.Module):
            # Held outside `_modules` (in a list, a closure): hashed in place, guarded against cycles by the walk's own paths.
            return ["module", self.held(value, path)]
        if isinstance(value, (torch.dtype, torch.Size, torch.memory_format, torch.layout)):
            return ["torch", str(value)]
        if isinstance(value, torch.device):
            return ["device"]  # where a module runs is never keyed; the device's type is part of the environment
        raise FingerprintError(
            path, f"attribute of type {type(value).__module__}.{type(value).__qualname__} cannot be hashed exactly"
        )

    def held(self, module: nn.Module, path: str) -> bytes:
        """Digest of a module that is reachable other than as a child."""
        mine = f"{path}.<held {id(module)}>"
        if mine in self.modules or any(module is known for known in self._holding):
            return b"cycle"
        self._holding.append(module)
        modules, self.modules = self.modules, {}
        try:
            return self.visit(module, "").value
        finally:
            self.modules = modules
            self._holding.pop()
            self._path = path

    @functools.cached_property
    def _holding(self) -> list[nn.Module]:
        return []

    def _refuse_hooks(self, module: nn.Module, path: str) -> None:
        values = module.__dict__
        if module.training:
            raise FingerprintError(path, f"{type(module).__name__} is in training mode; call model.eval()", "training")
        for kind in _HOOK_DICTS:
            for hook in (values.get(kind) or {}).values():
                if not _module_of(hook).startswith(_HARMLESS_HOOKS):
                    raise FingerprintError(
                        path, f"{kind[1:]}: {_module_of(hook)}.{getattr(hook, '__qualname__', type(hook).__name__)}", "hook"
                    )
        accelerate = values.get("_hf_hook")
        if accelerate is not None and any(
            type(hook).__module__ != "accelerate.hooks" for hook in getattr(accelerate, "hooks", [accelerate])
        ):
            raise FingerprintError(path, f"hook {type(accelerate).__name__}", "hook")
        for name, value in values.items():
            if callable(value) and isinstance(getattr(type(module), name, None), (types.FunctionType, types.MethodType)):
                if hasattr(value, ORIGINAL) or (name == "forward" and accelerate is not None and _is_accelerates(value, module)):
                    continue
                raise FingerprintError(path, f"the instance has its own {name}()", "patched")


_PENDING = ModuleRecord(Digest(bytes(16)), "")


def _hash_tensor(tensor: torch.Tensor) -> TensorRecord:
    dtype = _dtype_name(tensor.dtype)
    return TensorRecord(leaf_digest(dtype, tuple(tensor.shape), tensor_bytes(tensor)), dtype, tuple(tensor.shape), tensor.nbytes)


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """A tensor's row-major bytes as a uint8 array: a view for contiguous tensors in host memory, else a copy."""
    tensor = tensor.detach().as_subclass(torch.Tensor)
    if tensor.is_quantized or tensor.is_sparse or tensor.layout != torch.strided:
        raise FingerprintError("", f"layout {tensor.layout} has no row-major bytes")
    tensor = tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and not hasattr(
        tensor.data if isinstance(tensor, nn.Parameter) else tensor, "__tensor_flatten__"
    )


def _is_bitsandbytes(tensor: torch.Tensor) -> bool:
    # Their bytes are plain; what else they need (quant_state, SCB) is in the saved state and hashed as `extra`.
    return type(tensor).__module__.startswith("bitsandbytes.")


def _owned_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for child in module.modules():
        for kind in ("_parameters", "_buffers"):
            for tensor in child.__dict__[kind].values():
                if tensor is not None:
                    yield tensor


def _offloaded(hook: Any) -> Any:
    """The map from which an accelerate hook fetches a module's offloaded tensors, if it has one."""
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "weights_map", None) is not None:
            return one.weights_map
    return None


def _is_accelerates(forward: Any, module: nn.Module) -> bool:
    inner = forward.func if isinstance(forward, functools.partial) else forward
    old = module.__dict__.get("_old_forward")
    own = getattr(old, "__func__", None) is type(module).forward or hasattr(old, ORIGINAL)
    return inner.__module__ == "accelerate.hooks" or (inner.__code__.co_filename.endswith("accelerate/hooks.py") and own)


def _is_tuner(module: nn.Module) -> bool:
    return (
        hasattr(type(module), "merge")
        and hasattr(type(module), "adapter_layer_names")
        and "base_layer" in module.__dict__["_modules"]
    )


def _is_peft_model(module: Any) -> bool:
    return any(cls.__module__ == "peft.peft_model" and cls.__name__ == "PeftModel" for cls in type(module).__mro__)


def _of_adapters(value: Any, names: list[str]) -> Any:
    return [value.get(name) for name in names] if isinstance(value, dict) else value


def _module_of(hook: Any) -> str:
    inner = hook.func if isinstance(hook, functools.partial) else hook
    return getattr(inner, "__module__", None) or type(inner).__module__


def _class_name(cls: type) -> str:
    # The module of user code may hold a path or a commit (remote code does); its content is in the code's digest.
    return f"{cls.__module__}.{cls.__qualname__}" if is_library_class(cls) else cls.__qualname__


def _refuse_interception() -> None:
    """Refuse while something stands between every module, or every operation, and its result."""
    for name in _GLOBAL_HOOKS:
        for hook in getattr(nn.modules.module, name).values():
            if not _module_of(hook).startswith(_HARMLESS_HOOKS):
                raise FingerprintError("", f"global hook {_module_of(hook)}", "hook")
    if torch.overrides._get_current_function_mode_stack() and any(
        not type(mode).__module__.startswith("torch.utils._device") for mode in torch.overrides._get_current_function_mode_stack()
    ):
        raise FingerprintError("", "a torch function mode is active", "hook")
    if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        raise FingerprintError("", "a torch dispatch mode is active", "hook")


def _describe(outer: nn.Module, module: nn.Module) -> dict[str, Any]:
    """What a person wants to know about a model; not hashed."""
    config = getattr(module, "config", None)
    seen: dict[int, torch.Tensor] = {id(p): p for p in module.parameters()}
    about = {
        "class": type(module).__qualname__,
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "parameters": sum(p.numel() for p in seen.values()),
        "bytes": sum(p.nbytes for p in seen.values()),
        "adapter": ",".join(outer.active_adapters) if _is_peft_model(outer) else "",
        "quantisation": str(getattr(getattr(config, "quantization_config", None), "quant_method", "") or ""),
    }
    return about
