"""What loading draws from the script's generators and throws away.

The weights of an adapter are drawn before they are read from its file, and so are those of a head that is cut. Whoever leaves the
load out skips as many draws, so that the script's own go on as they would have.
"""

from __future__ import annotations

from typing import Any

import torch

_MOST_DRAWS = 1 << 28


class Draws:
    """What is drawn from here on."""

    def __init__(self) -> None:
        self._host, self._devices = torch.get_rng_state(), _device_states()

    def nothing(self) -> bool:
        """Whether nothing was drawn on the host."""
        return torch.equal(self._host, torch.get_rng_state())

    def count(self) -> list[Any] | None:
        """How much it was so far, for `skip_draws`; None where a generator has changed otherwise."""
        moves = _moves(self._devices)
        count = None if moves is None else count_draws(self._host, torch.get_rng_state())
        return None if count is None else [count, moves]


def _device_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _moves(before: list[torch.Tensor]) -> list[int] | None:
    """How far each device's generator has gone on; None where it was not only that."""
    after = _device_states()
    if len(before) == len(after) and all(map(torch.equal, before, after)):
        return [0] * len(after)
    # Of 16 bytes, the seed and the place. Where nothing had used a device before, its generators stood at their beginning.
    if any(len(state) != 16 for state in [*before, *after]):
        return None
    old = [state.view(torch.int64).tolist() for state in before]
    new = [state.view(torch.int64).tolist() for state in after]
    old = old or [[seed, 0] for seed, _ in new]
    return None if [one[0] for one in old] != [one[0] for one in new] else [b[1] - a[1] for a, b in zip(old, new, strict=True)]


def count_draws(before: torch.Tensor, after: torch.Tensor) -> int | None:
    """How many words the host's generator gave between two states; None if it was not only by words that it changed.

    An adapter's weights, say, are drawn before they are read from its file: a script's own draws go on behind those.
    """
    generator, block, one = torch.Generator(), torch.empty(_BLOCK, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    generator.set_state(before)
    goal, last, count = _words(after), before, -_BLOCK
    while _words(state := generator.get_state()) != goal:
        if count > _MOST_DRAWS:
            return None
        last = state
        block.random_(generator=generator)
        count += _BLOCK
    count = max(count, 0)
    generator.set_state(last)
    for more in range(2 * _BLOCK + 1):
        if torch.equal(generator.get_state(), after):
            return count + more
        one.random_(generator=generator)
    return None


def skip_draws(drawn: list[Any]) -> None:
    """Leave the generators where they would be after what `Draws.count` has counted."""
    count, moves = drawn
    words = torch.empty(min(count, 1 << 20), dtype=torch.int32)
    while count > 0:
        words[:count].random_()
        count -= len(words)
    for place, move in enumerate(moves):
        if move:
            seed, offset = torch.cuda.get_rng_state(place).view(torch.int64).tolist()
            torch.cuda.set_rng_state(torch.tensor([seed, offset + move]).view(torch.uint8), place)


_BLOCK = 624
"""Words that the Mersenne Twister makes at a time. Its state begins with 24 bytes of its place, then these, 8 bytes each."""


def _words(state: torch.Tensor) -> bytes:
    return state[24 : 24 + 8 * _BLOCK].numpy().tobytes()
