"""Effective settings of a call: what the engine would read after resolution, and nothing that has no effect.

Settings that are given in another way but act the same share a key, so inactive ones are dropped here, and lengths are counted in
new tokens. A setting that is not listed counts: a new one can cost a hit, never give a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evalcache.errors import UncacheableError

# Settings that choose the form of what comes back, or speed, and never a token.
_NEUTRAL = frozenset(
    "output_scores output_logits output_attentions output_hidden_states return_dict_in_generate transformers_version "
    "_from_model_config compile_config disable_compile max_length min_length max_new_tokens min_new_tokens is_assistant "
    "continuous_batching_config bos_token_id low_memory".split()
)
_ONLY_SAMPLING = frozenset("temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff top_h".split())
_ONLY_BEAMS = frozenset("length_penalty early_stopping num_beam_groups diversity_penalty".split())
_ONLY_ASSISTED = frozenset(
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind "
    "assistant_ensemble_weight speculation_type max_matching_ngram_size".split()
)
_REFUSED = {
    "prompt_lookup_num_tokens": "assistant",
    "assistant_early_exit": "assistant",
    "use_mtp": "assistant",
    "is_assistant": "assistant",  # stops where the model is not sure of a token
    "max_time": "max_time",
}
# Settings whose processors look at padding of the prompt, or of the encoder's input: values at which they do nothing.
_DECODER_SENSITIVE: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),  # acts on prompts of width 1 only
}
_ENCODER_SENSITIVE: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
}
_ALWAYS_SENSITIVE: dict[str, tuple[Any, ...]] = {
    "watermarking_config": (None,),
    "guidance_scale": (None, 1, 1.0),
}
_COMPILES = frozenset({"compile_config", "disable_compile"})
_MODES = frozenset({"greedy_search", "sample", "beam_search", "beam_sample"})


def effective_settings(config: Any, prefix_length: int, encoder_decoder: bool) -> dict[str, Any]:
    """The settings as they act: inactive ones dropped, lengths as numbers of new tokens.

    Args:
        config: a ``GenerationConfig`` that the engine has resolved. prefix_length: tokens that each returned row begins with.

    Raises:
        UncacheableError: a setting cannot be keyed, or asks for what is not served.
    """
    if not type(config).__module__.startswith("transformers."):
        raise UncacheableError("argument", f"generation_config of type {type(config).__name__}")
    mode = str(getattr(config.get_generation_mode(None), "value", ""))
    neutral = _NEUTRAL
    if "static" in str(config.cache_implementation):
        neutral = _NEUTRAL - _COMPILES  # a static cache makes the engine compile the model, where the device is one for it
    values = {name: value for name, value in vars(config).items() if value is not None and name not in neutral and name[0] != "_"}
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise UncacheableError(reason, name)
    if config.output_attentions or config.output_hidden_states:
        raise UncacheableError("output", "attentions or hidden states")
    if values.get("cache_implementation") == "paged" or values.get("token_healing"):
        raise UncacheableError("unsupported", "paged cache or token healing")
    if mode not in _MODES:
        raise UncacheableError("unsupported", f"generation mode {mode}")
    beams = (config.num_beams or 1) > 1
    if beams and config.low_memory:
        raise UncacheableError("unsupported", "low_memory, with which beam search raises")
    inactive = {*_ONLY_ASSISTED, "decoder_start_token_id"}
    if not config.do_sample:
        inactive |= _ONLY_SAMPLING
    if not beams:
        inactive |= _ONLY_BEAMS
    for name in inactive:
        values.pop(name, None)
    if isinstance(values.get("stop_strings"), str):
        values["stop_strings"] = [values["stop_strings"]]
    values["max_new_tokens"] = config.max_length - prefix_length
    values["min_new_tokens"] = max(0, (config.min_length or 0) - prefix_length)
    if encoder_decoder:  # the id that begins the answer, which may have come from the begin id
        start = config._decoder_start_token_tensor.reshape(-1).tolist()
        values["decoder_start_token_id"] = start[0] if len(start) == 1 else start
    values.pop("eos_token_id", None)
    ends = [] if config._eos_token_tensor is None else sorted(config._eos_token_tensor.tolist())
    # Beams are as many more as there are end ids, an id that is given twice included.
    values["end_ids"] = ends if beams else sorted(set(ends))
    values.pop("pad_token_id", None)
    pad = config._pad_token_tensor
    values["pad_id"] = None if pad is None else int(pad.reshape(-1)[0])
    return {name: _canonical(value) for name, value in values.items()}


def reads_padding(settings: Mapping[str, Any], encoder_decoder: bool) -> bool:
    """Whether a processor that these settings switch on looks at padded places, so that the padded row itself counts."""
    # Despite their names, the encoder's settings act on a decoder's prompt too.
    watched = _ALWAYS_SENSITIVE | _ENCODER_SENSITIVE | ({} if encoder_decoder else _DECODER_SENSITIVE)
    return any(settings[name] not in neutral for name, neutral in watched.items() if name in settings)


def fill_id(config: Any) -> int:
    """What the engine puts after the end of a row that is shorter than its neighbours."""
    pad, ends = config._pad_token_tensor, config._eos_token_tensor
    pad_id = 0 if pad is None else int(pad.reshape(-1)[0])
    if (config.num_beams or 1) == 1:
        return pad_id
    # As beam search has it: an id of 0 counts as none.
    return -1 if ends is None else pad_id or int(ends[0])


def _canonical(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: _canonical(item) for key, item in value.items()}
        return sorted(([_canonical(key), _canonical(item)] for key, item in value.items()), key=repr)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)]  # not the text, which may act otherwise
    return value
