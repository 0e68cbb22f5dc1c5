"""Stacks: the layers of a live model, what a forward was seen to use and when, and forwards that begin above the first layer.

Nothing is sliced or copied. To resume after ``depth`` layers, these get a ``forward`` of the instance's own that returns a stored
state; all that stands outside of the stack (embeddings, masks, rotary angles, norms, heads) runs as it is. Our own methods are
invisible to the fingerprint, and gone after the call, also after one that raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evalcache.components import Stack
from evalcache.errors import UncacheableError
from evalcache.structs import Frozen
from evalcache.tensors import owned_tensors

Forward = Callable[[], Any]
"""One forward of the model, of a batch of at least two rows."""


class Boundary(Frozen):
    """What leaves a layer: its output, and what dict-like arguments carry past it, as nested containers of tensors."""

    output: Any
    aside: Mapping[str, Any]

    def leaves(self) -> list[Any]:
        """Everything in it that is no container, in a fixed order."""
        return pytree.tree_leaves([self.output, dict(self.aside)])

    def replaced(self, leaves: Sequence[Any]) -> Boundary:
        """The same with other leaves."""
        spec = pytree.tree_structure([self.output, dict(self.aside)])
        output, aside = pytree.tree_unflatten(list(leaves), spec)
        return Boundary(output, aside)


def layers_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The layers of a model that has them where the stack says.

    Raises:
        UncacheableError: it has others.
    """
    try:
        layers = list(model.get_submodule(stack.path))
    except (AttributeError, TypeError) as error:
        raise UncacheableError("components", f"no layers at {stack.path}") from error
    if len(layers) != stack.count:
        raise UncacheableError("components", f"{len(layers)} layers at {stack.path} where {stack.count} were seen")
    return layers


def find_stack(model: nn.Module, forward: Forward) -> Stack:
    """Run one forward, and say where the model's layers are and when the rest of it is used.

    Of several lists of layers the one with the most parameters is taken.

    Raises:
        UncacheableError: ``components``, there is no list of layers that are called once each, in their order.

    Cost: a forward that takes several times as long as usual.
    """
    candidates = {
        path: list(found) for path, found in model.named_modules() if isinstance(found, nn.ModuleList) and len(found) > 1
    }
    candidates = {
        path: layers for path, layers in candidates.items() if not any(path.startswith(f"{above}.") for above in candidates)
    }
    with _Trace(model, candidates) as trace, torch.no_grad():
        forward()
    steady = [path for path, layers in candidates.items() if trace.calls[path] == list(range(len(layers)))]
    if not steady:
        called = {path: calls for path, calls in trace.calls.items() if calls}
        raise UncacheableError("components", f"no layers are called once each, in their order: {called or 'none were called'}")
    path = max(steady, key=lambda path: sum(one.numel() for one in model.get_submodule(path).parameters()))
    return trace.stack(path)


class _Trace(TorchDispatchMode):
    """What one forward calls and which tensors its operations take, each with how much had been done when it came first."""

    def __init__(self, model: nn.Module, candidates: Mapping[str, list[nn.Module]]) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {path: [] for path in candidates}
        self._model = model
        self._candidates = candidates
        self._ended = dict.fromkeys(candidates, 0)
        self._seen: dict[int, dict[str, int]] = {}  # module, or storage of a tensor → how many layers of each list had ended
        self._storages = {_storage(tensor): tensor for tensor in owned_tensors(model)}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Trace:
        for module in self._model.modules():
            self._hooks.append(module.register_forward_pre_hook(of_this_thread(self._before)))
        for path, layers in self._candidates.items():
            for number, layer in enumerate(layers):
                self._hooks.append(layer.register_forward_pre_hook(of_this_thread(self._counting(path, number))))
                self._hooks.append(layer.register_forward_hook(of_this_thread(self._ending(path))))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._note(_storage(leaf))
        return function(*args, **(kwargs or {}))

    def _note(self, what: int) -> None:
        if what not in self._seen:
            self._seen[what] = dict(self._ended)

    def _before(self, module: nn.Module, args: Any) -> None:
        self._note(-id(module))  # below zero, where no storage is

    def _counting(self, path: str, number: int) -> Callable[..., None]:
        return lambda module, args: self.calls[path].append(number)

    def _ending(self, path: str) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._ended[path] += 1

        return end

    def stack(self, path: str) -> Stack:
        """The stack at ``path``, with what was seen of the rest."""
        layers = self._candidates[path]
        inside = {id(module): number for number, layer in reversed(list(enumerate(layers))) for module in layer.modules()}
        used: dict[str, int] = {}
        early: dict[int, int] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            own = [tensor for kind in (module._parameters, module._buffers) for tensor in kind.values() if tensor is not None]
            marks = [self._seen.get(-id(module)), *(self._seen.get(_storage(tensor)) for tensor in own)]
            places = [mark[path] for mark in marks if mark is not None]
            if id(module) in inside:
                number = inside[id(module)]
                if places and min(places) < number:
                    early[number] = min([*places, early.get(number, number)])
            elif places:
                used[name] = min(places)
        return Stack(path, len(layers), used, early)


def _storage(tensor: torch.Tensor) -> int:
    """Where a tensor's bytes begin; 0 where that cannot be said, which nothing is found under."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


@contextlib.contextmanager
def capturing(layers: Sequence[nn.Module], depths: Sequence[int]) -> Iterator[dict[int, Boundary]]:
    """While a forward runs, keep what has left that many layers, by depth. Tensors are copies on their device.

    Nothing is kept of layers that this thread calls more than once, nor of what other threads do meanwhile.
    """
    found: dict[int, Boundary] = {}
    calls = dict.fromkeys(depths, 0)

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            calls[depth] += 1
            found.pop(depth, None)
            if calls[depth] == 1:
                aside = {name: dict(value) for name, value in kwargs.items() if isinstance(value, dict) and value}
                found[depth] = Boundary(*pytree.tree_map(_copied, (output, aside)))

        return hook

    hooks = [layers[depth - 1].register_forward_hook(of_this_thread(keep(depth)), with_kwargs=True) for depth in depths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def resuming(layers: Sequence[nn.Module], depth: int, boundary: Boundary) -> Iterator[None]:
    """While a forward of this thread runs, its first ``depth`` layers do nothing, and ``boundary`` leaves the last of them.

    Raises:
        RuntimeError: they were not called once each.
    """
    nothing = pytree.tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, boundary.output)
    mine, calls = threading.get_ident(), [0] * depth
    before = [layer.__dict__.get("forward") for layer in layers[:depth]]

    def standing_in(number: int) -> Callable[..., Any]:
        layer, own = layers[number], before[number]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != mine:  # somebody else's forward, which is none of our business
                return type(layer).forward(layer, *args, **kwargs) if own is None else own(*args, **kwargs)
            calls[number] += 1
            if number < depth - 1:
                return nothing
            for name, kept in boundary.aside.items():
                kwargs[name].update(kept)
            return boundary.output

        return forward

    try:
        for number, layer in enumerate(layers[:depth]):
            layer.__dict__["forward"] = standing_in(number)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=False):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward
    if calls != [1] * depth:
        raise RuntimeError(f"the first {depth} layers were called {calls} times")


def of_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that sees what this thread does alone: others may be asking the same model."""
    mine = threading.get_ident()

    def seen(*args: Any) -> None:
        if threading.get_ident() == mine:
            hook(*args)

    return seen


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
