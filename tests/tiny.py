"""Tiny architectures: real transformers models, made from configs with seeded random weights, each in a fraction of a second.

They have two layers, a width of 32, `VOCABULARY` tokens and at most `POSITIONS` positions, are in float32 and eval mode, and know
the same three special ids. The weights are larger than a fresh model's (`SPREAD`), because with the usual 0.02 the next token
hardly depends on the prompt, and a wrong answer would look like the right one.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
POSITIONS = 256
PAD, BOS, EOS = 0, 1, 2
SPREAD = 0.15

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": SPREAD, **_IDS}
_HEADS = {**_WIDE, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": POSITIONS}
_GROUPED = {**_HEADS, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": SPREAD, **_IDS}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": POSITIONS, "init_std": 3 * SPREAD,
    "decoder_start_token_id": EOS, "forced_eos_token_id": None, **_IDS,
}  # fmt: skip
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}

# name → (class of the model, class of the config, settings)
_SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # decoder-only
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _HEADS),
    "opt": ("OPTForCausalLM", "OPTConfig", {
        "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": POSITIONS, "init_std": SPREAD, **_IDS,
    }),
    "phi": ("PhiForCausalLM", "PhiConfig", _GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "original_max_position_embeddings": POSITIONS}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "falcon": ("FalconForCausalLM", "FalconConfig", {
        **_WIDE, "num_attention_heads": 4, "num_kv_heads": 1, "ffn_hidden_size": 64, "max_position_embeddings": POSITIONS,
    }),
    "bloom": ("BloomForCausalLM", "BloomConfig", {
        "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 2 * SPREAD, **_IDS,
    }),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "n_ctx": POSITIONS, "rotary_dim": 4}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _GROUPED),
    # mixtures of experts
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    }),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    # state-space models, hybrids of them with attention, and a recurrent one
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_WIDE, "tie_word_embeddings": False, "state_size": 8, "time_step_rank": 4}),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {
        **_WIDE, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16, "time_step_rank": 4,
    }),
    "jamba": ("JambaForCausalLM", "JambaConfig", {
        **_GROUPED, **_MAMBA, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
    }),
    "bamba": ("BambaForCausalLM", "BambaConfig", {
        **_GROUPED, **_MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16, "attn_layer_indices": [1],
    }),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {
        "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "context_length": POSITIONS, **_IDS,
        "rescale_every": 1,  # the weights of all but the first layer are rescaled at the first forward
    }),
    # encoder–decoder
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 2.0,
        "decoder_start_token_id": PAD, **_IDS,
    }),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    "marian": ("MarianMTModel", "MarianConfig", {**_SEQ2SEQ, "decoder_vocab_size": VOCABULARY}),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", {
        **_SEQ2SEQ, "scale_embedding": False, "tie_word_embeddings": False,
    }),
    # rotary embeddings that change for the whole batch once its longest row has more than 16 tokens
    "phi3_longrope": ("Phi3ForCausalLM", "Phi3Config", {
        **_GROUPED, "original_max_position_embeddings": 16, "rope_parameters": {**_LONGROPE, "factor": 16.0},
    }),
    "llama_dynamic": ("LlamaForCausalLM", "LlamaConfig", {
        **_GROUPED, "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    }),
}  # fmt: skip

NAMES = tuple(_SHAPES)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
STATE_SPACE = ("mamba", "mamba2", "jamba", "bamba", "rwkv")
ENCODER_DECODERS = ("t5", "bart", "marian", "m2m_100")
ROPE_DEPENDENT = ("phi3_longrope", "llama_dynamic")
DECODERS = tuple(name for name in NAMES if name not in {*MIXTURES, *STATE_SPACE, *ENCODER_DECODERS, *ROPE_DEPENDENT})
# A row's answer depends on the rows beside it.
NOT_ROW_SEPARABLE = ("rwkv", *ROPE_DEPENDENT)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Makes one tiny model: same name and seed, same weights. The caller's random state is left as it was.

    Args:
        name: one of `NAMES`.
        seed: of the weights.

    Returns:
        The model, on the CPU in eval mode. Each call builds another one, so that a test may change it.
    """
    model_class, config_class, settings = _SHAPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    return model.to(torch.float32).eval()


def prompts(rows: int = 4, width: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Makes a left-padded batch of random prompts, of which the first is ``width`` tokens long and the last a third of it.

    Args:
        rows: how many prompts.
        width: the longest one's tokens.
        seed: of the tokens.

    Returns:
        ``input_ids`` and ``attention_mask``, as `generate` takes them.

    *Shape*: both ``(rows, width) int64``.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(EOS + 1, VOCABULARY, (rows, width), generator=generator)
    lengths = torch.linspace(width, max(1, width // 3), rows).round().long()
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return {"input_ids": ids.where(mask == 1, torch.tensor(PAD)), "attention_mask": mask}
