"""Layout: which elements of a tensor a rank holds, given the terms of its dims and a partition of the axes;
and back.

All of it is arithmetic on *runs*: pairs ``(start, length)`` of contiguous elements of a global dim, in the
order in which the rank holds them. With ``F`` sharded over two ranks, a fused gate and up projection of 2·6
rows is held like this::

    (F | F)     rank 0: (0, 3) (6, 3)      rank 1: (3, 3) (9, 3)
    H·3·D       rank 0: (0, h·3·D)         one run, as long as the ranges of H are contiguous
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autotp.axes.term import Atom, Dim, Factor, atoms_of, size_of

Range = tuple[int, int]
Runs = NDArray[np.int64]  # [n, 2]: start and length of each run


@dataclass(frozen=True)
class Partition:
    """How axes are split: for the id of each sharded atom, the range of its elements that each rank holds.

    Ranks may share a range: with 2 kv heads and 4 groups over 4 ranks (``K·G``), K has ranges 0, 0, 1, 1 and
    G its halves in turn; a tensor without G is then held twice.
    """

    ranges: Mapping[int, tuple[Range, ...]]

    @property
    def size(self) -> int:
        """The number of ranks (1, if nothing is sharded)."""
        return max((len(r) for r in self.ranges.values()), default=1)

    def range_of(self, atom: Atom, rank: int) -> Range:
        """The elements of an axis that a rank holds."""
        ranges = self.ranges.get(atom.id)
        return (0, atom.size) if ranges is None else ranges[rank]


def local_size(dim: Dim, partition: Partition, rank: int) -> int:
    """How many elements of a dim a rank holds."""
    n = 1
    for factor in dim:
        if isinstance(factor, Atom):
            start, stop = partition.range_of(factor, rank)
            n *= stop - start
        else:
            n *= sum(local_size(part, partition, rank) for part in factor.parts)
    return n


def local_shape(dims: Sequence[Dim], partition: Partition, rank: int) -> tuple[int, ...]:
    """The shape of a rank's slice."""
    return tuple(local_size(dim, partition, rank) for dim in dims)


def runs(dim: Dim, partition: Partition, rank: int) -> list[Range]:
    """The elements of a dim that a rank holds, as ``(start, length)`` in its local order; adjacent ones
    merged.
    """
    return [(int(start), int(length)) for start, length in _runs(dim, partition, rank)]


def _runs(dim: Dim, partition: Partition, rank: int) -> Runs:
    result = np.array([[0, 1]], dtype=np.int64)
    inner = 1
    for factor in reversed(dim):  # minor to major
        own = _factor_runs(factor, partition, rank)
        if (
            result.shape[0] == 1 and result[0, 0] == 0 and result[0, 1] == inner
        ):  # the rest is whole: runs stay runs
            result = own * inner
        else:
            majors = indices_of(own)
            starts = majors[:, None] * inner + result[None, :, 0]
            lengths = np.broadcast_to(result[None, :, 1], starts.shape)
            result = np.stack([starts.reshape(-1), lengths.reshape(-1)], axis=1)
        inner *= factor.size
    return _merged(result)


def _factor_runs(factor: Factor, partition: Partition, rank: int) -> Runs:
    if isinstance(factor, Atom):
        start, stop = partition.range_of(factor, rank)
        return np.array([[start, stop - start]], dtype=np.int64)
    offset, found = 0, []
    for part in factor.parts:
        found.append(_runs(part, partition, rank) + np.array([[offset, 0]], dtype=np.int64))
        offset += size_of(part)
    return _merged(np.concatenate(found))


def _merged(found: Runs) -> Runs:
    found = found[found[:, 1] > 0]
    if len(found) < 2:
        return found
    begins = np.ones(len(found), dtype=bool)
    begins[1:] = found[1:, 0] != found[:-1, 0] + found[:-1, 1]
    first = np.flatnonzero(begins)
    return np.stack([found[first, 0], np.add.reduceat(found[:, 1], first)], axis=1)


def indices_of(found: Runs | Sequence[Range]) -> NDArray[np.int64]:
    """The single elements of runs, in order."""
    array = np.asarray(found, dtype=np.int64).reshape(-1, 2)
    lengths = array[:, 1]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    indices: NDArray[np.int64] = np.arange(total, dtype=np.int64)
    indices += np.repeat(array[:, 0] - (ends - lengths), lengths)
    return indices


def slice_tensor(t: torch.Tensor, dims: Sequence[Dim], partition: Partition, rank: int) -> torch.Tensor:
    """The part of a tensor that a rank holds: a view where each dim is one run, else a copy."""
    _check_shape(t, dims)
    for d, dim in enumerate(dims):
        found = _runs(dim, partition, rank)
        if len(found) == 1:
            t = t.narrow(d, int(found[0, 0]), int(found[0, 1]))
        elif len(found) == 0:
            t = t.narrow(d, 0, 0)
        elif len(found) <= 8:
            t = torch.cat([t.narrow(d, int(start), int(length)) for start, length in found], dim=d)
        else:
            t = t.index_select(d, torch.from_numpy(indices_of(found)).to(t.device))
    return t


def owners(dims: Sequence[Dim], partition: Partition) -> tuple[tuple[int, ...], ...]:
    """The ranks, grouped by which of them hold the same slice; in order of their first rank."""
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for rank in range(partition.size):
        key = tuple(_runs(dim, partition, rank).tobytes() for dim in dims)
        groups.setdefault(key, []).append(rank)
    return tuple(tuple(group) for group in groups.values())


def common_parts(
    dims: Sequence[Dim], partition: Partition, rank: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, tuple[int, ...], tuple[int, ...]] | None]:
    """(groups, part): the groups of ranks that sum the gradient of a parameter with these dims, and which part of it.

    The part is ``(dim, starts, lengths)`` of runs of the rank's slice, None where all of it is summed: ranks that
    hold the same slice sum all of it. Of a fused weight, ``(H | 1 | 1)·D``, of which each rank has its own first
    rows, all ranks sum the rows that they have in common; of ``(K·G | K | K)·D``, the ranks that share a kv head.

    Raises:
        ValueError: some elements are common to other ranks than others are.
    """
    held = [d for d, dim in enumerate(dims) if any(a.id in partition.ranges for a in atoms_of(dim))]
    if not held:
        return (tuple(range(partition.size)),), None
    if len(held) != 1:
        return owners(dims, partition), None
    mine = [indices_of(runs(dims[held[0]], partition, r)) for r in range(partition.size)]
    holds = np.stack([np.isin(np.arange(size_of(dims[held[0]])), own) for own in mine], axis=1)
    sets = {tuple(int(r) for r in np.flatnonzero(row)) for row in np.unique(holds, axis=0)}
    shared = [ranks for ranks in sets if len(ranks) > 1]
    alone = set(range(partition.size)) - {r for ranks in shared for r in ranks}
    groups = tuple(sorted((*shared, *((r,) for r in alone))))
    if sorted(r for ranks in groups for r in ranks) != list(range(partition.size)):
        raise ValueError(f"ranks have parts of it in common in more than one way ({sorted(sets)})")
    own_group = next(ranks for ranks in groups if rank in ranks)
    local = np.flatnonzero(holds[mine[rank]][:, list(own_group)].all(axis=1))
    if len(local) == len(mine[rank]):
        return groups, None
    pieces = np.split(local, np.flatnonzero(np.diff(local) != 1) + 1)
    return groups, (held[0], tuple(int(p[0]) for p in pieces), tuple(len(p) for p in pieces))


def merge(parts: Sequence[torch.Tensor], dims: Sequence[Dim], partition: Partition) -> torch.Tensor:
    """The whole tensor from the slices of all ranks, in order: the inverse of `slice_tensor`.

    Slices may overlap (the keys of multi-query attention are on every rank); then they hold the same.
    """
    whole = parts[0].new_empty([size_of(dim) for dim in dims])
    missing = _missing(dims, partition)
    if missing:
        raise ValueError(
            f"no rank holds {missing} elements of {whole.numel()}: the partition does not tile the tensor"
        )
    for rank, *_ in owners(dims, partition):
        part = parts[rank]
        expected = local_shape(dims, partition, rank)
        if tuple(part.shape) != expected:
            raise ValueError(
                f"the slice of rank {rank} has shape {tuple(part.shape)}, its layout says {expected}"
            )
        _place(whole, part, dims, partition, rank)
    return whole


def _missing(dims: Sequence[Dim], partition: Partition) -> int:
    """How many elements no rank holds. Only dims that are sharded are looked at, so this stays small."""
    sharded = [dim for dim in dims if any(atom.id in partition.ranges for atom in atoms_of(dim))]
    held = torch.zeros([size_of(dim) for dim in sharded], dtype=torch.bool)
    for rank in range(partition.size):
        box = [torch.from_numpy(indices_of(_runs(dim, partition, rank))) for dim in sharded]
        if box:
            held[torch.meshgrid(*box, indexing="ij")] = True
        else:
            held.fill_(True)
    return int(held.logical_not().sum())


def _place(
    whole: torch.Tensor, part: torch.Tensor, dims: Sequence[Dim], partition: Partition, rank: int
) -> None:
    """Write a rank's slice to its place in the whole tensor."""
    if not part.numel():
        return
    several: list[tuple[int, Runs]] = []
    for d, dim in enumerate(dims):
        found = _runs(dim, partition, rank)
        if len(found) == 1:
            whole = whole.narrow(d, int(found[0, 0]), int(found[0, 1]))
        else:
            several.append((d, found))
    if not several:
        whole.copy_(part)
        return
    *outer, (last, found) = several
    if not outer:
        whole.index_copy_(last, torch.from_numpy(indices_of(found)).to(whole.device), part)
        return
    places = []  # several scattered dims: one index tensor per dim, broadcast against each other
    for d in range(len(dims)):
        own = dict(several).get(d)
        index = np.arange(part.shape[d]) if own is None else indices_of(own)
        places.append(
            torch.from_numpy(index).to(whole.device).reshape([-1 if k == d else 1 for k in range(len(dims))])
        )
    whole[tuple(places)] = part


def _check_shape(t: torch.Tensor, dims: Sequence[Dim]) -> None:
    shape = tuple(size_of(dim) for dim in dims)
    if tuple(t.shape) != shape:
        raise ValueError(f"a tensor of shape {tuple(t.shape)} does not fit dims of shape {shape}")
