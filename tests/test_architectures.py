"""Forwards that begin above the first layer, over every causal architecture of transformers that can be made tiny.

At every depth they equal the whole forward, bit for bit; what is edited in a layer is found at that layer; and what cannot be
resumed is refused. The last line of a test run says how many were exact, refused and wrong.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import architectures
import pytest
import torch

from evalcache.components import Stack, chain, shared_depth
from evalcache.errors import UncacheableError
from evalcache.integrations.stacks import capturing, find_stack, layers_of, resuming
from evalcache.weights import Fingerprinter

MADE = [name for name in architectures.NAMES if name not in architectures.NOT_MADE]


def forward_of(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
    batch = architectures.inputs()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    return forward


def assert_resumed(model: torch.nn.Module, stack: Stack, forward: Callable[[], torch.Tensor]) -> None:
    """At every depth, and again while each layer in turn is another than the one whose state was kept."""
    layers, fingerprinter = layers_of(model, stack), Fingerprinter(model)
    before, whole = chain(fingerprinter.manifest(), stack), forward()
    with capturing(layers, range(1, stack.count + 1)) as kept:
        assert torch.equal(forward(), whole), "to keep states changes nothing"
    for depth in range(1, stack.count + 1):
        with resuming(layers, depth, kept[depth]):
            assert torch.equal(forward(), whole), depth
    assert torch.equal(forward(), whole), "nothing stays behind"
    assert chain(fingerprinter.manifest(), stack) == before
    for number, layer in enumerate(layers):
        edited = next(parameter for parameter in layer.parameters() if parameter.numel() > 8)
        elder = edited.detach().clone()
        with torch.no_grad():
            edited.add_(0.5)
        assert shared_depth(before, chain(fingerprinter.manifest(), stack)) == number
        if number:
            wanted = forward()
            with resuming(layers, number, kept[number]):
                assert torch.equal(forward(), wanted), f"layer {number} was edited"
        with torch.no_grad():
            edited.copy_(elder)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    assert shared_depth(before, chain(fingerprinter.manifest(), stack)) == -1, "all is above the embedding"


def check(name: str) -> str:
    """What becomes of one architecture: ``exact`` or ``refused``; anything else fails."""
    model = architectures.build(name)
    forward = forward_of(model)
    if name in architectures.REFUSED:
        if architectures.REFUSED[name]:
            with pytest.raises(UncacheableError, match=architectures.REFUSED[name]):
                find_stack(model, forward)
        else:
            stack = find_stack(model, forward)
            assert len(stack.early) == stack.count - 1, "every layer but the first is used before it is called"
        return "refused"
    assert_resumed(model, find_stack(model, forward), forward)
    shorter = architectures.build(name).to(torch.bfloat16)
    forward = forward_of(shorter)
    try:
        whole = forward()
    except RuntimeError:  # a few lose the dtype on their way, without us
        return "exact"
    stack = find_stack(shorter, forward)
    layers = layers_of(shorter, stack)
    with capturing(layers, range(1, stack.count + 1)) as kept:
        forward()
    for depth in range(1, stack.count + 1):
        with resuming(layers, depth, kept[depth]):
            assert torch.equal(forward(), whole), f"{depth}, in bfloat16"
    return "exact"


@pytest.mark.parametrize("name", MADE)
def test_a_forward_is_resumed_at_every_depth(name: str, record_property) -> None:
    record_property("components", "wrong")
    if name in architectures.ALONE:
        script = f"import test_architectures; print(test_architectures.check({name!r}))"
        here = {"cwd": Path(__file__).parent, "timeout": 300}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, **here)
        record_property("components", done.stdout.split()[-1])
    else:
        record_property("components", check(name))


def test_most_architectures_are_exact() -> None:
    assert len(MADE) - len(architectures.REFUSED) >= 130
    assert not architectures.NOT_MADE - set(architectures.NAMES), "they are all known to this transformers"
