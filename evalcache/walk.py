"""One pass over a live model: what `weights.py` makes a manifest of.

What makes the next pass cheap: unchanged Python state is recognised by comparison with the last one's (`Memory`), tensors in host
memory are hashed at memory speed, and tensors on a device are summed there (`device_sums.py`).
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from evalcache.adapters import acting_adapters, adapter_state, is_adapted_layer
from evalcache.attributes import AttributeEncoder
from evalcache.canonical import digest_canonical
from evalcache.code import is_library_class, keyed_name, origin_of
from evalcache.device_sums import device_sums
from evalcache.digest import Digest
from evalcache.errors import FingerprintError
from evalcache.interception import refuse_hooks
from evalcache.kernels import kernel_tables
from evalcache.library_code import LibraryCode
from evalcache.manifest import ModuleRecord, TensorRecord
from evalcache.structs import Struct, field
from evalcache.tensors import hash_tensor, hash_tensors, is_readable, module_tensors, owned_tensors, special_record
from evalcache.user_code import UserCode, names_read
from evalcache.wrappers import awake

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while tensors are hashed."""

_PENDING = ModuleRecord(Digest(bytes(16)), "")

LIBRARY = LibraryCode()
SCANNING = threading.RLock()  # libraries are scanned once for all models, by one thread at a time


class Memory(Struct):
    """What passes over one model leave to the next: records of modules by path, sums of tensors on a device, kernels."""

    records: dict[str, tuple[Any, ModuleRecord]] = field(default_factory=dict)
    sums: dict[int, tuple[weakref.ref[torch.Tensor], Any, TensorRecord]] = field(default_factory=dict)
    kernels: tuple[Any, Digest] | None = None


class Walk:
    """One pass over a model: `hash_tensors`, then `visit`, which fills `modules`."""

    def __init__(self, memory: Memory, progress: Progress | None, module: nn.Module) -> None:
        self._memory = memory
        self._progress = progress
        self._leaves: dict[int, TensorRecord] = {}
        self._kept: list[Any] = []
        self._classes: dict[type, Digest] = {}
        self._user = UserCode(LIBRARY, self._encode_object)
        self._root: nn.Module | None = None
        self._holding: list[nn.Module] = []
        self._above: set[int] = set()
        self.path = ""
        own = [cls for cls in {type(one) for one in module.modules()} if not is_library_class(cls)]
        read = frozenset[str]().union(*map(names_read, own))
        self.encoder = AttributeEncoder(self._encode_code, self._encode_object, read)
        self.modules: dict[str, ModuleRecord] = {}
        self.references: set[str] = set()
        """Paths of modules that others, or their code, reach otherwise than as children."""

    # --- tensors -------------------------------------------------------------------------------------------------------

    def hash_tensors(self, module: nn.Module) -> None:
        """Hash all plain tensors first: many bytes in threads, device ones in one round trip."""
        host: dict[int, torch.Tensor] = {}
        device: dict[int, torch.Tensor] = {}
        for tensor in owned_tensors(module):
            if is_readable(tensor):
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

        for key, record in hash_tensors(host):
            finished(key, host[key], record)
        for key, total_sum in device_sums(device).items():
            tensor = device[key]
            known = self._memory.sums.get(key)
            signature = (total_sum, tensor.dtype, tuple(tensor.shape), tensor.device)
            if known is None or known[0]() is not tensor or known[1] != signature:
                known = self._memory.sums[key] = (weakref.ref(tensor), signature, hash_tensor(tensor))
            finished(key, tensor, known[2])
        if len(self._memory.sums) > 2 * len(device):
            self._memory.sums = {key: value for key, value in self._memory.sums.items() if key in device}

    def _tensor(self, tensor: torch.Tensor) -> TensorRecord:
        found = self._leaves.get(id(tensor))
        if found is None:
            self._kept.append(tensor)
            found = special_record(tensor, self.path, self._tensor, self.encoder.encode)
            self._leaves[id(tensor)] = found
        return found

    # --- modules -------------------------------------------------------------------------------------------------------

    def visit(self, module: nn.Module, path: str) -> Digest:
        """Record ``module`` and all below it under ``path``; returns its digest."""
        self.path = path
        cls = type(module)
        if self._root is None:
            self._root = module
        if id(module) in self._above:
            raise FingerprintError(path, "a module inside itself")
        compiled = refuse_hooks(module, path)
        if is_adapted_layer(cls):
            return self._visit_adapted(module, path)
        # Before the tensors: saving makes bitsandbytes undo the layout that its last forward on a CPU chose.
        extra = self._extra_state(module, path)
        tensors = {name: self._tensor(tensor) for name, tensor in module_tensors(module, path)}
        parts = {"code": self.class_code(cls, path)}
        attributes = self.encoder.module_attributes(module, path)
        if attributes is not None:
            parts["attributes"] = attributes
        if not is_library_class(cls) and (marks := self._marks(module, path)):
            parts["marks"] = digest_canonical(marks)
        if compiled:
            parts["compiled"] = digest_canonical(compiled)
        if extra:
            parts["extra"] = digest_canonical(extra)
        # A place is kept before the children's, so that the manifest is in the order of the model's own traversal.
        self.modules[path] = _PENDING
        children = []
        self._above.add(id(module))
        for name, child in module.__dict__["_modules"].items():
            child = child if child is None else awake(child)
            if child is not None:
                children.append([name, self.visit(child, f"{path}.{name}" if path else name)])
        self._above.discard(id(module))
        if not path and module is self._root:
            self._add_runtime(parts)
        return self._record(path, keyed_name(cls), tensors, parts, children)

    def _record(self, path: str, name: str, tensors: dict, parts: dict, children: list) -> Digest:
        signature = (name, tensors, parts, children)
        known = self._memory.records.get(path)
        if known is None or known[0] != signature:
            content = [
                name,
                [[name, tensor.digest.value] for name, tensor in tensors.items()],
                {kind: digest.value for kind, digest in parts.items()},
                [[name, digest.value] for name, digest in children],
            ]
            known = self._memory.records[path] = (signature, ModuleRecord(digest_canonical(content), name, tensors, parts))
        self.modules[path] = known[1]
        return known[1].digest

    def _add_runtime(self, parts: dict[str, Digest]) -> None:
        """What every module of the model may call, and the kernels that its configurations choose by name."""
        transformers = any(cls.__module__.startswith("transformers.") for kind in self._classes for cls in kind.__mro__)
        parts["runtime"] = LIBRARY.runtime(transformers=transformers)
        if self.encoder.kernels:
            parts["kernels"] = self._kernels()
        if differing := self.encoder.differing_kernels():
            parts["kernels of modules"] = digest_canonical(differing)

    def _kernels(self) -> Digest:
        """The tables from which kernels are chosen: the library's own functions, and of foreign ones those that are chosen."""
        found = kernel_tables(LIBRARY)
        signature = (found, self.encoder.kernels)
        if self._memory.kernels is not None and self._memory.kernels[0] == signature:
            return self._memory.kernels[1]
        tables = []
        foreign = False
        for name, entries in found:
            hashed = []
            for key, function in entries:
                if isinstance(function, types.FunctionType) and origin_of(function) == "transformers":
                    hashed.append([key, LIBRARY.function(function)])
                elif key in self.encoder.kernels:
                    hashed.append([key, self._encode_code(function, "")])
                    foreign = True
            tables.append([name, hashed])
        digest = digest_canonical(tables)
        # The library's functions are guarded; a user's may reach anything, and are looked at each time.
        self._memory.kernels = None if foreign else (signature, digest)
        return digest

    def _marks(self, module: nn.Module, path: str) -> list[Any]:
        """What a user's module may read from its tensors beside their bytes: attributes that were set on them."""
        owned = {**module.__dict__["_parameters"], **module.__dict__["_buffers"]}
        return [
            [name, key, self.encoder.encode(value, path)]
            for name, tensor in sorted(owned.items())
            if tensor is not None
            for key, value in sorted(vars(tensor).items())
            if key != "_is_hf_initialized"
        ]

    def _extra_state(self, module: nn.Module, path: str) -> list[Any]:
        """What a class adds to its saved state beside parameters and buffers (bitsandbytes' quantisation state, …)."""
        cls = type(module)
        if cls._save_to_state_dict is nn.Module._save_to_state_dict and cls.get_extra_state is nn.Module.get_extra_state:
            return []
        saved: dict[str, Any] = {}
        state = getattr(module.__dict__["_parameters"].get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            # Saving makes bitsandbytes undo the layout that its first forward on a CPU chose, and the next one answers otherwise.
            saved = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        else:
            module._save_to_state_dict(saved, "", True)
        owned = {*module.__dict__["_parameters"], *module.__dict__["_buffers"]}
        return [
            [name, self._tensor(value).digest.value if isinstance(value, torch.Tensor) else self.encoder.encode(value, path)]
            for name, value in sorted(saved.items())
            if name not in owned
        ]

    def _visit_adapted(self, module: Any, path: str) -> Digest:
        """A PEFT layer: its base layer while no adapter acts, else the base layer and the acting adapters in order."""
        names = acting_adapters(module, path)
        code = self.class_code(type(module), path)  # raises if it was patched, acting or not
        if not names:
            return self.visit(module.base_layer, path)
        self.modules[path] = _PENDING
        base = self.visit(module.base_layer, f"{path}.base_layer" if path else "base_layer")
        acting: list[Any] = []
        tensors: dict[str, TensorRecord] = {}
        for kind, value in adapter_state(module, names):
            self.path = path
            if isinstance(value, nn.Module):
                acting.append([kind, self.visit(value, f"{path}.{kind}" if path else kind).value])
            elif isinstance(value, torch.Tensor):
                tensors[kind] = self._tensor(value)
            else:
                acting.append([kind, self.encoder.encode(value, path)])
        parts = {"code": code, "adapter": digest_canonical([len(names), acting])}
        return self._record(path, keyed_name(type(module)), tensors, parts, [["base_layer", base]])

    # --- code and objects ----------------------------------------------------------------------------------------------

    def class_code(self, cls: type, path: str) -> Digest:
        """Digest of a module's class. Raises `FingerprintError` with the module's path."""
        found = self._classes.get(cls)
        if found is None:
            try:
                found = self._classes[cls] = LIBRARY.digest(cls) if is_library_class(cls) else self._user.digest(cls)
            except FingerprintError as error:
                raise FingerprintError(path, error.problem, error.reason) from error
        return found

    def _encode_code(self, value: Any, path: str) -> Any:
        """Canonical value of a function or class that a module holds as an attribute (an activation, say)."""
        try:
            return ["code", self._user.digest(value).value]
        except FingerprintError as error:
            raise FingerprintError(path, error.problem, error.reason) from error

    def _encode_object(self, value: Any, path: str | None = None) -> Any:
        """Canonical value of an object that an attribute holds (``path`` is given) or that the user's code reaches."""
        inside_code = path is None
        path = self.path if path is None else path
        if isinstance(value, torch.Tensor):
            return ["tensor", self._tensor(value).digest.value]
        if isinstance(value, nn.Module):
            return ["module", self._held(value, path)]
        if isinstance(value, (torch.dtype, torch.Size, torch.memory_format, torch.layout)):
            return ["torch", str(value)]
        if isinstance(value, torch.device):
            return ["device"]  # where a module runs is never keyed; the device's type is part of the environment
        if type(value).__module__ == "bitsandbytes.functional" and hasattr(value, "as_dict"):
            return ["quantisation", self.encoder.encode(value.as_dict(packed=False), path)]
        if inside_code and type(value).__module__ == "numpy":
            return self.encoder.encode(value, path)
        if not inside_code:
            try:
                return self._encode_code(value, path)
            except FingerprintError as error:
                if error.reason != "code":
                    raise
        kind = type(value)
        raise FingerprintError(path, f"an object of type {kind.__module__}.{kind.__qualname__} cannot be hashed exactly")

    def _held(self, module: nn.Module, path: str) -> Any:
        """A module that is reachable other than as a child: by its place in the model if it has one, else by its content."""
        place = self._places.get(id(module))
        if place is not None:
            self.references.add(place)
            return ["at", place]
        if any(module is held for held in self._holding):
            return ["held", [module is held for held in self._holding].index(True)]
        self._holding.append(module)
        modules, self.modules = self.modules, {}
        above, self._above = self._above, set()
        try:
            return ["content", self.visit(module, f"{path}.<held>").value]
        finally:
            self.modules, self._above = modules, above
            self._holding.pop()
            self.path = path

    @functools.cached_property
    def _places(self) -> dict[int, str]:
        return {id(module): name for name, module in self._root.named_modules()} if self._root is not None else {}
