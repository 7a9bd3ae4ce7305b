"""Leaf modules become their sharded classes: a leaf of the program and one rank → options of the runtime's class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from ..axes.layout import local_size, runs
from ..axes.term import Dim, size_of
from ..errors import RewriteError
from ..runtime.attention import AttentionOptions, ShardedMultiheadAttention
from ..runtime.conv import ConvOptions, ShardedConv, ShardedTransposedConv
from ..runtime.edges import Gather as EdgeGather
from ..runtime.edges import SharedEnter
from ..runtime.edges import Take as EdgeTake
from ..runtime.embedding import EmbeddingOptions, ShardedEmbedding
from ..runtime.linear import LinearOptions, ShardedLinear, ShardedTransposedLinear
from .bind import Bound, Rank, bind
from .program import Leaf, Program
from .steps import AllReduce, Enter, Gather, Step, Take


class SharedEnters:
    """One `SharedEnter` for all takers of one share number."""

    def __init__(self, program: Program, rank: Rank) -> None:
        self.consumers = Counter(program.shares)
        self.rank = rank
        self.made: dict[int, SharedEnter] = {}

    def bind(self, step: Step, share: int | None) -> Bound:
        """A step of a hook or a wrap, as what it calls."""
        how = self.enter(step, share) if isinstance(step, Enter) else None
        return how if isinstance(how, SharedEnter) else bind(step, self.rank)

    def enter(self, step: Enter, share: int | None) -> str | SharedEnter:
        group = self.rank.group(step.common)
        if share is None:
            return group
        if share not in self.made:
            self.made[share] = SharedEnter(group, self.consumers[share])
        return self.made[share]


def _edge_gather(step: Gather, rank: Rank) -> EdgeGather:
    sizes, starts, lengths = rank.gather(step.axes)
    return EdgeGather(rank.prefix, tuple(sizes), tuple(starts), tuple(lengths), step.lazy)


def swap_leaf(module: nn.Module, leaf: Leaf, program: Program, rank: Rank, shared: SharedEnters) -> None:
    enter = next((shared.enter(s, leaf.share) for s in leaf.before if isinstance(s, Enter)), None)
    take = next((s for s in leaf.before if isinstance(s, Take)), None)
    reduce = next((rank.group(s.common) for s in leaf.after if isinstance(s, AllReduce)), None)
    gather = next((s for s in leaf.after if isinstance(s, Gather)), None)
    known = (Enter, Take) if leaf.kind in ("linear", "conv1d") else (Enter,)
    if any(not isinstance(s, known) for s in leaf.before) or any(
        not isinstance(s, (AllReduce, Gather)) for s in leaf.after
    ):
        raise RewriteError(
            f"{leaf.fqn}: cannot do {leaf.before} before and {leaf.after} after a {leaf.kind} module",
            leaf.fqn,
        )
    own = {fqn[len(leaf.fqn) + 1 :]: dims for fqn, dims in program.slices.items() if owner_of(fqn, leaf.fqn)}
    keep = rank.rank == 0
    if leaf.kind in ("linear", "conv1d"):
        options = LinearOptions(
            enter=enter,
            take=EdgeTake(*map(tuple, rank.take(take.axes))) if take is not None else None,
            reduce=reduce,
            bias=leaf.bias,
            keep=keep,
            gather=_edge_gather(gather, rank) if gather is not None else None,
        )
        if leaf.kind == "linear":
            assert isinstance(module, nn.Linear)
            ShardedLinear.swap(module, options)
        else:
            ShardedTransposedLinear.swap(module, options)
    elif leaf.kind == "embedding":
        _swap_embedding(module, leaf, own, reduce, gather, rank)
    elif leaf.kind == "attention":
        _swap_attention(module, leaf, own, enter, reduce is not None, rank)
    else:
        _swap_conv(module, leaf, own, enter, reduce, gather, rank)


def owner_of(fqn: str, module: str) -> bool:
    return fqn.startswith(module + ".") if module else True


def _swap_embedding(
    module: nn.Module,
    leaf: Leaf,
    own: Mapping[str, Sequence[Dim]],
    reduce: str | None,
    gather: Gather | None,
    rank: Rank,
) -> None:
    assert isinstance(module, nn.Embedding)
    dims = own.get("weight")
    rows = None
    if dims is not None and rank.sharded(dims[:1]):
        rows = tuple(runs(dims[0], rank.partition, rank.rank))
    vocab = size_of(dims[0]) if dims is not None else module.num_embeddings
    options = EmbeddingOptions(
        rows, vocab, reduce, _edge_gather(gather, rank) if gather is not None else None
    )
    ShardedEmbedding.swap(module, options)


def _swap_attention(
    module: nn.Module,
    leaf: Leaf,
    own: Mapping[str, Sequence[Dim]],
    enter: str | SharedEnter | None,
    reduce: bool,
    rank: Rank,
) -> None:
    assert isinstance(module, nn.MultiheadAttention)
    name, parts = (
        ("in_proj_weight", 3) if module._parameters.get("in_proj_weight") is not None else ("q_proj_weight", 1)
    )
    dims = own.get(name)
    if dims is None or "out_proj.weight" not in own:
        raise RewriteError(f"{leaf.fqn}: nn.MultiheadAttention can be sharded by its heads only", leaf.fqn)
    rows = [local_size(dims[0], rank.partition, r) for r in range(rank.tp)]
    if any(n % (parts * module.head_dim) for n in rows):
        raise RewriteError(f"{leaf.fqn}: nn.MultiheadAttention can be sharded by whole heads only", leaf.fqn)
    heads = tuple(n // (parts * module.head_dim) for n in rows)
    named = {("args", i): name for i, name in enumerate(("query", "key", "value"))}
    enters = frozenset(named[path] if path in named else str(path[1]) for path in leaf.ports)
    options = AttentionOptions(rank.prefix, heads, rank.rank, enter, reduce, rank.rank == 0, enters)
    ShardedMultiheadAttention.swap(module, options)


def _swap_conv(
    module: nn.Module,
    leaf: Leaf,
    own: Mapping[str, Sequence[Dim]],
    enter: str | SharedEnter | None,
    reduce: str | None,
    gather: Gather | None,
    rank: Rank,
) -> None:
    assert isinstance(module, nn.modules.conv._ConvNd)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    per_group = (module.in_channels if transposed else module.out_channels) // module.groups
    assert leaf.rows is not None
    options = ConvOptions(
        groups=1 if module.groups == 1 else rank.size(leaf.rows) // per_group,
        enter=enter,
        reduce=reduce,
        bias=leaf.bias,
        keep=rank.rank == 0,
        gather=_edge_gather(gather, rank) if gather is not None else None,
    )
    (ShardedTransposedConv if transposed else ShardedConv).swap(module, options)
