"""Fill a model that has memory but no values: each rank reads its slices, one tensor at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.layout import runs
from ..axes.term import Dim
from ..errors import CheckpointError
from ..rewrite.bind import Rank
from ..rewrite.state import Sharding, dims_by_id
from .keys import Keys, place
from .lazy import Lazy, lazy, read_into
from .tensorfile import Box, cut, whole_box


def fill(model: nn.Module, tensors: Mapping[str, Lazy], sharding: Sharding | None) -> None:
    """Read this rank's part of every tensor to where the model has it.

    Raises:
        CheckpointError: a file cannot be read, or its shapes are not the model's.
    """
    dims_of = {} if sharding is None else dims_by_id(model, sharding.dims)
    done: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in done or name not in tensors:
            continue
        done.add(id(value))
        source = tensors[name]
        box = box_of(dims_of.get(id(value)), None if sharding is None else sharding.rank, source.shape)
        shape = tuple(sum(n for _, n in own) for own in box)
        if shape != tuple(value.shape):
            raise CheckpointError(
                f"{name}: this rank holds a slice of shape {tuple(value.shape)}, of {place(source)} it would "
                f"be {shape}"
            )
        read_into(source, box, value.detach())


def box_of(dims: tuple[Dim, ...] | None, rank: Rank | None, shape: torch.Size) -> Box:
    """The part of a tensor that a rank holds."""
    if dims is None or rank is None:
        return whole_box(shape)
    return [runs(dim, rank.partition, rank.rank) for dim in dims]


class InMemory:
    """A tensor that is not in the checkpoint, and was made."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read_into(self, box: Box, out: Tensor) -> None:
        out.copy_(cut(self.value, box))


def initialise(model: Any, keys: Keys, names: set[str], seed: int) -> None:
    """Draw what a transformers checkpoint lacks as the model's own `_init_weights` does; whole, and from one seed, so
    that all ranks slice the same values."""
    by_module: dict[str, list[str]] = {}
    for name in sorted(names):
        by_module.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fqn, own in by_module.items():
            module = model.get_submodule(fqn)
            alone = copy.copy(module)
            alone._parameters = {
                n: None if p is None else nn.Parameter(torch.empty_like(p, device="cpu"))
                for n, p in module._parameters.items()
            }
            alone._buffers = {
                n: None if b is None else b.to("cpu") if not b.is_meta else torch.empty_like(b, device="cpu")
                for n, b in module._buffers.items()
            }
            alone.__dict__.pop("_is_hf_initialized", None)
            with torch.no_grad():
                model._init_weights(alone)
            for n in own:
                value = alone._parameters.get(n)
                value = alone._buffers.get(n) if value is None else value
                assert value is not None
                full = f"{fqn}.{n}" if fqn else n
                keys.tensors[full] = lazy(InMemory(value.detach()))
