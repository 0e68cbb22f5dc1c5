"""Seconds shared over rows add up to what was measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evalcache.integrations.timing import Stopwatch, measured, share

_TOKENS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 500)), min_size=1, max_size=20)


@given(st.floats(0, 1e5), st.floats(0, 1e5), _TOKENS)
def test_the_rows_add_up(total_s: float, first_s: float, tokens: list[tuple[int, int]]) -> None:
    prompts, completions = zip(*tokens, strict=True)
    costs = share(Stopwatch(total_s, first_s), prompts, completions, "cpu")
    assert sum(cost.seconds for cost in costs) == pytest.approx(total_s, rel=1e-9, abs=1e-12)
    assert [(cost.prompt_tokens, cost.completion_tokens) for cost in costs] == tokens
    assert all(cost.seconds >= 0 and cost.batch_size == len(tokens) for cost in costs)


def test_a_longer_prompt_and_a_longer_answer_cost_more() -> None:
    costs = share(Stopwatch(total_s=3.0, first_s=1.0), [30, 10], [5, 15], "cpu")
    assert [cost.seconds for cost in costs] == [pytest.approx(0.75 + 0.5), pytest.approx(0.25 + 1.5)]


def test_the_first_forward_is_timed_apart_and_leaves_no_hook() -> None:
    layer = torch.nn.Linear(64, 64)
    with measured(layer, torch.device("cpu")) as watch:
        for _ in range(50):
            layer(torch.zeros(64, 64))
    assert 0.0 < watch.first_s < watch.total_s
    assert not layer._forward_hooks


def test_a_failing_batch_leaves_no_hook() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), measured(layer, torch.device("cpu")):
        raise ZeroDivisionError
    assert not layer._forward_hooks
