"""Steps for one rank: group names, run lists, and the callables that hooks and patches apply."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..axes.layout import Partition, common_parts, local_size, runs
from ..axes.term import Atom, Dim, atoms_of, size_of
from ..errors import RewriteError
from ..runtime import ops
from ..runtime.gradients import Part
from ..runtime.lazy_gather import gather_when_needed
from ..runtime.sharded_gradient import Share
from .steps import AllReduce, Enter, Mask, Scale, Step, Take

Bound = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of one plan: which slice of each axis is its own, and what its groups are called."""

    rank: int
    tp: int
    partition: Partition
    prefix: str

    def size(self, dim: Dim) -> int:
        return local_size(dim, self.partition, self.rank)

    def shape(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(self.size(dim) for dim in dims)

    def sharded(self, dims: Iterable[Dim]) -> list[Atom]:
        """The sharded axes in these dims."""
        return [a for dim in dims for a in atoms_of(dim) if a.id in self.partition.ranges]

    def parts(self, common: Iterable[Atom]) -> tuple[tuple[int, ...], ...]:
        """The ranks, by equal ranges of the ``common`` axes: the groups that sum what those ranks hold alike."""
        held = sorted(common, key=lambda a: a.id)
        by_range: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for r in range(self.tp):
            by_range.setdefault(tuple(self.partition.ranges[a.id][r] for a in held), []).append(r)
        return tuple(tuple(ranks) for ranks in by_range.values())

    def gradient_sum(self, fqn: str, dims: Sequence[Dim]) -> tuple[tuple[tuple[int, ...], ...], Part | None]:
        """The groups of ranks that sum the gradient of parameter ``fqn``, and which part of it: `common_parts`."""
        try:
            return common_parts(dims, self.partition, self.rank)
        except ValueError as error:
            raise RewriteError(f"{fqn}: {error}") from error

    def gradient_share(self, fqn: str, dims: Sequence[Dim]) -> Share | None:
        """Which elements of its slice's gradient a rank counts in a norm; None for what is whole on every rank."""
        groups, part = self.gradient_sum(fqn, dims)
        if part is None and len(groups) == 1:
            return None
        if self.rank in {ranks[0] for ranks in groups}:
            return Share(self.prefix)
        if part is None:
            return Share(self.prefix, (0, (), ()))
        dim, starts, lengths = part
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        gaps = [
            (low, high - low)
            for low, high in zip([0, *ends], [*starts, self.size(dims[dim])], strict=True)
            if high > low
        ]
        return Share(self.prefix, (dim, tuple(s for s, _ in gaps), tuple(n for _, n in gaps)))

    def share(self, axes: Sequence[Dim]) -> tuple[int, int]:
        """(this rank's elements of some dims together, all of them)"""
        return math.prod(self.shape(axes)), math.prod(map(size_of, axes))

    def group(self, common: Iterable[Atom]) -> str:
        """The registered name of the group in which this rank sums values that hold the ``common`` axes."""
        return group_name(self.prefix, self.parts(common))

    def gather(self, axes: Dim) -> tuple[list[int], list[int], list[int]]:
        """(each rank's size, starts, lengths): the runs, in global order, of the concatenation by rank."""
        sizes = [local_size(axes, self.partition, r) for r in range(self.tp)]
        pieces: list[tuple[int, int, int]] = []  # global start, length, start in the concatenation
        offset = 0
        for r in range(self.tp):
            for start, length in runs(axes, self.partition, r):
                pieces.append((start, length, offset))
                offset += length
        starts: list[int] = []
        lengths: list[int] = []
        done = 0
        for start, length, at in sorted(pieces):
            skip = max(0, done - start)  # held by an earlier rank too
            if length <= skip:
                continue
            done = start + length
            if starts and starts[-1] + lengths[-1] == at + skip:
                lengths[-1] += length - skip
            else:
                starts.append(at + skip)
                lengths.append(length - skip)
        if len(starts) == 1 and starts[0] == 0 and lengths[0] == sum(sizes):
            return sizes, [], []
        return sizes, starts, lengths

    def take(self, axes: Dim) -> tuple[list[int], list[int]]:
        """(starts, lengths) of this rank's runs."""
        own = runs(axes, self.partition, self.rank)
        return [start for start, _ in own], [length for _, length in own]

    def inner(self, axes: Dim) -> tuple[Dim, int | None]:
        """(the minor part of a product that the sharded axes are in, its size): ``B·H`` is sliced over H for any B.

        The size is None where all of the dim is meant.
        """
        for i, factor in enumerate(axes):
            if any(a.id in self.partition.ranges for a in atoms_of((factor,))):
                return axes[i:], (size_of(axes[i:]) if i else None)
        return axes, None


def group_name(prefix: str, parts: tuple[tuple[int, ...], ...]) -> str:
    if len(parts) == 1:
        return prefix
    return prefix + "/" + "|".join(",".join(map(str, part)) for part in parts)


def bind(step: Step, rank: Rank) -> Bound:
    """The step as a function of one tensor, on this rank."""
    if isinstance(step, AllReduce):
        return functools.partial(ops.all_reduce, group=rank.group(step.common))
    if isinstance(step, Enter):
        return functools.partial(ops.enter, group=rank.group(step.common))
    if isinstance(step, Mask):
        return functools.partial(ops.mask, keep=rank.rank == 0)
    if isinstance(step, Scale):
        part, whole = rank.share(step.axes)
        return functools.partial(ops.scale, part=part, whole=whole)
    axes, inner = rank.inner(step.axes)
    dim = step.dim if inner is None else step.dim + 1
    fn: Bound
    if isinstance(step, Take):
        starts, lengths = rank.take(axes)
        fn = functools.partial(ops.take, dim=dim, starts=starts, lengths=lengths)
        before = inner
    else:
        sizes, starts, lengths = rank.gather(axes)
        fn = functools.partial(
            gather_when_needed if step.lazy and inner is None else ops.gather,
            dim=dim,
            sizes=sizes,
            perm_starts=starts,
            perm_lengths=lengths,
            group=rank.prefix,
        )
        before = rank.size(axes)
    return fn if inner is None or before is None else Unflattened(fn, step.dim, before)


@dataclass(frozen=True, slots=True)
class Unflattened:
    """``fn`` on a dim with its minor part, of size ``inner``, split off: the major part may be of any size."""

    fn: Bound
    dim: int
    inner: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.fn(torch.unflatten(x, self.dim, (-1, self.inner))).flatten(self.dim, self.dim + 1)


def describe(step: Step, rank: Rank) -> tuple[object, ...]:
    """The step as its op appears in a graph: (op name, arguments after the tensor)."""
    if isinstance(step, AllReduce):
        return ("all_reduce", rank.group(step.common))
    if isinstance(step, Enter):
        return ("enter", rank.group(step.common))
    if isinstance(step, Mask):
        return ("mask", rank.rank == 0)
    if isinstance(step, Scale):
        return ("scale", *rank.share(step.axes))
    axes, inner = rank.inner(step.axes)
    dim = step.dim if inner is None else step.dim + 1
    if isinstance(step, Take):
        starts, lengths = rank.take(axes)
        return ("take", dim, tuple(starts), tuple(lengths))
    sizes, starts, lengths = rank.gather(axes)
    return ("gather", dim, tuple(sizes), tuple(starts), tuple(lengths), rank.prefix)
