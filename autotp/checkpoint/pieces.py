"""A local tensor as rectangular pieces of a global one, as ``torch.distributed.checkpoint`` asks for them.

A fused or uneven layout is a few pieces more. Elements that several ranks hold are written by the first of them.
Where something else has sharded the local tensor once more (FSDP2 makes a `DTensor` of it), a rank's pieces are the
part of its slice that it still holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ..axes.layout import indices_of, runs
from ..axes.term import Dim, size_of
from ..errors import CheckpointError
from ..rewrite.bind import Rank

Piece = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(global offset, local offset, sizes)."""
Elements = list[np.ndarray[Any, np.dtype[np.int64]]]
"""For each dim the global indices that are meant."""


class Pieces(Tensor):
    """What a rank holds of a global tensor, for the planners of ``torch.distributed.checkpoint``."""

    _local: Tensor
    _held: list[Piece]
    _own: list[Piece]

    @staticmethod
    def __new__(cls, value: Tensor, dims: Sequence[Dim], rank: Rank) -> Pieces:
        shape = [size_of(dim) for dim in dims]
        local, kept = _local_part(value.detach())
        made: Pieces = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        held = _part([indices_of(runs(dim, rank.partition, rank.rank)) for dim in dims], kept)
        made._local = local
        made._held = _pieces(held, held)
        made._own = _pieces(_own(dims, rank, held), held)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func} on the pieces of a tensor")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pieces({tuple(self.shape)})"

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(piece[0])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(piece), properties, self.shape),
            )
            for piece in self._own
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        self._own = self._held  # asked for when it is loaded: then into all that is held, not what would be written
        return [_chunk(piece) for piece in self._held]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offset, at, sizes in (*self._own, *self._held):
            if index.offset is not None and tuple(index.offset) == offset:
                part = self._local
                for d, (start, length) in enumerate(zip(at, sizes, strict=True)):
                    part = part.narrow(d, start, length)
                return part
        raise CheckpointError(f"{index.fqn}: this rank has no piece at {index.offset}")


def _local_part(value: Tensor) -> tuple[Tensor, list[tuple[int, int]] | None]:
    """The memory of this rank, and which (start, length) of each dim of the slice it is; None: all of it."""
    if not isinstance(value, DTensor):
        return value, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return value.to_local(), list(zip(offset, shape, strict=True))


def _part(elements: Elements, kept: Sequence[tuple[int, int]] | None) -> Elements:
    if kept is None:
        return elements
    return [found[start : start + n] for found, (start, n) in zip(elements, kept, strict=True)]


def _own(dims: Sequence[Dim], rank: Rank, held: Elements) -> Elements:
    """What this rank writes of what it holds: the elements that no earlier rank has."""
    sharded = [d for d, dim in enumerate(dims) if rank.sharded((dim,))]
    nothing: Elements = [found[:0] for found in held]
    if not sharded:
        return held if rank.rank == 0 else nothing
    earlier = [[indices_of(runs(dim, rank.partition, r)) for dim in dims] for r in range(rank.rank)]
    if len(sharded) > 1:
        mine = [indices_of(runs(dim, rank.partition, rank.rank)) for dim in dims]
        again = any(all(map(np.array_equal, mine, other)) for other in earlier)
        return nothing if again else held
    d = sharded[0]
    own = list(held)
    for other in earlier:
        own[d] = own[d][~np.isin(own[d], other[d])]
    return own


def _pieces(elements: Elements, held: Elements) -> list[Piece]:
    """The rectangles of consecutive elements, and where they are among those that are held."""
    by_dim = [_stretches(own, all_of_dim) for own, all_of_dim in zip(elements, held, strict=True)]
    return [
        (tuple(start for start, _, _ in c), tuple(at for _, at, _ in c), tuple(n for _, _, n in c))
        for c in itertools.product(*by_dim)
    ]


def _stretches(own: Any, held: Any) -> list[tuple[int, int, int]]:
    """(global start, local start, length) of runs that are consecutive both in the whole and in what is held."""
    if not len(own):
        return []
    place = np.empty(int(held.max()) + 1, dtype=np.int64)
    place[held] = np.arange(len(held))
    at = place[own]
    cuts = np.flatnonzero((np.diff(own) != 1) | (np.diff(at) != 1)) + 1
    return [
        (int(g[0]), int(a[0]), len(g)) for g, a in zip(np.split(own, cuts), np.split(at, cuts), strict=True)
    ]


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece[0]), torch.Size(piece[2]))
