"""Models served from a store of their own in tests: each call's output together with what the cache made of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import ModelOutput

import evalcache.integrations.transformers as floor
from evalcache.cache import Cache
from evalcache.counts import Counts


@dataclass(frozen=True)
class Told:
    """What the cache counted for one call."""

    hits: int
    misses: int
    duplicates: int
    uncacheable: dict[str, int]


class Served:
    """A cache that serves every model of this process while a test runs."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def ask(self, call: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Told]:
        """Makes a call, and the check after it; says what came back and how it was counted."""
        counts = self.cache.counts
        before = (counts.hits, counts.misses, counts.duplicates, Counter(counts.uncacheable))
        output = call(*args, **kwargs)
        self.cache.flush()
        told = Told(
            counts.hits - before[0],
            counts.misses - before[1],
            counts.duplicates - before[2],
            dict(counts.uncacheable - before[3]),
        )
        return output, told


@contextlib.contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Served]:
    """Serves from ``folder`` inside the block, and closes the run after it."""
    cache = Cache(folder, **settings)
    floor.install(cache)
    try:
        yield Served(cache)
    finally:
        floor.uninstall()
        cache.close()


def in_a_run(folder: Path, script: Callable[..., Any], *args: Any, **settings: Any) -> tuple[Any, Counts]:
    """Calls ``script`` in a run of its own; returns what it returned, and what the run counted."""
    with served(folder, **settings) as here:
        return script(*args), here.cache.counts


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or raises; its draws are the same each time."""
    torch.manual_seed(5)
    try:
        return call()
    except Exception as error:  # whatever it is, it has to be the same
        return error


def assert_same_outcome(bare: Any, other: Any) -> None:
    """Asserts that two calls returned the same, or raised the same."""
    assert type(bare) is type(other), (bare, other)
    if isinstance(bare, Exception):
        assert str(bare) == str(other)
    else:
        assert_same(bare, other)


def assert_same(bare: Any, other: Any) -> None:
    """Asserts that two outputs of ``generate`` are equal: type, dtype, shape, every value; key-value caches are not compared."""
    assert type(bare) is type(other), (type(bare), type(other))
    if isinstance(bare, torch.Tensor):
        assert bare.dtype == other.dtype and bare.shape == other.shape and bare.device == other.device, (bare, other)
        assert torch.equal(bare, other), (bare, other)
    elif isinstance(bare, ModelOutput):
        names = [name for name, value in bare.items() if name != "past_key_values"]
        assert names == [name for name, value in other.items() if name != "past_key_values"]
        for name in names:
            assert_same(bare[name], other[name])
    elif isinstance(bare, (list, tuple)):
        assert len(bare) == len(other)
        for one, another in zip(bare, other, strict=True):
            assert_same(one, another)
    else:
        assert bare == other


def assert_not_answered_from_before(
    case: Callable[[contextlib.ExitStack], tuple[Any, Callable[[], Any]]], ask: Callable[[Any], Any], folder: Path
) -> None:
    """``case`` gives a model and a change that changes its answer: asked after it, the store answers as the bare model does."""
    with contextlib.ExitStack() as stack:
        model, change = case(stack)
        before = ask(model)
        with served(folder) as here:
            assert_same(before, here.ask(ask, model)[0])
            change()
            output, told = here.ask(ask, model)
        after = ask(model)
        assert not torch.equal(before, after), "the change changes no answer"
        assert_same(after, output)
        assert told.hits == 0
