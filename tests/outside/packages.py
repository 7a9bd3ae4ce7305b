"""Models of packages that autotp knows nothing of, as their users build them. Made where it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.case import Inputs, ModelCase

# ---- x-transformers


def _x_decoder(**options: object) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = {"dim": 40, "depth": 2, "heads": 8, "attn_dim_head": 6, "ff_mult": 2} | options
    return TransformerWrapper(num_tokens=61, max_seq_len=16, attn_layers=Decoder(**layers))


def _x_encoder_decoder() -> nn.Module:
    from x_transformers import XTransformer

    return XTransformer(
        dim=40,
        enc_num_tokens=61,
        enc_depth=1,
        enc_heads=8,
        enc_attn_dim_head=6,
        enc_max_seq_len=16,
        dec_num_tokens=53,
        dec_depth=1,
        dec_heads=8,
        dec_attn_dim_head=6,
        dec_max_seq_len=16,
    )


def _x_vit() -> nn.Module:
    from x_transformers import Encoder, ViTransformerWrapper

    return ViTransformerWrapper(
        image_size=12,
        patch_size=4,
        num_classes=11,
        attn_layers=Encoder(dim=40, depth=2, heads=8, attn_dim_head=6),
    )


# ---- diffusers


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=11,
        norm_num_groups=4,
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(24, 48),
        norm_num_groups=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=6,
    )


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(12, 24),
        latent_channels=4,
        norm_num_groups=6,
        sample_size=8,
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=6,
        joint_attention_dim=20,
        pooled_projection_dim=14,
        axes_dims_rope=(2, 2, 4),
    )


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=6,
        num_attention_heads=8,
        joint_attention_dim=20,
        caption_projection_dim=48,
        pooled_projection_dim=14,
        out_channels=4,
        pos_embed_max_size=8,
    )


# ---- peft


def _lora(base: str, **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from tests.models import MODELS

    model = MODELS[base].factory()
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[base]
    return get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=base == "gpt2", **options),
    )


def _tokens(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (torch.randint(0, 61, (batch, seq), generator=generator),)


def _ids(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return {"input_ids": torch.randint(3, 61, (batch, seq), generator=generator)}


def _two_sequences(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (
        torch.randint(0, 61, (batch, seq), generator=generator),
        torch.randint(0, 53, (batch, seq + 2), generator=generator),
    )


def _images(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (torch.randn(batch, 3, 12, 12, generator=generator, dtype=dtype),)


def _randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _class_conditional(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return {
        "hidden_states": _randn(generator, dtype, batch, 4, 8, 8),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "class_labels": torch.randint(0, 11, (batch,), generator=generator),
    }


def _text_conditional(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return {
        "sample": _randn(generator, dtype, batch, 4, 8, 8),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": _randn(generator, dtype, batch, seq, 20),
    }


def _sd3_inputs(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return {
        "hidden_states": _randn(generator, dtype, batch, 4, 8, 8),
        "encoder_hidden_states": _randn(generator, dtype, batch, seq, 20),
        "pooled_projections": _randn(generator, dtype, batch, 14),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }


def _flux_inputs(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return {
        "hidden_states": _randn(generator, dtype, batch, 9, 8),
        "encoder_hidden_states": _randn(generator, dtype, batch, seq, 20),
        "pooled_projections": _randn(generator, dtype, batch, 14),
        "timestep": torch.rand(batch, generator=generator, dtype=dtype),
        "img_ids": torch.randint(0, 3, (9, 3), generator=generator).to(dtype),
        "txt_ids": torch.zeros(seq, 3, dtype=dtype),
    }


def _rgb(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (_randn(generator, dtype, batch, 3, 8, 8),)


X_TRANSFORMERS = (
    ModelCase(
        "x_decoder",
        _x_decoder,
        _tokens,
        variants=(
            {},
            {
                "rotary_pos_emb": True,
                "use_rmsnorm": True,
                "ff_glu": True,
                "ff_swish": True,
                "ff_no_bias": True,
            },
            {"attn_flash": True, "attn_kv_heads": 4},
            {"alibi_pos_bias": True, "alibi_num_heads": 4},
            {"rel_pos_bias": True},
            {"attn_qk_norm": True, "attn_pre_talking_heads": True},
            {"attn_one_kv_head": True},
        ),
    ),
    ModelCase("x_encoder_decoder", _x_encoder_decoder, _two_sequences),
    ModelCase("x_vit", _x_vit, _images),
)
DIFFUSERS = (
    ModelCase("diffusers_dit", _dit, _class_conditional),
    ModelCase("diffusers_unet", _unet, _text_conditional),
    ModelCase("diffusers_vae", _vae, _rgb),
    ModelCase("diffusers_sd3", _sd3, _sd3_inputs),
    ModelCase("diffusers_flux", _flux, _flux_inputs),
)
PEFT = (
    ModelCase(
        "lora",
        _lora,
        _ids,
        variants=(
            {"base": "llama"},
            {"base": "gpt2"},
            {"base": "llama", "use_dora": True},
            {"base": "llama", "modules_to_save": ["lm_head"]},
        ),
    ),
)
PACKAGES = (*X_TRANSFORMERS, *DIFFUSERS, *PEFT)
