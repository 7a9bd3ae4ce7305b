"""Tiny models of every architecture: one table of sizes by the names that configs use, and special cases as data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from autotp.trace.scenario import scenarios

#: task → the mappings of the auto classes that are swept
TASKS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",),
    "image": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "MODEL_FOR_OBJECT_DETECTION_MAPPING",
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
        "MODEL_FOR_DEPTH_ESTIMATION_MAPPING",
    ),
    "audio": (
        "MODEL_FOR_CTC_MAPPING",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    ),
    "multimodal": (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    ),
}

HEADS, KV_HEADS = 4, 2
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        "hidden_size n_embd d_model embed_dim encoder_hidden_dim attention_hidden_size embedding_size"
        " word_embed_proj_dim emb_dim".split(), 64,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner dff n_inner inner_dim".split(), 96
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads".split(), HEADS,
    ),
    "num_key_value_heads": KV_HEADS,
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers depth"
        " num_decoder_layers".split(), 2,
    ),
    "vocab_size": 101, "head_dim": 16, "d_kv": 16, "d_head": 16, "rotary_dim": 8, "max_position_embeddings": 64,
    "n_positions": 64, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40, "q_lora_rank": 24, "kv_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 32, "patch_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "type_vocab_size": 2,
}  # fmt: skip

#: What is made small, tried in order until the model runs: everything; depth and vocabulary, where sizes have to fit
#: each other in ways that no name tells; nothing.
TABLES: tuple[frozenset[str], ...] = (
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

#: What single architectures need besides: model type → config values (None: the size is left to the config).
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "num_key_value_heads": HEADS},
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
    "xlstm": {"v_head_dim": None},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "expand": 2, "state_size": 8, "chunk_size": 8},
    "mamba": {"state_size": 8, "time_step_rank": 6},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 6},
    "xlnet": {"max_position_embeddings": None},
    "ctrl": {"dff": 96},
}

MOST_PARAMETERS = 40_000_000


def architectures(task: str) -> list[tuple[str, type]]:
    """(model type, class), each class once."""
    found: dict[str, type] = {}
    for name in TASKS[task]:
        for config_class, classes in getattr(auto, name).items():
            for cls in classes if isinstance(classes, tuple) else (classes,):
                if cls not in found.values():
                    model_type = config_class.model_type
                    found[model_type if model_type not in found else f"{model_type}:{cls.__name__}"] = cls
    return sorted(found.items())


def shrunk(
    config_class: type[PretrainedConfig], sizes: dict[str, Any], special: dict[str, Any] | None = None
) -> PretrainedConfig:
    """A config with every size that it has by a known name made small, its parts as well; ``special`` at the top."""
    default = config_class()
    values: dict[str, Any] = {}
    for name, value in sizes.items():
        try:
            own = getattr(default, name, None)
        except AttributeError:  # differs by layer
            own = value
        if own is not None and isinstance(own, (int, float)) == isinstance(value, (int, float)):
            values[name] = value
    for name, follower, value in FOLLOWS:
        if name in values and follower in values:
            values[follower] = values[value] if isinstance(value, str) else value
    for name, part in vars(default).items():
        if isinstance(part, PretrainedConfig):
            values[name] = shrunk(type(part), sizes).to_dict()
    values |= special or {}
    return _accepted(config_class, {name: value for name, value in values.items() if value is not None})


def _accepted(config_class: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    """Leaves out one value after the other where the config's own checks do not take them all."""
    first: Exception | None = None
    for without in (None, "head_dim", "num_key_value_heads", "num_hidden_layers"):
        try:
            return config_class(**{k: v for k, v in values.items() if k != without})
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def build(model_type: str, cls: Any, options: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model in float64 and eval mode that runs, every parameter a function of the seed, and inputs for it.

    Raises the first table's error where no table of sizes gives one that runs.
    """
    first: Exception | None = None
    for table in TABLES:
        sizes = {name: size for name, size in SMALL.items() if name in table}
        try:
            model = _build(model_type.split(":")[0], cls, {**sizes, **options})
            inputs = drawn(scenarios(model)[0].kwargs)
            torch.manual_seed(3)
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except ImportError:
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def drawn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Example inputs with random numbers in place of zeros."""
    generator = torch.Generator().manual_seed(2)

    def fresh(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value

    return {key: fresh(value) for key, value in inputs.items()}


def place_tokens(config: Any) -> None:
    """Let the placeholders of images and sounds be tokens of the small vocabulary, too."""
    size = getattr(config.get_text_config(), "vocab_size", None) or 0
    names = [n for n, v in vars(config).items() if n.endswith(("_token_id", "_token_index")) and isinstance(v, int)]
    for k, name in enumerate(sorted(n for n in names if getattr(config, n) >= size > len(names))):
        setattr(config, name, size - 1 - k)


def _build(model_type: str, cls: Any, sizes: dict[str, Any]) -> torch.nn.Module:
    config = shrunk(cls.config_class, sizes, SPECIAL.get(model_type))
    place_tokens(config)
    if hasattr(config, "is_decoder") and "CausalLM" in cls.__name__:
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters are too many for this sweep")
    torch.manual_seed(0)
    model = cls(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise.to(parameter.dtype))
    if hasattr(model, "set_experts_implementation"):
        with suppress(Exception):  # no experts in it
            model.set_experts_implementation("batched_mm")
    return model


__all__ = ["TASKS", "architectures", "build"]
