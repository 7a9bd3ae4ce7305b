"""Rules of softmax and of fused norms: the dims they normalise over are blocked, the others pass."""

from __future__ import annotations

from autotp.axes.rules.dims import aten, block_all, frozen_part, is_write, pass_but, split_groups, whole_dims
from autotp.axes.rules.registry import OpContext, rule
from autotp.axes.term import Dim


@rule(
    *aten(
        """
        softmax.int log_softmax.int _softmax _log_softmax special_softmax special_log_softmax _safe_softmax
        softmin
        """
    )
)
def softmax(op: OpContext) -> None:
    """Normalises over one dim."""
    i = op.tensor("self")
    op.out(pass_but(op, i, [int(op.args["dim"]) % max(op.rank(i), 1)] if op.rank(i) else []))


@rule(
    *aten(
        """
        layer_norm rms_norm native_layer_norm _fused_rms_norm
        """
    )
)
def trailing_norm(op: OpContext) -> None:
    """Normalises over the last dims, whose weight and bias are as whole as they are."""
    i = op.tensor("input")
    count = len(op.args["normalized_shape"])
    for name in ("weight", "bias"):
        if op.has(name):
            block_all(op, op.tensor(name))
    out = pass_but(op, i, range(op.rank(i) - count, op.rank(i)))
    statistics: list[Dim] = [*out[: op.rank(i) - count], *[()] * count]
    op.outs([out, *[statistics] * (len(op.out_shapes()) - 1)])


@rule("aten.group_norm")
def group_norm(op: OpContext) -> None:
    """Channels read ``groups · rest``: groups pass (a rank has fewer of them), the rest is blocked."""
    i = op.tensor("input")
    groups = int(op.args["num_groups"])
    dims = pass_but(op, i, range(2, op.rank(i)))
    group, rest = split_groups(op, i, 1, groups)
    inner = frozen_part(op, op.shape(i)[1] // groups) if rest else ()
    uses = [(i, 1, group)]
    for name in ("weight", "bias"):
        if op.has(name):
            k = op.tensor(name)
            uses.append((k, 0, split_groups(op, k, 0, groups)[0]))
    for _, _, other in uses[1:]:
        op.unify(group, other)
    for k, d, own in uses:
        op.consume_as(k, d, (*own, *inner))
    dims[1] = (*group, *inner)
    op.out(dims)
    op.local("num_groups", lambda size: size(group))


@rule("aten.batch_norm", "aten.native_batch_norm", "aten._native_batch_norm_legit_no_training")
def batch_norm(op: OpContext) -> None:
    """Channels pass; in training the statistics are over all else, which is therefore blocked."""
    _by_channel(op, bool(op.args.get("training", False)), [])


@rule("aten.instance_norm")
def instance_norm(op: OpContext) -> None:
    """Channels and samples pass; with statistics of the input the positions are blocked."""
    _by_channel(op, bool(op.args["use_input_stats"]), [0])


def _by_channel(op: OpContext, statistics: bool, passing: list[int]) -> None:
    i = op.tensor("input")
    channel = [(i, 1)]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if op.has(name):
            k = op.tensor(name)
            channel.append((k, 0))
            if statistics and name.startswith("running") and is_write(op, name):
                op.mutates(k)
    out = pass_but(op, i, [d for d in range(op.rank(i)) if d != 1 and d not in passing] if statistics else [])
    out[1] = op.join(channel)
    shapes = op.out_shapes()
    # the other results of the native ops: statistics by channel (empty outside training)
    op.outs(
        [
            out,
            *(
                [out[1]] if shape == (op.shape(i)[1],) else whole_dims(op, k)
                for k, shape in enumerate(shapes)
                if k
            ),
        ]
    )


@rule("aten.cosine_similarity", "aten.pairwise_distance")
def similarity(op: OpContext) -> None:
    """Compares along one dim, which is blocked; the others broadcast."""
    names = [n for n in ("x1", "x2") if n in op.args]
    operands = [op.tensor(n) for n in names]
    rank = max(op.rank(i) for i in operands)
    at = int(op.args.get("dim", -1)) % rank if rank else 0
    for i in operands:
        if op.rank(i) >= rank - at:
            op.block(i, at - rank)
    out = op.broadcast(operands)
    keep = bool(op.args.get("keepdim", False))
    op.out([() if d == at else dim for d, dim in enumerate(out) if d != at or keep])


@rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(op: OpContext) -> None:
    """``v · g / ‖v‖``: one norm for each element of one dim, the others are blocked. Dim -1 is none: one norm of all
    (`aten::norm_except_dim`).
    """
    v, g = op.tensor("v"), op.tensor("g")
    at = None if op.args["dim"] == -1 else int(op.args["dim"]) % op.rank(v)
    out = pass_but(op, v, [d for d in range(op.rank(v)) if d != at])
    if at is not None:
        out[at] = op.join([(v, at), *([(g, at)] if op.rank(g) == op.rank(v) else [])])
    norms = [[out[d] if d == at else () for d in range(op.rank(v))]] * (len(op.out_shapes()) - 1)
    op.outs([out, *norms])
    if not norms:
        op.linear("mul", [g])
