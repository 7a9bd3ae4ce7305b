"""Rules of ops that lay the same elements out in other dims: view, flatten, permute, squeeze, expand, repeat.

A view regroups dims: the dims of each smallest group of equal product are multiplied, then split as the
result asks. Where a group cannot be split (its axes do not nest), the dims of that group are blocked, and
only those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autotp.axes.rules.registry import LocalSize, OpContext, rule
from autotp.axes.term import CannotUnify, Dim


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The smallest runs of dims of two shapes that hold the same elements: (6, 5) and (2, 3, 5) -> [0 | 0 1],
    [1 | 2].
    """
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        m = n = 1
        if i < len(before):
            m, i = before[i], i + 1
        if j < len(after):
            n, j = after[j], j + 1
        while m != n:
            if (m < n and i < len(before)) or j == len(after):
                m, i = m * before[i], i + 1
            else:
                n, j = n * after[j], j + 1
        found.append((range(first_i, i), range(first_j, j)))
    return found


def regroup(op: OpContext, i: int, shape: Sequence[int]) -> list[Dim]:
    """The dims of operand `i` laid out as `shape`."""
    if 0 in op.shape(i):
        for d in range(op.rank(i)):
            op.block(i, d)
        return [op.whole(n) for n in shape]
    dims: list[Dim] = []
    for before, after in groups(op.shape(i), shape):
        joint = op.solver.product([op.dims(i)[d] for d in before])
        mark = op.solver.mark()
        try:
            dims += op.solver.split(joint, [shape[d] for d in after])
        except CannotUnify as error:
            op.solver.undo(mark)
            op.notes.append(str(error))
            for d in before:
                op.block(i, d)
            dims += [op.whole(shape[d]) for d in after]
    return dims


def sizes_of(dims: Sequence[Dim], asked: Sequence[Any]) -> Any:
    """A size list with local sizes in it; -1 stays -1."""
    return lambda n: [-1 if s == -1 else n(dim) for dim, s in zip(dims, asked, strict=True)]


@rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view", "aten._reshape_alias")
def view(op: OpContext) -> None:
    """``view(x, sizes)``: the sizes are local ones on a rank."""
    i = op.tensor("self")
    name = next(n for n in ("size", "shape") if n in op.args)
    dims = regroup(op, i, op.out_shapes()[0])
    op.local(name, sizes_of(dims, op.args[name]))
    op.linear("add", [i])
    op.out(dims)


@rule("aten.view_as", "aten.reshape_as")
def view_as(op: OpContext) -> None:
    """The sizes come from another tensor, so its dims are the result's."""
    i, other = op.tensor("self"), op.tensor("other")
    dims = regroup(op, i, op.out_shapes()[0])
    for mine, its in zip(dims, op.dims(other), strict=True):
        op.unify(mine, its)
    op.linear("add", [i])
    op.out(dims)


@rule("aten.view.dtype")
def view_dtype(op: OpContext) -> None:
    """Bits read as another type: the last dim changes where the width does."""
    i = op.tensor("self")
    dims = op.dims(i)
    shape = op.out_shapes()[0]
    if shape != op.shape(i):
        op.block(i, -1)
        dims[-1] = op.whole(shape[-1])
    op.out(dims)


@rule("aten.flatten.using_ints", "aten.ravel")
def flatten(op: OpContext) -> None:
    """No sizes are given, so none are local."""
    i = op.tensor("self")
    op.linear("add", [i])
    op.out(regroup(op, i, op.out_shapes()[0]))


@rule("aten.unflatten.int")
def unflatten(op: OpContext) -> None:
    """One dim into several, of given sizes."""
    i = op.tensor("self")
    d = op.args["dim"] % op.rank(i)
    dims = regroup(op, i, op.out_shapes()[0])
    asked = op.args["sizes"]
    op.local("sizes", sizes_of(dims[d : d + len(asked)], asked))
    op.linear("add", [i])
    op.out(dims)


def reorder(op: OpContext, order: Sequence[int]) -> None:
    """The result's dims are the operand's, in another order."""
    i = op.tensor("self")
    dims = op.dims(i)
    op.linear("add", [i])
    op.out([dims[d] for d in order])


@rule("aten.permute")
def permute(op: OpContext) -> None:
    """``permute(x, dims)``."""
    reorder(op, [d % len(op.args["dims"]) for d in op.args["dims"]])


@rule("aten.transpose.int", "aten.transpose_", "aten.swapaxes", "aten.swapdims")
def transpose(op: OpContext) -> None:
    """``transpose(x, dim0, dim1)``."""
    order = list(range(op.rank(op.tensor("self"))))
    a, b = (op.args[n] for n in (("dim0", "dim1") if "dim0" in op.args else ("axis0", "axis1")))
    if order:
        order[a], order[b] = order[b], order[a]
    reorder(op, order)


@rule("aten.t", "aten.numpy_T", "aten.mT", "aten.mH", "aten.matrix_H", "aten.adjoint")
def transposed(op: OpContext) -> None:
    """All dims reversed (``t``, ``.T``), or the last two swapped."""
    rank = op.rank(op.tensor("self"))
    order = list(range(rank))
    if rank == 2 or "numpy_T" in str(op.node.target):
        order.reverse()
    elif rank > 2:
        order[-2:] = [rank - 1, rank - 2]
    reorder(op, order)


@rule("aten.movedim", "aten.moveaxis")
def movedim(op: OpContext) -> None:
    """``movedim(x, source, destination)``, ints or lists."""
    rank = op.rank(op.tensor("self"))

    def listed(name: str) -> list[int]:
        value = op.args[name]
        return [v % rank for v in (value if isinstance(value, (list, tuple)) else [value])]

    source, destination = listed("source"), listed("destination")
    rest = iter(d for d in range(rank) if d not in source)
    placed = dict(zip(destination, source, strict=True))
    reorder(op, [placed[d] if d in placed else next(rest) for d in range(rank)])


@rule("aten.squeeze", "aten.squeeze_", "aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(op: OpContext) -> None:
    """Dims of size 1 go. A listed dim of another size stays, and is blocked: a local size of 1 would make it
    go.
    """
    i = op.tensor("self")
    asked = op.args.get("dim")
    rank = max(op.rank(i), 1)
    listed = range(rank) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = {d % rank for d in listed}
    dims = [
        op.whole(n) if d in gone else dim
        for d, (dim, n) in enumerate(zip(op.dims(i), op.shape(i), strict=True))
    ]
    op.linear("add", [i])
    op.out([dim for d, dim in enumerate(dims) if not (d in gone and op.shape(i)[d] == 1)])
    for d in gone & set(range(op.rank(i))):
        op.block(i, d)


@rule("aten.unsqueeze", "aten.unsqueeze_")
def unsqueeze(op: OpContext) -> None:
    """A new dim of size 1."""
    i = op.tensor("self")
    dims = op.dims(i)
    dims.insert(op.args["dim"] % (len(dims) + 1), ())
    op.linear("add", [i])
    op.out(dims)


@rule("aten.expand.default", "aten.broadcast_to")
def expand(op: OpContext) -> None:
    """A dim of size 1 that grows becomes a fresh axis: every element is the same, so a rank makes as many as
    it needs.
    """
    i = op.tensor("self")
    shape = op.out_shapes()[0]
    new = len(shape) - op.rank(i)
    dims = [op.solver.fresh(n) for n in shape[:new]]
    dims += [
        op.solver.fresh(n) if m != n else dim
        for dim, m, n in zip(op.dims(i), op.shape(i), shape[new:], strict=True)
    ]
    op.local("size", sizes_of(dims, op.args["size"]))
    op.linear("add", [i])
    op.out(dims)


@rule("aten.expand_as")
def expand_as(op: OpContext) -> None:
    """The sizes come from another tensor, so its dims are the result's."""
    i, other = op.tensor("self"), op.tensor("other")
    dims = op.dims(other)
    new = len(dims) - op.rank(i)
    for k, (dim, size) in enumerate(zip(op.dims(i), op.shape(i), strict=True)):
        if size != 1:
            op.unify(dim, dims[new + k])
    op.linear("add", [i])
    op.out(dims)


@rule("aten.repeat", "aten.tile")
def repeat(op: OpContext) -> None:
    """Copies lie one after the other: ``copies · dim``. A rank makes as many copies as the axis of copies has
    there.
    """
    i = op.tensor("self")
    name = "repeats" if "repeats" in op.args else "dims"
    counts = list(op.args[name])
    counts = [1] * (op.rank(i) - len(counts)) + counts
    dims = [()] * (len(counts) - op.rank(i)) + op.dims(i)
    copies = [op.solver.fresh(n) for n in counts]
    given = len(op.args[name])
    op.local(name, lambda n: [n(c) for c in copies][-given:] if given else [])
    op.linear("add", [i])
    op.out([op.solver.product([c, dim]) for c, dim in zip(copies, dims, strict=True)])


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(op: OpContext) -> None:
    """Copies of an element lie side by side: ``dim · copies``."""
    i = op.tensor("self")
    count = op.args["repeats"]
    copies = op.solver.fresh(count)
    dims = op.dims(i)
    if op.args["dim"] is None:
        dims = [op.solver.product([*dims, copies])]
    else:
        d = op.args["dim"] % len(dims)
        dims[d] = op.solver.product([dims[d], copies])
        if op.args.get("output_size") is not None:
            op.local("output_size", _size(dims[d]))
    op.local("repeats", _size(copies))
    op.linear("add", [i])
    op.out(dims)


def _size(dim: Dim) -> Any:
    def local(n: LocalSize) -> int:
        return n(dim)

    return local


@rule("aten.repeat_interleave.self_Tensor")
def repeat_interleave_counts(op: OpContext) -> None:
    """A count per element: the dim is blocked."""
    i, counts = op.tensor("self"), op.tensor("repeats")
    for d in range(op.rank(counts)):
        op.block(counts, d)
    dims = op.dims(i)
    shape = op.out_shapes()[0]
    if op.args["dim"] is None:
        for d in range(len(dims)):
            op.block(i, d)
        dims = [op.whole(math.prod(shape))]
    else:
        d = op.args["dim"] % len(dims)
        op.block(i, d)
        dims[d] = op.whole(shape[d])
    op.linear("mul", [i])
    op.out(dims)
