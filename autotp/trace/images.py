"""Example inputs of language models that see: an image, and the placeholder tokens that its features take the place of.

Without an image the vision tower would not be traced, and stay whole. How many tokens an image takes is asked of the
model, on fake tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from autotp.trace.inputs import image_inputs, image_token, vocabulary
from autotp.trace.library import is_transformers, unchecked
from autotp.trace.makefx import fake_mode, quiet
from autotp.trace.skeleton import skeleton


def with_images(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The example inputs with an image before each text; None where the model takes none, or cannot be traced with it
    (code that branches on the sizes of images given as tensors)."""
    library: Any = model
    if not is_transformers(model) or "input_ids" not in inputs:
        return None
    takes = inspect.signature(library.forward).parameters
    token = image_token(library.config)
    if "pixel_values" not in takes or (token is not None and not 0 <= token < vocabulary(model)):
        return None
    bare = skeleton(model)
    for images in image_inputs(model):
        found = {**inputs, **images}
        try:
            if token is not None:
                count = _features(bare, images) // len(inputs["input_ids"])
                placeholders = torch.full((len(inputs["input_ids"]), count), token)
                found["input_ids"] = torch.cat([placeholders, inputs["input_ids"]], dim=1)
            _dry_run(bare, partial(bare, **found))
        except Exception:  # it takes other images, or other inputs beside them
            continue
        return found
    return None


def _features(bare: nn.Module, images: Mapping[str, torch.Tensor]) -> int:
    """How many tokens' features the model makes of these images: the rows, in all dims but the last."""
    tower: Any = next(module for module in bare.modules() if hasattr(module, "get_image_features"))
    wanted = inspect.signature(tower.get_image_features).parameters
    given = {name: value for name, value in images.items() if name in wanted}
    features = _dry_run(bare, partial(tower.get_image_features, **given))
    return sum(t.numel() // t.shape[-1] for t in _tensors(getattr(features, "pooler_output", features)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _dry_run(bare: nn.Module, run: Callable[[], Any]) -> Any:
    """What a call of a skeleton, or of a part of it, returns: without values."""
    made: dict[int, torch.Tensor] = {}
    with quiet(), fake_mode(), unchecked(), torch.no_grad():
        fakes = {
            name: made.setdefault(id(t), torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype))
            for named in (bare.named_parameters, bare.named_buffers)
            for name, t in named(remove_duplicate=False)
            if t.device.type == "meta"
        }
        with _reparametrize_module(bare, fakes):
            return run()
