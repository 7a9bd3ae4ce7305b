"""A plan's communication worked out a second time: what each rank has of every value and of every gradient.

`reductions` searches: its cuts say where sums may wait, and what may not wait. Here nothing is searched. Two walks, one
forwards and one backwards, follow what the ranks have through the plan as it is, and each op must get what it needs.
So a sum that the search forgot is a refused plan and not a wrong number.

A *region* of a value is the sharded axes that its elements lie on: a fused projection ``(H·D | D)`` has the regions
``{H}`` and ``{}``. The *holders* of an element of a region are the ranks whose ranges of those axes have it: one rank
where the axes tell all ranks apart, all ranks for ``{}``, a group for the outer axis of a nested pair. A rank has an
element *whole*, or an *addend* of it: summed over the holders they are the element (PyTorch's placement Partial).

An op is a sum of products over an index space, which has regions too: of all operands, of the result, and of what is
summed over. Of a region ``op`` of that space, ``result`` and ``operand`` are the parts in one of the values.

Forward:
    With whole operands a result is whole where ``result`` is all of ``op``, and an addend where it is not, if ``op``
    has one holder (each product is counted once). An addend among the operands passes where the op is linear in it.
Backward:
    Where ``operand`` is all of ``op``, its gradient is what that of the result is. An addend it can be only if
    ``result`` is all of ``op`` as well: else each rank would get an addend of what the others do not have.
    Where ``op`` has more axes, the holders of ``operand`` have to sum, which is right if ``op`` has one holder and the
    gradient of the result is whole, or if it is an addend over the holders of ``op``.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from torch import fx

from ..axes.analysis import Analysis, OpInfo
from ..axes.layout import Range
from ..axes.rules.factory import FILLS
from ..axes.term import Atom, Cat, Dim, Factor, atoms_of
from ..errors import VerifyError
from ..trace.differentiable import differentiable
from ..trace.memory import storages
from .communication import Communication, Edge

Region = frozenset[Atom]
State = Region | None  # an addend, to be summed over the holders of such a region; or
WHOLE: State = None
Held = dict[Region, State]  # of each region of a value, or of a gradient (which is zero in a region that is missing)
Dims = tuple[Dim, ...]


def prove(
    analysis: Analysis,
    communication: Communication,
    ranges: Mapping[Atom, tuple[Range, ...]],
    gradients: bool = True,
) -> None:
    """Follow values and, with ``gradients``, their gradients through a plan.

    Args:
        ranges: of each sharded axis the elements that each rank has.

    Raises:
        VerifyError: an op would not get what it needs, or something is summed that is whole; names the op.
    """
    forward = Forward(analysis, communication, Ranks(ranges))
    forward.run()
    if gradients:
        Backward(forward).run()


class Ranks:
    """Who holds what, for one choice of axes."""

    def __init__(self, ranges: Mapping[Atom, tuple[Range, ...]]) -> None:
        self.ranges = ranges
        self.sharded = frozenset(ranges)
        self.has_one_holder = cache(self._has_one_holder)
        self.is_in_groups = cache(self._is_in_groups)
        self.regions = cache(self._regions)

    def _has_one_holder(self, region: Region) -> bool:
        return bool(region) and all(_apart(r, s) for r, s in itertools.combinations(self._ranges(region), 2))

    def _is_in_groups(self, region: Region) -> bool:
        """Whether two ranks hold the same elements or have none in common, so that holders are one group."""
        return all(r == s or _apart(r, s) for r, s in itertools.combinations(self._ranges(region), 2))

    def _ranges(self, region: Region) -> list[tuple[Range, ...]]:
        """Of each rank, in the region's axes."""
        return list(zip(*(self.ranges[axis] for axis in region), strict=True))

    def addend(self, region: Region) -> State:
        """What is to be summed over the holders: with one of them, nothing."""
        return WHOLE if self.has_one_holder(region) else region

    def of(self, dims: Dims) -> set[Region]:
        """The regions of one value."""
        return {region for (region,) in self.regions((dims,))}

    def _regions(self, values: tuple[Dims, ...]) -> frozenset[tuple[Region, ...]]:
        """The regions of an index space, each as those that the values in it are in."""
        return frozenset(self._walk(values, {}, ()))

    def _walk(
        self, values: Sequence[Dims], parts: Mapping[Cat, int], found: tuple[Region, ...]
    ) -> Iterator[tuple[Region, ...]]:
        if not values:
            yield found
            return
        for chosen, region in self._chosen([f for dim in values[0] for f in dim], parts, frozenset()):
            yield from self._walk(values[1:], chosen, (*found, region))

    def _chosen(
        self, factors: Sequence[Factor], parts: Mapping[Cat, int], region: Region
    ) -> Iterator[tuple[Mapping[Cat, int], Region]]:
        """Every choice of one part of each concatenation: of the same one the same part, wherever it stands."""
        for i, factor in enumerate(factors):
            if isinstance(factor, Atom):
                region |= self.sharded & {factor}
            elif self._is_cut(factor):
                for number in [parts[factor]] if factor in parts else range(len(factor.parts)):
                    rest = [*factor.parts[number], *factors[i + 1 :]]
                    yield from self._chosen(rest, {**parts, factor: number}, region)
                return
        yield parts, region

    def _is_cut(self, cat: Cat) -> bool:
        return not self.sharded.isdisjoint(atoms_of((cat,)))

    def cut(self, dims: Dims) -> set[Cat]:
        """The concatenations that hold a sharded axis."""
        return {factor for dim in dims for factor in dim if isinstance(factor, Cat) and self._is_cut(factor)}


def _apart(r: Iterable[Range], s: Iterable[Range]) -> bool:
    """Whether two ranks have no element in common: of one axis at least."""
    return any(max(a, c) >= min(b, d) for (a, b), (c, d) in zip(r, s, strict=True))


class Walk:
    """One graph and its plan."""

    def __init__(self, analysis: Analysis, plan: Communication, ranks: Ranks) -> None:
        self.analysis, self.plan, self.ranks = analysis, plan, ranks
        self.outputs = {port.node for port in analysis.trace.outputs}
        self.after_op = {(c.kind, c.producer, c.operand, c.dim) for c in plan.conversions if c.consumer is None}
        self.converted = {Edge(c.producer, c.consumer, c.operand) for c in plan.conversions if c.consumer is not None}

    def index_space(
        self, node: fx.Node, info: OpInfo, k: int
    ) -> Iterator[tuple[Sequence[Region | None], Region, Region]]:
        """(of each operand, of output ``k``, of the op) for each region of an op; None: the operand has no part in it.

        Where parts of a value are taken apart or put together, an operand has to do with its own parts of the result.
        """
        result = self.computed(node, k)
        dims = [operand.dims for operand in info.operands]
        if node.target in FILLS:  # which read no values
            dims = []
        taken: set[Cat] = set().union(*(self.ranks.cut(d) for d in dims))
        if node.target in FILLS or taken != self.ranks.cut(result) | self.ranks.cut(info.contracted):
            if self.ranks.of(info.contracted) != {frozenset()}:
                raise self.error(node, "sums over a sharded axis, and takes parts of another one apart")
            parts = [self.ranks.of(d) for d in dims] or [set() for _ in info.operands]
            for region in self.ranks.of(result):
                yield [region if region in regions else None for regions in parts], region, region
            return
        elsewhere = frozenset(a for j, out in enumerate(info.out) if j != k for dim in out for a in atoms_of(dim))
        for found in self.ranks.regions((*dims, result, info.contracted)):
            *operands, own, summed = found
            other = elsewhere - own - summed  # in other outputs only: this one (a kernel's seed) is not made of it
            taking = [None if region & other else region for region in operands]
            yield taking, own, own.union(summed, *(region for region in taking if region is not None))

    def computed(self, node: fx.Node, k: int) -> Dims:
        """The dims of an output before it is sliced, where the op computes more than is used of it."""
        info = self.analysis.ops.get(node)
        whole = frozenset() if info is None else info.whole_out
        return tuple(() if (k, d) in whole else dim for d, dim in enumerate(self.analysis.dims[node][k]))

    @staticmethod
    def whole(regions: Iterable[Region]) -> Held:
        return dict.fromkeys(regions, WHOLE)

    def error(self, node: fx.Node, text: str) -> VerifyError:
        place = self.analysis.trace.where(node) if node in self.analysis.ops else "the model's inputs"
        what = node.target if node in self.analysis.ops else node.name
        return VerifyError(f"the plan would be wrong at {what} in {place}: {text}", node.meta.get("module"))


class Forward(Walk):
    """What the ranks have of each value, after the sums that the plan puts there."""

    def run(self) -> None:
        self.values: dict[tuple[fx.Node, int], Held] = {}  # by op and number of its output
        for node, outputs in self.analysis.dims.items():
            info = self.analysis.ops.get(node)
            for k, dims in enumerate(outputs):
                computed = self.computed(node, k)
                held = self.whole(self.ranks.of(dims)) if info is None else self.made(node, info, k)
                held = self.reduced(node, held)
                if self.ranks.of(computed) != self.ranks.of(dims):
                    if any(state is not WHOLE for state in held.values()):
                        raise self.error(node, "computed whole and sliced, and an addend on each rank")
                    held = self.whole(self.ranks.of(dims))
                self.values[node, k] = held
                self.check_ends(node, k, dims, computed)

    def reduced(self, node: fx.Node, held: Held) -> Held:
        addends = [region for region, state in held.items() if state is not WHOLE]
        if bool(addends) != (node in self.plan.partial):
            raise self.error(node, f"{'not planned' if addends else 'planned'} to be an addend on each rank")
        if node not in self.plan.reduce:
            if addends and node in self.outputs:
                raise self.error(node, "returned, and an addend on each rank")
            return held
        if len(addends) < len(held):
            raise self.error(node, "summed, and whole on each rank")
        if not all(self.ranks.is_in_groups(region) for region in addends):
            raise self.error(node, "summed by ranks of which some have only a part in common")
        return self.whole(held)

    def check_ends(self, node: fx.Node, k: int, dims: Dims, computed: Dims) -> None:
        """What is computed whole is sliced if it is used so, and what is returned is gathered."""
        for d, (dim, own) in enumerate(zip(dims, computed, strict=True)):
            if self.ranks.of((dim,)) != self.ranks.of((own,)) and ("take", node, k, d) not in self.after_op:
                raise self.error(node, "computed whole, and not sliced")
            if self.ranks.of((dim,)) != {frozenset()} and node in self.outputs:
                if ("gather", node, k, d) not in self.after_op:
                    raise self.error(node, "returned, and not gathered")

    def made(self, node: fx.Node, info: OpInfo, k: int) -> Held:
        operands = [self.taken(node, i) for i in range(len(info.operands))]
        found: Held = {}
        for regions, result, op in self.index_space(node, info, k):
            states = [WHOLE if r is None else held[r] for r, held in zip(regions, operands, strict=True)]
            state = self.combined(node, info, states, result, op)
            if found.setdefault(result, state) != state:
                raise self.error(node, "sums over an axis that is sharded in part")
        return found

    def taken(self, node: fx.Node, i: int) -> Held:
        """An operand as the op takes it: gathered or sliced, where that is planned."""
        operand = self.analysis.ops[node].operands[i]
        made, regions = self.values[operand.node, operand.output], self.ranks.of(operand.dims)
        if Edge(operand.node, node, i) not in self.converted:
            if regions != made.keys():
                raise self.error(node, f"takes {operand.node.name} sliced otherwise than it is made")
            return made
        if any(state is not WHOLE for state in made.values()):
            raise self.error(node, f"gathers or slices {operand.node.name}, an addend on each rank")
        return self.whole(regions)

    def combined(self, node: fx.Node, info: OpInfo, states: Sequence[State], result: Region, op: Region) -> State:
        addends = {i for i, state in enumerate(states) if state is not WHOLE}
        masked = {i for i, o in enumerate(info.operands) if Edge(o.node, node, i) in self.plan.masked}
        state: State = WHOLE
        once = info.added  # what is to be counted on one rank only, if the result is an addend
        if addends:
            state = states[min(addends)]
            linear = addends <= info.linear.of and (info.linear.kind == "add" or len(addends) == 1)
            if not linear or info.mutates is not None or op != result or any(states[i] != result for i in addends):
                raise self.error(node, "not linear in an operand that is an addend on each rank")
            if info.linear.kind == "add":
                once |= set(range(len(states))) - addends
        elif op != result:
            if not self.ranks.has_one_holder(op):
                raise self.error(node, "sums over an axis of which ranks have elements in common")
            state = self.ranks.addend(result)
        if masked != (set() if state is WHOLE else once):
            raise self.error(node, "an operand is counted by each rank, or by one alone, and should not be")
        return state


class Backward(Walk):
    """What the ranks have of each value's gradient, from its uses to the op that made it."""

    def __init__(self, forward: Forward) -> None:
        super().__init__(forward.analysis, forward.plan, forward.ranks)
        self.values = forward.values
        self.differentiable = differentiable(self.analysis.trace)
        self.gathered = {
            Edge(c.producer, c.consumer, c.operand)
            for c in self.plan.conversions
            if c.kind == "gather" and c.consumer is not None
        }
        self.order = {node: i for i, node in enumerate(self.analysis.dims)}
        self.writes: dict[int, list[fx.Node]] = defaultdict(list)  # memory → the ops that write into it
        for node, info in self.analysis.ops.items():
            if info.mutates is not None:
                for storage in storages(info.operands[info.mutates].node):
                    self.writes[storage].append(node)
        self.uses: dict[tuple[fx.Node, int], list[tuple[Edge | None, Held]]] = defaultdict(list)

    def run(self) -> None:
        for node in self.outputs:
            self.uses[node, 0].append((None, self.whole(self.values[node, 0])))
        for node in reversed(list(self.analysis.dims)):
            if node not in self.differentiable:
                continue
            for k, dims in enumerate(self.analysis.dims[node]):
                gradient = self.summed(node, k)
                info = self.analysis.ops.get(node)
                if info is None:
                    self.end(node, gradient)
                    continue
                computed = self.ranks.of(self.computed(node, k))
                if node in self.plan.close:
                    gradient = self.closed(node, computed, gradient)
                elif computed != self.ranks.of(dims):
                    gradient = self.of_slice(node, computed, gradient)
                self.to_operands(node, info, k, gradient)

    def closed(self, node: fx.Node, computed: Iterable[Region], gradient: Held) -> Held:
        """The gradient of what is computed whole and then sliced, made whole from the ranks' slices of it."""
        if any(state is not WHOLE for state in gradient.values()):
            raise self.error(node, "its gradient is made whole from slices, which are addends")
        return self.whole(computed)

    def of_slice(self, node: fx.Node, whole: Iterable[Region], gradient: Held) -> Held:
        """The gradient of what a rank slices, given that of the slice: zero beside it."""
        found: Held = {}
        for region, used in itertools.product(whole, gradient):
            state = self.passed(node, region, used, used, gradient[used])
            if found.setdefault(region, state) != state:
                raise self.error(node, "sliced, and a part of it is sharded already")
        return found

    def summed(self, node: fx.Node, k: int) -> Held:
        """The gradient from all uses, those summed that the plan sums."""
        entering = set(self.plan.enter.get(node, ()))
        found: Held = {}
        entered: Held = {}
        for edge, held in self.uses[node, k]:
            into = entered if edge in entering else found
            for region, state in held.items():
                if into.setdefault(region, state) != state:
                    raise self.error(node, "its gradient is whole from one use and an addend from another")
        for region, state in entered.items():
            if state is WHOLE or not self.ranks.is_in_groups(region):
                raise self.error(node, "its gradient is summed by ranks on which it is whole")
            if found.setdefault(region, WHOLE) is not WHOLE:
                raise self.error(node, "its gradient is summed, but not for all uses from which it is an addend")
        return found

    def end(self, node: fx.Node, gradient: Held) -> None:
        """A parameter's gradient is summed once a step, if it is to be; an input's is whole."""
        states = {state for region, state in gradient.items() if not self.ranks.has_one_holder(region)}
        if node in self.plan.sync and WHOLE in states:
            raise self.error(node, "its gradient is summed, and is whole on each rank")
        if node not in self.plan.sync and states - {WHOLE}:
            raise self.error(node, "its gradient is an addend on each rank, and is not summed")

    def to_operands(self, node: fx.Node, info: OpInfo, k: int, gradient: Held) -> None:
        found: list[Held] = [{} for _ in info.operands]
        for regions, own, op in self.index_space(node, info, k):
            if own not in gradient:
                continue
            for i, region in enumerate(regions):
                if region is None or info.operands[i].node not in self.differentiable:
                    continue
                state = self.to_operand(node, info, i, regions, own, op, gradient[own])
                if found[i].setdefault(region, state) != state:
                    raise self.error(node, "the gradient of an operand is whole in part, and in part an addend")
        for i, held in enumerate(found):
            if held:
                self.use(Edge(info.operands[i].node, node, i), held)

    def to_operand(
        self,
        node: fx.Node,
        info: OpInfo,
        i: int,
        regions: Sequence[Region | None],
        result: Region,
        op: Region,
        state: State,
    ) -> State:
        operand = regions[i]
        assert operand is not None
        if Edge(info.operands[i].node, node, i) in self.plan.masked:  # it has no part in what is summed over
            return self.passed(node, operand, result, result, state)
        others = [(o, region) for j, (o, region) in enumerate(zip(info.operands, regions, strict=True)) if j != i]
        if info.linear.kind == "mul" and any(
            region is not None and self.values[o.node, o.output].get(region) is not WHOLE for o, region in others
        ):
            if state is not WHOLE or operand != op:
                raise self.error(node, "multiplies an addend, and has one for a gradient")
            return self.ranks.addend(operand)
        return self.passed(node, operand, result, op, state)

    def passed(self, node: fx.Node, operand: Region, result: Region, op: Region, state: State) -> State:
        if operand == op and (state is WHOLE or result == op):
            return state
        if operand != op and (self.ranks.has_one_holder(op) if state is WHOLE else state == op == result):
            return self.ranks.addend(operand)
        raise self.error(node, "its gradient is to be whole, and is an addend on each rank")

    def use(self, edge: Edge, held: Held) -> None:
        """The gradient of an operand goes to the value that it is, and to what was written into its memory."""
        node, info = edge.consumer, self.analysis.ops[edge.consumer]
        key = edge.producer, info.operands[edge.operand].output
        made = self.values[key]
        if edge in self.gathered:
            if any(state is not WHOLE for state in held.values()):
                raise self.error(node, f"gathers {edge.producer.name}, and the gradient of that is an addend")
            held = self.whole(made)
        elif edge in self.converted:
            held = self.of_slice(node, made, held)
        self.uses[key].append((edge, held))
        start, stop = self.order[edge.producer], self.order[node]
        for write in {w for s in storages(edge.producer) if self.writes for w in self.writes.get(s, ())}:
            if start < self.order[write] < stop:
                own = self.values[write, 0]
                self.uses[write, 0].append((edge, {region: held[region] for region in own if region in held}))
