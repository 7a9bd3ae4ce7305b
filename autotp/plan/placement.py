"""What a sharded axis makes of a weight, told from how the ops use it: column, row or vocabulary parallel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from ..axes.analysis import Analysis, OpInfo
from ..axes.term import Atom
from .candidates import atoms_of


class Uses:
    """The ops that read a value, seen through views and casts."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._uses: dict[fx.Node, list[tuple[fx.Node, int]]] = defaultdict(list)
        for node, info in analysis.ops.items():
            for i, operand in enumerate(info.operands):
                self._uses[operand.node].append((node, i))

    def ends(self, node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
        """(op, number of its operand) for each op that does more with the value than look at it otherwise."""
        for user, i in self._uses[node]:
            info = self.analysis.ops[user]
            if len(info.operands) == 1 and not info.contracted and info.linear.kind == "add":
                yield from self.ends(user)
            else:
                yield user, i

    def roles(self, node: fx.Node) -> Iterator[tuple[str, frozenset[Atom], fx.Node]]:
        """What each axis of a weight would make of it: (placement, axes, the op that uses it so).

        Of a product (linear, matmul, convolution) the contracted axes are the input's and the others the
        output's; where the other operand does not have the contracted axes, it is a lookup.
        """
        held = frozenset(atoms_of(self.analysis.dims[node][0]))
        for user, i in self.ends(node):
            info = self.analysis.ops[user]
            contracted = frozenset(atoms_of(info.contracted)) & held
            if i in info.added:
                yield "column", held & frozenset(a for dims in info.out for a in atoms_of(dims)), user
            elif info.linear.kind == "mul" and i in info.linear.of and info.contracted:
                lookup = contracted and not contracted & _others(info, i)
                yield "vocab" if lookup else "row", contracted, user
                if not lookup:
                    yield "column", held - contracted - _others(info, i), user

    def placement(self, node: fx.Node, sharded: frozenset[Atom]) -> str:
        """The placement of a parameter, in a word."""
        held = sharded & frozenset(atoms_of(self.analysis.dims[node][0]))
        if not held:
            return "replicate"
        found = {word for word, atoms, _ in self.roles(node) if atoms & held}
        return next((word for word in ("vocab", "row", "column") if word in found), "shard")


def _others(info: OpInfo, i: int) -> frozenset[Atom]:
    factors = (o for j, o in enumerate(info.operands) if j != i and j not in info.added)
    return frozenset(a for operand in factors for a in atoms_of(operand.dims))
