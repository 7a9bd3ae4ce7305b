"""Sets of axes that cannot be sharded together, made smaller until they can: what the cuts would refuse anyway.

Two refusals depend on the axes alone, and are found without a cut: a sum over a concatenation of which only some parts
are sharded, and an op that gets one operand gathered while it works on another sharded axis. In a convolution network
nearly every maximal set has one of them somewhere; dropping the axis that shards fewer bytes there keeps the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from ..axes.analysis import Analysis
from ..axes.term import Atom, Cat, Dim
from .candidates import atoms_of
from .parts import covers, sliced_alike
from .reductions import Flow


@dataclass(slots=True, eq=False)
class _Use:
    """A use whose dim is another than the producer's."""

    consumer: fx.Node
    have: Dim
    want: Dim
    held: frozenset[Atom]
    wanted: frozenset[Atom]
    found: dict[frozenset[Atom], frozenset[Atom]] = field(default_factory=dict)

    def gathered(self, sharded: frozenset[Atom]) -> frozenset[Atom]:
        """The axes that have to be gathered for it."""
        held = sharded & self.held
        if not held:
            return held
        of_both = held | (sharded & self.wanted)
        if of_both not in self.found:
            alike = sliced_alike(self.have, self.want, of_both)
            self.found[of_both] = frozenset() if alike else held
        return self.found[of_both]


@dataclass(slots=True, eq=False)
class _Sum:
    """A dim with concatenations that is summed over."""

    dim: Dim
    atoms: frozenset[Atom]
    found: dict[frozenset[Atom], bool] = field(default_factory=dict)

    def partly(self, sharded: frozenset[Atom]) -> frozenset[Atom]:
        """Its sharded axes, if some parts stay whole."""
        held = sharded & self.atoms
        if held and held not in self.found:
            self.found[held] = covers(self.dim, held)
        return frozenset() if not held or self.found[held] else held


class Refusals:
    """What of a set of axes stands in each other's way, told from the graph alone."""

    def __init__(self, analysis: Analysis, flow: Flow) -> None:
        self.flow = flow
        self.sums = [
            _Sum(dim, _atoms(dim))
            for info in analysis.ops.values()
            for dim in info.contracted
            if any(isinstance(factor, Cat) for factor in dim)
        ]
        self.uses: list[_Use] = []
        self.operands: dict[fx.Node, frozenset[Atom]] = {}
        self.sliced: dict[fx.Node, frozenset[Atom]] = defaultdict(frozenset)
        for node, info in analysis.ops.items():
            for operand in info.operands:
                made = analysis.dims[operand.node][operand.output]
                for have, want in zip(made, operand.dims, strict=True):
                    if have != want and node in flow.differentiable:
                        self.uses.append(_Use(node, have, want, _atoms(have), _atoms(want)))
            self.operands[node] = frozenset(a for o in info.operands for a in atoms_of(o.dims))
            for output, d in info.whole_out:
                self.sliced[node] |= _atoms(info.out[output][d])

    def blamed(self, sharded: frozenset[Atom]) -> frozenset[Atom]:
        """The axes at the first refusal; none, if there is none."""
        for contracted in self.sums:
            if partly := contracted.partly(sharded):
                return partly
        for use in self.uses:
            gathered = use.gathered(sharded)
            if not gathered:
                continue
            node = use.consumer
            others = sharded & self.operands[node]
            if not sharded & self.sliced[node]:
                others |= self.flow.held_by_op(node, sharded)
            if others:
                return gathered | others
        return frozenset()


def _atoms(dim: Dim) -> frozenset[Atom]:
    return frozenset(atoms_of([dim]))


def repaired(
    chosen: Iterable[str],
    classes: Mapping[str, frozenset[Atom]],
    refusals: Refusals,
    lost: Callable[[frozenset[Atom], frozenset[Atom]], float],
) -> list[str]:
    """``chosen`` without the classes of axes that stand in the way of ones that shard more bytes.

    Args:
        classes: the axes of each class.
        lost: the bytes that the first axes shard and would not without the second ones.
    """
    kept = sorted(chosen)
    while True:
        sharded = frozenset(a for key in kept for a in classes[key])
        blamed = refusals.blamed(sharded)
        against = [key for key in kept if not blamed.isdisjoint(classes[key])]
        if not against:
            return kept
        kept.remove(min(against, key=lambda key: lost(sharded, classes[key])))
