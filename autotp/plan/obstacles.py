"""What stands in the way of sharding an axis, in words: the op and the source line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import fx

from ..axes.analysis import Analysis
from ..axes.term import Atom, Dim
from .candidates import Candidate, atoms_of, candidates, conflicts, gathered_weights, meetings


class Obstacles:
    """The candidates of one analysis, their conflicts, and why other axes are none."""

    def __init__(self, analysis: Analysis, tp: int) -> None:
        self.analysis = analysis
        self.tp = tp
        self.found = candidates(analysis, tp)
        self.own, self.against = conflicts(analysis, self.found)
        self._holding: dict[Atom, list[Candidate]] = defaultdict(list)
        for candidate in self.found:
            if candidate not in self.own:
                for atom in candidate.atoms:
                    self._holding[atom].append(candidate)

    def shardable(self, atoms: Iterable[Atom]) -> tuple[Candidate, ...]:
        """The candidates that shard one of these axes."""
        return tuple(dict.fromkeys(c for a in sorted(atoms, key=lambda a: a.id) for c in self._holding[a]))

    def conflict(self, a: Candidate, b: Candidate) -> bool:
        return a is not b and b in self.against[a]

    def meeting(self, a: Candidate, b: Candidate) -> str:
        """Where two candidates meet."""
        pairs = {frozenset((x, y)) for x in a.atoms for y in b.atoms}
        for node, dims in self._values():
            if pairs & meetings(dims)[1]:
                return f"{self.place(node)} has both axes on one tensor, of which one can be sharded"
        return "both axes are on one tensor, of which one can be sharded"

    def why(self, param: fx.Node, atoms: frozenset[Atom]) -> str:
        """Why none of these axes of a parameter is a candidate."""
        if not atoms:
            return "the dim has one element"
        sizes = ", ".join(str(a.size) for a in sorted(atoms, key=lambda a: a.id))
        gathered = self._needed_whole(atoms)
        if gathered is not None:
            return f"{self.place(gathered)} needs the axis (of {sizes}) whole"
        free = atoms - self.analysis.frozen
        for candidate in self.found:
            if candidate in self.own and free & set(candidate.atoms):
                for node, dims in self._values():
                    if any(frozenset((x,)) in meetings(dims)[1] for x in candidate.atoms):
                        return f"{self.place(node)} has the axis (of {sizes}) on two dims of one tensor"
        if free and all(a.size < self.tp for a in free):
            return f"the axis has {sizes} elements, fewer than tp={self.tp}"
        units = self.analysis.units()
        if free and all(a.size < self.tp * units.get(a, 1) or a.size % units.get(a, 1) for a in free):
            unit = ", ".join(str(units[a]) for a in sorted(free, key=lambda a: a.id) if a in units)
            return f"the axis has {sizes} elements, which a kernel takes in units of {unit}: tp={self.tp} has no split"
        for note in self.analysis.notes:
            info = self.analysis.ops[note.node]
            if any(atoms & set(atoms_of(operand.dims)) for operand in info.operands):
                return f"{self.place(note.node)}: {note.text}"
        first = next(
            (n for n, dims in self._values() if n is not param and atoms & set(atoms_of(dims))), param
        )
        return f"the axis (of {sizes}) cannot be sharded in {self.place(first)}"

    def place(self, node: fx.Node) -> str:
        """``layer_norm in 'h.0.ln_1' at model.py:41 'F.layer_norm(…)'``"""
        if node.op == "placeholder":
            names = {n: fqn for fqn, n in self.analysis.trace.params.items()}
            return repr(names.get(node, node.name))
        op = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        return f"{op} in {self.analysis.trace.where(node)}"

    def _needed_whole(self, atoms: frozenset[Atom]) -> fx.Node | None:
        """The first op that gathers one of these axes of a parameter."""
        return next((node for node, gathered in gathered_weights(self.analysis) if atoms & gathered), None)

    def _values(self) -> Iterator[tuple[fx.Node, tuple[Dim, ...]]]:
        for node, info in self.analysis.ops.items():
            for operand in info.operands:
                yield node, operand.dims
            for dims in info.out:
                yield node, dims
        for node in self.analysis.trace.params.values():
            yield node, self.analysis.dims[node][0]
