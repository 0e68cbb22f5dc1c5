"""A live `nn.Module` → Manifest: every byte of every tensor, and all else in the modules that shapes their answer.

The live module is the truth: what a checkpoint's files say may be cast, fused, quantised or adapted while loading. One walk
(`walk.py`) serves both the first fingerprint and every later check.

What cannot be hashed exactly raises `FingerprintError`, which names the module.
"""

from __future__ import annotations

import importlib
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from evalcache.adapters import is_peft_model
from evalcache.canonical import digest_canonical
from evalcache.code import is_library_class, origin_of
from evalcache.errors import FingerprintError
from evalcache.interception import refuse_interception, refuse_wrapper
from evalcache.kernels import kernel_tables
from evalcache.manifest import Manifest
from evalcache.tensors import tensor_bytes
from evalcache.walk import LIBRARY, SCANNING, Memory, Progress, Walk
from evalcache.wrappers import unwrap, unwrapped

__all__ = ["Fingerprinter", "fingerprint", "library_digests", "tensor_bytes", "unwrap"]


def fingerprint(module: nn.Module, progress: Progress | None = None) -> Manifest:
    """The manifest of a live module.

    Args:
        module: any module; wrappers that change nothing but the place are looked through.
        progress: told about bytes as they are hashed.

    Raises:
        FingerprintError: a tensor, attribute, hook or method that cannot be hashed exactly; names the module.

    Cost: one pass over all bytes (20+ GB/s in host memory; a copy to the host for each tensor on a device), some 10 µs a
    module, and once per process some 100 ms for the code of the libraries.
    """
    return Fingerprinter(module).manifest(progress)


def library_digests(classes: Sequence[str]) -> bytes:
    """Digest of the code of library classes as it is in this process now, for a model that is not loaded yet.

    Args:
        classes: ``module:QualifiedName`` each; their modules are imported.

    Raises:
        FingerprintError: something is patched or hooked, or a class is not a library's.
    """
    refuse_interception()
    modules = {name: importlib.import_module(name.partition(":")[0]) for name in classes}
    with SCANNING:
        LIBRARY.guard()
        return _library_digests(modules)


def _library_digests(classes: Mapping[str, types.ModuleType]) -> bytes:
    parts: list[Any] = []
    for name, module in classes.items():
        cls: Any = module
        for part in name.partition(":")[2].split("."):
            cls = getattr(cls, part, None)
        if not isinstance(cls, type) or not is_library_class(cls):
            raise FingerprintError("", f"{name} is no class of a library", "code")
        parts.append([name, LIBRARY.digest(cls).value])
    transformers = any(name.startswith("transformers.") for name in classes)
    runtime = LIBRARY.runtime(transformers=transformers).value
    # No configuration is there yet to say which kernel it chooses: a table that somebody added to is refused.
    tables = []
    for name, entries in kernel_tables(LIBRARY):
        for key, one in entries:
            if not isinstance(one, types.FunctionType) or origin_of(one) not in ("transformers", "torch"):
                raise FingerprintError("", f"kernel {key!r} of {name} comes from elsewhere", "code")
        tables.append([name, [[key, LIBRARY.function(one)] for key, one in entries]])
    return digest_canonical([parts, runtime, tables]).value


class Fingerprinter:
    """Fingerprints one model again and again: `manifest` reads every byte each time, and reuses what comparison allows.

    Not thread-safe; hold one per model. It does not keep the model alive.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._memory = Memory()
        self._about: tuple[Any, dict[str, Any]] = (None, {})

    def manifest(self, progress: Progress | None = None) -> Manifest:
        """The manifest of the model as it is now. Raises and costs: see `fingerprint`."""
        refuse_interception()
        outer = self._module()
        if outer is None:
            raise FingerprintError("", "the model is gone")
        *wrappers, module = unwrapped(outer)
        walk = Walk(self._memory, progress, module)
        walk.hash_tensors(module)
        try:
            with SCANNING:
                LIBRARY.guard()
                for wrapper in wrappers:
                    refuse_wrapper(wrapper, module)
                    if not is_library_class(type(wrapper)):
                        raise FingerprintError("", f"{type(wrapper).__qualname__}, a wrapper of one's own", "patched")
                    if type(wrapper).__name__ != "OptimizedModule":
                        LIBRARY.digest(type(wrapper))  # raises if it was patched
                walk.visit(module, "")
            manifest = Manifest(walk.modules, walk.encoder.config_digests())
        except RecursionError as error:
            raise FingerprintError(walk.path, "nested too deeply, or inside itself") from error
        config = getattr(module, "config", None)
        adapter = ",".join(outer.active_adapters) if is_peft_model(outer) else ""
        known = (manifest.root, getattr(config, "_name_or_path", None), adapter)
        if self._about[0] != known:
            self._about = known, _describe(module, adapter)
        about = self._about[1] | ({"references": sorted(walk.references)} if walk.references else {})
        return Manifest(manifest.modules, manifest.configs, about)


def _describe(module: nn.Module, adapter: str) -> dict[str, Any]:
    """What a person wants to know about a model; not hashed."""
    config = getattr(module, "config", None)
    seen: dict[int, torch.Tensor] = {id(p): p for p in module.parameters()}
    return {
        "class": type(module).__qualname__,
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "parameters": sum(p.numel() for p in seen.values()),
        "bytes": sum(p.nbytes for p in seen.values()),
        "adapter": adapter,
        "quantisation": str(getattr(getattr(config, "quantization_config", None), "quant_method", "") or ""),
    }
