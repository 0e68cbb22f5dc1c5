"""Row states: what leaves a layer for a batch ↔ one `State` for each of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evalcache.integrations.probe import TOLERANCE
from evalcache.integrations.stacks import Boundary
from evalcache.records import Array
from evalcache.states import State
from evalcache.tensors import dtype_name


def tensors_in(boundary: Boundary) -> list[torch.Tensor]:
    """The tensors of a boundary, in the order in which a `State` names them by number."""
    return [leaf for leaf in boundary.leaves() if isinstance(leaf, torch.Tensor)]


def split_row(tensors: Sequence[torch.Tensor], row: int, about: Mapping[str, Any]) -> State:
    """One row's state. Cost: a copy of it into host memory."""
    found = {}
    for place, tensor in enumerate(tensors):
        mine = tensor[row].detach().cpu().contiguous()
        found[str(place)] = Array(
            dtype_name(tensor.dtype), tuple(mine.shape), memoryview(mine.reshape(-1).view(torch.uint8).numpy())
        )
    return State(found, about)


def join_rows(outline: Boundary, states: Sequence[State]) -> Boundary:
    """What leaves a layer for a batch of these rows, each tensor on the device where ``outline`` has it. Cost: a copy.

    Raises:
        KeyError, ValueError: the states are not of one kind, or not of this one.
    """
    leaves: list[Any] = []
    place = 0
    for leaf in outline.leaves():
        if isinstance(leaf, torch.Tensor):
            leaves.append(_joined(leaf, [state.tensors[str(place)] for state in states]))
            place += 1
        else:
            leaves.append(leaf)
    return outline.replaced(leaves)


def _joined(like: torch.Tensor, rows: Sequence[Array]) -> torch.Tensor:
    if len({(one.dtype, one.shape) for one in rows}) != 1 or rows[0].dtype != dtype_name(like.dtype):
        raise ValueError("states of another kind")
    batch = torch.empty((len(rows), *rows[0].shape), dtype=like.dtype)
    into = batch.view(-1).view(torch.uint8).numpy().reshape(len(rows), -1)
    for place, one in enumerate(rows):
        into[place] = np.frombuffer(one.data, np.uint8)
    return batch.to(like.device)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def are_close(here: Boundary, there: Boundary) -> bool:
    """Whether two batches of other compositions may have made both: within what that is known to do to floats."""
    return all(map(_close, tensors_in(here), tensors_in(there)))


def _close(here: torch.Tensor, there: torch.Tensor) -> bool:
    if here.shape != there.shape or here.dtype != there.dtype:
        return False
    if not here.dtype.is_floating_point:
        return torch.equal(here, there)
    size = max(1e-3, float(torch.nan_to_num(there.double()).abs().max()))
    apart = torch.nan_to_num((here.double() - there.double()).abs(), nan=0.0)
    return bool((apart <= TOLERANCE.get(here.dtype, 0.0) * size).all()) and torch.equal(here.isnan(), there.isnan())
