"""Rules of ops that make tensors from nothing.

Constant fills may be made smaller on a rank. What carries data (``arange``, random numbers) is made whole
everywhere and then sliced: ``arange`` of a local size would count the wrong positions.
"""

from __future__ import annotations

import torch

from autotp.axes.rules.dims import aten, whole_dims
from autotp.axes.rules.registry import OpContext, rule
from autotp.axes.term import Dim


def _fresh(op: OpContext) -> list[Dim]:
    return [op.solver.fresh(size) for size in op.out_shapes()[0]]


FILLS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
) | {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}


@rule(
    *aten(
        """
        zeros ones full empty.memory_format new_zeros new_ones new_full new_empty
        """
    )
)
def fill(op: OpContext) -> None:
    """Every element is the same; `self` lends its dtype and device only."""
    if op.has("self"):
        op.tensor("self")
    if op.has("fill_value"):
        op.tensor("fill_value")
    dims = _fresh(op)
    op.out(dims)
    op.local("size", lambda size: [size(dim) for dim in dims])


@rule(
    *aten(
        """
        zeros_like ones_like full_like empty_like
        """
    )
)
def fill_like(op: OpContext) -> None:
    """The operand's shape, whatever it holds."""
    i = op.tensor("self")
    op.out(op.dims(i))
    if "zeros" in str(op.node.target):
        op.linear("mul", [i])


@rule(
    *aten(
        """
        arange linspace logspace eye scalar_tensor tril_indices triu_indices range bartlett_window
        blackman_window hamming_window hann_window kaiser_window
        """
    )
)
def data(op: OpContext) -> None:
    """Made whole."""
    for i in op.all_tensors():
        for d in range(op.rank(i)):
            op.block(i, d)
    op.out(whole_dims(op, 0))


@rule(
    *aten(
        """
        rand randn randint randperm normal.float_float
        """
    )
)
def random_data(op: OpContext) -> None:
    """Made whole, the same on every rank, so that the numbers do not depend on the degree."""
    data(op)
    op.random()
