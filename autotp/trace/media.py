"""Example images and sounds beside text, for models that put their features in place of placeholder tokens.

How many tokens an image takes is what the model says: its `get_image_features` (`get_audio_features`) is traced with
the shapes in which such models take images, and the rows that come out are counted. The library's processors know the
shapes, but need files that a model without a repository does not have.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autotp.errors import TraceError
from autotp.trace.capture import trace
from autotp.trace.config import AUDIO_TOKEN, IMAGE_TOKEN, dtype_of, first, get, vocabulary
from autotp.trace.inputs import BATCH, SEQ, token_ids
from autotp.trace.library import is_transformers
from autotp.trace.skeleton import skeleton

Inputs = dict[str, torch.Tensor]

_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 for text, 1 for the first other medium
_GRIDS = frozenset(("image_grid_thw", "image_grid_hw", "target_sizes"))  # by one of which patches are told their places
_PASSED_ON = ("image_merge_sizes",)  # by a getter, to what it calls
_MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask")
_AXES = (3, 4)  # of positions: time, height and width; the place in the text
_LEADING = 2  # tokens of text before the placeholders
_FRAMES = 96


@dataclass(frozen=True)
class _Medium:
    getter: str
    arguments: tuple[str, ...]  # of which a model takes one
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class _Offer:
    """Inputs of a medium, and how many placeholders a row has for them."""

    token: int
    count: int
    given: Inputs


_MEDIA = (
    _Medium("get_image_features", ("pixel_values",), IMAGE_TOKEN),
    _Medium("get_audio_features", ("input_features", "input_values"), AUDIO_TOKEN),
)


def media_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Example inputs with each medium that the model takes beside its text; one after another to try.

    `input_ids` is [BATCH, SEQ + placeholders]; the placeholders of a row are in one run a medium. Nothing for a model
    without such media, or of which no shape is known to fit.
    """
    if not is_transformers(model) or model.main_input_name != "input_ids":
        return
    takes = inspect.signature(model.forward).parameters
    if all(_names(model, medium) == [] for medium in _MEDIA) and "pixel_values" in takes:
        for given in _images(model):  # which the text is put behind
            yield {k: v for k, v in given.items() if k in takes}
    offers = [_fitting(model, medium, takes) for medium in _MEDIA]
    best = [next(offer, None) for offer in offers]
    if all(offer is not None for offer in best):
        yield from _beside_text(model, [offer for offer in best if offer is not None], takes)
    for offer, others in zip(best, offers, strict=True):
        if offer is not None:
            for one in itertools.chain((offer,), others):
                yield from _beside_text(model, [one], takes)


def _fitting(model: Any, medium: _Medium, takes: Collection[str]) -> Iterator[_Offer]:
    """The shapes of a medium that the model makes features of."""
    token = _token(model, medium)
    holders = _holders(model, medium)
    if token is None or not holders:
        return
    makes = _images if "pixel_values" in medium.arguments else _sounds
    for given in makes(model):
        known = {k: v for k, v in given.items() if k in takes}
        if not any(name in known for name in medium.arguments):
            continue
        if not _GRIDS.isdisjoint(given) and _GRIDS.isdisjoint(known):
            continue
        for holder, getter in holders:
            own = {k: v for k, v in known.items() if k in getter or k in _PASSED_ON}
            if "input_ids" in getter:  # to find how many sounds there are, not how long they are
                own["input_ids"] = _with_placeholders(model, [_Offer(token, _LEADING, {})])
            count = _rows(model, holder, medium, own)
            if count and count % BATCH == 0:
                for one in _masked(known, count // BATCH):
                    yield _Offer(token, count // BATCH, one)
                break


def _masked(given: Inputs, count: int) -> Iterator[Inputs]:
    """With what is given, and where that has masks, with such that tell of features instead of frames."""
    yield given
    masks = {k: torch.ones(BATCH, count, dtype=torch.bool) for k in given if k in _MASKS}
    if masks:
        yield given | masks


def _beside_text(model: Any, offers: Sequence[_Offer], takes: Collection[str]) -> Iterator[Inputs]:
    ids = _with_placeholders(model, offers)
    tokens = torch.tensor([offer.token for offer in offers])
    given = {"input_ids": ids, **{name: torch.isin(ids, tokens).long() for name in _TYPES if name in takes}}
    for offer in offers:
        given |= offer.given
    yield given
    if "position_ids" in takes:  # what finds them branches on the sizes of images
        for axes in _AXES:
            yield {**given, "position_ids": torch.arange(ids.shape[1]).expand(axes, *ids.shape).contiguous()}


def _names(model: Any, medium: _Medium) -> list[str]:
    return [name for name in medium.tokens if get(model.config, name) is not None]


def _token(model: Any, medium: _Medium) -> int | None:
    found = (get(model.config, name) for name in _names(model, medium))
    return next((t for t in found if isinstance(t, int) and 0 <= t < vocabulary(model)), None)


def _holders(model: Any, medium: _Medium) -> list[tuple[str, Collection[str]]]:
    """The modules that have the getter, and its arguments, from the outermost: some only pass on what they get."""
    return [
        (fqn, inspect.signature(getattr(module, medium.getter)).parameters)
        for fqn, module in model.named_modules()
        if hasattr(module, medium.getter)
    ]


def _with_placeholders(model: Any, offers: Sequence[_Offer]) -> torch.Tensor:
    tokens = {offer.token for offer in offers}
    plain = next(i for i in range(vocabulary(model) - 1, -1, -1) if i not in tokens)
    text = token_ids(SEQ, vocabulary(model))
    text = torch.where(torch.isin(text, torch.tensor([*tokens])), plain, text)
    runs = [torch.full((BATCH, offer.count), offer.token) for offer in offers]
    return torch.cat([text[:, :_LEADING], *runs, text[:, _LEADING:]], 1)


def _rows(model: Any, holder: str, medium: _Medium, given: Inputs) -> int:
    """How many features there are; 0 where the model does not take what is given.

    Those that are ready for the text's embeddings come as ``pooler_output``, beside the tower's own.
    """
    try:
        traced = trace(
            skeleton(model), (), given, medium.getter, training=False,
            run=lambda m, **kwargs: getattr(m.get_submodule(holder), medium.getter)(**kwargs),
        )  # fmt: skip
    except TraceError:
        return 0
    features = [port for port in traced.outputs if port.path[0] == "out"]
    ready = [port for port in features if "pooler_output" in port.path] or features
    shapes = [port.node.meta["val"].shape for port in ready]
    width = model.get_input_embeddings().embedding_dim
    return sum(math.prod(shape[:-1]) for shape in shapes) if all(shape[-1] == width for shape in shapes) else 0


# shapes


def _images(model: Any) -> Iterator[Inputs]:
    """The shapes of `pixel_values`, with what else tells their sizes; the most common first."""
    dtype = dtype_of(model)
    vision = (first((model.config, get(model.config, "encoder")), "vision_config") or model.config,)
    channels = first(vision, "num_channels", "in_channels", "in_chans") or 3
    size = first((*vision, get(model.config, "vq_config")), "image_size", "img_size", "resolution") or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    patch = first(vision, "patch_size") or 16
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    sizes = torch.tensor([[height, width]]).repeat(BATCH, 1)

    merge = first((*vision, model.config), "spatial_merge_size", "merge_kernel_size") or 2
    merge = merge[0] if isinstance(merge, (tuple, list)) else merge
    side = 2 * merge
    grid = torch.tensor([[1, side, side]]).repeat(BATCH, 1)
    grids = {
        "image_grid_thw": grid,
        "image_grid_hw": grid[:, 1:].contiguous(),
        "target_sizes": grid[:, 1:].int(),
        "image_merge_sizes": torch.full((BATCH,), merge),
    }
    for frames in dict.fromkeys((first(vision, "temporal_patch_size", "patch_temporal") or 1, 1)):
        pixels = channels * frames * patch * patch
        yield {"pixel_values": torch.ones(BATCH * side * side, pixels, dtype=dtype), **grids}
    flat = torch.ones(BATCH * side * side, channels, patch, patch, dtype=dtype)
    yield {"pixel_values": flat, **grids}

    plain = torch.ones(BATCH, channels, height, width, dtype=dtype)
    larger = get(get(model.config, "high_res_vision_config"), "image_size")
    if larger:
        yield {"pixel_values": plain, "high_res_pixel_values": torch.ones(BATCH, channels, larger, larger, dtype=dtype)}
    yield {"pixel_values": plain}
    yield {"pixel_values": plain, "image_sizes": sizes}
    for count in (1, 2, 3, 5):  # an image and its tiles
        yield {
            "pixel_values": torch.ones(BATCH, count, channels, height, width, dtype=dtype),
            "image_sizes": sizes,
            "pixel_attention_mask": torch.ones(BATCH, count, height, width, dtype=torch.bool),
        }
    rows = torch.arange(side).repeat_interleave(side)
    places = torch.stack([torch.arange(side).repeat(side), rows], -1)
    yield {
        "pixel_values": torch.ones(BATCH, side * side, channels * patch * patch, dtype=dtype),
        "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]]).repeat(BATCH, 1),
        "image_position_ids": places.expand(BATCH, -1, -1).contiguous(),
    }


def _sounds(model: Any) -> Iterator[Inputs]:
    """The shapes of `input_features`, with the mask that tells how long each is; those of `input_values`."""
    dtype = dtype_of(model)
    audio = (first((model.config,), "audio_config", "encoder_config") or model.config,)
    bins = first(audio, "num_mel_bins", "input_dim", "input_feat_size") or 80
    positions = first(audio, "max_source_positions")
    window = first(audio, "n_window")
    lengths = (2 * positions if positions else _FRAMES, _FRAMES, 2 * window if window else _FRAMES)
    for frames in dict.fromkeys(lengths):
        for shape in ((BATCH, bins, frames), (BATCH, frames, bins)):
            mask = torch.ones(BATCH, frames, dtype=torch.long)
            yield {"input_features": torch.ones(shape, dtype=dtype), **dict.fromkeys(_MASKS, mask)}
    hop = first((get(model.config, "acoustic_tokenizer_encoder_config"), *audio), "hop_length") or 320
    samples = 3 * hop
    yield {
        "input_values": torch.ones(BATCH, 1, samples, dtype=dtype),
        "padding_mask": torch.ones(BATCH, samples, dtype=torch.bool),
    }
