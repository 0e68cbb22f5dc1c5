"""A call of ``generate`` → Requests. Runs no model.

A call is resolved as the engine itself resolves it (its own methods are asked), so settings that are given in another way but
have the same effect share a key. Each row is a Request of its own where rows do not depend on each other; the whole batch is
one Request where they do: sampling, scores, stop strings in a batch, rotary embeddings that depend on the longest row.

Raises `UncacheableError` for what cannot be keyed; the caller then runs the call untouched.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evalcache.canonical import digest_canonical
from evalcache.digest import digest_bytes
from evalcache.errors import CanonicalError, EvalCacheError, UncacheableError
from evalcache.integrations import streaming
from evalcache.integrations.generators import generator_states
from evalcache.integrations.processors import describe_criteria, describe_processors, tokenizer_digest
from evalcache.integrations.settings import effective_settings, fill_id, reads_padding
from evalcache.records import Fields, Request, pack_tokens
from evalcache.structs import Frozen, Struct, field
from evalcache.weights import tensor_bytes, unwrap

_ROW_TENSORS = frozenset("position_ids token_type_ids decoder_input_ids decoder_attention_mask labels".split())
_ALONG_PROMPT = frozenset({"position_ids", "token_type_ids"})
_BATCH_TENSORS = frozenset(
    "pixel_values pixel_attention_mask pixel_values_videos image_grid_thw video_grid_thw image_sizes input_features "
    "input_values encoder_attention_mask cross_attention_mask aspect_ratio_ids aspect_ratio_mask mm_token_type_ids".split()
)
_PLAIN_ARGUMENTS = frozenset({"use_cache", "logits_to_keep", "return_dict"})


class Traits(Frozen):
    """What a model's rows depend on, as the probe found.

    Args:
        rows: on nothing but themselves. left: not on padding before them; right: not on padding after them.
        draws: a forward draws random numbers, so that a greedy answer depends on the generators too.
        steady: asked twice from the same states of torch's generators, it answers alike.
    """

    rows: bool
    left: bool
    right: bool
    draws: bool = False
    steady: bool = True


class Call(Struct):
    """One resolved call.

    Args:
        ids: ``(batch, width) int64`` prompt (of the encoder, in an encoder–decoder model). mask: the same shape, 0 or 1.
        prefix: ``(batch, n)`` tokens that each returned row begins with.
        requests: one per row, or a single one for the whole batch.
        engine: the model that resolved it. default_length: whether nobody has said how long an answer may be.
    """

    arguments: dict[str, Any]
    ids: torch.Tensor
    mask: torch.Tensor
    prefix: torch.Tensor
    whole: bool
    samples: bool
    requests: list[Request]
    returned: int
    end_ids: frozenset[int]
    fill_id: int
    row_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: Any = None
    encoder_decoder: bool = False
    engine: Any = None
    default_length: bool = False

    @property
    def rows(self) -> int:
        """Rows of the prompt batch."""
        return self.ids.shape[0]


_SIGNATURE: inspect.Signature | None = None


def bind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate`` by name, those in ``**kwargs`` beside the named ones; None for what was not given.

    Raises:
        UncacheableError: they do not fit; the untouched call will say so itself.
    """
    global _SIGNATURE
    if _SIGNATURE is None:
        from transformers.generation.utils import GenerationMixin

        _SIGNATURE = inspect.signature(inspect.unwrap(GenerationMixin.generate))
    try:
        bound = _SIGNATURE.bind(None, *args, **kwargs)
    except TypeError as error:
        raise UncacheableError("argument", str(error)) from error
    named = dict(bound.arguments)
    named.pop("self", None)
    return named.pop("kwargs", {}) | named


def engine_of(model: Any, arguments: Mapping[str, Any]) -> Any:
    """The transformers model whose methods resolve a call: below wrappers, and below adapters.

    Raises:
        UncacheableError: an adapter acts in a way that is not keyed.
    """
    inner = unwrap(model)
    if model is not inner and "generation_config" in vars(model):
        inner.generation_config = model.generation_config  # PEFT does so when its `generate` begins
    if any(getattr(one, "alora_invocation_tokens", None) for one in getattr(model, "peft_config", {}).values()):
        raise UncacheableError("unsupported", "an adapter that acts after its invocation tokens")
    if model is inner and hasattr(model, "active_peft_config"):  # prompt learning: virtual tokens come before the prompt
        config = arguments.get("generation_config")
        if arguments.get("max_new_tokens") is None and getattr(config, "max_new_tokens", None) is None:
            raise UncacheableError("unsupported", "a prompt-learning adapter without max_new_tokens")
        return model.base_model
    return inner


def resolve(model: Any, arguments: dict[str, Any], traits: Traits) -> Call:
    """Resolve a call into Requests.

    Args:
        model: the transformers model that would generate; may be hollow (config and generation config only).
        arguments: from `bind`. traits: what its rows depend on.

    Raises:
        UncacheableError: with the reason.
    """
    try:
        return _resolve(model, arguments, traits)
    except (EvalCacheError, MemoryError):
        raise
    except Exception as error:
        # Wrong arguments raise in the engine's own checks, and a new version's methods may differ: the bare call will tell.
        raise UncacheableError("argument", f"{type(error).__name__}: {error}") from error


def _resolve(model: Any, arguments: dict[str, Any], traits: Traits) -> Call:
    if not traits.steady:
        raise UncacheableError("unsupported", "asked twice this model answers differently, and not by torch's generators")
    given = dict(arguments)
    _refuse(given)
    processors = describe_processors(given.pop("logits_processor", None))
    criteria = describe_criteria(given.pop("stopping_criteria", None))
    for name in ("prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "streamer", "negative_prompt_ids"):
        given.pop(name, None)
    for name in ("negative_prompt_attention_mask", "custom_generate", "assistant_tokenizer", "trust_remote_code"):
        given.pop(name, None)
    tokenizer = given.pop("tokenizer", None)
    base = given.pop("generation_config", None)
    inputs = given.pop("inputs", None)
    ids = inputs if inputs is not None else given.pop("input_ids", None)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or 0 in ids.shape:
        raise UncacheableError("unsupported", "the prompt is not a (batch, width) tensor of token ids")

    default_max, default_min = (_is_default(model, base, given, name) for name in ("max_length", "min_length"))
    config, others = model._prepare_generation_config(base, **given)
    mask = others.pop("attention_mask", None)
    model._prepare_special_tokens(config, mask is not None, device=ids.device, batch_size=ids.shape[0])
    encoder_decoder = bool(model.config.is_encoder_decoder)
    if mask is None:
        # The engine infers a decoder's mask from its pad ids, and leaves an encoder without one.
        mask = torch.ones_like(ids) if encoder_decoder else model._prepare_attention_mask_for_generation(ids, config, {})
    if mask.shape != ids.shape:
        raise UncacheableError("argument", f"attention_mask of shape {tuple(mask.shape)}")
    if mask.is_floating_point() or not bool(((mask == 0) | (mask == 1)).all()):
        raise UncacheableError("argument", "attention_mask with other values than the integers 0 and 1")
    model._validate_model_kwargs(dict(others))
    row_tensors, batch_tensors, plain = _sort_arguments(others, ids.shape)

    if encoder_decoder:
        prefix = row_tensors.get("decoder_input_ids")
        if prefix is None:
            start = config._decoder_start_token_tensor
            prefix = ids.new_full((ids.shape[0], 1), int(start.reshape(-1)[0]))
            if start.numel() > 1:
                raise UncacheableError("unsupported", "a start token for each row")
        elif bool((prefix[:, 0] != config._decoder_start_token_tensor).all()):
            # The engine puts the start token before ids that do not begin with it.
            raise UncacheableError("unsupported", "decoder_input_ids without the start token")
    else:
        prefix = ids
    config = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=default_max,
        has_default_min_length=default_min,
        model_input_name="input_ids",
        input_ids_length=prefix.shape[1],
        inputs_tensor=ids,
    )
    settings = effective_settings(config, prefix.shape[1], encoder_decoder)
    settings["processors"], settings["criteria"] = processors, criteria
    if config.stop_strings is not None:
        settings["tokenizer"] = tokenizer_digest(tokenizer)
    if plain:
        settings["arguments"] = plain

    streaming.refuse_several(arguments.get("streamer"), ids.shape[0] * (config.num_return_sequences or 1), config.num_beams or 1)
    ends = config._eos_token_tensor
    samples = bool(config.do_sample) or traits.draws
    beams = (config.num_beams or 1) > 1  # whose indices come back with a dict
    scores = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits or beams))
    # A caller's criteria take the place of the end ids, and a processor may hold a tensor with a line for each row.
    whole = samples or scores or bool(batch_tensors or processors or criteria)
    # Groups that are quantised together may reach into padding, and over rows.
    whole = whole or "quantized" in str(config.cache_implementation)
    whole = whole or (ids.shape[0] > 1 and (config.stop_strings is not None or not traits.rows))
    sensitive = reads_padding(settings, encoder_decoder)
    call = Call(
        arguments=arguments,
        ids=ids,
        mask=mask,
        prefix=prefix,
        whole=whole,
        samples=samples,
        requests=[],
        returned=int(config.num_return_sequences or 1),
        end_ids=frozenset(() if ends is None else ends.tolist()),
        fill_id=fill_id(config),
        row_tensors=row_tensors,
        config=config,
        encoder_decoder=encoder_decoder,
        engine=model,
        default_length=default_max,
    )
    try:
        if whole:
            settings["output"] = [bool(config.return_dict_in_generate), bool(config.output_scores), bool(config.output_logits)]
            call.requests = [_batch_request(call, Fields(settings), batch_tensors)]
        else:
            fields = Fields(settings)
            call.requests = _row_requests(call, fields, traits, sensitive)
    except CanonicalError as error:
        raise UncacheableError("argument", str(error)) from error
    return call


def _refuse(given: Mapping[str, Any]) -> None:
    streaming.refuse_unknown(given.get("streamer"))
    if given.get("assistant_model") is not None or given.get("assistant_tokenizer") is not None:
        raise UncacheableError("assistant")
    if given.get("prefix_allowed_tokens_fn") is not None:
        raise UncacheableError("processor", "prefix_allowed_tokens_fn")
    if given.get("synced_gpus"):
        raise UncacheableError("unsupported", "synced_gpus: every rank has to take part in every step")
    if given.get("past_key_values") is not None:
        raise UncacheableError("past_key_values")
    if given.get("adapter_names") is not None:
        raise UncacheableError("adapter_names")
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"):
        if given.get(name) is not None:
            raise UncacheableError("argument", name)


def _is_default(model: Any, base: Any, given: Mapping[str, Any], name: str) -> bool:
    return (
        given.get(name) is None
        and (base is None or getattr(base, name) is None)
        and getattr(model.generation_config, name) is None
    )


def _sort_arguments(others: Mapping[str, Any], shape: torch.Size) -> tuple[dict, dict, dict]:
    """Model arguments by how they are keyed: a tensor's rows, tensors of the whole batch, plain values."""
    row_tensors: dict[str, torch.Tensor] = {}
    batch_tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in others.items():
        if value is None:
            continue
        if name in ("output_attentions", "output_hidden_states"):
            raise UncacheableError("output", name)
        # Positions of three rope sections come as (3, batch, width): what looks like rows may be sections.
        if isinstance(value, torch.Tensor) and name in _ROW_TENSORS:
            if value.dim() != 2 or (value.shape != shape if name in _ALONG_PROMPT else value.shape[0] != shape[0]):
                raise UncacheableError("argument", f"{name} of shape {tuple(value.shape)}")
            row_tensors[name] = value
        elif isinstance(value, torch.Tensor) and name in _BATCH_TENSORS:
            batch_tensors[name] = value
        elif name in _PLAIN_ARGUMENTS and type(value) in (bool, int):
            plain[name] = value
        else:
            raise UncacheableError("argument", f"{name} of type {type(value).__name__}")
    return row_tensors, batch_tensors, plain


def _row_requests(call: Call, settings: Fields, traits: Traits, sensitive: bool) -> list[Request]:
    ids, mask = call.ids.cpu().numpy(), call.mask.cpu().numpy() != 0
    width = ids.shape[1]
    requests = []
    for row in range(call.rows):
        kept = mask[row]
        inputs: dict[str, Any] = {}
        places = kept.nonzero()[0]
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, width - 1)
        # What stands after the last real token is padding to an encoder, but a decoder goes on from there.
        end = last + 1 if call.encoder_decoder else width
        padded_left, padded_right = first > 0, end < width
        if not len(places) or sensitive or (padded_left and not traits.left) or (padded_right and not traits.right):
            inputs["padded"] = pack_tokens(ids[row])
            inputs["mask"] = kept.tobytes()
        elif not kept[first:end].all():
            # Holes within the row, and padding after it that a decoder reads: their pattern, and what stands there.
            inputs["span"] = pack_tokens(ids[row, first:end])
            inputs["mask"] = kept[first:end].tobytes()
        for name, tensor in call.row_tensors.items():
            values = tensor[row]
            if name in _ALONG_PROMPT and "padded" not in inputs:
                values = values[first:end]
            inputs[name] = [str(values.dtype), list(values.shape), digest_bytes(tensor_bytes(values)).value]
        requests.append(Request("generate", pack_tokens(ids[row][kept]), settings, inputs))
    return requests


def _batch_request(call: Call, settings: Fields, batch_tensors: Mapping[str, torch.Tensor]) -> Request:
    inputs: dict[str, Any] = {
        "ids": pack_tokens(call.ids.cpu().numpy()),
        "mask": (call.mask.cpu().numpy() != 0).tobytes(),
        "shape": list(call.ids.shape),
    }
    for name, tensor in {**call.row_tensors, **batch_tensors}.items():
        inputs[name] = [str(tensor.dtype), list(tensor.shape), digest_bytes(tensor_bytes(tensor)).value]
    if call.samples:
        inputs["generators"] = [digest_bytes(tensor_bytes(state)).value for state in generator_states(call.ids.device)]
    return Request("generate_batch", inputs["ids"], settings, inputs)


def select_rows(call: Call, rows: Sequence[int]) -> dict[str, Any]:
    """Arguments of the same call for some of its rows, at the caller's padded width: never re-padded."""
    if list(rows) == list(range(call.rows)):
        return dict(call.arguments)
    index = torch.as_tensor(list(rows), device=call.ids.device)
    chosen = dict(call.arguments)
    for name in ("inputs", "input_ids", "attention_mask", *call.row_tensors):
        value = chosen.get(name)
        if isinstance(value, torch.Tensor):
            chosen[name] = value.index_select(0, index.to(value.device))
    return chosen


def warn_as_computed(call: Call, length: int) -> None:
    """Give the warnings that the engine gives after a call is resolved: for a call of which nothing is computed.

    Args:
        length: of the returned rows, with their prefix.
    """
    engine, config, width = call.engine, call.config, call.prefix.shape[1]
    if not call.encoder_decoder and _warns_of_right_padding(call):
        # As the engine has it, within `generate` itself.
        logging.getLogger("transformers.generation.utils").warning(
            "A decoder-only architecture is being used, but right-padding was detected! For correct "
            "generation results, please set `padding_side='left'` when initializing the tokenizer."
        )
    with contextlib.suppress(AttributeError, TypeError):  # methods of its own, which another version may not have
        engine._validate_generated_length(config, width, call.default_length)
        if processors := call.arguments.get("logits_processor"):
            engine._get_logits_processor(config, width, call.ids, None, processors, call.ids.device, call.arguments)
        if criteria := call.arguments.get("stopping_criteria"):
            engine._get_stopping_criteria(config, criteria, call.arguments.get("tokenizer"))
        if (last := min(length, config.max_length - 1)) > width:
            from transformers.generation.stopping_criteria import MaxLengthCriteria

            positions = getattr(engine.config, "max_position_embeddings", None)
            MaxLengthCriteria(config.max_length, positions)(call.ids.new_empty(1, 1).expand(1, last), None)


def _warns_of_right_padding(call: Call) -> bool:
    pad, mask = call.config._pad_token_tensor, call.arguments.get("attention_mask")
    if pad is None or call.rows == 1:
        return False
    return bool((mask[:, -1] == 0).any() if mask is not None else (call.ids[:, -1] == pad).any())


def batch_digest(call: Call) -> bytes:
    """Digest of everything that a row shares its batch with, for strict matching."""
    tensors = {"ids": call.ids, "mask": call.mask, **call.row_tensors}
    return digest_canonical(
        [[name, list(t.shape), digest_bytes(tensor_bytes(t)).value] for name, t in sorted(tensors.items())]
    ).value


def traits_name(parts: Sequence[Any]) -> str:
    """Name of the store's object that keeps what the probe found."""
    return f"probe/{digest_canonical(list(parts)).hex}"
