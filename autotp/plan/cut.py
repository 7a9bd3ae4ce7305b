"""A minimum vertex cut by networkx, with the tie broken towards the source.

A vertex is split into an in- and an out-half joined by an edge of its capacity; every other edge is
infinite. By max-flow/min-cut (Ford and Fulkerson 1956) the cheapest set of vertices that separates
source from sink is the set of saturated halves. Among cuts of the same cost the one nearest the
source is returned: a Partial is summed where it arises unless waiting is cheaper.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import networkx as nx

from ..errors import PlanError

V = TypeVar("V", bound=Hashable)

SOURCE = ("source", None)
SINK = ("sink", None)

Cache = dict[frozenset[Hashable], tuple[int, frozenset[Hashable]] | None]


class VertexCut(Generic[V]):
    """Build with :meth:`vertex`, :meth:`flow`, :meth:`start`, :meth:`end`; then :meth:`solve`.

    Parts that do not touch are solved each by itself; one ``cache`` lets many cuts share the parts that are alike.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache: Cache = {} if cache is None else cache
        # Reversed from the start: networkx returns the cut nearest *its* sink.
        self._net: nx.DiGraph = nx.DiGraph()
        self._net.add_nodes_from([SOURCE, SINK])
        self._capacity: dict[V, int | None] = {}

    def vertex(self, v: V, capacity: int | None) -> None:
        """Vertex ``v`` may be cut at this price; ``None``: it may not be cut."""
        self._capacity[v] = capacity
        if capacity is None:
            self._net.add_edge(("out", v), ("in", v))
        else:
            self._net.add_edge(("out", v), ("in", v), capacity=capacity)

    def flow(self, a: V, b: V) -> None:
        """What leaves ``a`` uncut arrives at ``b``."""
        self._net.add_edge(("in", b), ("out", a))

    def require(self, a: V, b: V) -> None:
        """If ``a`` stays uncut on the source's side, then so does ``b``."""
        self._net.add_edge(("out", b), ("out", a))

    def only_with(self, b: V, a: V) -> None:
        """``b`` is reached only together with what leaves ``a`` uncut."""
        self._net.add_edge(("out", a), ("in", b))

    def start(self, v: V) -> None:
        """``v`` is reached from the source."""
        self._net.add_edge(("in", v), SOURCE)

    def end(self, v: V) -> None:
        """What leaves ``v`` uncut reaches the sink."""
        self._net.add_edge(SINK, ("out", v))

    def _solved(self, net: nx.DiGraph, late: bool) -> tuple[int, frozenset[Hashable]] | None:
        """(cost, the side of the source) of one part; None where it cannot be cut."""
        key = frozenset((late, *net.edges(data="capacity")))
        if key not in self._cache:
            try:
                if late:  # networkx returns the cut nearest to where the flow ends
                    cost, (side, _) = nx.minimum_cut(
                        net.reverse(), SOURCE, SINK, flow_func=nx.algorithms.flow.dinitz
                    )
                else:
                    cost, (_, side) = nx.minimum_cut(net, SINK, SOURCE, flow_func=nx.algorithms.flow.dinitz)
                self._cache[key] = int(cost), frozenset(side)
            except nx.NetworkXUnbounded:
                self._cache[key] = None
        return self._cache[key]

    def solve(self, late: bool = False) -> tuple[int, frozenset[V], frozenset[V]]:
        """(cost, the vertices cut, the vertices reached and left uncut); among equals nearest the source, or the sink.

        Raises:
            PlanError: every way from source to sink passes only vertices that may not be cut.
        """
        cost = 0
        near_source: set[Hashable] = set()
        inner = self._net.subgraph([n for n in self._net if n not in (SOURCE, SINK)])
        for part in nx.weakly_connected_components(inner):
            if not any(self._net.has_edge(n, SOURCE) for n in part):
                continue
            net = self._net.subgraph([*part, SOURCE, SINK])
            found = self._solved(net, late)
            if found is None:
                raise PlanError("a value must be whole where nothing can make it whole")
            cost += found[0]
            near_source |= found[1]
        reached = {v for v in self._capacity if ("in", v) in near_source}
        uncut = {v for v in self._capacity if ("out", v) in near_source}
        return cost, frozenset(reached - uncut), frozenset(uncut)
