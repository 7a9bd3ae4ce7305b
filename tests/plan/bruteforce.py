"""The planner's program solved by trying everything: all sets of axes, of values to reduce, of places of an enter.

Nothing here is shared with the planner but the analysis and the prices. What is right follows from what the values
are on each rank:

* Forward. An op that sums over a sharded axis leaves an addend on each rank, a *Partial*. It may be reduced
  (all-reduced) where it is made. An op may take Partials if it is linear in them and works on no sharded axis: a sum
  takes any number of them (a whole addend then counts on one rank only, which costs nothing), a product one. What it
  makes is Partial again. All other ops, and the model's outputs, take none. No value is Partial and sharded at once,
  there being one mesh dim, and none that changes its dtype (rounding is not linear).
* Backward. A gradient is whole (the same on all ranks, or the own slice of a sharded value) or Partial. A use
  contributes a Partial one if the op works on sharded axes that the value does not have, if it multiplies the value
  with a Partial, or (gradients pass through all ops linearly) if the gradient of what the op makes is Partial.
  Contributions are summed, so they must be of one kind; an *enter* makes the Partial ones of a value whole, one
  all-reduce for all of them. The gradient must be whole for parameters (a sum once a step makes them whole), for the
  model's inputs, for an op on sharded axes, a cast, a gather, and a value that is Partial forward. An op on a
  gathered operand whose result is sliced again is *closed*: the gradient is made whole in between.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from autotp.axes.analysis import Analysis
from autotp.axes.dim import Atom, Cat, Dim
from autotp.plan.candidates import Candidate
from autotp.plan.communication import ANYWHERE, Edge, Places
from autotp.plan.planner import Choice
from autotp.plan.price import FINE, START_BYTES, TOKENS


class Impossible(Exception):
    """These axes cannot be sharded together, or these reduce points do not do."""


@dataclass(frozen=True)
class Answer:
    """A way to communicate, by its price."""

    cost: int
    reduce: frozenset[fx.Node]
    enter: frozenset[fx.Node]
    sync: frozenset[fx.Node]


def atoms(dims: Iterable[Dim]) -> Iterator[Atom]:
    for dim in dims:
        for factor in dim:
            if isinstance(factor, Cat):
                yield from atoms(factor.parts)
            else:
                yield factor


def numel(node: fx.Node) -> int:
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(v.numel() * v.element_size() for v in values)


def dtype(node: fx.Node) -> object:
    value = node.meta["val"]
    return (value[0] if isinstance(value, (tuple, list)) else value).dtype


# ---- which axes ----------------------------------------------------------------------------------------


def places(dims: Iterable[Dim]) -> list[tuple[Atom, tuple[tuple[int, ...], ...]]]:
    """Each occurrence of an atom in a value and the way to it: (dim, factor), then (part of the Cat, factor) …"""

    def walk(
        dim: Dim, way: tuple[tuple[int, ...], ...]
    ) -> Iterator[tuple[Atom, tuple[tuple[int, ...], ...]]]:
        for f, factor in enumerate(dim):
            if isinstance(factor, Cat):
                for p, part in enumerate(factor.parts):
                    yield from walk(part, (*way, (f,), (-1, p)))
            else:
                yield factor, (*way, (f,))

    return [found for d, dim in enumerate(dims) for found in walk(dim, ((d,),))]


def side_by_side(a: tuple[tuple[int, ...], ...], b: tuple[tuple[int, ...], ...]) -> bool:
    """Whether two places are in different parts of one Cat: they do not meet."""
    first = next((x for x in zip(a, b, strict=False) if x[0] != x[1]), None)
    return first is not None and len(first[0]) == len(first[1]) == 2


def values(analysis: Analysis) -> Iterator[tuple[Dim, ...]]:
    for outputs in analysis.dims.values():
        yield from outputs
    for info in analysis.ops.values():
        for operand in info.operands:
            yield operand.dims


def legal(analysis: Analysis, chosen: Iterable[Candidate]) -> bool:
    """Whether no value is sharded twice (but for the two axes of one nested candidate)."""
    owner = {atom: candidate for candidate in chosen for atom in candidate.atoms}
    for value in set(values(analysis)):
        held = [(atom, way) for atom, way in places(value) if atom in owner]
        for (x, a), (y, b) in itertools.combinations(held, 2):
            if (x is y or owner[x] is not owner[y]) and not side_by_side(a, b):
                return False
    return True


def maximal_sets(analysis: Analysis, found: Iterable[Candidate]) -> list[tuple[Candidate, ...]]:
    """All sets of candidates to which none can be added; those of one key go together."""
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in found:
        groups[candidate.key].append(candidate)
    sets = [
        frozenset(keys)
        for n in range(len(groups) + 1)
        for keys in itertools.combinations(sorted(groups), n)
        if legal(analysis, [c for key in keys for c in groups[key]])
    ]
    return [
        tuple(c for key in sorted(s) for c in groups[key])
        for s in sets
        if not any(s < other for other in sets)
    ]


def share(dims: Iterable[Dim], sharded: frozenset[Atom]) -> float:
    """The share of a value's elements that are on one rank only."""
    common = 1.0
    for dim in dims:
        for factor in dim:
            if isinstance(factor, Cat):
                total = sum(size(part) for part in factor.parts)
                common *= 1 - sum(size(part) * share([part], sharded) for part in factor.parts) / total
            elif factor in sharded:
                common = 0.0
    return 1 - common


def size(dim: Dim) -> int:
    n = 1
    for factor in dim:
        n *= factor.size
    return n


def weight_bytes(analysis: Analysis, chosen: Iterable[Candidate]) -> float:
    sharded = frozenset(a for c in chosen for a in c.atoms)
    params = {f: n for f, n in analysis.trace.params.items() if f not in analysis.trace.is_buffer}
    return sum(numel(node) * share(analysis.dims[node][0], sharded) for node in params.values())


# ---- where to communicate ------------------------------------------------------------------------------


class Ranks:
    """One graph with some axes sharded: what each value is on the ranks, where ``places`` has what it takes."""

    def __init__(self, analysis: Analysis, chosen: Iterable[Candidate], places: Places = ANYWHERE) -> None:
        self.analysis = analysis
        self.places = places
        self.ops = analysis.ops
        self.sharded = frozenset(a for c in chosen for a in c.atoms)
        trace = analysis.trace
        self.order = [node for node in trace.graph.nodes if node in analysis.dims]
        self.outputs = {port.node for port in trace.outputs}
        self.inputs = {port.node for port in trace.inputs}
        self.params = {node for fqn, node in trace.params.items() if fqn not in trace.is_buffer}
        self.uses: dict[fx.Node, list[Edge]] = defaultdict(list)
        for node, info in self.ops.items():
            for i, operand in enumerate(info.operands):
                self.uses[operand.node].append(Edge(operand.node, node, i))
        self.gathers, self.gathered, self.converted = self._conversions()
        self.closed = {e.consumer for e in self.gathered if e.consumer in self.converted}
        self.sources = {n for n, info in self.ops.items() if self.sharded & set(atoms(info.contracted))}
        self.differentiable = self._differentiable()
        if any(self.mixed(node) for node in self.order):
            raise Impossible("partly common values are not enumerated here")

    def held(self, dims: Iterable[Dim]) -> frozenset[Atom]:
        return self.sharded & set(atoms(dims))

    def mixed(self, node: fx.Node) -> bool:
        return any(0 < share(dims, self.sharded) < 1 for dims in self.analysis.dims[node])

    def on_sharded_axes(self, node: fx.Node) -> frozenset[Atom]:
        info = self.ops[node]
        every = [*(o.dims for o in info.operands), *info.out, info.contracted]
        return frozenset(a for dims in every for a in self.held(dims))

    def _conversions(self) -> tuple[set[tuple[fx.Node, int]], set[Edge], set[Edge | fx.Node]]:
        """(values gathered along a dim, uses that get the gathered value, uses and outputs that get another layout)."""
        gathers: set[tuple[fx.Node, int]] = set()
        gathered: set[Edge] = set()
        converted: set[Edge | fx.Node] = set()
        for node, info in self.ops.items():
            for i, operand in enumerate(info.operands):
                made = self.analysis.dims[operand.node][operand.output]
                for d, (have, want) in enumerate(zip(made, operand.dims, strict=True)):
                    if have == want:
                        continue
                    if self.held([have]):
                        gathers.add((operand.node, d))
                        gathered.add(Edge(operand.node, node, i))
                    if self.held([have]) or self.held([want]):
                        converted.add(Edge(operand.node, node, i))
            for output, d in info.whole_out:
                if self.held([info.out[output][d]]):
                    converted.add(node)
        for node in self.outputs:
            for d, dim in enumerate(self.analysis.dims[node][0]):
                if self.held([dim]):
                    gathers.add((node, d))
                    converted.add(node)
        return gathers, gathered, converted

    def _differentiable(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.order:
            floating = getattr(dtype(node), "is_floating_point", False)
            inputs = [o.node for o in self.ops[node].operands] if node in self.ops else []
            if floating and (node in self.params or node in self.inputs or any(i in found for i in inputs)):
                found.add(node)
        return found

    # ---- forward

    def forward(self, reduce: frozenset[fx.Node]) -> tuple[set[fx.Node], set[Edge]]:
        """(values that are made Partial, operands that must count once), with these values reduced."""
        partial: set[fx.Node] = set()
        for node in self.order:
            if node in self.ops and self.makes_partial(node, partial - reduce):
                partial.add(node)
            if node in partial - reduce and (node in self.outputs or node in self.converted):
                raise Impossible(f"{node} must be whole")
        return partial, self.masked(partial, reduce)

    def makes_partial(self, node: fx.Node, flowing: set[fx.Node]) -> bool:
        info = self.ops[node]
        taken = [i for i, operand in enumerate(info.operands) if operand.node in flowing]
        if taken:
            convert = any(Edge(info.operands[i].node, node, i) in self.converted for i in taken)
            casts = any(dtype(info.operands[i].node) != dtype(node) for i in taken)
            linear = {
                "add": lambda: not info.linear.of or set(taken) <= info.linear.of,
                "mul": lambda: len(taken) == 1 and set(taken) <= info.linear.of,
                "none": lambda: False,
            }[info.linear.kind]()
            if convert or casts or not linear or self.on_sharded_axes(node) or info.mutates is not None:
                raise Impossible(f"{node} takes no Partial")
        return node in self.sources or bool(taken)

    def masked(self, partial: set[fx.Node], reduce: frozenset[fx.Node]) -> set[Edge]:
        found: set[Edge] = set()
        for node in partial:
            info = self.ops[node]
            for i, operand in enumerate(info.operands):
                summand = node not in self.sources and info.linear.kind == "add"
                edge = Edge(operand.node, node, i)
                if i in info.added or (summand and operand.node not in partial - reduce):
                    found.add(edge)
                    if i not in info.added and not self.places.mask(edge):
                        raise Impossible(f"{node}: nothing can mask what it adds")
        return found

    def reductions(self) -> Iterator[frozenset[fx.Node]]:
        """Every set of values that can be reduced, one node after the other; those that fail early are left early."""
        nodes = [node for node in self.order if node in self.ops]

        def branch(
            k: int, partial: frozenset[fx.Node], reduce: frozenset[fx.Node]
        ) -> Iterator[frozenset[fx.Node]]:
            while k < len(nodes):
                node = nodes[k]
                k += 1
                try:
                    made = self.makes_partial(node, set(partial - reduce))
                except Impossible:
                    return
                if made:
                    partial |= {node}
                    yield from branch(k, partial, reduce | {node})
                    if node in self.outputs or node in self.converted:
                        return
            yield reduce

        return branch(0, frozenset(), frozenset())

    # ---- backward

    def contributions(
        self, node: fx.Node, partial_grad: set[fx.Node], flowing: set[fx.Node], masked: set[Edge]
    ) -> tuple[tuple[Edge, ...], tuple[Edge, ...]]:
        """(uses that contribute a Partial gradient, uses that contribute a whole one)."""
        kinds: tuple[list[Edge], list[Edge]] = [], []
        held = frozenset(a for dims in self.analysis.dims[node] for a in self.held(dims))
        for edge in self.uses[node]:
            if edge.consumer not in self.differentiable:
                continue
            info = self.ops[edge.consumer]
            others = [o.node for j, o in enumerate(info.operands) if j != edge.operand]
            if (
                edge in masked or held or edge.consumer in self.closed
            ):  # counts once, or is a slice of its own
                is_partial = False
            elif info.linear.kind == "mul" and any(o in flowing for o in others):
                is_partial = True  # multiplied with an addend
            else:
                is_partial = bool(self.on_sharded_axes(edge.consumer)) or edge.consumer in partial_grad
            kinds[0 if is_partial else 1].append(edge)
        return tuple(kinds[0]), tuple(kinds[1])

    def backward(
        self, flowing: set[fx.Node], masked: set[Edge], enter: frozenset[fx.Node]
    ) -> dict[fx.Node, tuple[Edge, ...]]:
        """The values (parameters among them) that are made whole, with the uses that make their gradients Partial."""
        partial_grad: set[fx.Node] = set()
        found: dict[fx.Node, tuple[Edge, ...]] = {}
        for node in reversed(self.order):
            if node in self.differentiable:
                uses = self.gradient(node, partial_grad, flowing, masked, node in enter)
                if uses is not None:
                    found[node] = uses
        return found

    def gradient(
        self, node: fx.Node, partial_grad: set[fx.Node], flowing: set[fx.Node], masked: set[Edge], enter: bool
    ) -> tuple[Edge, ...] | None:
        """Work out one gradient; the uses that are made whole, if so."""
        partial, whole = self.contributions(node, partial_grad, flowing, masked)
        if not partial:
            return None
        if node in self.params:
            if whole:
                raise Impossible(f"{node} is used in and outside of a sharded region")
            return partial
        if enter:
            return partial
        if whole or node in self.outputs or self.needs_whole_gradient(node, flowing):
            raise Impossible(f"the gradient of {node} must be whole")
        partial_grad.add(node)
        return None

    def needs_whole_gradient(self, node: fx.Node, flowing: set[fx.Node]) -> bool:
        if node not in self.ops or node in flowing or self.on_sharded_axes(node):
            return True
        operands = [Edge(o.node, node, i) for i, o in enumerate(self.ops[node].operands)]
        if any(edge in self.gathered for edge in operands):
            return True
        return any(dtype(e.producer) != dtype(node) for e in operands if e.producer in self.differentiable)

    def enters(
        self, flowing: set[fx.Node], masked: set[Edge]
    ) -> Iterator[tuple[frozenset[fx.Node], frozenset[fx.Node]]]:
        """Every set of values to enter that will do, and the parameters that are synced then."""
        nodes = [node for node in reversed(self.order) if node in self.differentiable]

        def branch(
            k: int, partial_grad: frozenset[fx.Node], enter: frozenset[fx.Node], sync: frozenset[fx.Node]
        ) -> Iterator[tuple[frozenset[fx.Node], frozenset[fx.Node]]]:
            while k < len(nodes):
                node = nodes[k]
                k += 1
                try:
                    grads = set(partial_grad)
                    uses = self.gradient(node, grads, flowing, masked, enter=False)
                except Impossible:
                    if node in self.params:
                        return
                    enter |= {node}
                    continue
                if uses is not None:  # a parameter
                    sync |= {node}
                elif len(grads) > len(partial_grad):
                    yield from branch(k, partial_grad, enter | {node}, sync)
                    partial_grad = frozenset(grads)
            yield enter, sync

        return branch(0, frozenset(), frozenset(), frozenset())

    # ---- prices

    def all_reduce(self, node: fx.Node) -> int:
        return FINE * (2 * numel(node) + START_BYTES)

    def sync(self, node: fx.Node) -> int:
        common = 1 - share(self.analysis.dims[node][0], self.sharded)
        return FINE * (int(2 * numel(node) * common) + START_BYTES) // TOKENS

    def gather_cost(self) -> int:
        return sum(FINE * (numel(node) + START_BYTES) for node, _ in self.gathers)

    def cost(self, reduce: Iterable[fx.Node], enter: Iterable[fx.Node], sync: Iterable[fx.Node]) -> int:
        moved = sum(map(self.all_reduce, [*reduce, *enter])) + sum(map(self.sync, sync))
        closed = sum(self.all_reduce(node) for node in self.closed & self.differentiable)
        return moved + closed + self.gather_cost()

    def best(self, joint: bool = True) -> Answer:
        """The cheapest forward, and then the cheapest backward of each forward that is as cheap."""
        forwards: dict[frozenset[fx.Node], int] = {}
        for reduce in self.reductions():
            forwards[reduce] = sum(map(self.all_reduce, reduce))
        if not forwards:
            raise Impossible("no reduce points will do")
        answers: list[Answer] = []
        for reduce, price in forwards.items():
            if not joint and price > min(forwards.values()):
                continue
            try:
                partial, masked = self.forward(reduce)
            except Impossible:
                continue
            for enter, sync in self.enters(partial - reduce, masked):
                answers.append(Answer(self.cost(reduce, enter, sync), reduce, enter, sync))
        if not answers:
            raise Impossible("no enters will do")
        return min(answers, key=lambda answer: answer.cost)


# ---- what the planner said -----------------------------------------------------------------------------


def check_valid(analysis: Analysis, choice: Choice, places: Places = ANYWHERE) -> int:
    """Whether the planner's own communication is right, and what it costs."""
    ranks = Ranks(analysis, choice.candidates, places)
    comm = choice.communication
    partial, masked = ranks.forward(comm.reduce)
    assert comm.reduce <= partial, "a value is reduced that is whole"
    assert set(comm.masked) == masked, "a whole addend counts on all ranks, or on none"
    found = ranks.backward(partial - comm.reduce, masked, frozenset(comm.enter))
    assert {n: e for n, e in found.items() if n not in ranks.params} == comm.enter
    assert {n for n in found if n in ranks.params} == comm.sync
    assert ranks.closed & ranks.differentiable == comm.close
    assert {(c.producer, c.dim) for c in comm.conversions if c.kind == "gather"} == ranks.gathers
    return ranks.cost(comm.reduce, comm.enter, comm.sync)
