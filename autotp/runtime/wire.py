"""The collectives themselves: what moves between ranks, without autograd.

Never in place on the caller's tensor. Everything works on any backend that torch.distributed has; what a
backend lacks is made from what it has (Gloo gathers equal sizes only, and knows no complex numbers).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotp.errors import AutoTPError
from autotp.runtime import record
from autotp.runtime.group import Group, get_group

Ints = Sequence[int]
Runs = tuple[tuple[int, int], ...]  # (start, length) along one dim

# torch 2.13 gave it another name, and warns about the old one
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_MANY_RUNS = 64  # from here on one index_select is cheaper than a cat of narrows


def reduce_sum(x: Tensor, group: str) -> Tensor:
    """The sum of x over the ranks, in a tensor of its own."""
    g = get_group(group)
    out = x.clone(memory_format=torch.contiguous_format)
    if record.active:
        record.note("all_reduce", tuple(x.shape), x.numel() * x.element_size(), group)
    if g.process_group is not None and out.numel():
        wire = torch.view_as_real(out) if out.is_complex() else out
        _all_reduce(wire, dist.ReduceOp.SUM, g, out.is_complex())
    return out


def _all_reduce(x: Tensor, op: Any, g: Group, complex_: bool = False) -> None:
    """In place; ``complex_``: x shows complex numbers as pairs."""
    assert g.process_group is not None

    def start() -> Any:
        if op is dist.ReduceOp.SUM:
            return g.process_group.allreduce([x])  # type: ignore[union-attr]
        return dist.all_reduce(x, op, group=g.process_group, async_op=True)

    if record.watcher is None:
        start().wait()
    else:
        shape = tuple(x.shape[:-1] if complex_ else x.shape)
        record.watched("all_reduce", shape, x.numel() * x.element_size(), g.name, start)


def reduce_max(x: Tensor, group: str, least: bool = False) -> Tensor:
    """The elementwise greatest (or least) of x over the ranks, in a tensor of its own."""
    g = get_group(group)
    out = x.clone(memory_format=torch.contiguous_format)
    if record.active:
        record.note("all_reduce", tuple(x.shape), x.numel() * x.element_size(), group)
    if g.process_group is not None and out.numel():
        op = dist.ReduceOp.MIN if least else dist.ReduceOp.MAX
        _all_reduce(out, op, g)
    return out


def gather_cat(x: Tensor, dim: int, sizes: Ints, starts: Ints, lengths: Ints, group: str) -> Tensor:
    """The ranks' shards (``sizes[r]`` along ``dim`` on rank r) put together, then permuted by the runs."""
    g = get_group(group)
    if len(sizes) != g.size:
        raise AutoTPError(
            f"gather over group {group!r} of {g.size} ranks was given {len(sizes)} sizes: {list(sizes)}."
        )
    dim = dim % x.dim()
    if x.shape[dim] != sizes[g.index]:
        raise AutoTPError(
            f"gather over group {group!r}: rank {g.index} holds {x.shape[dim]} elements in dim {dim} of a "
            f"tensor of shape {tuple(x.shape)}, where sizes {list(sizes)} say {sizes[g.index]}."
        )
    widest = max(sizes)
    shape = list(x.shape)
    shape[dim] = sum(lengths) if starts else sum(sizes)
    whole_shape = tuple(shape)
    if record.active:
        record.note("all_gather", whole_shape, math.prod(shape) * x.element_size(), group)
    if math.prod(shape) == 0:  # the same on every rank
        return x.new_empty(shape)
    if sizes[g.index] == widest:
        mine = x.contiguous()
    else:  # Gloo's all-gather wants the same size everywhere
        shape[dim] = widest
        mine = x.new_zeros(shape)
        mine.narrow(dim, 0, sizes[g.index]).copy_(x)
    buffer = mine.new_empty((g.size, *mine.shape))
    if g.process_group is None:
        buffer.zero_()
        buffer[g.index].copy_(mine)
    else:
        whole, part = buffer, mine
        if mine.is_complex():
            whole, part = torch.view_as_real(buffer), torch.view_as_real(mine)
        elif mine.dtype is torch.bool:
            whole, part = buffer.view(torch.uint8), mine.view(torch.uint8)
        into = whole.flatten(0, 1) if part.dim() else whole
        if record.watcher is None:
            _all_gather(into, part, group=g.process_group)
        else:
            start = functools.partial(_all_gather, into, part, group=g.process_group, async_op=True)
            record.watched("all_gather", whole_shape, math.prod(whole_shape) * x.element_size(), group, start)
    pieces = _pieces(tuple(sizes), tuple(starts), tuple(lengths))
    if len(pieces) > _MANY_RUNS:
        padded = torch.cat(buffer.unbind(0), dim) if dim else buffer.flatten(0, 1)
        return padded.index_select(dim, _piece_index(pieces, widest, x.device))
    shards = buffer.unbind(0)
    whole_shards = len(pieces) == len(shards) and not starts and min(sizes) == widest
    return torch.cat(shards if whole_shards else [shards[r].narrow(dim, s, n) for r, s, n in pieces], dim)


def narrow_runs(x: Tensor, dim: int, starts: Ints, lengths: Ints) -> Tensor:
    """The runs of x along dim, one after the other; a view where there is one run."""
    if len(starts) == 1:
        return x.narrow(dim, starts[0], lengths[0])
    if not starts:
        return x.narrow(dim, 0, 0)
    if len(starts) > _MANY_RUNS:
        return x.index_select(dim, _run_index(tuple(zip(starts, lengths, strict=True)), x.device))
    return torch.cat([x.narrow(dim, s, n) for s, n in zip(starts, lengths, strict=True)], dim)


def scatter_runs(g: Tensor, dim: int, starts: Ints, lengths: Ints, size: int) -> Tensor:
    """The transpose of narrow_runs: g's pieces at their places in zeros of ``size`` along dim."""
    shape = list(g.shape)
    shape[dim] = size
    out = g.new_zeros(shape)
    offset = 0
    for start, length in zip(starts, lengths, strict=True):
        out.narrow(dim, start, length).add_(g.narrow(dim, offset, length))  # add: runs may overlap
        offset += length
    return out


def shard_of_gathered(g: Tensor, dim: int, sizes: Ints, starts: Ints, lengths: Ints, rank: int) -> Tensor:
    """The transpose of gather_cat on one rank: the part of the whole tensor that came from it.

    An element of the shard that the permutation leaves out (another rank's copy of it was taken) gets zero.
    """
    if not starts:
        return g.narrow(dim, sum(sizes[:rank]), sizes[rank])
    sources, targets, covered = _runs_of_rank(tuple(sizes), tuple(starts), tuple(lengths), rank)
    if covered == sizes[rank] and all(a <= b for a, b in itertools.pairwise(targets)):
        return narrow_runs(g, dim, [s for s, _ in sources], [n for _, n in sources])
    shape = list(g.shape)
    shape[dim] = sizes[rank]
    out = g.new_zeros(shape)
    for (source, length), target in zip(sources, targets, strict=True):
        out.narrow(dim, target, length).add_(g.narrow(dim, source, length))
    return out


@functools.lru_cache(maxsize=4096)
def _pieces(
    sizes: tuple[int, ...], starts: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    """(rank, start in its shard, length) of each piece of the result, in order."""
    if not starts:
        return tuple((rank, 0, size) for rank, size in enumerate(sizes))
    offsets = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    pieces: list[tuple[int, int, int]] = []
    for start, length in zip(starts, lengths, strict=True):
        stop = start + length
        if start < 0 or stop > offsets[-1]:
            raise AutoTPError(f"gather: run {start}:{stop} is outside the {offsets[-1]} gathered elements.")
        for rank in range(len(sizes)):
            low, high = max(start, offsets[rank]), min(stop, offsets[rank + 1])
            if low < high:
                pieces.append((rank, low - offsets[rank], high - low))
    return tuple(pieces)


@functools.lru_cache(maxsize=4096)
def _runs_of_rank(
    sizes: tuple[int, ...], starts: tuple[int, ...], lengths: tuple[int, ...], rank: int
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], int]:
    """The pieces that came from rank, by place in its shard: (place in the result, length)s, places, sum."""
    found: list[tuple[int, int, int]] = []
    place = 0
    for owner, start, length in _pieces(sizes, starts, lengths):
        if owner == rank:
            found.append((start, place, length))
        place += length
    found.sort()
    distinct = all(a[0] + a[2] <= b[0] for a, b in itertools.pairwise(found))
    covered = sum(n for _, _, n in found) if distinct else -1
    return tuple((p, n) for _, p, n in found), tuple(s for s, _, _ in found), covered


@functools.lru_cache(maxsize=256)
def _piece_index(pieces: tuple[tuple[int, int, int], ...], widest: int, device: torch.device) -> Tensor:
    return _run_index(tuple((rank * widest + start, length) for rank, start, length in pieces), device)


@functools.lru_cache(maxsize=256)
def _run_index(runs: Runs, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, start + length) for start, length in runs]).to(device)
