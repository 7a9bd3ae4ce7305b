"""Rules of losses: classes are blocked; without a reduction the other dims pass, a sum contracts them."""

from __future__ import annotations

from autotp.axes.rules.dims import aten, block_all, pass_but, whole_dims
from autotp.axes.rules.registry import OpContext, block_everything, rule

NONE, MEAN, SUM = 0, 1, 2  # at::Reduction


@rule(
    *aten(
        """
        cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward
        """
    )
)
def class_loss(op: OpContext) -> None:
    """``[n, c, ...]`` or ``[c]`` against indices ``[n, ...]`` (or probabilities like the input)."""
    if int(op.args["reduction"]) != NONE or len(op.out_shapes()) > 1:
        block_everything(op)
        return
    x, target = op.tensor("self"), op.tensor("target")
    classes = 1 if op.rank(x) > 1 else 0
    op.block(x, classes)
    if op.has("weight"):
        block_all(op, op.tensor("weight"))
    probabilities = op.rank(target) == op.rank(x)
    if probabilities:
        op.block(target, classes)
    kept = [d for d in range(op.rank(x)) if d != classes]
    op.out([op.join([(x, d), (target, d if probabilities or d < classes else d - 1)]) for d in kept])


@rule(
    *aten(
        """
        mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
        kl_div soft_margin_loss poisson_nll_loss
        """
    )
)
def pointwise_loss(op: OpContext) -> None:
    """One term an element."""
    operands = op.all_tensors()
    reduction = int(op.args["reduction"])
    if reduction == MEAN:
        block_everything(op)
        return
    dims = op.broadcast(operands)
    if reduction == NONE:
        op.out(dims)
        return
    rank = len(dims)
    for d, dim in enumerate(dims):
        if not any(op.is_blocked(i, op.rank(i) - rank + d) for i in operands if op.rank(i) >= rank - d):
            op.contract(dim)
    op.out([])


@rule(
    *aten(
        """
        cosine_embedding_loss triplet_margin_loss margin_ranking_loss hinge_embedding_loss multi_margin_loss
        multilabel_margin_loss ctc_loss multilabel_soft_margin_loss
        """
    )
)
def other_loss(op: OpContext) -> None:
    """Whole."""
    for i in op.all_tensors():
        pass_but(op, i, range(op.rank(i)))
    op.outs([whole_dims(op, k) for k in range(len(op.out_shapes()))])
