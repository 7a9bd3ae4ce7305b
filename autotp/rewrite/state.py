"""What a sharded model knows of its sharding, and the way back to the whole state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..axes.layout import local_shape, merge
from ..axes.term import Dim
from ..errors import AutoTPError
from ..plan.plan import Plan
from ..runtime.group import get_group
from .bind import Rank

_ATTRIBUTE = "_autotp_sharding"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked of the plan, to be asked again when the model has changed."""

    example_inputs: Any = None
    plan: Any = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Sharding:
    """The plan, this rank's place in it, the dims of each sharded parameter or buffer, the whole model's config, and
    what was asked.
    """

    plan: Plan
    rank: Rank
    dims: Mapping[str, tuple[Dim, ...]]
    config: Any = None
    asked: Asked = Asked()


def remember(model: nn.Module, sharding: Sharding) -> None:
    model.__dict__[_ATTRIBUTE] = sharding


def sharding_of(model: nn.Module) -> Sharding | None:
    """The sharding of a model that autotp has parallelized, or None."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Sharding) else None


def sharded_in(model: nn.Module) -> list[nn.Module]:
    """The sharded models that a model is, or has in it."""
    return [module for module in model.modules() if sharding_of(module) is not None]


def refuse_wrapper(model: nn.Module, what: str) -> None:
    """Where a model is expected that is sharded itself, or not at all."""
    inside = sharded_in(model)
    if inside and inside[0] is not model:
        raise AutoTPError(
            f"{what} was given a {type(model).__name__} around a sharded {type(inside[0]).__name__}. Give it the "
            "sharded model itself; autotp.full_state_dict takes both."
        )


def dims_by_id(model: nn.Module, dims: Mapping[str, tuple[Dim, ...]]) -> dict[int, tuple[Dim, ...]]:
    """The dims of each sharded parameter or buffer, by its id: tied ones have several names."""
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held.update(model.named_buffers(remove_duplicate=False))
    return {id(held[fqn]): own for fqn, own in dims.items() if fqn in held}


def gather_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on every rank, of a model that is sharded or has sharded ones in it; one tensor is gathered
    at a time."""
    whole: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}  # tied parameters are gathered once, and stay one tensor
    sharded: dict[int, tuple[tuple[Dim, ...], Rank]] = {}
    for part in sharded_in(model):
        sharding = sharding_of(part)
        assert sharding is not None
        sharded |= {key: (dims, sharding.rank) for key, dims in dims_by_id(part, sharding.dims).items()}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in done:
            local = slice_of(value.detach())
            done[id(value)] = gather(local, *sharded[id(value)]) if id(value) in sharded else local
        whole[name] = done[id(value)]
    return whole


def slice_of(value: Tensor) -> Tensor:
    """The rank's slice as autotp cut it: FSDP2 shards it once more (a collective call over its ranks, then)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(local: Tensor, dims: tuple[Dim, ...], rank: Rank) -> Tensor:
    """The whole of what this rank has a slice of."""
    group = get_group(rank.prefix)
    assert group.process_group is not None
    parts = [
        torch.empty(local_shape(dims, rank.partition, r), dtype=local.dtype, device=local.device)
        for r in range(rank.tp)
    ]
    parts[rank.rank] = local.contiguous()
    for r in range(rank.tp):
        dist.broadcast(parts[r], group_src=r, group=group.process_group)
    return merge(parts, dims, rank.partition)
