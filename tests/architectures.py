"""Every causal architecture that transformers knows, made tiny from its own configuration class: three layers, seeded weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, VOCABULARY = 3, 128
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_SIZES: dict[int | bool, str] = {  # value → settings that take it, wherever a configuration has them
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size dim moe_intermediate_size expert_intermediate_size "
    "shared_expert_intermediate_size",
    64: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim max_position_embeddings "
    "n_positions n_ctx seq_length max_seq_len",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads qk_rope_head_dim rotary_dim "
    "num_experts num_local_experts n_routed_experts moe_num_experts sliding_window",
    2: "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_topk num_experts_per_token moe_k "
    "eos_token_id",
    8: "head_dim attention_head_dim kv_channels d_kv v_head_dim qk_nope_head_dim",
    16: "q_lora_rank kv_lora_rank",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace bos_token_id",
    0: "pad_token_id",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
_SMALL = {setting: value for value, settings in _SIZES.items() for setting in settings.split()}
_ALSO = {  # architectures → what suits them better
    "axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa youtu minicpm3 hy_v4": {
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
    "bamba granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2},
    "hunyuan_v1_dense hunyuan_v1_moe ministral": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "nemotron": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
}

NOT_MADE = frozenset(
    "bailing_hybrid blt cohere_compass_text dbrx deepseek_v2 dots1 dots3_note dots3_note_text gemma3n gemma3n_text "
    "gemma4_assistant gemma4_unified_assistant kimi_linear lfm2_moe longcat_flash musicgen musicgen_melody phi4_multimodal "
    "recurrent_gemma reformer roc_bert xlm xlstm xmod zamba zamba2".split()
)
"""Not made tiny by the sizes above: each would need a configuration of its own."""
ALONE = frozenset(("deepseek_v4", "minimax_m3_vl_text"))
"""Their files add to transformers' own tables when they are imported: to whoever comes after that is another library."""
REFUSED = {"hrm_text": "called once each", "rwkv": ""}
"""Names → what is said. Layers of the first are called in a loop; the second rescales all weights before its first layer."""


def build(name: str) -> torch.nn.Module:
    """A model in float32 and eval mode. Raises whatever its classes raise where these sizes do not suit them."""
    config = CONFIG_MAPPING[name]()
    _shrink(config)
    for names, settings in _ALSO.items():
        if name in names.split():
            vars(config).update(settings)
    torch.manual_seed(0)
    with torch.device("meta"):  # which takes nothing, where the sizes are not those that were set
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > 4_000_000:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def inputs(rows: int = 3, width: int = 9) -> dict[str, torch.Tensor]:
    """A batch, of which the last row is shorter than the others."""
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, width), generator=numbers)
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _shrink(config: Any) -> None:
    for name, value in _SMALL.items():
        known = vars(config).get(name)
        if type(known) is int or (name in vars(config) and name.endswith("_token_id")):
            setattr(config, name, value)
    config.tie_word_embeddings = False
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            _shrink(getattr(config, name))
