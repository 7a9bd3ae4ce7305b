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
    "hidden_size_per_layer_input": 8, "global_head_dim": 32, "vision_feature_layer": -1,
    "image_token_id": 98, "image_token_index": 98, "video_token_id": 97, "video_token_index": 97,
    "audio_token_id": 96, "audio_token_index": 96, "vision_start_token_id": 95, "vision_end_token_id": 94,
    "image_start_token_id": 95, "image_end_token_id": 94, "boi_token_id": 95, "eoi_token_id": 94,
    "boi_token_index": 95, "eoi_token_index": 94, "audio_pad_token_id": 96,
    **dict.fromkeys(
        "out_hidden_size text_hidden_size projection_dim adapter_out_dim adapter_in_dim adapter_input_size"
        " audio_hidden_size projector_hidden_size bottleneck_features entity_emb_size".split(), 64,
    ),
    "reassemble_hidden_size": 64,
    "entity_vocab_size": 31, "mm_tokens_per_image": 4, "codebook_size": 32, "num_embeddings": 41, "base_channels": 32,
    "projection_hidden_dim": 72, "num_latents": 6, "d_latents": 64, "linear_head_dim": 8,
    "linear_num_heads": 4, "encoder_hash_byte_group_vocab": 51, "hidden_size_global": 64,
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
    "dots1": {"n_routed_experts": 4, "num_key_value_heads": HEADS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "hunyuan_v1_moe": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": KV_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "albert": {"embedding_size": 16},  # far narrower than the layers, as it is
    "big_bird": {"attention_type": "original_full"},  # what its first forward of a short input changes it to
    "bigbird_pegasus": {"attention_type": "original_full"},  # likewise
    "zamba": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "head_dim": 32, "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "head_dim": 32, "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48)},
    "reformer:ReformerForMaskedLM": {"is_decoder": False, "axial_pos_embds_dim": (16, 48)},
    "xlstm": {"v_head_dim": None},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "expand": 2, "state_size": 8, "chunk_size": 8},
    "mamba": {"state_size": 8, "time_step_rank": 6},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 6},
    "xlnet": {"max_position_embeddings": None},
    "ctrl": {"dff": 96},
    "qwen3_vl": {"vision_config.deepstack_visual_indexes": [0]},
    "qwen3_vl_moe": {"vision_config.deepstack_visual_indexes": [0]},
    "cohere_compass": {"vision_config.deepstack_visual_indexes": [0]},
    "cosmos3_omni": {"vision_config.deepstack_visual_indexes": [0]},
    "voxtral": {"audio_token_id": 9},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "granite_speech": {"projector_config.encoder_hidden_size": 64},
    "granite_speech_plus": {"projector_config.encoder_hidden_size": 64},
    "granite_speech_encoder": {"context_size": 20, "max_pos_emb": 24},
    "granite_speech_plus_encoder": {"context_size": 20, "max_pos_emb": 24},
    "hy_v4": {"n_routed_experts": 12, "num_local_experts": 12},  # of the real one's 256; so that they are most of it
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
            for name in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": KV_HEADS, "attn_config.clip_qkv": 8.0,
        "ffn_config.ffn_hidden_size": 48},
    "esm": {"vocab_size": 101, "mask_token_id": 99, "pad_token_id": 0},
    "wav2vec2-bert": {"vocab_size": 101},
    "wav2vec2-conformer": {"vocab_size": 101},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "granite_speech5_encoder": {"context_size": 16, "num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "dia_decoder": {
        "cross_hidden_size": 64, "cross_num_attention_heads": HEADS, "cross_head_dim": 16,
        "cross_num_key_value_heads": HEADS,
    },
    "beit:BeitForSemanticSegmentation": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 64, "hidden_dim": 1280},
    "align_vision_model": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 64},
    "perceiver": {"num_self_attends_per_block": 2, "num_frames": 0},
    "perceiver:PerceiverForImageClassificationConvProcessing": {
        "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 224,
    },
    "perceiver:PerceiverForImageClassificationFourier": {
        "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 224,
    },
    "sapiens2": {
        "head_config.upsample_out_channels": [40, 24], "head_config.conv_out_channels": [20],
    },
    "blip-2": {"image_token_index": 98},
    "blip-2:Blip2ForImageTextRetrieval": {"qformer_config.use_qformer_text_input": True},
    "instructblip": {"image_token_index": 98},
    "instructblipvideo": {"video_token_index": 98},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 98, **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 40 + i for i in range(26)},
        },
        "vq_config.num_embeddings": 26, "vq_config.resolution": 32,
    },
    "emu3_vqgan": {"hidden_size": 128},
    "emu3": {"vocabulary_map": {"<image>": 98, "<|extra_200|>": 97, "<|visual token 000000|>": 40}},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32]]},  # of tiles as large as the images are
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "muse_glimmer": {"out_hidden_size": 256, "projector_hidden_size": 64},
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0]},
    "kimi_k25": {"projection_hidden_size": 64},
    "llama4_vision_model": {
        "intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64,
    },
    "minicpmv4_6": {"image_token_id": 98},
    "minicpmv4_7": {"image_token_id": 98},
    "minicpm_ocr": {"image_token_id": 98},
    **{
        f"{name}_sam_vision_model": {"downsample_channels": [96, 64], "global_attn_indexes": [0]}
        for name in ("deepseek_ocr2", "unlimited_ocr")
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    "florence_vision": {
        "depths": [1, 1], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4], "patch_size": [7, 3],
        "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "num_hidden_layers": 4},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1], "downsample_rate": "1/2",
        "image_grid_pinpoints": [[32, 64], [64, 32]],
    },
    "hunyuan_vl_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
    },
    "mistral4": {"head_dim": 20},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron_h_omni": {
        "vision_config.video_temporal_patch_size": 2, "vision_hidden_size": 64, "projector_hidden_size": 64,
    },
    "step3p5": {"sliding_window": 5},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "gemma4_unified_assistant": {
        "text_config.num_kv_shared_layers": 1, "text_config.layer_types": ["full_attention", "full_attention"],
    },
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "lw_detr_vit": {"image_size": 64, "num_windows": 4},
    "lw_detr": {"decoder_self_attention_heads": HEADS, "decoder_cross_attention_heads": HEADS, "group_detr": 2,
                "projector_scale_factors": [1.0]},
    "align": {"projection_dim": 320},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "nemo_speechlm": {"blank_token_id": 100},
    "mimi": {"upsample_groups": 64, "num_filters": 8},
    "hgnet_v2": {
        "stem_channels": [3, 4, 8], "stage_in_channels": [8, 16, 32, 64], "stage_mid_channels": [4, 8, 16, 32],
        "stage_out_channels": [16, 32, 64, 128], "hidden_sizes": [16, 32, 64, 128], "stage_num_blocks": [1, 1, 1, 1],
    },
    **{
        name: {"decoder_in_channels": [64, 64, 64]}
        for name in ("rt_detr", "rt_detr_v2", "pp_doclayout_v4", "d_fine", "deimv2")
    },
    "pp_doclayout_v3": {"decoder_in_channels": [64, 64, 64], "x4_feat_dim": 16},
    "pp_doclayout_v2": {
        "decoder_in_channels": [64, 64, 64], "class_thresholds": [0.5] * 30, "class_order": list(range(30)),
    },
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    **{name: {"image_size": 128, "patch_size": 4, "window_size": 4} for name in ("swin", "swinv2", "donut-swin")},
    # one pooling head after 12 layers and more, in the real ones
    "siglip_vision_model": {"num_hidden_layers": 12},
    "siglip2_vision_model": {"num_hidden_layers": 12},
    "aria": {"projector_patch_to_query_dict": {16: 3}},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]},
}
