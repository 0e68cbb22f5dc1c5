"""What stands between a module and its result: hooks, methods set on an instance, modes, compilation.

None of these is a tensor or a class, and each can change an answer. Those of accelerate, of transformers' output capturing and of
our own are known to change nothing; any other is refused, with the module it was found in.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
from torch import nn

from evalcache.code import is_library_class, is_ours, library_of, origin_of
from evalcache.errors import FingerprintError

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
_HARMLESS_HOOK_FILES = ("/transformers/utils/output_capturing.py", "/accelerate/hooks.py")
# They ask for gradients at a model's input, which a model prepared for training keeps; nothing is computed by them.
_HARMLESS_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
_GRADIENT_FILES = ("/transformers/modeling_utils.py", "/peft/peft_model.py", "/peft/utils/other.py")
_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})
# Methods that say or move something, and compute nothing: torchao sets `extra_repr`, accelerate the others.
_SILENT_METHODS = frozenset("extra_repr to cuda npu mlu sdaa musa xpu neuron".split())


def refuse_interception() -> None:
    """Refuse while something stands between every module, or every operation, and its result.

    Raises:
        FingerprintError: ``hook``.
    """
    for name in _GLOBAL_HOOKS:
        for hook in getattr(nn.modules.module, name).values():
            if not _is_harmless(hook):
                raise FingerprintError("", f"global hook {_described(hook)}", "hook")
    parametrize = sys.modules.get("torch.nn.utils.parametrize")
    if getattr(parametrize, "_cache_enabled", 0):
        raise FingerprintError("", "torch.nn.utils.parametrize.cached() holds weights of its own", "hook")
    for mode in torch.overrides._get_current_function_mode_stack():
        if not type(mode).__module__.startswith("torch.utils._device"):
            raise FingerprintError("", f"torch function mode {type(mode).__qualname__} is active", "hook")
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        raise FingerprintError("", f"torch dispatch mode {type(mode).__qualname__} is active", "hook")


def refuse_hooks(module: nn.Module, path: str, inner: nn.Module | None = None) -> str:
    """Refuse foreign hooks and methods of one module.

    Args:
        module: at ``path`` of the model. inner: a module whose own methods it may borrow.

    Returns:
        What was compiled in place, empty for an ordinary module.

    Raises:
        FingerprintError: ``training``, ``hook``, ``patched`` or ``sharded``.
    """
    values = module.__dict__
    if _is_sharded(type(module)):
        raise FingerprintError(path, f"{type(module).__name__}: this process sees one shard only", "sharded")
    if "training" not in values:
        raise FingerprintError(path, f"{type(module).__name__} keeps its state outside of Python", "unsupported")
    if values["training"] and not _ignores_training(type(module)):
        raise FingerprintError(path, f"{type(module).__name__} is in training mode; call model.eval()", "training")
    for kind in _HOOK_DICTS:
        if hooks := values.get(kind):
            for hook in hooks.values():
                if not _is_harmless(hook):
                    raise FingerprintError(path, f"{kind[1:]}: {_described(hook)}", "hook")
    accelerate = values.get("_hf_hook")
    if accelerate is not None and any(not _is_accelerate_class(hook) for hook in getattr(accelerate, "hooks", [accelerate])):
        raise FingerprintError(path, f"hook {type(accelerate).__name__}", "hook")
    compiled = []
    if (call := values.get("_compiled_call_impl")) is not None:
        if not _compiles(call, module, "_call_impl"):
            raise FingerprintError(path, "the instance has a compiled call that is not its own", "patched")
        compiled.append("call")
    cls = type(module)
    for name, value in values.items():
        if callable(value) and isinstance(getattr(cls, name, None), (types.FunctionType, types.MethodType)):
            if name in _SILENT_METHODS or is_ours(value) or _is_own_method(value, module, name):
                continue
            if name == "forward" and accelerate is not None and _is_accelerates(value, module):
                continue
            if inner is not None and _is_own_method(value, inner, name):
                continue
            if _compiles(value, module, name):
                compiled.append(name)
                continue
            raise FingerprintError(path, f"the instance has its own {name}()", "patched")
    return " ".join(compiled)


def refuse_wrapper(wrapper: nn.Module, inner: nn.Module) -> None:
    """Refuse hooks, methods and foreign backends of a wrapper that is looked through.

    Raises:
        FingerprintError: ``hook`` or ``patched``.
    """
    if type(wrapper).__name__ == "OptimizedModule":  # its `forward` is an instance's by design
        for kind in _HOOK_DICTS:
            for hook in wrapper.__dict__[kind].values():
                if not _is_harmless(hook):
                    raise FingerprintError("", f"{kind[1:]}: {_described(hook)}", "hook")
        if not _is_library_backend(wrapper.__dict__.get("dynamo_ctx")):
            raise FingerprintError("", "compiled by a backend of the user's", "patched")
    else:
        refuse_hooks(wrapper, "", inner)  # PEFT lends the base model's forward to a model whose prompt is disabled


@functools.cache
def _is_sharded(cls: type) -> bool:
    return any(base.__name__ in _SHARDED for base in cls.__mro__)


@functools.cache
def _ignores_training(cls: type) -> bool:
    """Whether a class of torch computes the same in training mode: a list of layers, say, or a linear layer that was put in."""
    if not cls.__module__.startswith("torch.nn.") or not is_library_class(cls):
        return False
    functions = [value for base in cls.__mro__ if base is not nn.Module for value in vars(base).values()]
    waiting: list[Any] = [one.__code__ for one in functions if isinstance(one, types.FunctionType)]
    while waiting:
        code = waiting.pop()
        if "training" in code.co_names:
            return False
        waiting += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return True


def _is_harmless(hook: Any) -> bool:
    inner = hook.func if isinstance(hook, functools.partial) else hook
    code = getattr(inner, "__code__", None)  # of a bound method too
    if code is None:
        return False
    if origin_of(getattr(inner, "__func__", inner)) == "evalcache":
        return True
    asks_for_gradients = code.co_name in _HARMLESS_HOOKS and code.co_filename.endswith(_GRADIENT_FILES)
    harmless = asks_for_gradients or code.co_filename.endswith(_HARMLESS_HOOK_FILES)
    return harmless and library_of(code.co_filename) is not None


def _is_accelerate_class(hook: Any) -> bool:
    return type(hook).__module__ == "accelerate.hooks" and is_library_class(type(hook))


def _is_accelerates(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward`` is accelerate's, around the class's own."""
    inner = forward.func if isinstance(forward, functools.partial) else forward
    old = module.__dict__.get("_old_forward")
    if not _is_own_method(old, module, "forward") and not is_ours(old):
        return False
    file = inner.__code__.co_filename if isinstance(inner, types.FunctionType) else ""
    return file.endswith("/accelerate/hooks.py") and library_of(file) is not None


def _compiles(value: Any, module: nn.Module, name: str) -> bool:
    """Whether ``value`` is `torch.compile` of the module's own method, by a backend of a library."""
    if not isinstance(value, types.FunctionType) or not value.__code__.co_filename.endswith("/torch/_dynamo/eval_frame.py"):
        return False
    inside = dict(zip(value.__code__.co_freevars, (cell.cell_contents for cell in value.__closure__ or ()), strict=True))
    method = inside.get("fn")
    return _is_own_method(method, module, name) and _is_library_backend(inside.get("self"))


def _is_own_method(value: Any, module: nn.Module, name: str) -> bool:
    """Whether ``value`` is the method that the class has, bound to the module itself."""
    return getattr(value, "__func__", None) is getattr(type(module), name) and getattr(value, "__self__", None) is module


def _is_library_backend(context: Any) -> bool:
    """Whether the backend under a dynamo context is a library's."""
    backend = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    backend = getattr(backend, "compiler_fn", backend)
    while isinstance(backend, functools.partial):
        backend = backend.func
    if isinstance(backend, types.FunctionType):
        return origin_of(backend) is not None
    return backend is not None and is_library_class(type(backend))


def _described(hook: Any) -> str:
    inner = hook.func if isinstance(hook, functools.partial) else hook
    return f"{getattr(inner, '__module__', None)}.{getattr(inner, '__qualname__', type(inner).__name__)}"
