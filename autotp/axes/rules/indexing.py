"""Rules of ops that read or write at computed places: index, gather, scatter, and their kin.

The indexed dims are blocked, and only those; the dims of the index tensors pass to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from autotp.axes.rules.dims import in_place
from autotp.axes.rules.registry import LocalSize, OpContext, block_everything, is_tensor_node, rule
from autotp.axes.rules.slicing import constant_range
from autotp.axes.term import Dim


def _is_mask(op: OpContext, i: int) -> bool:
    val = op.operand_node(i).meta["val"]
    return val.dtype in (torch.bool, torch.uint8)


def _constant_range(
    op: OpContext, node: fx.Node, i: int, d: int
) -> tuple[Dim, Callable[[LocalSize], fx.Node | torch.Tensor]] | None:
    """A known index list that is a contiguous range: its dim, and on a rank the list (a tensor, where it is
    another one).
    """
    value = op.constant(node)
    found = None if value is None else constant_range(op, value, i, d)
    if value is None or found is None:
        return None
    piece, local = found
    given = [int(v) for v in value.tolist()]
    return piece, lambda n: node if local(n) == given else torch.tensor(local(n), dtype=torch.long)


@rule("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(op: OpContext) -> None:
    """``x[:, i, :, j]``: adjacent index tensors put their dims where they stand, separated ones put them
    first.
    """
    i = op.tensor("self")
    listed = list(op.args["indices"])
    at = [d for d, value in enumerate(listed) if is_tensor_node(value)]
    op.linear("mul", [i])
    if len(at) == 1:
        (d,) = at
        found = _constant_range(op, listed[d], i, d)
        if found is not None:
            piece, local = found
            op.local("indices", lambda n: [*listed[:d], local(n), *listed[d + 1 :]])
            dims = op.dims(i)
            dims[d] = piece
            op.out(dims)
            return
    indices = {d: op.tensor("indices", d) for d in at}
    if any(_is_mask(op, k) for k in indices.values()):
        op.linear("none")
        block_everything(op)  # how many elements a mask selects depends on the data
        return
    for d in at:
        op.block(i, d)
    placed = op.broadcast(list(indices.values()))
    dims = op.dims(i)
    rest = [dim for d, dim in enumerate(dims) if d not in indices]
    adjacent = at == list(range(at[0], at[-1] + 1))
    where = at[0] if adjacent else 0
    op.out([*rest[:where], *placed, *rest[where:]])


@rule("aten.index_select")
def index_select(op: OpContext) -> None:
    """``index_select(x, dim, list)``."""
    i = op.tensor("self")
    op.linear("mul", [i])
    if op.rank(i) == 0:
        op.out([])
        return
    d = op.args["dim"] % op.rank(i)
    dims = op.dims(i)
    found = _constant_range(op, op.args["index"], i, d)
    if found is not None:
        dims[d], local = found
        op.local("index", local)
    else:
        index = op.tensor("index")
        op.block(i, d)
        dims[d] = op.dims(index)[0] if op.rank(index) else ()
    op.out(dims)


@rule("aten.take_along_dim", "aten.gather")
def gather(op: OpContext) -> None:
    """The result has the index's shape; its other dims run along the operand's where they are as long."""
    i = op.tensor("self")
    index = op.tensor("index" if "index" in op.args else "indices")
    if op.args["dim"] is None or op.rank(i) != op.rank(index) or op.rank(i) == 0:
        block_everything(op)
        return
    d = op.args["dim"] % op.rank(i)
    broadcasts = "take_along_dim" in str(op.node.target)
    dims: list[Dim] = []
    for k, (mine, its) in enumerate(zip(op.shape(i), op.shape(index), strict=True)):
        if k == d:
            op.block(i, k)
            dims.append(op.dims(index)[k])
        elif mine == its or broadcasts:
            dims.append(op.join([(i, k), (index, k)]))
        else:  # only the first elements are read
            op.block(i, k)
            op.block(index, k)
            dims.append(op.whole(its))
    op.linear("mul", [i])
    op.out(dims)


def _along(op: OpContext, d: int, others: Iterable[int]) -> list[Dim]:
    """`self` with dim `d` blocked and the other dims joined with those of operands of the same rank."""
    i = op.tensor("self")
    others = list(others)
    dims: list[Dim] = []
    for k, size in enumerate(op.shape(i)):
        same = all(op.shape(o)[k] == size for o in others)
        if k != d and same:
            dims.append(op.join([(i, k), *((o, k) for o in others)]))
            continue
        for o in (i, *others):
            op.block(o, k)
        dims.append(op.whole(size))
    return dims


@rule(
    "aten.scatter",
    "aten.scatter_",
    "aten.scatter_add",
    "aten.scatter_add_",
    "aten.scatter_reduce",
    "aten.scatter_reduce_",
)
def scatter(op: OpContext) -> None:
    """``scatter(x, dim, index, src)``: the dim is blocked, the others pass where all are as long."""
    written = in_place(op)
    i, index = op.tensor("self"), op.tensor("index")
    src = [op.tensor("src")] if op.has("src") else []
    if op.rank(i) == 0:
        op.out([])
        return
    op.out(_along(op, op.args["dim"] % op.rank(i), [index, *src]))
    reduce = op.args.get("reduce")
    if (
        not written
        and src
        and (reduce is None or (reduce in ("sum", "add") and op.args.get("include_self", True)))
    ):
        op.linear("add", [i, *src])


@rule(
    "aten.index_add",
    "aten.index_add_",
    "aten.index_copy",
    "aten.index_copy_",
    "aten.index_reduce",
    "aten.index_reduce_",
)
def index_write(op: OpContext) -> None:
    """``index_add(x, dim, index, source)``: one index for all, so only that dim is blocked."""
    written = in_place(op)
    i, index, source = op.tensor("self"), op.tensor("index"), op.tensor("source")
    for d in range(op.rank(index)):
        op.block(index, d)
    if op.rank(i) == 0 or op.rank(source) != op.rank(i):
        block_everything(op)
        return
    op.out(_along(op, op.args["dim"] % op.rank(i), [source]))
    if not written and "index_reduce" not in str(op.node.target):
        op.linear("add", [i, source])


@rule("aten.index_fill", "aten.index_fill_")
def index_fill(op: OpContext) -> None:
    """``index_fill(x, dim, index, value)``."""
    in_place(op)
    for i in op.all_tensors()[1:]:
        for d in range(op.rank(i)):
            op.block(i, d)
    i = op.tensor("self")
    op.out(_along(op, op.args["dim"] % max(op.rank(i), 1), []))


@rule("aten.index_put", "aten.index_put_", "aten._unsafe_index_put")
def index_put(op: OpContext) -> None:
    """``x[i, j] = values``: the indexed dims are blocked; the others run along the values'."""
    written = in_place(op)
    i, values = op.tensor("self"), op.tensor("values")
    listed = list(op.args["indices"])
    at = [d for d, value in enumerate(listed) if is_tensor_node(value)]
    indices = [op.tensor("indices", d) for d in at]
    if any(_is_mask(op, k) for k in indices):
        block_everything(op)
        return
    for k in indices:
        for d in range(op.rank(k)):
            op.block(k, d)
    for d in at:
        op.block(i, d)
    spread = max(op.rank(k) for k in indices)
    rest = [d for d in range(op.rank(i)) if d not in at]
    where = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    layout = [*rest[:where], *([-1] * spread), *rest[where:]]  # the values' dims (-1: of the indices)
    layout = layout[len(layout) - op.rank(values) :]
    joined: dict[int, Dim] = {}
    for k, d in enumerate(layout):
        if d < 0:
            op.block(values, k)
        elif op.shape(values)[k] != 1:
            joined[d] = op.join([(i, d), (values, k)])
    dims = op.dims(i)
    op.out([op.whole(op.shape(i)[d]) if d in at else joined.get(d, dim) for d, dim in enumerate(dims)])
    if not written:
        op.linear("add", [i, values])


@rule(
    "aten.masked_select",
    "aten.nonzero",
    "aten.nonzero_numpy",
    "aten.take",
    "aten.put",
    "aten.put_",
    "aten.unique_dim",
)
def by_data(op: OpContext) -> None:
    """The shape depends on the data, or places are counted over all dims."""
    in_place(op)
    block_everything(op)


@rule("aten.masked_scatter", "aten.masked_scatter_")
def masked_scatter(op: OpContext) -> None:
    """Values are taken in order, over all dims of the mask."""
    in_place(op)
    block_everything(op)
