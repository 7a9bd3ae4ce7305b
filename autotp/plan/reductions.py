"""Where to communicate, given the axes to shard: the provably cheapest places.

**Forward.** A contraction over a sharded axis leaves each rank with an addend: the value is Partial.
It stays right through every linear op, so it may be summed at any vertex between the op that made it
and the first that needs it whole; where branches join (attention and MLP of a parallel-residual block)
one sum can serve both. The cheapest set of all-reduces is a minimum vertex cut.

**Backward.** A value that is whole on every rank and enters an op over sharded axes gets from each rank
only a part of its gradient. Gradients pass backwards linearly through anything, so the sum may wait until
they meet a whole gradient, a parameter, or an op that needs the gradient whole. One ``enter`` (identity
forward, all-reduce backward; Megatron-LM's *f*, Shoeybi et al. 2019) at a value serves all of its sharded
uses. Again a minimum vertex cut, on the gradients.

Each cut is exact. They meet where a Partial passes through a product: the gradient of the other factor is then
Partial too. So the forward is cut in several ways (`WAYS`), the backward after each, and the cheapest pair is taken.

**Conversions** are fixed by the axes: where producer and use of a value disagree it is gathered or sliced.

`price` says what each costs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import fx

from ..axes.analysis import Analysis, OpInfo
from ..axes.layout import Partition
from ..axes.term import Atom, Dim
from ..errors import PlanError
from ..trace.differentiable import differentiable
from ..trace.memory import storages
from .candidates import Candidate, atoms_of, sharded_share
from .communication import ANYWHERE, Communication, Conversion, Edge, Places
from .cut import Cache, VertexCut
from .parts import covers, is_disjoint, sliced_alike, sums_once
from .price import FINE, START_BYTES, TOKENS, all_gather_cost, all_reduce_cost, nbytes

#: Ways to cut the forward, the plainest first: whole addends masked or not, Partials through products or not, and then
#: as late as can be among equals, which makes the other factor's gradient Partial where others of it are Partial too.
WAYS = tuple(
    (masks, products, late)
    for masks in (False, True)
    for products, late in ((False, False), (True, False), (True, True))
)
#: The way that allows all that any other does: what it costs, none is below.
FREEST = (True, True, False)


@dataclass(frozen=True, slots=True)
class Forward:
    """One way to sum in the forward: where, what stays Partial (before a sum, too), what is masked, at what cost."""

    reduce: frozenset[fx.Node] = frozenset()
    partial: frozenset[fx.Node] = frozenset()
    masked: frozenset[Edge] = frozenset()
    cost: int = 0


class Flow:
    """The analysed graph in the form that the cuts ask about; made once, used for every choice of axes."""

    def __init__(self, analysis: Analysis, places: Places = ANYWHERE) -> None:
        self.analysis = analysis
        self.places = Places(cache(places.reduce), cache(places.enter), cache(places.mask), cache(places.contract))
        self.order = {node: i for i, node in enumerate(analysis.trace.graph.nodes)}
        self.edges: list[Edge] = []
        self.uses: dict[fx.Node, list[Edge]] = defaultdict(list)
        for node, info in analysis.ops.items():
            for i, operand in enumerate(info.operands):
                edge = Edge(operand.node, node, i)
                self.edges.append(edge)
                self.uses[operand.node].append(edge)
        self.output_nodes = frozenset(port.node for port in analysis.trace.outputs)
        self.params = frozenset(
            node for fqn, node in analysis.trace.params.items() if fqn not in analysis.trace.is_buffer
        )
        self.differentiable = differentiable(analysis.trace)
        self._live = [e for e in self.edges if e.producer in self.differentiable and e.consumer in self.differentiable]
        self._sources_of = {
            node: [o.node for o in info.operands if o.node in self.differentiable]
            for node, info in analysis.ops.items()
        }
        self._written = self._written_to_later()
        self._own = {node: _atoms_of_op(info) for node, info in analysis.ops.items()}
        self._cuts: Cache = {}
        self._dtypes = {node: _dtype(node) for node in analysis.dims}
        self._sum_costs = {node: all_reduce_cost(node) for node in analysis.dims}
        self._asked: frozenset[Atom] = frozenset()  # of which `_held` knows the answers
        self._held: dict[fx.Node, frozenset[Atom]] = {}
        self._casts = {
            node
            for node, sources in self._sources_of.items()
            if any(self._dtypes[source] != self._dtypes[node] for source in sources)
        }
        self._holding: dict[Atom, list[fx.Node]] = defaultdict(list)
        for node, outs in analysis.dims.items():
            for atom in {a for dims in outs for a in atoms_of(dims)}:
                self._holding[atom].append(node)

    def _written_to_later(self) -> frozenset[fx.Node]:
        """Values in memory that a later op writes into: what autograd forbids on the result of a collective."""
        ops = self.analysis.ops
        last: dict[int, int] = {}
        for node, info in ops.items():
            if info.mutates is not None:
                last.update(dict.fromkeys(storages(info.operands[info.mutates].node), self.order[node]))
        if not last:
            return frozenset()
        return frozenset(n for n in ops if any(last.get(s, -1) > self.order[n] for s in storages(n)))

    # ---- what a choice of axes means at one op -------------------------------------------------

    def held_by_op(self, node: fx.Node, sharded: frozenset[Atom]) -> frozenset[Atom]:
        """The sharded axes on any operand (as used) or output of the op."""
        if sharded is not self._asked:
            self._asked, self._held = sharded, {}
        found = self._held.get(node)
        if found is None:
            found = self._held[node] = sharded & self._own.get(node, frozenset())
        return found

    def held_by_values(self, sharded: frozenset[Atom]) -> Mapping[fx.Node, set[Atom]]:
        """The sharded axes on each value that holds any."""
        found: dict[fx.Node, set[Atom]] = defaultdict(set)
        for atom in sharded:
            for node in self._holding[atom]:
                found[node].add(atom)
        return dict(found)

    def least(self, chosen: tuple[Candidate, ...]) -> int:
        """A lower bound of the communication, found quickly: the gathers, which the axes alone decide."""
        sharded = frozenset(a for c in chosen for a in c.atoms)
        found = {(c.producer, c.dim): c.cost for c in self._conversions(sharded) if c.kind == "gather"}
        return sum(found.values())

    def exceeds(self, chosen: tuple[Candidate, ...], limit: int) -> bool:
        """Whether gathers and the freest way to sum in the forward alone cost more than ``limit``."""
        sharded = frozenset(a for c in chosen for a in c.atoms)
        conversions = tuple(self._conversions(sharded))
        gathers = {(c.producer, c.dim): c.cost for c in conversions if c.kind == "gather"}
        try:
            return sum(gathers.values()) + self._forward(sharded, conversions, *FREEST).cost > limit
        except PlanError:  # `communicate` says so
            return False

    def communicate(self, chosen: tuple[Candidate, ...], gradients: bool = True) -> Communication:
        """The cheapest communication for these axes; without ``gradients`` that of the forward only.

        Raises:
            PlanError: the axes cannot be sharded together without a step that autotp cannot take.
        """
        sharded = frozenset(a for c in chosen for a in c.atoms)
        pairs = {c.atoms[0]: c.atoms[1] for c in chosen if len(c.atoms) == 2}
        partition = Partition({a.id: r for c in chosen for a, r in zip(c.atoms, c.ranges, strict=True)})
        conversions = tuple(self._conversions(sharded))
        self._check_contractions(sharded, pairs)
        close = self._closed(sharded, conversions) if gradients else frozenset()
        gathers = {(c.producer, c.dim): c.cost for c in conversions if c.kind == "gather"}
        fixed = sum(gathers.values()) + sum(self._sum_costs[node] for node in close)
        best: Communication | None = None
        seen: set[tuple[frozenset[fx.Node], frozenset[Edge]]] = set()
        failure = PlanError("no way to sum")
        for way in WAYS:
            try:
                forward = self._forward(sharded, conversions, *way)
                if (forward.reduce, forward.masked) in seen:
                    continue
                seen.add((forward.reduce, forward.masked))
                price = forward.cost
                enter: dict[fx.Node, tuple[Edge, ...]] = {}
                unsummed: frozenset[fx.Node] = frozenset()
                sync: frozenset[fx.Node] = frozenset()
                if gradients:
                    flowing = forward.partial - forward.reduce
                    enter, unsummed, sync, back = self._backward(
                        sharded, pairs, partition, flowing, forward.masked, conversions, close
                    )
                    price += back
            except PlanError as error:
                failure = error
                continue
            if best is None or price + FINE <= best.cost_bytes:  # the plainer way, unless another one saves bytes
                best = Communication(
                    forward.reduce, forward.masked, forward.partial, enter, close, unsummed, sync, conversions, price
                )
        if best is None:
            raise failure
        count = len(best.reduce) + len(best.enter) + len(close) + len(best.sync) + len(gathers)
        return replace(best, cost_bytes=best.cost_bytes + fixed, collectives=count)

    # ---- conversions ---------------------------------------------------------------------------

    def _conversions(self, sharded: frozenset[Atom]) -> Iterator[Conversion]:
        dims = self.analysis.dims
        for node, info in self.analysis.ops.items():
            for i, operand in enumerate(info.operands):
                made = dims[operand.node][operand.output]
                if made == operand.dims:
                    continue
                for d, (have, want) in enumerate(zip(made, operand.dims, strict=True)):
                    yield from self._convert(operand.node, node, i, d, have, want, sharded)
            for output, d in info.whole_out:
                want = info.out[output][d]
                if sharded & frozenset(atoms_of([want])):
                    yield Conversion("take", node, None, output, d, want, 0)
        for node in self.output_nodes:
            for d, have in enumerate(dims[node][0]):
                yield from self._convert(node, None, 0, d, have, (), sharded)

    def _convert(
        self,
        producer: fx.Node,
        consumer: fx.Node | None,
        i: int,
        d: int,
        have: Dim,
        want: Dim,
        sharded: frozenset[Atom],
    ) -> Iterator[Conversion]:
        has = sharded & frozenset(atoms_of([have]))
        wants = sharded & frozenset(atoms_of([want]))
        if has and has == wants and sliced_alike(have, want, sharded):
            return
        if has:
            yield Conversion(
                "gather", producer, consumer, i, d, have, all_gather_cost(producer)
            )
        if wants:
            yield Conversion("take", producer, consumer, i, d, want, 0)

    def _check_contractions(self, sharded: frozenset[Atom], pairs: dict[Atom, Atom]) -> None:
        for node, info in self.analysis.ops.items():
            for dim in info.contracted:
                held = sharded & frozenset(atoms_of([dim]))
                if not held:
                    continue
                for outer, inner in pairs.items():
                    if held.isdisjoint((outer, inner)):
                        continue
                    grouped = any(outer in atoms_of(dims) for dims in info.out)
                    if inner not in held or not (grouped or outer in held):
                        raise PlanError(f"{node}: sums over an axis that ranks hold in common")
                    if grouped and info.added:
                        raise PlanError(f"{node}: adds something to a sum that each group of ranks takes by itself")
                if not self.places.contract(node):
                    raise PlanError(
                        f"{node}: its rows cannot be looked up by part outside of an embedding module"
                    )
                if info.averaged and self.places.reduce(node) is None:
                    raise PlanError(f"{node}: a mean of which no place takes a part")
                if not covers(dim, sharded):
                    raise PlanError(f"{node}: sums over an axis that is sharded only in part")

    def _closed(self, sharded: frozenset[Atom], conversions: tuple[Conversion, ...]) -> frozenset[fx.Node]:
        """Ops on gathered operands: a gather can only go backwards from a whole gradient.

        Raises:
            PlanError: a gathered value enters an op over another sharded axis, or a sum over one is sliced.
        """
        ops = self.analysis.ops
        gathering = {c.consumer for c in conversions if c.kind == "gather" and c.consumer is not None}
        gathering = {n for n in gathering if n in self.differentiable}
        sliced = {c.producer for c in conversions if c.kind == "take" and c.consumer is None}
        for node in gathering:
            operands = {a for operand in ops[node].operands for a in atoms_of(operand.dims)}
            if sharded & operands or (node not in sliced and self.held_by_op(node, sharded)):
                raise PlanError(f"{node}: a gathered value enters an op over another sharded axis")
        for node in sliced & self.differentiable:
            if not sharded.isdisjoint(atoms_of(ops[node].contracted)):
                raise PlanError(f"{node}: sums over one sharded axis, and is sliced along another")
        return frozenset(gathering & sliced)

    # ---- forward -------------------------------------------------------------------------------

    def _forward(
        self,
        sharded: frozenset[Atom],
        conversions: tuple[Conversion, ...],
        masks: bool,
        products: bool,
        late: bool,
    ) -> Forward:
        ops = self.analysis.ops
        sources = {n for n, info in ops.items() if sharded & frozenset(atoms_of(info.contracted))}
        if not sources:
            return Forward()
        converted = {(c.producer, c.consumer) for c in conversions}

        def maskable(edge: Edge) -> bool:
            return masks and self.places.mask(edge)

        def accepts(edge: Edge) -> bool:
            info = ops[edge.consumer]
            if info.mutates is not None or (edge.producer, edge.consumer) in converted:
                return False
            if self.held_by_op(edge.consumer, sharded) or self._dtypes[edge.producer] != self._dtypes[edge.consumer]:
                return False  # a sum is taken in the dtype in which it arose: rounding is not linear
            if info.linear.kind == "add":
                return (not info.linear.of or edge.operand in info.linear.of) and all(
                    o.node in reached or maskable(Edge(o.node, edge.consumer, j))
                    for j, o in enumerate(info.operands)
                )
            if info.linear.kind == "mul":
                others = [o.node for j, o in enumerate(info.operands) if j != edge.operand]
                if edge.operand not in info.linear.of or any(o in reached for o in others):
                    return False
                return products or not any(o in self.differentiable for o in others)
            return False

        reached = set(sources)  # what may be Partial
        for node, info in ops.items():
            if any(o.node in reached and accepts(Edge(o.node, node, i)) for i, o in enumerate(info.operands)):
                reached.add(node)

        cut: VertexCut[fx.Node] = VertexCut(self._cuts)
        frontier = sorted(sources, key=self.order.__getitem__)
        added = set(frontier)
        passing: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # op → operands of which a Partial passes through it
        for node in frontier:
            cut.start(node)
        while frontier:
            node = frontier.pop()
            willing = self.places.reduce(node)
            cut.vertex(node, None if willing is None else self._sum_cost(node, sharded) + willing)
            whole = node in self.output_nodes or (node, None) in converted
            for edge in self.uses[node]:
                if accepts(edge):
                    cut.flow(node, edge.consumer)
                    passing[edge.consumer].append(node)
                    if edge.consumer not in sources and not maskable(edge):
                        cut.only_with(edge.consumer, node)
                    if edge.consumer not in added:
                        added.add(edge.consumer)
                        frontier.append(edge.consumer)
                else:
                    whole = True
            if whole:
                cut.end(node)
        _, reduce, _ = cut.solve(late)
        return self._forward_of(reduce, sources, passing, sharded, maskable)

    def _forward_of(
        self,
        reduce: frozenset[fx.Node],
        sources: set[fx.Node],
        passing: Mapping[fx.Node, Sequence[fx.Node]],
        sharded: frozenset[Atom],
        maskable: Callable[[Edge], bool],
    ) -> Forward:
        """What is Partial, and masked, where these values are reduced.

        Raises:
            PlanError: something would be masked where nothing can mask it.
        """
        ops = self.analysis.ops
        partial = set(sources)
        for node in sorted(passing, key=self.order.__getitem__):
            if any(operand in partial and operand not in reduce for operand in passing[node]):
                partial.add(node)
        masked = set()
        for node in partial:
            info = ops[node]
            for j, o in enumerate(info.operands):
                edge = Edge(o.node, node, j)
                if j in info.added:  # a bias: of a contraction, or of a linear layer that a Partial passes through
                    masked.add(edge)
                elif node not in sources and info.linear.kind == "add" and o.node not in partial - reduce:
                    if not maskable(edge):
                        raise PlanError(f"{node}: takes a whole value and parts of others, of which one must be summed")
                    masked.add(edge)
        summed = frozenset(partial) & reduce
        cost = sum(self._sum_cost(node, sharded) + (self.places.reduce(node) or 0) for node in summed)
        return Forward(summed, frozenset(partial), frozenset(masked), cost)

    # ---- backward ------------------------------------------------------------------------------

    def _backward(
        self,
        sharded: frozenset[Atom],
        pairs: dict[Atom, Atom],
        partition: Partition,
        flowing: frozenset[fx.Node],
        masked: frozenset[Edge],
        conversions: tuple[Conversion, ...],
        close: frozenset[fx.Node],
    ) -> tuple[dict[fx.Node, tuple[Edge, ...]], frozenset[fx.Node], frozenset[fx.Node], int]:
        ops, dims = self.analysis.ops, self.analysis.dims
        gathered = {(c.producer, c.consumer) for c in conversions if c.kind == "gather"}
        held = self.held_by_values(sharded)
        disjoint = {node for node in held if all(is_disjoint(d, sharded, pairs) for d in dims[node])}
        # Partly common (a fused (H|1|1)·D, or kv heads that a subgroup shares): its gradient must stay as
        # partial as it comes, or the sum at the input of the op that made it would count the common part twice.
        mixed = {node for node in held if node in ops and node not in disjoint and node in self.differentiable}

        whole = self.output_nodes | {producer for producer, _ in gathered}
        grouped = self._summed_by_groups(sharded, mixed - whole)
        none: set[Atom] = set()

        def sharded_use(edge: Edge) -> bool:
            if edge in masked or edge.producer in disjoint or edge.consumer in close:
                return False
            info = ops[edge.consumer]
            if flowing and info.linear.kind == "mul" and any(
                o.node in flowing for j, o in enumerate(info.operands) if j != edge.operand
            ):
                return True
            used = self.held_by_op(edge.consumer, sharded)
            return bool(used) and not used <= held.get(edge.producer, none)

        def neutral(edge: Edge) -> bool:
            """A use that only takes the sharded part out of a partly common value."""
            info = ops[edge.consumer]
            common = edge.producer in mixed and edge.producer not in grouped
            return common and edge.consumer in disjoint and len(info.operands) == 1

        sources = {e for e in self._live if sharded_use(e)}
        if not sources:
            return {}, frozenset(), frozenset(), 0

        def needs_whole(node: fx.Node) -> bool:
            """Whether the op that made ``node`` can only go backwards from a whole gradient."""
            if node in mixed:
                return not sharded.isdisjoint(atoms_of(ops[node].contracted))
            inputs = self._sources_of[node]
            picks = len(inputs) == 1 and inputs[0] in mixed  # takes the common part out of a partly common value
            return node in self._casts or (bool(self.held_by_op(node, sharded)) and not picks) or node in flowing

        reached = {e.producer for e in sources} | mixed
        for node in reversed(list(ops)):  # values that a partial gradient can reach, walking backwards
            if node in reached and not needs_whole(node):
                reached.update(source for source in self._sources_of[node] if source not in disjoint)
        cut: VertexCut[fx.Node] = VertexCut(self._cuts)
        for node in sorted(reached, key=self.order.__getitem__):
            is_param = node in self.params
            willing = 0 if is_param else None if node in self._written else self.places.enter(node)
            partial = node in mixed and node not in grouped
            barred = partial or willing is None
            price = self._sync_cost(node, sharded) if is_param else self._sum_cost(node, sharded)
            cut.vertex(node, None if barred else price + (willing or 0))
            if partial:
                cut.start(node)
            stop = is_param or node not in ops or node in self.output_nodes or needs_whole(node)
            for edge in self.uses[node]:
                if edge.consumer not in self.differentiable or neutral(edge):
                    continue
                if edge in sources:
                    cut.start(node)
                elif (node, edge.consumer) in gathered:
                    stop = True
                elif edge.consumer in reached and edge not in masked:
                    cut.flow(edge.consumer, node)
                    cut.require(node, edge.consumer)
                else:
                    stop = True
            if stop:
                cut.end(node)
        for _, consumer in gathered:  # backwards, each rank keeps its slice of what has to be a whole gradient
            if consumer in reached:
                cut.end(consumer)
        cost, entered, uncut = cut.solve()
        enter: dict[fx.Node, tuple[Edge, ...]] = {}
        sync = set()
        for node in sorted(entered, key=self.order.__getitem__):
            uses = [e for e in self.uses[node] if e.consumer in self.differentiable and not neutral(e)]
            partial_uses = tuple(e for e in uses if e in sources or (e.consumer in uncut and e not in masked))
            if node not in self.params:
                enter[node] = partial_uses
            elif len(partial_uses) < len(uses):
                raise PlanError(f"{node}: a parameter used both in and outside a sharded region")
            elif not sums_once(dims[node][0], partition):
                raise PlanError(f"{node}: ranks have parts of it in common in more than one way")
            else:
                sync.add(node)
        return enter, uncut, frozenset(sync), cost

    def _summed_by_groups(self, sharded: frozenset[Atom], common: set[fx.Node]) -> set[fx.Node]:
        """Of values that some ranks have in common, those that these ranks have summed (the mean square of a group of
        heads), and what is made of nothing else: they can sum its gradient as well, before it goes back to addends
        that each has for itself."""
        found: set[fx.Node] = set()
        for node, info in self.analysis.ops.items():
            summed = not sharded.isdisjoint(atoms_of(info.contracted))
            if node in common and (summed or found.issuperset(self._sources_of[node])):
                found.add(node)
        return found

    def _sum_cost(self, node: fx.Node, sharded: frozenset[Atom]) -> int:
        """Of a value that groups of ranks have in common, each sums its own part."""
        own = self.held_by_op(node, sharded) and sharded.intersection(atoms_of(self.analysis.dims[node][0]))
        return all_reduce_cost(node, math.prod(a.size for a in own)) if own else self._sum_costs[node]

    def _sync_cost(self, param: fx.Node, sharded: frozenset[Atom]) -> int:
        """Of a gradient only the part that ranks hold in common is summed, once a step for any number of tokens."""
        common = 1 - sharded_share(self.analysis.dims[param][0], sharded)
        return FINE * (int(2 * nbytes(param) * common) + START_BYTES) // TOKENS


def _atoms_of_op(info: OpInfo) -> frozenset[Atom]:
    found = set(atoms_of(info.contracted))
    for operand in info.operands:
        found |= set(atoms_of(operand.dims))
    for dims in info.out:
        found |= set(atoms_of(dims))
    return frozenset(found)


def _dtype(node: fx.Node) -> object:
    value: Any = node.meta.get("val")
    values: Iterable[Any] = value if isinstance(value, (tuple, list)) else [value]
    return next((v.dtype for v in values if hasattr(v, "dtype")), None)
