"""What ``generate`` returned → Results, and Results → what ``generate`` would have returned. Runs no model.

A row is kept up to its own end and padded again as its neighbours ask; a whole batch is kept as it came, with the states of the
generators that followed. Key-value caches are not kept: an output served from the store has ``past_key_values`` of None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evalcache.checking import RESULT_LIMIT_BYTES
from evalcache.errors import UncacheableError
from evalcache.integrations.generation import Call
from evalcache.integrations.generators import generator_states, restore_generators
from evalcache.integrations.processors import describe_processors
from evalcache.records import Array, Result, pack_tokens, unpack_tokens
from evalcache.weights import tensor_bytes


def sequences(output: Any) -> torch.Tensor:
    """The token ids of what ``generate`` returned, prefix included."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def row_results(call: Call, output: Any, rows: int) -> list[Result]:
    """What ``generate`` returned for ``rows`` rows, as one Result each: tokens up to the row's own end."""
    new = sequences(output)[:, call.prefix.shape[1] :].cpu().numpy()
    results = []
    for row in range(rows):
        mine = [_until_end(call, new[row * call.returned + number]) for number in range(call.returned)]
        reason = "stop" if call.end_ids and len(mine[0]) and int(mine[0][-1]) in call.end_ids else "length"
        scalars: dict[str, Any] = {}
        if call.returned > 1:
            scalars["sequences"] = [pack_tokens(tokens) for tokens in mine[1:]]
        results.append(Result(tokens=pack_tokens(mine[0]), finish_reason=reason, scalars=scalars))
    return results


def tokens_made(result: Result) -> int:
    """New tokens of a row, of all the sequences that were returned for it."""
    return (len(result.tokens) + sum(len(more) for more in result.scalars.get("sequences", ()))) // 4


def _until_end(call: Call, tokens: Any) -> Any:
    # What follows a row's end is padding, as long as its longest neighbour: not the row's own.
    for place, token in enumerate(tokens.tolist()):
        if token in call.end_ids:
            return tokens[: place + 1]
    return tokens


def assemble_rows(call: Call, results: Sequence[Result]) -> Any:
    """What ``generate`` would have returned for these rows: padded again to the longest of them."""
    rows = []
    for result in results:
        rows.append(unpack_tokens(result.tokens))
        rows += [unpack_tokens(more) for more in result.scalars.get("sequences", ())]
    longest = max(len(row) for row in rows)
    # The engine appends int64 ids to what it was given.
    new = torch.full((len(rows), longest), call.fill_id, dtype=torch.promote_types(call.prefix.dtype, torch.int64))
    for place, row in enumerate(rows):
        new[place, : len(row)] = torch.from_numpy(row.astype("int64"))
    prefix = call.prefix if call.returned == 1 else call.prefix.repeat_interleave(call.returned, dim=0)
    joined = torch.cat([prefix, new.to(prefix.device)], dim=1)
    return _output(call, {"sequences": joined}) if call.config.return_dict_in_generate else joined


def batch_result(call: Call, output: Any) -> Result:
    """A whole batch's output as one Result; for samples, with the states of the generators that followed.

    Raises:
        UncacheableError: ``output``, it holds something that is not stored; ``too_large``; ``processor``, one of the caller's has
            kept something of this call for its next one, which a served call would not leave behind.
    """
    if describe_processors(call.arguments.get("logits_processor")) != call.requests[0].settings["processors"]:
        raise UncacheableError("processor", "one that keeps state from call to call")
    parts: dict[str, torch.Tensor] = {}
    if isinstance(output, torch.Tensor):
        parts["sequences"] = output
    else:
        for name, value in output.items():
            if name == "past_key_values" or value is None:
                continue
            if isinstance(value, torch.Tensor):
                parts[name] = value
            elif isinstance(value, tuple) and name in ("scores", "logits"):
                if sum(step.nbytes for step in value) > RESULT_LIMIT_BYTES:  # before they are copied
                    raise UncacheableError("too_large", f"{name} of a batch")
                parts[name] = torch.stack(value)
            else:
                raise UncacheableError("output", name)
    arrays = {name: to_array(tensor) for name, tensor in parts.items()}
    if call.samples:
        arrays |= {f"generator.{place}": to_array(state) for place, state in enumerate(generator_states(call.ids.device))}
    new = parts["sequences"][:, call.prefix.shape[1] :]
    return Result(tokens=pack_tokens(new.cpu().numpy().reshape(-1)), arrays=arrays)


def assemble_batch(call: Call, result: Result) -> Any:
    """What ``generate`` returned for a stored batch; sets the generators to what followed."""
    device = call.ids.device
    tensors = {name: to_tensor(array) for name, array in result.arrays.items()}
    states = [tensors[name] for name in sorted(tensors) if name.startswith("generator.")]
    if states:
        restore_generators(states, device)
    values: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items() if not name.startswith("generator.")}
    if not call.config.return_dict_in_generate:
        return values["sequences"]
    for name in ("scores", "logits"):
        if name in values:
            # Each step in memory of its own, as the engine returns them: one that is kept does not keep the others.
            values[name] = tuple(step.clone() for step in values[name].unbind(0))
    return _output(call, values)


def _output(call: Call, values: dict[str, Any]) -> Any:
    from transformers.generation import utils

    beams = (call.config.num_beams or 1) > 1
    kind = f"Generate{'Beam' if beams else ''}{'EncoderDecoder' if call.encoder_decoder else 'DecoderOnly'}Output"
    return getattr(utils, kind)(**values)


def to_array(tensor: torch.Tensor) -> Array:
    """A tensor as it is stored."""
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), bytes(tensor_bytes(tensor)))


def to_tensor(array: Array) -> torch.Tensor:
    """The tensor that `to_array` stored, in host memory."""
    return torch.frombuffer(bytearray(array.data), dtype=torch.uint8).view(getattr(torch, array.dtype)).reshape(array.shape)
