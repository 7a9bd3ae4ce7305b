"""The vertex cut against every way to put the vertices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from autotp.errors import PlanError
from autotp.plan.cut import VertexCut

#: Where a vertex is: what leaves the source does not reach it, is cut there, or passes through it.
UNREACHED, CUT, THROUGH = range(3)
MOST = 6
Put = tuple[int, ...]
Drawn = tuple[list[int | None], dict[str, list[tuple[int, ...]]]]

RULES: dict[str, Callable[..., bool]] = {
    "start": lambda a: a != UNREACHED,
    "end": lambda a: a != THROUGH,
    "flow": lambda a, b: a != THROUGH or b != UNREACHED,
    "require": lambda a, b: a != THROUGH or b == THROUGH,
    "only_with": lambda b, a: b == UNREACHED or a == THROUGH,
}


def draw(seed: int) -> Drawn:
    """What the vertices cost, and what is asked of which."""
    rng = random.Random(seed)
    vertices = range(rng.randrange(3, MOST + 1))
    costs = [rng.choice([None, 0, *range(1, 6)]) for _ in vertices]
    pairs = list(itertools.combinations(vertices, 2))
    before = [None, *(rng.randrange(v) for v in vertices[1:])]  # every vertex may be reached
    flows = [(a, b) for a, b in pairs if a == before[b] or rng.random() < 0.3]
    summing = {b for b in vertices if rng.random() < 0.6}
    return costs, {
        "start": [(0,)],
        "end": [(v,) for v in vertices if rng.random() < 0.3 or v == vertices[-1]],
        "flow": flows,
        "require": [pair for pair in pairs if rng.random() < 0.1],
        "only_with": [(b, a) for a, b in flows if b in summing],
    }


def allowed(costs: list[int | None], asked: dict[str, list[tuple[int, ...]]]) -> Iterator[tuple[int, Put]]:
    """(cost, where each vertex is) of all that keep what is asked."""
    for put in itertools.product(range(3), repeat=len(costs)):
        paid = [cost for cost, where in zip(costs, put, strict=True) if where == CUT]
        kept = all(RULES[rule](*(put[v] for v in vs)) for rule, found in asked.items() for vs in found)
        if kept and None not in paid:
            yield sum(cost or 0 for cost in paid), put


def solved(drawn: Drawn, late: bool) -> tuple[int, Put]:
    costs, asked = drawn
    cut: VertexCut[int] = VertexCut()
    for v, cost in enumerate(costs):
        cut.vertex(v, cost)
    for rule, found in asked.items():
        for vs in found:
            getattr(cut, rule)(*vs)
    cost, ended, through = cut.solve(late)
    return cost, tuple(CUT if v in ended else THROUGH if v in through else UNREACHED for v in range(len(costs)))


@pytest.mark.parametrize("late", [False, True])
def test_cheapest_of_all(late: bool) -> None:
    """The cut costs the least, and of those that do it is the nearest to the source, or to the sink."""
    nearest = max if late else min
    impossible = 0
    for seed in range(300):
        drawn = draw(seed)
        every = list(allowed(*drawn))
        if not every:
            impossible += 1
            with pytest.raises(PlanError):
                solved(drawn, late)
            continue
        least = min(cost for cost, _ in every)
        best = [put for cost, put in every if cost == least]
        assert solved(drawn, late) == (least, tuple(nearest(at) for at in zip(*best, strict=True))), seed
    assert 20 < impossible < 200


@pytest.mark.parametrize("late", [False, True])
def test_nothing_passes_through_what_is_not_reached(late: bool) -> None:
    """The last vertex takes parts of two: where one was cut before, the other has to be cut too, which costs more."""
    needed_whole, scaled, other, both = 1, 2, 3, 4
    drawn: Drawn = (
        [9, 1, None, 3, 1],
        {
            "start": [(0,)],
            "end": [(needed_whole,), (both,)],
            "flow": [(0, needed_whole), (needed_whole, scaled), (scaled, both), (0, other), (other, both)],
            "only_with": [(scaled, needed_whole), (both, scaled), (both, other)],
        },
    )
    assert min(allowed(*drawn))[0] == 1 + 3
    assert solved(drawn, late)[0] == 1 + 3
