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


class VertexCut(Generic[V]):
    """Build with :meth:`vertex`, :meth:`flow`, :meth:`start`, :meth:`end`; then :meth:`solve`."""

    def __init__(self) -> None:
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

    def solve(self) -> tuple[int, frozenset[V], frozenset[V]]:
        """(cost, the vertices cut, the vertices reached and left uncut).

        Raises:
            PlanError: every way from source to sink passes only vertices that may not be cut.
        """
        try:
            cost, (_, near_source) = nx.minimum_cut(self._net, SINK, SOURCE)
        except nx.NetworkXUnbounded as error:
            raise PlanError("a value must be whole where nothing can make it whole") from error
        reached = {v for v in self._capacity if ("in", v) in near_source}
        uncut = {v for v in self._capacity if ("out", v) in near_source}
        return int(cost), frozenset(reached - uncut), frozenset(uncut)
