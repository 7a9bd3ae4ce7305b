"""Local constants as equations: which attributes take a local value, so that the sizes in the user's code
come out local.

An equation says that an expression over integer attributes and sizes (`C // self.n_head`) is to have a local
value. Changing an attribute is legal where every equation that reads it holds afterwards. Among the legal
changes `solve` takes the one that mends the most equations, then the one that changes the fewest attributes,
then the one whose attributes stand most directly in what they mend (`n_head` before `n_embd // n_head`, the
left factor before the right one).

What is left over (`Solution.unsolved`) is for patches: in nanoGPT `n_head` also sits in `C // n_head` with a
C that is not local, so that no value of `n_head` is legal, and `self.n_head` is replaced where it stands.

The search is exact within one bound: attributes that are determined by an equation alone or by the others'
values are solved by inversion; where only several together are determined, one of them is tried with 1, 2, …
up to its present value (a local size is no larger than the whole). Attributes that share equations are solved
together; more than 12 of them only by changes of up to 3 and their unions. Components that look the same (one
a layer) are solved once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autotp.rewrite.invert import Lowered, evaluate, positions, solutions
from autotp.trace.provenance import Attr, AttrPath, Const, Dim, Expr

if TYPE_CHECKING:
    from torch import fx

    from autotp.trace.graph import Site

AttrKey = tuple[str, AttrPath]

MOST_TOGETHER = 12
"""Attributes in one component up to which all sets of changes are tried."""
MOST_TRIED = 512
"""Values tried for an attribute that no equation determines alone."""
MOST_STEPS = 20_000
"""Values tried in all for one set of changes."""


@dataclass(frozen=True, slots=True)
class Equation:
    """`expr` is to be `want`. `tag` is the caller's own; equations are compared by it too."""

    expr: Expr
    want: int
    where: Site | None = None
    tag: object = None

    def __str__(self) -> str:
        return f"{self.expr} = {self.want}" + (f" at {self.where}" if self.where is not None else "")


@dataclass(frozen=True, slots=True)
class Solution:
    """The attributes that change, and the equations that no legal change satisfies (in the order given)."""

    attrs: Mapping[AttrKey, int]
    unsolved: tuple[Equation, ...]


@dataclass(frozen=True, slots=True)
class _Problem:
    """A component with its attributes numbered in order of appearance, so that like ones are equal."""

    values: tuple[int, ...]
    equations: tuple[tuple[Lowered, int], ...]


@dataclass(slots=True)
class _Component:
    attrs: list[AttrKey] = field(default_factory=list)
    equations: list[int] = field(default_factory=list)


def solve(
    equations: Iterable[Equation],
    attr: Callable[[str, AttrPath], int],
    dim: Callable[[fx.Node, int], int],
    frozen: Collection[AttrKey] = (),
) -> Solution:
    """Choose the local values of attributes.

    Args:
        attr: the present (whole) value of an attribute; dim: the local size of a value.
        frozen: attributes that may not change, say because their change has been found wrong.
    """
    given = list(equations)
    fixed = frozenset(frozen)
    lowered = [_lower(equation.expr, attr, dim, fixed) for equation in given]
    attrs: dict[AttrKey, int] = {}
    unsolved: list[int] = []
    cache: dict[_Problem, tuple[tuple[int, int], ...]] = {}
    for component in _components(lowered):
        number = {key: i for i, key in enumerate(component.attrs)}
        problem = _Problem(
            tuple(attr(*key) for key in component.attrs),
            tuple(dict.fromkeys((_renumber(lowered[i], number), given[i].want) for i in component.equations)),
        )
        if problem not in cache:
            cache[problem] = _solve(problem)
        changed = dict(cache[problem])
        attrs.update((component.attrs[i], value) for i, value in changed.items())
        values = {i: changed.get(i, value) for i, value in enumerate(problem.values)}
        unsolved += [
            i for i in component.equations if evaluate(_renumber(lowered[i], number), values) != given[i].want
        ]
    return Solution(attrs, tuple(given[i] for i in sorted(unsolved)))


def _lower(
    expr: Expr,
    attr: Callable[[str, AttrPath], int],
    dim: Callable[[fx.Node, int], int],
    frozen: frozenset[AttrKey],
) -> Lowered:
    """`expr` with sizes and frozen attributes as numbers: an int, ("attr", key) or (symbol, operands)."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Dim):
        return int(dim(expr.node, expr.dim))
    if isinstance(expr, Attr):
        key = (expr.module, expr.path)
        return int(attr(*key)) if key in frozen else ("attr", key)
    args = tuple(_lower(arg, attr, dim, frozen) for arg in expr.args)
    if all(isinstance(arg, int) for arg in args):
        value = evaluate((expr.symbol, args), {})
        if value is not None:
            return value
    return (expr.symbol, args)


def _renumber(expr: Lowered, number: Mapping[AttrKey, int]) -> Lowered:
    if isinstance(expr, int):
        return expr
    if expr[0] == "attr":
        return ("attr", number[expr[1]])
    return (expr[0], tuple(_renumber(arg, number) for arg in expr[1]))


def _components(lowered: Sequence[Lowered]) -> Iterator[_Component]:
    """Equations by the attributes they share; those that read none come by themselves."""
    parent: dict[AttrKey, AttrKey] = {}

    def root(key: AttrKey) -> AttrKey:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    reads = [list(positions(expr)) for expr in lowered]
    for keys in reads:
        for key in keys:
            parent.setdefault(key, key)
            parent[root(key)] = root(keys[0])
    found: dict[AttrKey | None, _Component] = {}
    for i, keys in enumerate(reads):
        component = found.setdefault(root(keys[0]) if keys else None, _Component())
        component.equations.append(i)
        component.attrs += [key for key in keys if key not in component.attrs]
    yield from found.values()


def _solve(problem: _Problem) -> tuple[tuple[int, int], ...]:
    """The changes, as (attribute, value), that are best in the sense of the module's docstring."""
    present = dict(enumerate(problem.values))
    violated = [e for e in problem.equations if evaluate(e[0], present) != e[1]]
    if not violated:
        return ()
    free = _free(problem, present)
    changes: dict[int, int] = {}
    for part in _parts(free, [e[0] for e in problem.equations]):
        reading = [e for e in problem.equations if not part.isdisjoint(positions(e[0]))]
        changes |= _best(sorted(part), reading, [e for e in violated if e in reading], present)
    return tuple(sorted(changes.items()))


def _free(problem: _Problem, present: Mapping[int, int]) -> set[int]:
    """The attributes that the equations in which they stand alone do not hold to their present value."""
    alone: dict[int, list[tuple[Lowered, int]]] = {a: [] for a in present}
    for expr, want in problem.equations:
        if len(places := positions(expr)) == 1:
            alone[next(iter(places))].append((expr, want))
    return {
        a
        for a, equations in alone.items()
        if not equations
        or any(value != present[a] for value in solutions(equations, a, present, present[a], MOST_TRIED))
    }


def _parts(free: Collection[int], exprs: Sequence[Lowered]) -> list[set[int]]:
    """The free attributes by the equations they share."""
    parts: list[set[int]] = []
    for expr in exprs:
        if here := {a for a in positions(expr) if a in free}:
            joined = [part for part in parts if not part.isdisjoint(here)]
            parts = [part for part in parts if part.isdisjoint(here)] + [here.union(*joined)]
    return sorted(parts, key=min)


def _best(
    numbers: Sequence[int],
    equations: Sequence[tuple[Lowered, int]],
    violated: Sequence[tuple[Lowered, int]],
    present: Mapping[int, int],
) -> dict[int, int]:
    """The best change of a few attributes that hang together."""

    def cost(changed: tuple[int, ...]) -> tuple[int, int, int, int, tuple[int, ...]]:
        """What it leaves violated, how many it changes, how deep and how far right they stand."""
        places = [positions(expr) for expr, _ in violated]
        mended = sum(any(a in place for a in changed) for place in places)
        best = [min((place[a] for place in places if a in place), default=(99, 99)) for a in changed]
        return -mended, len(changed), sum(p[0] for p in best), sum(p[1] for p in best), changed

    together = len(numbers) if len(numbers) <= MOST_TOGETHER else 3
    sets = itertools.chain.from_iterable(itertools.combinations(numbers, n) for n in range(1, together + 1))
    result: dict[int, int] = {}
    for changed in sorted(sets, key=cost):
        if cost(changed)[0] == 0:
            break
        involved = [e for e in equations if any(a in positions(e[0]) for a in changed)]
        if any(a in result for e in involved for a in positions(e[0])):
            continue  # (in a large part) it shares an equation with what is changed already
        known = {a: value for a, value in present.items() if a not in changed}
        found = _search(frozenset(changed), involved, known, present, [MOST_STEPS])
        if found is not None:
            result |= found
            if together == len(numbers):
                break
    return result


def _search(
    unknown: frozenset[int],
    equations: Sequence[tuple[Lowered, int]],
    values: Mapping[int, int],
    present: Mapping[int, int],
    steps: list[int],
) -> dict[int, int] | None:
    """Values other than the present ones for all `unknown` attributes, such that the equations hold."""
    alone: dict[int, list[tuple[Lowered, int]]] = {}
    undecided: list[tuple[Lowered, int]] = []
    for expr, want in equations:
        left = [a for a in positions(expr) if a in unknown]
        if left:
            undecided.append((expr, want))
            if len(left) == 1:
                alone.setdefault(left[0], []).append((expr, want))
        elif evaluate(expr, values) != want:
            return None
    if not unknown:
        return {}
    if alone:
        chosen = min(alone, key=lambda a: (-len(alone[a]), a))
        candidates = solutions(alone[chosen], chosen, values, present[chosen], MOST_TRIED)
    else:
        chosen = min(unknown, key=lambda a: (abs(present[a]), a))
        candidates = iter(_to_try(present[chosen], [want for _, want in undecided]))
    for value in candidates:
        steps[0] -= 1
        if steps[0] < 0:
            return None
        if value != present[chosen]:
            found = _search(unknown - {chosen}, undecided, {**values, chosen: value}, present, steps)
            if found is not None:
                return {chosen: value, **found}
    return None


def _to_try(present: int, wanted: Sequence[int]) -> list[int]:
    """Values for an attribute that no equation determines alone: the larger divisors of its value first."""
    if present <= 0:
        return []
    divisors = [n for n in range(present, 0, -1) if present % n == 0] if present <= 1 << 16 else []
    others = (
        range(1, present + 1) if present <= MOST_TRIED else sorted({w for w in wanted if 0 < w <= present})
    )
    return list(dict.fromkeys([*divisors, *others]))
