"""Rules of the remaining ops that move elements: aliases and casts, triangles, padding, windows,
complex pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from autotp.axes.rules.dims import pass_but
from autotp.axes.rules.registry import OpContext, rule


def _self(op: OpContext) -> int:
    """The first tensor argument, whatever its name."""
    return op.tensor(next(name for name in op.tensor_names if op.has(name)))


def _is_linear_cast(op: OpContext, i: int) -> bool:
    def inexact(val: Any) -> bool:
        return isinstance(val, torch.Tensor) and (val.dtype.is_floating_point or val.dtype.is_complex)

    return inexact(op.operand_node(i).meta["val"]) and inexact(op.node.meta["val"])


@rule(
    "aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.detach_", "aten.lift",
    "aten.lift_fresh", "aten.lift_fresh_copy", "aten._to_copy", "aten.to", "aten.type_as",
    "aten.requires_grad_", "aten.pin_memory", "aten.view_copy", "aten.alias_copy",
    "aten._neg_view", "aten.cpu", "aten.cuda", "aten.data",
    "aten._autocast_to_reduced_precision", "aten._autocast_to_full_precision", "prims.convert_element_type",
)  # fmt: skip
def same(op: OpContext) -> None:
    """The same values, perhaps copied or cast. A cast to integers is not linear."""
    i = _self(op)
    if _is_linear_cast(op, i):
        op.linear("add", [i])
    op.out(op.dims(i))


@rule("getitem")
def getitem(op: OpContext) -> None:
    """One of the results of an op that has several."""
    i = op.tensor("0")
    op.output_of(i, op.args["1"])
    op.linear("add", [i])
    op.out(op.dims(i))


def _blocked(op: OpContext, at: Iterable[int], linear: bool = True) -> None:
    i = _self(op)
    op.out(pass_but(op, i, at))
    if linear:
        op.linear("add", [i])


@rule("aten.tril", "aten.triu", "aten.tril_", "aten.triu_")
def triangle(op: OpContext) -> None:
    """Which elements stay depends on the places in the last two dims."""
    i = _self(op)
    _blocked(op, range(op.rank(i) - 2, op.rank(i)))
    if str(op.node.target).split(".")[1].endswith("_"):
        op.mutates(i)


@rule("aten.diagonal", "aten.diagonal_copy", "aten.linalg_diagonal")
def diagonal(op: OpContext) -> None:
    """Two dims become one, at the end."""
    i = _self(op)
    d1, d2 = (op.args[n] % op.rank(i) for n in ("dim1", "dim2"))
    dims = pass_but(op, i, [d1, d2])
    op.out([*(dim for d, dim in enumerate(dims) if d not in (d1, d2)), op.whole(op.out_shapes()[0][-1])])
    op.linear("add", [i])


@rule("aten.diag_embed")
def diag_embed(op: OpContext) -> None:
    """The last dim becomes two."""
    i = _self(op)
    shape = op.out_shapes()[0]
    d1, d2 = (op.args[n] % len(shape) for n in ("dim1", "dim2"))
    rest = iter(pass_but(op, i, [op.rank(i) - 1])[:-1])
    op.out([op.whole(n) if d in (d1, d2) else next(rest) for d, n in enumerate(shape)])
    op.linear("add", [i])


@rule("aten.constant_pad_nd", "aten.pad")
def pad(op: OpContext) -> None:
    """Padding with a constant is a concatenation with parts that every rank has; any other is blocked where
    it pads.
    """
    i = _self(op)
    amounts = list(op.args["pad"])
    dims, rank = op.dims(i), op.rank(i)
    constant = op.args.get("mode", "constant") == "constant"
    shape = op.out_shapes()[0]
    for k in range(len(amounts) // 2):
        d = rank - 1 - k
        before, after = amounts[2 * k : 2 * k + 2]
        if before == after == 0:
            continue
        if constant and before >= 0 and after >= 0:
            parts = [op.solver.fresh(n, frozen=True) if n != 1 else () for n in (before, after)]
            dims[d] = op.solver.concat([parts[0], dims[d], parts[1]])
        else:
            op.block(i, d)
            dims[d] = op.whole(shape[d])
    if not constant or not op.args.get("value"):
        op.linear("add", [i])
    op.out(dims)


@rule("aten.unfold.default", "aten.unfold_copy")
def unfold(op: OpContext) -> None:
    """Windows over one dim: how many, and (last) how long."""
    i = _self(op)
    d = op.args["dimension"] % max(op.rank(i), 1)
    shape = op.out_shapes()[0]
    dims = pass_but(op, i, [d])
    if dims:
        dims[d] = op.whole(shape[d])
    op.out([*dims, op.whole(shape[-1])])
    op.linear("add", [i])


@rule("aten.view_as_complex", "aten.view_as_complex_copy")
def view_as_complex(op: OpContext) -> None:
    """The last dim is the pair of real and imaginary part."""
    i = _self(op)
    op.block(i, -1)
    op.out(op.dims(i)[:-1])
    op.linear("add", [i])


@rule("aten.view_as_real", "aten.view_as_real_copy")
def view_as_real(op: OpContext) -> None:
    """A new last dim for the pair of real and imaginary part."""
    i = _self(op)
    op.out([*op.dims(i), op.whole(2)])
    op.linear("add", [i])


@rule("aten.broadcast_tensors")
def broadcast_tensors(op: OpContext) -> None:
    """All operands brought to one shape; a dim that grows has no size argument, so it is the others' axis."""
    operands = op.tensors("tensors")
    dims = op.broadcast(operands)
    op.outs([dims] * len(operands))


@rule("aten.meshgrid")
def meshgrid(op: OpContext) -> None:
    """Each operand is one dim of every result."""
    operands = op.tensors("tensors")
    dims = [op.dims(i)[0] if op.rank(i) else () for i in operands]
    if op.args.get("indexing", "ij") == "xy" and len(dims) >= 2:
        dims[0], dims[1] = dims[1], dims[0]
    op.outs([dims] * len(operands))


@rule("aten.sym_size", "aten.sym_numel", "aten.is_same_size")
def about(op: OpContext) -> None:
    """A question about a tensor's shape, not its values."""
    op.outs([[] for _ in op.out_shapes()])
