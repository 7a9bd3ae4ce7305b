"""Rules of reductions: sums and means contract, everything else needs the reduced dims whole."""

from __future__ import annotations

from autotp.axes.rules.dims import aten, block_all, normalized, pass_but, whole_dims
from autotp.axes.rules.registry import OpContext, rule
from autotp.axes.term import Dim


def _dims_argument(op: OpContext) -> list[int]:
    rank = op.rank(op.tensor("self"))
    return normalized(op.args.get("dim"), rank)


def _without(dims: list[Dim], reduced: list[int], keepdim: bool) -> list[Dim]:
    return [() if d in reduced else dim for d, dim in enumerate(dims) if d not in reduced or keepdim]


@rule("aten.sum.default", "aten.sum.dim_IntList", "aten.nansum")
def summation(op: OpContext) -> None:
    """Sharding a summed axis makes the result Partial; linear."""
    i = op.tensor("self")
    reduced = _dims_argument(op)
    for d in reduced:
        op.contract(op.dims(i)[d])
    op.out(_without(op.dims(i), reduced, bool(op.args.get("keepdim", False))))
    if "nansum" not in str(op.node.target):
        op.linear("mul", [i])


@rule("aten.count_nonzero")
def count_nonzero(op: OpContext) -> None:
    """Counts of parts add up, but the count of a sum is not the sum of the counts."""
    i = op.tensor("self")
    reduced = _dims_argument(op)
    for d in reduced:
        op.contract(op.dims(i)[d])
    op.out(_without(op.dims(i), reduced, False))


@rule("aten.trace")
def trace(op: OpContext) -> None:
    """Needs the pair of dims."""
    i = op.tensor("self")
    block_all(op, i)
    op.out([])
    op.linear("mul", [i])


@rule("aten.mean.default", "aten.mean.dim")
def mean(op: OpContext) -> None:
    """A sum of the local means, each counted by its rank's share of the elements; linear."""
    summation(op)
    op.averages()


@rule(
    *aten(
        """
        amax amin aminmax argmax argmin max.default max.dim min.default min.dim any.default any.dim any.dims
        all.default all.dim all.dims prod.default prod.dim_int var std var_mean std_mean norm.Scalar
        norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype norm.ScalarOpt_dtype linalg_vector_norm logsumexp
        special_logsumexp nanmean median.default median.dim nanmedian.default nanmedian.dim mode kthvalue
        quantile.scalar nanquantile.scalar
        """
    )
)
def _blocked_reduction(op: OpContext) -> None:
    """All results have the shape that is left."""
    i = op.tensor("self")
    reduced = _dims_argument(op)
    kept = _without(pass_but(op, i, reduced), reduced, bool(op.args.get("keepdim", False)))
    shape = tuple(op.solver.size(dim) for dim in kept)
    op.outs([kept if other == shape else whole_dims(op, k) for k, other in enumerate(op.out_shapes())])


@rule("aten.linalg_norm", "aten.linalg_matrix_norm")
def matrix_norm(op: OpContext) -> None:
    """Over the dims given; without them over all, and a matrix norm over the last two."""
    i = op.tensor("self" if "self" in op.args else "A")
    given = op.args.get("dim")
    matrix = "matrix" in str(op.node.target)
    reduced = (
        normalized(given, op.rank(i)) if given is not None or not matrix else [op.rank(i) - 2, op.rank(i) - 1]
    )
    op.out(_without(pass_but(op, i, reduced), reduced, bool(op.args.get("keepdim", False))))
