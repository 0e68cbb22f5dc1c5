"""lm-evaluation-harness on the tasks of `harness_tasks.py`: asked as scripts ask it, and its answers compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from harness_tasks import ALL
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


@dataclass
class Here:
    """Tasks and a saved model."""

    tasks: Path
    model: Path
    manager: TaskManager


def with_tasks(tasks: Path, model: Path) -> Here:
    """What `make_tasks` and `make_model` have written."""
    return Here(tasks, model, TaskManager(include_path=str(tasks), include_defaults=False))


def evaluate(
    here: Here, model: Any = None, *, tasks: tuple[str, ...] = ALL, batch_size: Any = 4, args: str = "", **more: Any
) -> Any:
    """One evaluation.

    Args:
        model: a folder or a harness's model; None means the one that is there. args: further ``model_args``, with a comma each.
    """
    if not isinstance(model, HFLM):
        more["model_args"] = f"pretrained={model or here.model},dtype=float32{args}"
        model = "hf"
    return lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=here.manager, batch_size=batch_size, device="cpu", bootstrap_iters=0, **more
    )


def assert_same(left: Any, right: Any) -> None:
    """Numbers to 1e-5, all else exactly."""
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-5)
    else:
        assert left == right
