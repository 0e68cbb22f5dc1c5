"""Streamers: those that only show what is generated are handed the stored tokens as the engine would have handed them over.

A streamer is told the prompt and then each token, and decides nothing: with and without one a call has the same answer, and one
entry. That holds for transformers' own; somebody else's class runs code of its own between two tokens, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from evalcache.errors import UncacheableError

_KNOWN = {
    "transformers.generation.streamers": ("TextStreamer", "TextIteratorStreamer", "AsyncTextIteratorStreamer"),
    "transformers.cli.serving.utils": ("DirectStreamer",),  # of `transformers serve`
}


def refuse_unknown(streamer: Any) -> None:
    """Refuse a streamer that may do more than show.

    Raises:
        UncacheableError: ``streamer``.
    """
    kind = type(streamer)
    if streamer is not None and (
        kind.__qualname__ not in _KNOWN.get(kind.__module__, ()) or not {"put", "end"}.isdisjoint(vars(streamer))
    ):
        raise UncacheableError("streamer", f"{kind.__module__}.{kind.__qualname__}")


def refuse_several(streamer: Any, rows: int, beams: int) -> None:
    """Refuse what the engine does not stream row by row: the bare call says so itself.

    Raises:
        UncacheableError: ``streamer``.
    """
    if streamer is not None and (rows != 1 or beams != 1):
        raise UncacheableError("streamer", "several rows or beams")


def replay(streamer: Any, prompt: torch.Tensor, sequences: torch.Tensor) -> None:
    """Show a stored answer: the prompt, each new token, the end. Whatever the streamer raises comes out (a client that left).

    Args:
        prompt: ``(1, width)``, what the answer begins with. sequences: ``(1, width + n)``, what ``generate`` returns.
    """
    if streamer is None:
        return
    streamer.put(prompt.cpu())
    for token in sequences[:, prompt.shape[1] :].cpu().unbind(1):
        streamer.put(token.clone())
    streamer.end()
