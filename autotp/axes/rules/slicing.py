"""Rules of ops that cut a dim into pieces or put pieces together: split, chunk, slice, narrow, select, cat,
stack.

A piece is a part of a `Cat`, so that a local piece lies where the local sizes of the parts before it say.
Only an axis that cannot be cut there (the cut falls inside an inner factor) is blocked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autotp.axes.rules.registry import LocalSize, OpContext, rule
from autotp.axes.term import CannotUnify, Dim


def pieces_of(op: OpContext, i: int, d: int, sizes: Sequence[int]) -> list[Dim]:
    """Dim `d` of operand `i` cut into pieces, or blocked, with whole pieces."""
    mark = op.solver.mark()
    try:
        return op.solver.cut(op.dims(i)[d], sizes)
    except CannotUnify as error:
        op.solver.undo(mark)
        op.notes.append(str(error))
        op.block(i, d)
        return [op.whole(n) for n in sizes]


def _split(op: OpContext, name: str, value: Callable[[list[int]], Any]) -> None:
    i = op.tensor("self")
    d = op.args["dim"] % op.rank(i)
    pieces = pieces_of(op, i, d, [shape[d] for shape in op.out_shapes()])
    op.local(name, lambda n: value([n(piece) for piece in pieces]))
    op.linear("add", [i])
    op.outs([_replaced(op.dims(i), d, piece) for piece in pieces])


def _replaced(dims: list[Dim], d: int, dim: Dim) -> list[Dim]:
    return [*dims[:d], dim, *dims[d + 1 :]]


@rule("aten.split.Tensor", "aten.unsafe_split.Tensor")
def split(op: OpContext) -> None:
    """Pieces of one size. Local pieces of several sizes need a list where the source has an int."""

    def local(sizes: list[int]) -> Any:
        even = all(s == sizes[0] for s in sizes[:-1]) and sizes[-1] <= sizes[0]
        return sizes[0] if even and sizes[-1] else sizes

    _split(op, "split_size", local)


@rule("aten.split_with_sizes", "aten.split.sizes", "aten.unsafe_split_with_sizes")
def split_with_sizes(op: OpContext) -> None:
    """Pieces of given sizes."""
    _split(op, "split_sizes" if "split_sizes" in op.args else "split_size", list)


@rule("aten.chunk", "aten.unsafe_chunk")
def chunk(op: OpContext) -> None:
    """So many pieces. Local pieces that `chunk` would not make need a list of sizes where the source has a
    count.
    """
    count = op.args["chunks"]

    def local(sizes: list[int]) -> Any:
        total = sum(sizes)
        size = -(-total // count) if total else 0
        made = [min(size, total - k * size) for k in range(-(-total // size))] if size else [0] * count
        return count if made == sizes else sizes

    _split(op, "chunks", local)


@rule("aten.tensor_split.sections", "aten.tensor_split.indices")
def tensor_split(op: OpContext) -> None:
    """Pieces at indices, or so many nearly equal ones; the first ones are the longer ones."""

    def indices(sizes: list[int]) -> list[int]:
        return [sum(sizes[:k]) for k in range(1, len(sizes))]

    def sections(sizes: list[int]) -> Any:
        base, extra = divmod(sum(sizes), len(sizes))
        even = [base + (k < extra) for k in range(len(sizes))]
        return len(sizes) if sizes == even else indices(sizes)

    if "indices" in op.args:
        _split(op, "indices", indices)
    else:
        _split(op, "sections", sections)


@rule("aten.unbind.int")
def unbind(op: OpContext) -> None:
    """One result per element: blocks that dim."""
    i = op.tensor("self")
    d = op.args["dim"] % op.rank(i)
    op.block(i, d)
    dims = op.dims(i)
    op.linear("add", [i])
    op.outs([[*dims[:d], *dims[d + 1 :]] for _ in op.out_shapes()])


@rule("aten.select.int", "aten.select_copy")
def select(op: OpContext) -> None:
    """One element: blocks that dim."""
    i = op.tensor("self")
    d = op.args["dim"] % op.rank(i)
    op.block(i, d)
    dims = op.dims(i)
    op.linear("add", [i])
    op.out([*dims[:d], *dims[d + 1 :]])


def local_index(given: Any, n: int, offset: int, total: int) -> Any:
    """The local value of a start or stop: as it was written (None, past the end, from the end), at its local
    place.
    """
    if given is None or given >= n:
        return given
    if given < 0 and offset < total:
        return offset - total
    return offset


@rule("aten.slice.Tensor", "aten.slice_copy")
def slice_(op: OpContext) -> None:
    """``x[start:stop:step]``. A contiguous range is a part of a concatenation; every k-th element is the
    outer part of ``n·k``.
    """
    i = op.tensor("self")
    d, step = op.args["dim"] % op.rank(i), op.args["step"]
    n = op.shape(i)[d]
    start, stop, _ = slice(op.args["start"], op.args["end"]).indices(n)
    stop = max(stop, start)
    if step == 1:
        _range(op, i, d, start, stop, "start", "end")
    else:
        _every(op, i, d, start, stop, step)


def _range(op: OpContext, i: int, d: int, start: int, stop: int, first: str, last: str) -> None:
    """The elements from start to stop; `first` and `last` name the arguments that say so."""
    n = op.shape(i)[d]
    dims = op.dims(i)
    op.linear("add", [i])
    if stop - start == n:  # all of it: no number but "as many as there are"
        whole = dims[d]
        if op.args[last] is not None and op.args[last] < sys.maxsize:
            op.local(last, lambda size: size(whole))
        op.out(dims)
        return
    before, piece, after = pieces_of(op, i, d, [start, stop - start, n - stop])
    given_first, given_last = op.args[first], op.args[last]

    def total(size: LocalSize) -> int:
        return size(before) + size(piece) + size(after)

    op.local(first, lambda size: local_index(given_first, n, size(before), total(size)))
    if last == "length":
        op.local(last, lambda size: size(piece))
    else:
        op.local(last, lambda size: local_index(given_last, n, size(before) + size(piece), total(size)))
    op.out(_replaced(dims, d, piece))


def _every(op: OpContext, i: int, d: int, start: int, stop: int, step: int) -> None:
    dims, n = op.dims(i), op.shape(i)[d]
    op.linear("add", [i])
    mark = op.solver.mark()
    try:
        if n % step or start >= step or len(range(start, stop, step)) != n // step:
            raise CannotUnify(
                f"every {step}th of {n} elements from {start} to {stop} is no factor of the axis"
            )
        major, minor = op.solver.split(dims[d], [n // step, step])
    except CannotUnify as error:
        op.solver.undo(mark)
        op.notes.append(str(error))
        op.block(i, d)
        op.out(_replaced(dims, d, op.whole(len(range(start, stop, step)))))
        return
    if not op.solver.is_frozen(minor):  # which of the `step` neighbours is taken is not to depend on the rank
        minor = op.solver.fresh(step, frozen=True)
        op.consume_as(i, d, op.solver.product([major, minor]))
    consumed = op.dims(i)[d]
    given = op.args["end"]
    if given is not None and given < n:
        op.local("end", lambda size: size(consumed) - (n - stop) if given >= 0 else given)
    elif given is not None and given < sys.maxsize:
        op.local("end", lambda size: size(consumed))
    op.out(_replaced(dims, d, major))


@rule("aten.narrow.default", "aten.narrow_copy")
def narrow(op: OpContext) -> None:
    """``narrow(x, dim, start, length)``."""
    i = op.tensor("self")
    d = op.args["dim"] % op.rank(i)
    n = op.shape(i)[d]
    start = op.args["start"] + n if op.args["start"] < 0 else op.args["start"]
    _range(op, i, d, start, start + op.args["length"], "start", "length")


def constant_range(
    op: OpContext, index: torch.Tensor, i: int, d: int
) -> tuple[Dim, Callable[[LocalSize], list[int]]] | None:
    """A constant index list that is a contiguous range, read as a slice: its dim, and the local list."""
    n = op.shape(i)[d]
    if index.dtype in (torch.bool, torch.uint8) or index.dim() != 1 or not index.numel():
        return None
    given = [int(v) for v in index.tolist()]
    places = [v + n if v < 0 else v for v in given]
    if any(not 0 <= v < n for v in places) or places != list(range(places[0], places[0] + len(places))):
        return None
    if len({v < 0 for v in given}) != 1:
        return None
    try:
        before, piece, after = op.solver.cut(op.dims(i)[d], [places[0], len(places), n - places[-1] - 1])
    except CannotUnify:
        return None

    def local(size: LocalSize) -> list[int]:
        first = size(before) if given[0] >= 0 else -size(piece) - size(after)
        return list(range(first, first + size(piece)))

    return piece, local


@rule("aten.cat", "aten.concat", "aten.concatenate", "aten._concat")
def cat(op: OpContext) -> None:
    """The other dims are joined; this one is a concatenation."""
    name = next(n for n in op.args if n in ("tensors", "inputs"))
    operands = [i for i in op.tensors(name) if op.shape(i) != (0,)]  # an empty list of any rank may take part
    shape = op.out_shapes()[0]
    op.linear("add", operands)
    if not operands:
        op.out([op.whole(n) for n in shape])
        return
    d = op.args["dim"] % len(shape)
    dims = [() if k == d else op.join((i, k) for i in operands) for k in range(len(shape))]
    dims[d] = op.solver.concat([op.dims(i)[d] for i in operands])
    op.out(dims)


@rule("aten.stack")
def stack(op: OpContext) -> None:
    """The dims are joined; the new one is whole."""
    operands = op.tensors("tensors")
    shape = op.out_shapes()[0]
    d = op.args["dim"] % len(shape)
    dims = [op.join((i, k) for i in operands) for k in range(len(shape) - 1)]
    dims.insert(d, op.whole(len(operands)))
    op.linear("add", operands)
    op.out(dims)


@rule("aten.hstack", "aten.vstack", "aten.dstack", "aten.column_stack", "aten.row_stack")
def stack_by_name(op: OpContext) -> None:
    """Concatenations along a dim that the name says; only for operands that need no new dim."""
    operands = op.tensors("tensors")
    shape = op.out_shapes()[0]
    d = {"hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}[
        str(op.node.target).split(".")[1]
    ]
    if any(op.rank(i) != len(shape) for i in operands) or d >= len(shape):
        if str(op.node.target).startswith("aten.hstack") and len(shape) == 1:
            d = 0
        else:
            raise CannotUnify("stacked tensors get new dims")
    dims = [() if k == d else op.join((i, k) for i in operands) for k in range(len(shape))]
    dims[d] = op.solver.concat([op.dims(i)[d] for i in operands])
    op.linear("add", operands)
    op.out(dims)
