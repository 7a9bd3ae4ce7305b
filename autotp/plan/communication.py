"""What is communicated for one choice of axes, and where it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from ..axes.term import Atom, Dim


@dataclass(frozen=True, slots=True)
class Edge:
    """Operand number ``operand`` of the op at node ``consumer``, made by ``producer``."""

    producer: fx.Node
    consumer: fx.Node
    operand: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """An operand is gathered (``"gather"``) or sliced for free (``"take"``) along ``dim``.

    ``consumer`` is None where the op's own output is sliced (it was computed whole), or a model output gathered.
    """

    kind: str
    producer: fx.Node
    consumer: fx.Node | None
    operand: int
    dim: int
    axes: Dim
    cost: int


def is_loss_of_parts(conversion: Conversion) -> bool:
    """Whether a gather is for a cross-entropy over the sharded classes, which is computed from the ranks' parts."""
    node, axes = conversion.consumer, conversion.axes
    if conversion.kind != "gather" or node is None or conversion.operand != 0:
        return False
    if str(node.target) != "aten.cross_entropy_loss.default" or len(axes) != 1 or not isinstance(axes[0], Atom):
        return False
    logits, target = (arg.meta["val"] for arg in node.args[:2] if isinstance(arg, fx.Node))
    return conversion.dim == min(1, logits.dim() - 1) and not target.is_floating_point()


@dataclass(frozen=True, slots=True)
class Communication:
    """Everything that moves, for one choice of axes.

    Attributes:
        reduce: values that are all-reduced in the forward.
        masked: operands that are whole but join a Partial sum: they count on one rank only.
        partial: values that are Partial on each rank (before the reduce, where there is one).
        enter: value → the uses that share one gradient all-reduce.
        close: ops on gathered operands whose result is sliced again: between op and slice the gradient is made whole.
        unsummed: values whose gradient is still a part of it on each rank when it goes on backwards.
        sync: parameters whose gradient is summed after the backward (over ranks that hold the same slice).
        conversions: gathers and slices.
        cost_bytes: ring bytes of all of it; ``collectives``: how many.
    """

    reduce: frozenset[fx.Node] = frozenset()
    masked: frozenset[Edge] = frozenset()
    partial: frozenset[fx.Node] = frozenset()
    enter: dict[fx.Node, tuple[Edge, ...]] = field(default_factory=dict)
    close: frozenset[fx.Node] = frozenset()
    unsummed: frozenset[fx.Node] = frozenset()
    sync: frozenset[fx.Node] = frozenset()
    conversions: tuple[Conversion, ...] = ()
    cost_bytes: int = 0
    collectives: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """Which collectives the rewriter can put where, and how willingly (0: a hook; 1: a patch of the source)."""

    reduce: Callable[[fx.Node], int | None]
    enter: Callable[[fx.Node], int | None]
    mask: Callable[[Edge], bool]
    contract: Callable[[fx.Node], bool]


ANYWHERE = Places(
    reduce=lambda node: 0, enter=lambda node: 0, mask=lambda edge: True, contract=lambda node: True
)
