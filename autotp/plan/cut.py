"""A minimum vertex cut, with the tie broken towards the source.

A vertex is split into an in- and an out-half joined by an edge of its capacity; every other edge is
infinite. By max-flow/min-cut (Ford and Fulkerson 1956) the cheapest set of vertices that separates
source from sink is the set of saturated halves. Among cuts of the same cost the one nearest the
source is returned: a Partial is summed where it arises unless waiting is cheaper.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from ..errors import PlanError

V = TypeVar("V", bound=Hashable)
Half = tuple[str, Hashable]

SOURCE: Half = ("source", None)
SINK: Half = ("sink", None)

Cache = dict[frozenset[Hashable], tuple[int, frozenset[Hashable]] | None]


class VertexCut(Generic[V]):
    """Build with :meth:`vertex`, :meth:`flow`, :meth:`start`, :meth:`end`; then :meth:`solve`.

    Parts that do not touch are solved each by itself; one ``cache`` lets many cuts share the parts that are alike.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache: Cache = {} if cache is None else cache
        self._next: dict[Half, dict[Half, int | None]] = {SOURCE: {}, SINK: {}}  # edges, and their capacities
        self._capacity: dict[V, int | None] = {}

    def _edge(self, a: Half, b: Half, capacity: int | None = None) -> None:
        self._next.setdefault(b, {})
        self._next.setdefault(a, {})[b] = capacity

    def vertex(self, v: V, capacity: int | None) -> None:
        """Vertex ``v`` may be cut at this price; ``None``: it may not be cut."""
        self._capacity[v] = capacity
        self._edge(("in", v), ("out", v), capacity)
        self._edge(("out", v), ("in", v))  # nothing leaves a vertex that nothing reached

    def flow(self, a: V, b: V) -> None:
        """What leaves ``a`` uncut arrives at ``b``."""
        self._edge(("out", a), ("in", b))

    def require(self, a: V, b: V) -> None:
        """If ``a`` stays uncut on the source's side, then so does ``b``."""
        self._edge(("out", a), ("out", b))

    def only_with(self, b: V, a: V) -> None:
        """``b`` is reached only together with what leaves ``a`` uncut."""
        self._edge(("in", b), ("out", a))

    def start(self, v: V) -> None:
        """``v`` is reached from the source."""
        self._edge(SOURCE, ("in", v))

    def end(self, v: V) -> None:
        """What leaves ``v`` uncut reaches the sink."""
        self._edge(("out", v), SINK)

    def _parts(self) -> list[list[Half]]:
        """The halves, without source and sink, by what they are connected to."""
        near: dict[Half, list[Half]] = {n: [] for n in self._next}
        for a, targets in self._next.items():
            for b in targets:
                near[a].append(b)
                near[b].append(a)
        parts: list[list[Half]] = []
        seen: set[Half] = {SOURCE, SINK}
        for first in near:
            if first in seen:
                continue
            seen.add(first)
            part = [first]
            for n in part:
                new = [other for other in near[n] if other not in seen]
                seen.update(new)
                part += dict.fromkeys(new)
            parts.append(part)
        return parts

    def _solved(self, part: list[Half], late: bool) -> tuple[int, frozenset[Hashable]] | None:
        """(cost, the side of the source) of one part; None where it cannot be cut."""
        inside = {*part, SOURCE, SINK}
        edges = [
            (a, b, capacity)
            for a in (SOURCE, *part)
            for b, capacity in self._next[a].items()
            if b in inside
        ]
        key = frozenset((late, *edges))
        if key not in self._cache:
            self._cache[key] = minimum_cut(edges, late)
        return self._cache[key]

    def solve(self, late: bool = False) -> tuple[int, frozenset[V], frozenset[V]]:
        """(cost, the vertices cut, the vertices reached and left uncut); among equals nearest the source, or the sink.

        Raises:
            PlanError: every way from source to sink passes only vertices that may not be cut.
        """
        cost = 0
        near_source: set[Hashable] = set()
        for part in self._parts():
            if not any(n in self._next[SOURCE] for n in part):
                continue
            found = self._solved(part, late)
            if found is None:
                raise PlanError("a value must be whole where nothing can make it whole")
            cost += found[0]
            near_source |= found[1]
        reached = {v for v in self._capacity if ("in", v) in near_source}
        uncut = {v for v in self._capacity if ("out", v) in near_source}
        return cost, frozenset(reached - uncut), frozenset(uncut)


def minimum_cut(
    edges: Sequence[tuple[Hashable, Hashable, int | None]], late: bool
) -> tuple[int, frozenset[Hashable]] | None:
    """(cost, the side of SOURCE) of the cheapest cut between SOURCE and SINK, by Dinic's algorithm (1970).

    ``late``: of several, the one nearest SINK. None: an edge without a capacity is on every way.
    """
    numbers: dict[Hashable, int] = {SOURCE: 0, SINK: 1}
    for a, b, _ in edges:
        numbers.setdefault(a, len(numbers))
        numbers.setdefault(b, len(numbers))
    most = sum(capacity for _, _, capacity in edges if capacity is not None)
    out: list[list[int]] = [[] for _ in numbers]  # numbers of edges; an edge and its reverse differ in the last bit
    head: list[int] = []
    left: list[int] = []
    for a, b, capacity in edges:
        out[numbers[a]].append(len(head))
        out[numbers[b]].append(len(head) + 1)
        head += (numbers[b], numbers[a])
        left += (most + 1 if capacity is None else capacity, 0)

    def levels(start: int, backwards: bool) -> list[int]:
        """How far each vertex is from ``start`` over edges with something left (or to it); -1: it is not reached."""
        found = [-1] * len(out)
        found[start] = 0
        queue = [start]
        for v in queue:
            for e in out[v]:
                if left[e ^ 1 if backwards else e] and found[head[e]] < 0:
                    found[head[e]] = found[v] + 1
                    queue.append(head[e])
        return found

    cost = 0
    while (level := levels(0, False))[1] >= 0:
        at = [0] * len(out)
        path: list[int] = []
        v = 0
        while True:
            if v == 1:
                amount = min(left[e] for e in path)
                cost += amount
                if cost > most:
                    return None
                for e in path:
                    left[e] -= amount
                    left[e ^ 1] += amount
                path, v = [], 0
            elif at[v] < len(out[v]):
                e = out[v][at[v]]
                if left[e] and level[head[e]] == level[v] + 1:
                    path.append(e)
                    v = head[e]
                else:
                    at[v] += 1
            elif path:
                v = head[path.pop() ^ 1]
                at[v] += 1
            else:
                break
    reached = [n < 0 for n in levels(1, True)] if late else [n >= 0 for n in levels(0, False)]
    return cost, frozenset(node for node, number in numbers.items() if reached[number])
