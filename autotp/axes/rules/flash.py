"""Rules of attention kernels that keep heads next to last: ``[b, s, h, d]``, or ``[t, h, d]`` for packed sequences.

FlashAttention's ops, PyTorch's own, xformers' and (with heads second) ``flex_attention``. Heads pass, and the batch
where nothing else speaks of it (lengths, tables of pages); positions and the head dim are needed whole. With fewer
heads of keys than of queries the latter are ``K · G``, as in `attention`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from autotp.axes.rules.attention import Use, grouped_heads
from autotp.axes.rules.dims import block_all, whole_dims
from autotp.axes.rules.registry import OpContext, block_everything, rule
from autotp.axes.term import Dim

_BIASES = ("bias", "attn_bias")  # [b, h, s, s]
_SLOPES = ("alibi_slopes",)  # [h] or [b, h]

_FILLS = ("aten.new_ones", "aten.new_zeros", "aten.new_full", "aten.ones_like", "aten.zeros_like")  # read no value


@rule(
    "flash_attn._flash_attn_forward",
    "flash_attn._flash_attn_varlen_forward",
    "flashattn._flash_attn_forward",
    "flashattn._flash_attn_varlen_forward",
    "flash_attn_3._flash_attn_forward",
    "flash_attn_3.fwd",
    "aten._flash_attention_forward",
    "aten._efficient_attention_forward",
    "torch_attn._varlen_attn",
    "xformers_flash.flash_fwd",
    "xformers_flash3.flash_fwd",
    "xformers.efficient_attention_forward_cutlass",
)
def flash(op: OpContext) -> None:
    """The first three tensors are queries, keys and values. Of the others a bias and slopes go by heads, and integers
    (lengths, tables of pages) are whole; any other (new keys for a cache, scales of a quantization) is not known."""
    names = [name for name in op.tensor_names if op.has(name)]
    q, k, v = (op.tensor(name) for name in names[:3])
    rank = op.rank(q)
    heads: list[Use] = []
    lengths: list[int] = []
    for name in names[3:]:
        i = op.tensor(name)
        if not op.operand_node(i).meta["val"].dtype.is_floating_point:
            lengths.append(i)
        elif name in _BIASES and op.rank(i) == 4:
            heads.append((i, 1))
        elif name in _SLOPES and op.rank(i) in (1, 2):
            heads.append((i, op.rank(i) - 1))
        else:
            block_everything(op)
            return
    if rank not in (3, 4) or op.rank(k) not in (3, 4) or op.rank(k) != op.rank(v):
        block_everything(op)
        return
    keys = [(i, op.rank(i) - 2) for i in (k, v)]
    by_heads = {(q, rank - 2), *keys, *heads}
    by_batch = []
    if rank == op.rank(k) == 4 and not lengths:
        by_batch = [(i, 0) for i in (q, k, v)] + [(i, 0) for i, d in heads if d == 1]
    for i in (q, k, v, *lengths, *(i for i, _ in heads)):
        for d in range(op.rank(i)):
            if (i, d) not in by_heads and (i, d) not in by_batch:
                op.block(i, d)
    made = grouped_heads(op, (q, rank - 2), keys, heads)
    if rank == 3:
        batch = []
    elif by_batch:
        batch = [op.join(by_batch)]
    else:
        batch = [op.whole(op.shape(q)[0])]
    _results(op, batch, made)
    if op.args.get("dropout_p") or op.args.get("p"):
        op.random()


def _results(op: OpContext, batch: list[Dim], heads: Dim) -> None:
    """The result is as the queries are. Of the softmax there is ``[b, h, ...]`` (packed: ``[h, t]``); the rest are
    seeds and lengths."""
    lead = [*batch, heads]
    sizes = tuple(op.solver.size(dim) for dim in lead)
    results: list[list[Dim]] = []
    for k, shape in enumerate(op.out_shapes()):
        dims = whole_dims(op, k)
        if k == 0:
            dims[: len(batch)] = batch
            dims[-2] = heads
        elif len(shape) > len(lead) and shape[: len(lead)] == sizes:
            dims[: len(lead)] = lead
        results.append(dims)
    op.outs(results)


@rule("flex_attention")
def flex_attention(op: OpContext) -> None:
    """The higher-order op, on ``[b, h, s, d]``. Heads (the batch) pass where neither the scores' function nor the
    mask's asks which head (which sequence) it is at: each rank counts its own from 0."""
    q, k, v = (op.tensor(name) for name in ("0", "1", "2"))
    others = [i for i in op.all_tensors() if i not in (q, k, v)]
    blocks = [op.operand_node(i) for i in others if any(op.operand_node(i) is x for x in op.args["4"])]
    for i in others:
        block_all(op, i)
    for d in range(2):
        alike = all(node.meta["val"].shape[d] == 1 for node in blocks)
        if not alike or _asks(op.args["3"], d + 1) or _asks(op.args["4"][-1], d):
            for i in (q, k, v):
                op.block(i, d)
    for i in (q, k, v):
        op.block(i, 2)
        op.block(i, 3)
    heads = grouped_heads(op, (q, 1), [(k, 1), (v, 1)], [])
    batch = op.join([(i, 0) for i in (q, k, v)])
    op.outs([[batch, heads, *whole_dims(op, n)[2:]] for n in range(len(op.out_shapes()))])


def _asks(function: object, argument: int) -> bool:
    """Whether the graph of a scores' or a mask's function uses one of its arguments. In doubt, yes."""
    if not isinstance(function, fx.Node):
        return function is not None
    graph: Any = getattr(getattr(function.graph.owning_module, str(function.target), None), "graph", None)
    if not isinstance(graph, fx.Graph):
        return True
    users = [n for n in graph.nodes if n.op == "placeholder"][argument].users
    return any(str(user.target).partition(".default")[0] not in _FILLS for user in users)
