"""What the rules of several families share: dim arguments, and dims that pass while others are blocked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autotp.axes.rules.registry import OpContext
from autotp.axes.term import CannotUnify, Dim


def aten(names: str) -> list[str]:
    """The names of a list of ops, for `rule`."""
    return [f"aten.{name}" for name in names.split()]


def normalized(dim: Any, rank: int) -> list[int]:
    """A ``dim`` argument (an int, a list, ``None`` or ``[]`` for all of them) as sorted indices from 0."""
    if dim is None or dim == []:
        return list(range(rank))
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    return sorted({int(d) % rank for d in dims}) if rank else []


def pass_but(op: OpContext, i: int, blocked: Iterable[int]) -> list[Dim]:
    """Block some dims of operand `i`; the dims of a result of its shape, where those are fresh and whole."""
    at = set(blocked)
    dims = op.dims(i)
    sizes = op.shape(i)
    for d in at:
        op.block(i, d)
    return [op.whole(sizes[d]) if d in at else dim for d, dim in enumerate(dims)]


def block_all(op: OpContext, i: int) -> None:
    """Block every dim of operand `i`."""
    for d in range(op.rank(i)):
        op.block(i, d)


def whole_dims(op: OpContext, result: int) -> list[Dim]:
    """Fresh whole axes of the shape of one result."""
    return [op.whole(size) for size in op.out_shapes()[result]]


def frozen_part(op: OpContext, size: int) -> Dim:
    """An axis that is never sharded: the part of a dim that an op needs whole while the rest passes."""
    return op.solver.fresh(size, frozen=True)


def split_groups(op: OpContext, i: int, d: int, groups: int) -> tuple[Dim, Dim]:
    """Read dim `d` of operand `i` as ``groups · rest``; the two factors. Blocks the dim where it cannot be
    read so.
    """
    dim = op.dims(i)[d]
    rest = op.shape(i)[d] // groups
    if groups == 1:
        return (), dim
    if rest == 1:
        return dim, ()
    mark = op.solver.mark()
    try:
        major, minor = op.solver.split(dim, [groups, rest])
    except CannotUnify:
        op.solver.undo(mark)
        op.block(i, d)
        major, minor = op.solver.fresh(groups, frozen=True), op.solver.fresh(rest, frozen=True)
    return major, minor


def is_write(op: OpContext, name: str) -> bool:
    """Whether the op's schema says that it writes into this argument."""
    schema = getattr(op.node.target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    return any(a.name == name and a.alias_info is not None and a.alias_info.is_write for a in arguments)


def in_place(op: OpContext) -> bool:
    """Whether the op writes into its first argument (``add_``); marks that operand as mutated."""
    first = next(iter(op.args), "")
    if not is_write(op, first):
        return False
    op.mutates(op.tensor(first))
    return True
