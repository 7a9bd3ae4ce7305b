"""The whole of a sharded parameter, gathered from the ranks to the one that writes it; one at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..axes.layout import local_shape, merge, owners
from ..axes.term import Dim, size_of
from ..rewrite.bind import Rank
from ..rewrite.state import Sharding, dims_by_id, slice_of
from ..runtime.group import get_group
from .tensorfile import Box, cut


class Desk:
    """Where whole tensors are put together: on rank ``writer``, which may change from tensor to tensor.

    Every rank asks for the same tensors in the same order, so each request is a collective call. The last tensor is
    kept, for those that are written in several pieces (stacked experts).
    """

    def __init__(self, rank: Rank | None) -> None:
        self.rank = rank
        self.writer = 0
        self._last: tuple[int, int] | None = None
        self._whole: Tensor | None = None

    def get(self, value: Tensor, dims: tuple[Dim, ...] | None) -> Tensor | None:
        """The whole tensor on the writer, None on the others."""
        if self.rank is None or dims is None:
            value = slice_of(value)
            return value if self.rank is None or self.rank.rank == self.writer else None
        key = (id(value), self.writer)
        if self._last != key:
            self._whole = None
            self._whole = self._gather(slice_of(value), dims, self.rank)
            self._last = key
        return self._whole

    def _gather(self, value: Tensor, dims: tuple[Dim, ...], rank: Rank) -> Tensor | None:
        group = get_group(rank.prefix).process_group
        first = [ranks[0] for ranks in owners(dims, rank.partition)]
        if rank.rank != self.writer:
            if rank.rank in first and value.numel():
                dist.send(value.contiguous(), group_dst=self.writer, group=group)
            return None
        parts = []
        for r in range(rank.tp):
            shape = local_shape(dims, rank.partition, r)
            if r == rank.rank:
                part = value
            elif r in first:
                part = torch.empty(shape, dtype=value.dtype, device=value.device)
                if part.numel():
                    dist.recv(part, group_src=r, group=group)
                part = part.cpu()
            else:
                part = value.new_empty(()).expand(shape)  # as another rank has it; never looked at
            parts.append(part.cpu())
        return merge(parts, dims, rank.partition)


class Gathered:
    """A parameter or buffer of a sharded model, whole."""

    def __init__(self, name: str, value: Tensor, dims: tuple[Dim, ...] | None, desk: Desk) -> None:
        self.name = name
        self.value = value.detach()
        self.dims = dims
        self.desk = desk

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if self.dims is None else tuple(size_of(d) for d in self.dims)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read_into(self, box: Box, out: Tensor) -> None:
        part = self.desk.get(self.value, self.dims)
        if part is not None:
            out.copy_(cut(part, box))


def whole_state(model: nn.Module, sharding: Sharding | None) -> tuple[dict[str, Gathered], Desk]:
    """Every name of the state dict, tied ones several times with one source."""
    desk = Desk(None if sharding is None else sharding.rank)
    dims_of = {} if sharding is None else dims_by_id(model, sharding.dims)
    made: dict[int, Gathered] = {}
    found: dict[str, Gathered] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in made:
            made[id(value)] = Gathered(name, value, dims_of.get(id(value)), desk)
        found[name] = made[id(value)]
    return found, desk
