"""States of the random number generators that an answer may draw from: keyed before it, restored after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """States of the generators that sampling on ``device`` draws from: the host's, and the device's own. ``(n,) uint8`` each."""
    states = [torch.get_rng_state()]
    if device.type == "mps":
        states.append(torch.mps.get_rng_state())
    elif device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def restore_generators(states: Sequence[torch.Tensor], device: torch.device) -> None:
    """Set the generators to the states that followed a stored sample, so that later draws go on as they would have."""
    torch.set_rng_state(states[0])
    if device.type == "mps":
        torch.mps.set_rng_state(states[1])
    elif device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
