"""Example inputs: found from the config of a transformers model, guessed for others where the guess is safe.

Only shapes and dtypes matter to a trace. Batch and sequence sizes are small distinct primes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.errors import TraceError
from autotp.trace.config import IMAGE_TOKEN, VIDEO_TOKEN, dtype_of, find, first, get, image_token, vocabulary
from autotp.trace.library import is_transformers

BATCH, SEQ, DECODER_SEQ = 2, 7, 5
FRAMES, FRAMES_OF_VIDEO = 29, 2
ENCODER_STATES = ("encoder_hidden_states", "encoder_outputs")
PATCHES = (3, 5)  # rows and columns of an image that comes in patches

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
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    for name in _wanted(model, takes):
        inputs |= _library_input(model, name)
    if get(model.config, "is_encoder_decoder") and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _decoder_ids(model)
    if takes_cache_switch(model):
        inputs["use_cache"] = False
    return inputs


def _wanted(model: Any, takes: Mapping[str, inspect.Parameter]) -> list[str]:
    """The arguments without which the model does not run: its main input, those that have no default, the text beside
    an image or the image beside a text, and where on a page the words of the text are."""
    config = model.config
    names = [model.main_input_name]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names += [name for name, p in takes.items() if p.default is p.empty and p.kind in named]
    if "inputs" in names:  # of several kinds
        names = [next((kind for kind in ("input_ids", "pixel_values") if kind in takes), "inputs")]
    if get(config, "vision_config") is not None:
        names += ["input_ids"] if model.main_input_name.startswith("pixel_values") else []
        two_towers = not model.can_generate() and image_token(config) is None
        names += ["input_ids", "pixel_values"] if two_towers else []
    names.append("bbox")
    if any(name.startswith("pixel_values") for name in names) and not names[0].startswith("pixel_values"):
        names = [name for name in names if name != "pixel_values" or "pixel_values_videos" not in names]
    return list(dict.fromkeys(name for name in names if name in takes or name == names[0]))


def takes_cache_switch(model: nn.Module) -> bool:
    """Whether `use_cache` is an argument, by name or passed on."""
    takes = inspect.signature(model.forward).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return "use_cache" in takes or (passes_on and "past_key_values" in takes)


def encoder_states(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What the cross-attention of a decoder by itself looks at, where it may have one; nothing for other models."""
    takes = inspect.signature(model.forward).parameters if is_transformers(model) else ()
    name = next((name for name in ENCODER_STATES if name in takes), None)
    if name is None:
        return
    config: Any = model.config
    looks = name == "encoder_outputs" or get(config, "is_decoder") or get(config, "add_cross_attention")
    if get(config, "is_encoder_decoder") or not looks:
        return
    width = first((config,), "cross_attention_hidden_size", "hidden_size")
    if width:
        states = torch.zeros(BATCH, FRAMES, width, dtype=dtype_of(model))
        yield {name: (states,) if name == "encoder_outputs" else states}


def _library_input(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The argument, and those that go with it."""
    config = model.config
    takes = inspect.signature(model.forward).parameters
    dtype = dtype_of(model)
    if name.endswith("input_ids"):
        size = vocabulary(model)
        books = (
            get(config, "num_codebooks")
            if name == "input_ids" and not get(config, "is_encoder_decoder")
            else 0
        )
        return {name: token_ids(SEQ, size).repeat(books or 1, 1)}
    if name == "bbox":
        whole = "Long" in str(takes[name].annotation)
        return {name: torch.zeros(BATCH, SEQ, 4, dtype=torch.long if whole else dtype)}
    if name.startswith("pixel_values"):
        return _images(model, name, takes, dtype)
    if name == "flattened_patches":
        patches = find(config, "patch_size") or 16
        width = patches * patches * (find(config, "num_channels") or 3)
        return {
            name: torch.zeros(BATCH, PATCHES[0] * PATCHES[1], 2 + width, dtype=dtype)
        }  # row, column, pixels
    if name == "input_values":
        mels = get(config, "num_mel_bins")
        if mels and get(config, "max_length"):  # a spectrogram transformer
            return {name: torch.zeros(BATCH, config.max_length, mels, dtype=dtype)}
        return {name: torch.zeros(BATCH, 16 * _stride(config), dtype=dtype)}
    if name == "input_features":
        return {name: torch.zeros(_spectrogram(model), dtype=dtype)}
    encoder = _encoder(model)
    if name == "inputs" and encoder is not None:  # a pair of models: what the first takes
        (its,) = _library_input(encoder, encoder.main_input_name).values()
        return {name: its}
    raise TraceError(
        f"cannot find example inputs for {type(model).__name__}: its input {name!r} is not known to "
        f"autotp. Pass example_inputs={{{name!r}: ...}}"
    )


def _spectrogram(model: Any) -> tuple[int, ...]:
    config = model.config
    leaf = _first_leaf(model)
    wide = leaf.in_features if isinstance(leaf, nn.Linear) else get(config, "feature_projection_input_dim")
    if wide:  # frames, several of them stacked
        return BATCH, FRAMES, int(wide)
    mels = find(config, "input_feat_per_channel", "num_mel_bins") or 80
    positions = get(config, "max_source_positions")
    if positions and not get(config, "input_feat_per_channel"):  # of a fixed length, as Whisper's
        return BATCH, mels, 2 * positions
    return BATCH, FRAMES, mels


def _encoder(model: Any) -> Any:
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return encoder if encoder is not model and hasattr(encoder, "main_input_name") else None


def _decoder_ids(model: Any) -> torch.Tensor:
    ids = token_ids(DECODER_SEQ, vocabulary(model))
    books = get(
        get(model.config, "decoder_config"), "num_channels"
    )  # of a decoder of several streams of tokens
    return ids if not books else ids.unsqueeze(-1).repeat(1, 1, books)


def _images(
    model: nn.Module, name: str, takes: Mapping[str, inspect.Parameter], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    config = model.config
    if "spatial_shapes" in takes:  # a list of patches, of images of all shapes
        patch = find(config, "patch_size")
        width = patch * patch * (find(config, "num_channels") or 3)
        count = PATCHES[0] * PATCHES[1]
        return {
            name: torch.zeros(BATCH, count, width, dtype=dtype),
            "pixel_attention_mask": torch.ones(BATCH, count, dtype=torch.long),
            "spatial_shapes": torch.tensor(PATCHES).expand(BATCH, 2).contiguous(),
        }
    shape = _image_shape(model, config)
    only_videos = any(get(config, token) for token in VIDEO_TOKEN) and not any(
        get(config, token) for token in IMAGE_TOKEN
    )
    if (name == "pixel_values_videos" or only_videos) and len(shape) == 4:
        shape = (BATCH, FRAMES_OF_VIDEO, *shape[1:])
    elif {"pixel_attention_mask", "image_attention_mask"} & takes.keys() and len(shape) == 4:
        shape = (BATCH, 1, *shape[1:])  # several images to a text
    images = {name: torch.zeros(shape, dtype=dtype)}
    if "image_attention_mask" in takes:  # which of them each token sees
        images["image_attention_mask"] = torch.ones(BATCH, SEQ, 1, dtype=torch.long)
    return images


def _image_shape(model: nn.Module, config: Any) -> tuple[int, ...]:
    size = find(config, "image_size")
    channels = find(config, "num_channels", "in_channels") or next(
        (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3
    )
    height, width = (
        size if isinstance(size, (tuple, list)) else (size or 224, size or 224)
    )  # convolutional: any
    frames = find(config, "num_frames")
    return (BATCH, frames, channels, height, width) if frames else (BATCH, channels, height, width)


def _stride(config: Any) -> int:
    """Samples of a waveform per frame."""
    stride = 1
    for s in get(config, "conv_stride") or (320,):
        stride *= s
    return stride


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
        for holder in (module, get(module, "config")):
            for name in ("image_size", "img_size", "input_size"):
                size = get(holder, name)
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
