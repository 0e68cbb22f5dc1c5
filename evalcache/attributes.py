"""A module's attributes → canonical value: `eps`, `scaling`, configs, activation functions, and all else that is no tensor.

Everything in a module's ``__dict__`` counts unless it is on the list of names that never shape an answer; what has no exact
encoding raises. Modules whose attributes are plain values are recognised by comparison with the last walk.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from typing import Any

from evalcache.canonical import digest_canonical
from evalcache.code import constant_value
from evalcache.digest import Digest

# Tensors, children and hooks are visited by weights.py itself.
_STRUCTURE = frozenset(
    "_parameters _buffers _modules _non_persistent_buffers_set _backward_pre_hooks _backward_hooks _is_full_backward_hook "
    "_forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks _forward_pre_hooks_with_kwargs "
    "_state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks training".split()
)
# Names, loading, saving, placement and training: never part of an answer.
_NEVER = frozenset(
    "name_or_path _is_hf_initialized _tp_plan _ep_plan _pp_plan _fsdp_plan _tp_size _device_mesh all_tied_weights_keys "
    "_keep_in_fp32_modules _keep_in_fp32_modules_strict _no_split_modules _skip_keys_device_placement "
    "_keys_to_ignore_on_load_unexpected _keys_to_ignore_on_load_missing _keys_to_ignore_on_save _tied_weights_keys "
    "_dynamic_tied_weights_keys loss_type _loss_function gradient_checkpointing _gradient_checkpointing_func "
    "_require_grads_hook _require_grads_hooks hf_device_map _hf_hook _old_forward hf_quantizer quantization_method is_quantized "
    "is_loaded_in_4bit is_loaded_in_8bit warnings_issued "
    "model_tags _hf_peft_config_loaded peft_config generation_config _compiled_call_impl _output_capturing_hooks_installed "
    "_is_torch_compile _use_kernels "
    "_previous_max_cache_length _is_torch_compile _weight_conversions".split()
)
_NEVER_IN_CONFIG = frozenset(
    "_name_or_path name_or_path transformers_version _commit_hash architectures _attn_implementation_autoset _post_init_done "
    # Kernels are part of the environment: the same weights under another kernel are the same model.
    "_attn_implementation_internal _experts_implementation_internal "
    "id2label label2id problem_type finetuning_task task_specific_params torchscript _auto_class auto_map".split()
)
# Of these a user's code may read all but the following.
_NEVER_READ = frozenset(
    "_hf_hook _old_forward _compiled_call_impl hf_device_map _require_grads_hook _require_grads_hooks generation_config "
    "_attn_implementation_internal _experts_implementation_internal".split()
)
_KERNELS = ("_attn_implementation_internal", "_experts_implementation_internal")
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)
_FAST = frozenset({bool, int, str, type(None)})


class AttributeEncoder:
    """Encodes the attributes of one model's modules during one walk.

    Args:
        encode_code: canonical value of a function or class. encode_object: of a tensor, module or torch value, or raises.
        read: names that the user's code reads: they count, whatever they mean to a library.
    """

    def __init__(
        self,
        encode_code: Callable[[Any, str], Any],
        encode_object: Callable[[Any, str], Any],
        read: Set[str] = frozenset(),
    ) -> None:
        self._read = read - _NEVER_READ
        self._encode_code = encode_code
        self._encode_object = encode_object
        self._configs: dict[int, Digest] = {}
        self._holders: dict[str, Digest] = {}
        self._held: dict[str, Any] = {}
        self._inside: set[int] = set()
        self._configuring = 0
        self.kernels: set[str] = set()
        """Names of the kernels that the configs choose; the functions behind them are in tables that anybody may add to."""

    def module_attributes(self, module: Any, path: str) -> Digest | None:
        """Digest of a module's own attributes, None if there are none. Configs are kept apart, for the manifest's root."""
        names: list[Any] = []
        rest: dict[str, Any] = {}
        for name, value in module.__dict__.items():
            if name in _STRUCTURE or (name in _NEVER and name not in self._read):
                continue
            kind = type(value)
            if kind in _FAST:
                names += (name, kind, value)
            elif kind is float:
                names += (name, kind, value.hex())  # -0.0 == 0.0, and yet they divide differently
            elif not _is_ours_or_instance_method(module, name, value):
                rest[name] = value
        for name in _slots(type(module)):
            if hasattr(module, name):
                rest[f"slot {name}"] = getattr(module, name)
        others: dict[str, Any] = {}
        for name, value in rest.items():
            if is_config(value):
                others[name] = ["config", self._config(value, f"{path}.{name}" if path else name)]
            else:
                others[name] = self.encode(value, path)
        if not names and not others:
            return None
        fast = tuple(names)
        if not others:
            found = _known.get(fast)
            if found is None:
                if len(_known) > 100_000:
                    _known.clear()
                found = _known[fast] = self._digest(fast, others)
            return found
        return self._digest(fast, others)

    def _digest(self, fast: tuple[Any, ...], others: dict[str, Any]) -> Digest:
        plain = {fast[i]: [fast[i + 1].__name__, _exact(fast[i + 2])] for i in range(0, len(fast), 3)}
        return digest_canonical([plain, others])

    def config_digests(self) -> dict[str, Digest]:
        """Digests of the configs by the path that holds them, those left out that equal the one of the enclosing module."""
        kept: dict[str, Digest] = {}
        for path, digest in self._holders.items():
            if self._enclosing(path, self._holders) != digest:
                kept[path] = digest
        return kept

    def differing_kernels(self) -> list[list[Any]]:
        """The kernels that configs choose otherwise than the enclosing module's, where the environment does not say so.

        It says what the outermost config and those in it choose. A module may hold a copy.
        """
        covered: set[int] = set()
        waiting = [config for path, config in self._held.items() if path == "config"]
        while waiting:
            config = waiting.pop()
            covered.add(id(config))
            inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
            waiting += [one for one in inside if is_config(one) and id(one) not in covered]
        chosen = {path: [str(vars(config).get(name)) for name in _KERNELS] for path, config in self._held.items()}
        return [
            [path, choice]
            for path, choice in chosen.items()
            if id(self._held[path]) not in covered and self._enclosing(path, chosen) != choice
        ]

    @staticmethod
    def _enclosing(path: str, values: Mapping[str, Any]) -> Any:
        # `a.b.config` is enclosed by `a.config` and `config`; a module without a config of its own passes it through.
        parts = path.split(".")
        above = (".".join([*parts[:depth], parts[-1]]) for depth in range(len(parts) - 2, -1, -1))
        return next((values[name] for name in above if name in values), None)

    def _config(self, config: Any, path: str) -> None:
        # Only the root of the manifest holds configs: else one edited field would make every module look changed.
        if id(config) not in self._configs:
            self._configs[id(config)] = digest_canonical(self.config_value(config, path))
        self._holders[path] = self._configs[id(config)]
        self._held[path] = config

    def config_value(self, config: Any, path: str) -> Any:
        """Canonical value of a config object, nested ones included."""
        if id(config) in self._inside:
            return "cycle"
        self._inside.add(id(config))
        self._configuring += 1
        try:
            for name in _KERNELS:
                chosen = vars(config).get(name)
                self.kernels.update([chosen] if isinstance(chosen, str) else chosen.values() if isinstance(chosen, dict) else ())
            values = {
                name: self.encode(str(value).removeprefix("torch.") if name == "dtype" else value, f"{path}.{name}")
                for name, value in sorted(vars(config).items())
                # Loading repeats the class's own model type in the instance.
                if (name not in _NEVER_IN_CONFIG or name in self._read)
                and not (name == "model_type" and value == type(config).model_type)
            }
        finally:
            self._inside.discard(id(config))
            self._configuring -= 1
        return [self._encode_code(type(config), path), values]

    def encode(self, value: Any, path: str) -> Any:
        """Canonical value of any attribute.

        Raises:
            FingerprintError: there is no exact encoding; names the module.
        """
        kind = type(value)
        if value is None or kind in (bool, str, bytes, float):
            return value
        if kind in (int, complex):
            return constant_value(value)
        if isinstance(value, enum.Enum):
            return ["enum", self._encode_code(kind, path), value.name, self.encode(value.value, path)]
        if isinstance(value, _CODE):
            return self._encode_code(value, path)
        if is_config(value):
            return self.config_value(value, path)
        if kind in (list, tuple):
            # A saved configuration comes back with lists for tuples, and with sorted keys.
            return ["list" if self._configuring else kind.__name__, *[self.encode(item, path) for item in value]]
        if kind in (set, frozenset):
            return ["set", *sorted(digest_canonical(self.encode(item, path)).value for item in value)]
        if kind in (dict, OrderedDict, types.MappingProxyType):
            items = [[self.encode(key, path), self.encode(item, path)] for key, item in value.items()]
            return ["dict", *(sorted(items, key=_order) if self._configuring else items)]
        if kind.__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return ["numpy", str(value.dtype), list(value.shape), value.tobytes()]
        return self._encode_object(value, path)


_known: dict[tuple[Any, ...], Digest] = {}


@functools.cache
def _slots(cls: type) -> tuple[str, ...]:
    """Names of values that a module keeps beside its ``__dict__``."""
    found = [name for base in cls.__mro__ for name, kind in vars(base).items() if isinstance(kind, types.MemberDescriptorType)]
    return tuple(sorted(set(found)))


def _exact(value: Any) -> Any:
    return constant_value(value) if type(value) is int else value


def _is_ours_or_instance_method(module: Any, name: str, value: Any) -> bool:
    """Methods set on the instance were judged by weights.py already: what is left is ours or accelerate's."""
    return callable(value) and isinstance(getattr(type(module), name, None), types.FunctionType)


def is_config(value: Any) -> bool:
    """Whether it is a configuration of transformers, of PEFT or of a quantiser."""
    return any(
        cls.__name__ in ("PreTrainedConfig", "PretrainedConfig", "PeftConfigMixin", "QuantizationConfigMixin")
        for cls in type(value).__mro__
    )


def _order(item: list[Any]) -> bytes:
    return digest_canonical(item[0]).value
