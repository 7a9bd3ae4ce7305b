"""What transformers' configs say, under the names that they say it by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

IMAGE_TOKEN = ("image_token_id", "image_token_index")
VIDEO_TOKEN = ("video_token_id", "video_token_index")
AUDIO_TOKEN = ("audio_token_id", "audio_token_index")

#: Where a config has the sizes of what a model sees or hears.
_PARTS = (
    "vision_config", "audio_config", "encoder_config", "speech_encoder", "encoder", "backbone_config",
)  # fmt: skip


def get(config: Any, name: str) -> Any:
    """The attribute or item; None where there is none."""
    return getattr(config, name, None) if not isinstance(config, dict) else config.get(name)


def first(places: Iterable[Any], *names: str) -> Any:
    """The first value other than nothing that one of the places has by one of the names."""
    return next((value for place in places for name in names if (value := get(place, name))), None)


def find(config: Any, *names: str) -> Any:
    """The first value that the config or one of its parts has by one of these names."""
    return first((config, *(get(config, part) for part in _PARTS)), *names)


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def vocabulary(model: Any) -> int:
    """The number of tokens, of the decoder where there are two."""
    config = model.config
    for place in (config, get(config, "decoder"), get(config, "text_config")):
        size = get(place, "vocab_size")
        if isinstance(size, int):
            return size
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return int(get(text, "vocab_size") or 32)


def image_token(config: Any) -> int | None:
    """The token in whose place the features of an image are put."""
    return next(
        (token for name in (*IMAGE_TOKEN, *VIDEO_TOKEN) if isinstance(token := get(config, name), int)), None
    )
