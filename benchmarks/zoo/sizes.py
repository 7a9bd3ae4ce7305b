"""The sizes of the tiny models, as data: by the names that configs use, and what single architectures need besides."""

from __future__ import annotations

from typing import Any

HEADS, KV_HEADS = 4, 2
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        "hidden_size n_embd d_model embed_dim encoder_hidden_dim attention_hidden_size embedding_size"
        " word_embed_proj_dim emb_dim fusion_hidden_size encoder_dim".split(), 64,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner dff n_inner inner_dim".split(), 96
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads index_n_heads".split(), HEADS,
    ),
    "num_key_value_heads": KV_HEADS,
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers depth"
        " num_decoder_layers".split(), 2,
    ),
    "vocab_size": 101, "head_dim": 16, "d_kv": 16, "d_head": 16, "rotary_dim": 8, "max_position_embeddings": 64,
    "n_positions": 64, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40, "q_lora_rank": 14, "kv_lora_rank": 6,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 32, "patch_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "type_vocab_size": 2, "index_head_dim": 16, "num_queries": 7, "vocab_size_per_layer_input": 101,
    "hidden_size_per_layer_input": 8, "global_head_dim": 32,
}  # fmt: skip

#: The widths of stages, divided by one number where they are large.
STAGED = "hidden_sizes embed_dims dims widths neck_hidden_sizes encoder_in_channels".split()
LARGEST_STAGE = 128

#: Names of lists that say which layers' outputs are used: there have to be as many layers.
TAPS = "out_indices backbone_out_indices intermediate_hook_ids".split()
DEPTHS = "num_hidden_layers num_layers depth".split()

#: What is made small, tried in order until the model runs: everything; all but the widths of stages; depth and
#: vocabulary, where sizes have to fit each other in ways that no name tells; vocabulary; nothing.
TABLES: tuple[frozenset[str], ...] = (
    frozenset((*SMALL, *STAGED)),
    frozenset(SMALL),
    frozenset(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers depth"
        " num_decoder_layers vocab_size pad_token_id bos_token_id eos_token_id".split()
    ),
    frozenset(("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")),
    frozenset(),
)

#: Sizes that follow from another: where a config has the first name, the second is the third, or a number: multi-latent
#: attention has as many kv heads as heads, and rotates a part of its head.
FOLLOWS: tuple[tuple[str, str, str | int], ...] = (
    ("qk_rope_head_dim", "head_dim", "qk_rope_head_dim"),
    ("kv_lora_rank", "num_key_value_heads", HEADS),
)

#: In place of a backbone of timm.
RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [24, 40, 56, 72], "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}  # fmt: skip

#: What single architectures need besides: model type → config values (None: the size is left to the config). A dotted
#: name is a part's.
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "num_key_value_heads": HEADS, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "hunyuan_v1_moe": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": KV_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48)},
    "reformer:ReformerForMaskedLM": {"is_decoder": False, "axial_pos_embds_dim": (16, 48)},
    "xlstm": {"v_head_dim": None},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "expand": 2, "state_size": 8, "chunk_size": 8},
    "mamba": {"state_size": 8, "time_step_rank": 6},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 6},
    "xlnet": {"max_position_embeddings": None},
    "ctrl": {"dff": 96},
}
