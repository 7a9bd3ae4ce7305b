"""Example inputs: found from the config of a transformers model, guessed for others where the guess is safe.

Only shapes and dtypes matter to a trace. Batch and sequence sizes are small distinct primes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.errors import TraceError
from autotp.trace.library import is_transformers

BATCH, SEQ, DECODER_SEQ = 2, 7, 5

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def as_arguments(example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor) -> Arguments:
    """What a user gives as `example_inputs`: positional arguments as a tuple, keyword arguments as a dict."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TraceError(
        f"example_inputs is a {type(example_inputs).__name__}; give positional arguments as a tuple, "
        "or keyword arguments as a dict"
    )


def example_inputs(model: nn.Module) -> Arguments:
    """Arguments that `model` can be called with. Raises `TraceError` where they cannot be told."""
    return ((), _library_inputs(model)) if is_transformers(model) else (_guessed_inputs(model), {})


def token_ids(length: int, vocabulary: int) -> torch.Tensor:
    """Ordinary tokens: away from 0, 1, 2 and from the end, where the special ones are."""
    ids = torch.arange(BATCH * length).reshape(BATCH, length)
    return (3 + ids % max(1, vocabulary - 6)) % max(1, vocabulary)


# transformers


def _library_inputs(model: Any) -> dict[str, Any]:
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    names = [model.main_input_name]
    two_towers = _get(config, "vision_config") is not None and not model.can_generate()
    names += [
        name for name in ("input_ids", "pixel_values") if two_towers and name in takes and name not in names
    ]
    inputs: dict[str, Any] = {name: _library_input(model, name) for name in names}
    if _get(config, "is_encoder_decoder") and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = token_ids(DECODER_SEQ, vocabulary(model))
    if takes_cache_switch(model):
        inputs["use_cache"] = False
    return inputs


def takes_cache_switch(model: nn.Module) -> bool:
    """Whether `use_cache` is an argument, by name or passed on."""
    takes = inspect.signature(model.forward).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return "use_cache" in takes or (passes_on and "past_key_values" in takes)


def vocabulary(model: Any) -> int:
    """The number of tokens, of the decoder where there are two."""
    config = model.config
    for place in (config, _get(config, "decoder"), _get(config, "text_config")):
        size = _get(place, "vocab_size")
        if isinstance(size, int):
            return size
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return int(_get(text, "vocab_size") or 32)


def _library_input(model: Any, name: str) -> torch.Tensor:
    config = model.config
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if name == "input_ids":
        return token_ids(SEQ, vocabulary(model))
    if name == "pixel_values":
        return torch.zeros(_image_shape(model, config), dtype=dtype)
    if name == "input_values":
        mels = _get(config, "num_mel_bins")
        if mels and _get(config, "max_length"):  # a spectrogram transformer
            return torch.zeros(BATCH, config.max_length, mels, dtype=dtype)
        return torch.zeros(BATCH, 16 * _stride(config), dtype=dtype)
    if name == "input_features":
        mels = _get(config, "num_mel_bins") or _get(config, "feature_projection_input_dim")
        if _get(config, "max_source_positions") and not _get(config, "input_feat_per_channel"):  # Whisper
            return torch.zeros(BATCH, mels or 80, 2 * config.max_source_positions, dtype=dtype)
        return torch.zeros(BATCH, 29, _get(config, "input_feat_per_channel") or mels or 80, dtype=dtype)
    raise TraceError(
        f"cannot find example inputs for {type(model).__name__}: its main input {name!r} is not known to "
        f"autotp. Pass example_inputs={{{name!r}: ...}}"
    )


def _image_shape(model: nn.Module, config: Any) -> tuple[int, ...]:
    places = [_get(config, name) for name in ("vision_config", "encoder", "backbone_config")]
    for place in (config, *places):
        size = _get(place, "image_size")
        if size:
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            channels = _get(place, "num_channels") or _get(place, "in_channels") or 3
            frames = _get(place, "num_frames")
            return (BATCH, frames, channels, height, width) if frames else (BATCH, channels, height, width)
    channels = _get(config, "num_channels") or next(
        (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3
    )
    return (BATCH, channels, 224, 224)  # convolutional: takes any size


def _stride(config: Any) -> int:
    """Samples of a waveform per frame."""
    stride = 1
    for s in _get(config, "conv_stride") or (320,):
        stride *= s
    return stride


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None) if not isinstance(config, dict) else config.get(name)


# any other module


def _guessed_inputs(model: nn.Module) -> tuple[Any, ...]:
    takes = inspect.signature(model.forward).parameters.values()
    positional = [p for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    required += [p.name for p in takes if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    leaf = _first_leaf(model)
    if len(required) != 1 or leaf is None:
        raise _missing(model, required or [p.name for p in takes])
    weight = next((p for p in leaf.parameters() if p is not None), None)
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
    if isinstance(leaf, nn.Embedding):
        return (token_ids(SEQ, leaf.num_embeddings),)
    if isinstance(leaf, nn.Linear):
        return (torch.zeros(BATCH, SEQ, leaf.in_features, dtype=dtype),)
    if isinstance(leaf, nn.MultiheadAttention):
        return (torch.zeros(BATCH, SEQ, leaf.embed_dim, dtype=dtype),)
    if isinstance(leaf, nn.LayerNorm):
        return (torch.zeros(BATCH, SEQ, *leaf.normalized_shape, dtype=dtype),)
    if isinstance(leaf, nn.Conv2d):
        size = _declared_image_size(model)
        if size is not None:
            return (torch.zeros(BATCH, leaf.in_channels, *size, dtype=dtype),)
        raise TraceError(
            f"cannot guess example inputs for {type(model).__name__}: {required[0]!r} looks like images of "
            f"{leaf.in_channels} channels, but no image_size says of which height and width. Pass "
            f"example_inputs=(torch.zeros({BATCH}, {leaf.in_channels}, HEIGHT, WIDTH),)"
        )
    raise _missing(model, required)


def _first_leaf(model: nn.Module) -> nn.Module | None:
    """The first module registered that does the work itself, as the first to run in most models."""
    for module in model.modules():
        whole = isinstance(module, nn.MultiheadAttention) or not any(True for _ in module.children())
        if whole and any(True for _ in module.parameters()):
            return module
    return None


def _declared_image_size(model: nn.Module) -> tuple[int, int] | None:
    for module in model.modules():
        for holder in (module, _get(module, "config")):
            for name in ("image_size", "img_size", "input_size"):
                size = _get(holder, name)
                if isinstance(size, int):
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2:
                    return int(size[0]), int(size[1])
    return None


def _missing(model: nn.Module, names: Sequence[str]) -> TraceError:
    arguments = ", ".join(names) or "..."
    given = f"({arguments},)" if len(names) == 1 else f"({arguments})"
    return TraceError(
        f"cannot guess example inputs for {type(model).__name__}: its forward takes ({arguments}). Pass "
        f"example_inputs={given}, positional arguments as a tuple, or keyword arguments as a dict; only "
        "shapes and dtypes matter"
    )
