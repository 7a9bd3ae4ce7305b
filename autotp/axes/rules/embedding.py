"""Rules of lookups.

An embedding is a contraction with a one-hot matrix: its vocabulary is contracted. On a rank with some of
the rows, only indices of those are looked up, the others give zero, and the result is Partial
(vocab-parallel). An op over local rows cannot be called with global indices as it is; whoever runs it
(`ShardedEmbedding`) shifts and masks.
"""

from __future__ import annotations

from autotp.axes.rules.dims import block_all, pass_but, whole_dims
from autotp.axes.rules.registry import OpContext, rule


@rule("aten.embedding")
def embedding(op: OpContext) -> None:
    """``[v, m], [...] -> [..., m]`` with v contracted."""
    weight, indices = op.tensor("weight"), op.tensor("indices")
    vocabulary, model = op.dims(weight)
    op.contract(vocabulary)
    op.out([*op.dims(indices), model])
    op.linear("mul", [weight])


@rule("aten.embedding_bag", "aten._embedding_bag")
def embedding_bag(op: OpContext) -> None:
    """Only the embedding's width passes."""
    weight = op.tensor("weight")
    for i in op.all_tensors():
        if i != weight:
            block_all(op, i)
    model = pass_but(op, weight, [0])[1]
    bags = whole_dims(op, 0)[0]
    op.outs([[bags, model], *(whole_dims(op, k) for k in range(1, len(op.out_shapes())))])


@rule("aten.one_hot")
def one_hot(op: OpContext) -> None:
    """A new last dim, the classes, is whole."""
    i = op.tensor("self")
    classes = op.out_shapes()[0][-1]
    op.out([*op.dims(i), op.whole(classes)])
