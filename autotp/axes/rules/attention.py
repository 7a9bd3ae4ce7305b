"""Rules of fused attention: batch, heads and (unless causal) the queries' positions pass, the rest is blocked.

A decode step of grouped-query attention may put the group in the place of the positions, ``[b, K, G, d]``.

Grouped-query attention appears in three ways, and each leaves the queries' heads as ``K · G`` (kv heads,
queries of one): keys expanded in the model (an ``expand`` made ``G``, so heads agree one by one),
``enable_gqa``, and a single kv head that broadcasts.
"""

from __future__ import annotations

from typing import TypeAlias

from autotp.axes.rules.dims import aten, whole_dims
from autotp.axes.rules.registry import OpContext, rule
from autotp.axes.term import CannotUnify, Dim

Use: TypeAlias = tuple[int, int]
"""An operand, and one of its dims."""


@rule(
    *aten(
        """
        scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
        """
    )
)
def attention(op: OpContext) -> None:
    """``softmax(q kᵀ + mask) v``, linear in v."""
    q, k, v = (op.tensor(name) for name in ("query", "key", "value"))
    mask = next((op.tensor(name) for name in ("attn_mask", "attn_bias") if op.has(name)), None)
    operands = [q, k, v, *([] if mask is None else [mask])]
    rows = (
        [] if op.args.get("is_causal") or len(op.out_shapes()) > 1 else [q, *([] if mask is None else [mask])]
    )
    for i in operands:
        for d in range(max(op.rank(i) - 2, 0), op.rank(i) - (i in rows and op.rank(i) > 1)):
            op.block(i, d if i not in rows else d + 1)
    rank = op.rank(q)
    grouped = bool(op.args.get("enable_gqa", False)) and rank > 2 and op.shape(q)[-3] != op.shape(k)[-3] != 1
    leading = [
        grouped_heads(
            op, (q, rank - 3), [(i, op.rank(i) - 3) for i in (k, v)],
            [] if mask is None or op.rank(mask) < 3 else [(mask, op.rank(mask) - 3)],
        )
        if grouped and at == 3
        else op.join([(i, op.rank(i) - at) for i in operands if op.rank(i) >= at])
        for at in range(rank, 2, -1)
    ]
    positions = op.join([(i, op.rank(i) - 2) for i in rows]) if rows else op.whole(op.shape(q)[-2])
    out: list[Dim] = [*leading, positions, op.whole(op.shape(v)[-1])]
    # the fused kernels also return the softmax's denominators, [batch, heads, positions], and seeds
    heads = tuple(op.solver.size(d) for d in leading)
    others = [
        [*leading, *whole_dims(op, n)[len(leading) :]]
        if len(shape) > len(heads) and shape[: len(heads)] == heads
        else whole_dims(op, n)
        for n, shape in enumerate(op.out_shapes())
        if n
    ]
    op.outs([out, *others])
    if not others:  # the denominators do not depend on v
        op.linear("mul", [v])
    if op.args.get("dropout_p"):
        op.random()


def grouped_heads(op: OpContext, query: Use, keys: list[Use], others: list[Use]) -> Dim:
    """The heads of the result, from the dims that are heads: of the queries (as `others`), and of keys and values.

    Where there are more of the former, they are read as kv heads by queries of one.
    """
    heads, kv = op.shape(query[0])[query[1]], {op.shape(i)[d] for i, d in keys}
    uses, every = [query, *others], [query, *others, *keys]
    if kv <= {1, heads}:
        return op.join(every)
    kv_heads = max(kv)
    start = op.solver.mark()
    try:
        if heads % kv_heads or len(kv) > 1 or any(op.is_blocked(i, d) for i, d in every):
            raise CannotUnify("queries' heads are no multiple of the kv heads")
        major, minor = op.solver.split(op.dims(query[0])[query[1]], [kv_heads, heads // kv_heads])
        for i, d in keys:
            op.solver.unify(major, op.dims(i)[d])
    except CannotUnify:
        op.solver.undo(start)
        for i, d in every:
            op.block(i, d)
        return op.whole(heads)
    joined = op.join(uses)
    if any(op.is_blocked(i, d) for i, d in uses if op.shape(i)[d] != 1):  # the mask did not fit
        for i, d in every:
            op.block(i, d)
        return joined
    op.consume_as(*query, (*major, *minor))
    return (*major, *minor)
