"""Rules of ops along one dim (cumulative ones, sorting, differences), which is blocked."""

from __future__ import annotations

from autotp.axes.rules.dims import aten, in_place, normalized, pass_but
from autotp.axes.rules.registry import OpContext, rule
from autotp.axes.term import Dim


def _along(op: OpContext) -> tuple[int, list[Dim]]:
    i = op.tensor("self")
    rank = op.rank(i)
    return i, pass_but(op, i, [int(op.args.get("dim", -1)) % rank] if rank else [])


@rule(
    *aten(
        """
        cumsum cumsum_ flip fliplr flipud roll rot90
        """
    )
)
def linear_scan(op: OpContext) -> None:
    """Linear; ``flip``, ``roll`` and ``rot90`` only move elements."""
    i = op.tensor("self")
    if "dims" not in op.args and "dim" not in op.args:
        at = list(range(op.rank(i)))
    else:
        at = normalized(op.args.get("dims", op.args.get("dim")), op.rank(i))
    in_place(op)
    out = pass_but(op, i, at)
    if "rot90" in str(op.node.target):
        shape = op.out_shapes()[0]
        out = [op.whole(shape[d]) if d in at else dim for d, dim in enumerate(out)]
    op.out(out)
    op.linear("mul", [i])


@rule(
    *aten(
        """
        cumprod cumprod_ logcumsumexp cummax cummin sort.default sort.stable argsort renorm
        """
    )
)
def scan(op: OpContext) -> None:
    """Results of the operand's shape; not linear."""
    in_place(op)
    i, out = _along(op)
    if "renorm" in str(op.node.target):  # its dim is the one that it keeps
        out = pass_but(op, i, [d for d in range(op.rank(i)) if d != int(op.args["dim"]) % op.rank(i)])
    op.outs([out] * len(op.out_shapes()))


@rule("aten.topk.default")
def topk(op: OpContext) -> None:
    """Values and indices: the dim has another size."""
    i, out = _along(op)
    at = int(op.args["dim"]) % op.rank(i) if op.rank(i) else 0
    shape = op.out_shapes()[0]
    dims = [op.whole(shape[d]) if d == at else dim for d, dim in enumerate(out)]
    op.outs([dims, dims])


@rule("aten.diff")
def diff(op: OpContext) -> None:
    """Differences along one dim, perhaps with values before and after it."""
    operands = [op.tensor(n) for n in ("self", "prepend", "append") if op.has(n)]
    rank = op.rank(operands[0])
    at = int(op.args["dim"]) % rank
    for i in operands:
        op.block(i, at)
    size = op.out_shapes()[0][at]
    op.out([
        op.whole(size) if d == at else op.join([(i, d) for i in operands]) for d in range(rank)
    ])  # fmt: skip
    op.linear("add", operands)


@rule("aten.bucketize.Tensor", "aten.searchsorted.Tensor")
def bucketize(op: OpContext) -> None:
    """Values pass, boundaries are blocked (with batched boundaries, so are the values)."""
    i = op.tensor("self")
    name = "boundaries" if op.has("boundaries") else "sorted_sequence"
    k = op.tensor(name)
    batched = op.rank(k) > 1
    pass_but(op, k, range(op.rank(k)))
    if op.has("sorter"):
        pass_but(op, op.tensor("sorter"), range(op.rank(op.tensor("sorter"))))
    op.out(pass_but(op, i, range(op.rank(i)) if batched else []))


@rule("aten.multinomial")
def multinomial(op: OpContext) -> None:
    """Draws along the last dim."""
    i = op.tensor("self")
    out = pass_but(op, i, [op.rank(i) - 1])
    op.out([*out[:-1], op.whole(op.out_shapes()[0][-1])])
    op.random()
