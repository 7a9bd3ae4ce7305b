"""Which logical axes could be sharded, and which of them exclude one another.

A *candidate* is one axis of at least ``tp`` elements that a parameter holds, or a nested pair of
axes (kv heads, then the group of query heads of each) where the outer one alone is too small: ranks
are dealt to the outer elements first and each element's ranks then split the inner axis.

Two candidates conflict when one value would hold both: there is one mesh dim. Parts of one
concatenation do not meet (``(H·D | F)`` may shard H and F both).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ..axes.analysis import Analysis, aliased_args
from ..axes.term import Atom, Cat, Dim

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One axis to shard (or a nested pair), with each rank's ranges.

    Attributes:
        atoms: the axis, or outer and inner axis of a nested pair.
        ranges: for each atom the half-open range of every rank.
        key: the same for the corresponding axis of repeated layers, which are decided together.
    """

    atoms: tuple[Atom, ...]
    ranges: tuple[tuple[Range, ...], ...]
    key: str

    @property
    def size(self) -> int:
        n = 1
        for atom in self.atoms:
            n *= atom.size
        return n


def split_evenly(n: int, parts: int, unit: int = 1) -> tuple[Range, ...]:
    """``n`` elements over ``parts``, the first ``n % parts`` get one more: 6 over 4 is 2, 2, 1, 1.

    In whole units of 4, 24 over 4 is 8, 8, 4, 4.
    """
    q, r = divmod(n // unit, parts)
    bounds = [unit * (i * q + min(i, r)) for i in range(parts + 1)]
    return tuple(zip(bounds, bounds[1:], strict=False))


def split_nested(outer: int, inner: int, tp: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Ranges of both axes when ``outer < tp``: 2 kv heads of 4 on tp=4 is (0,0,1,1) × (0:2, 2:4, 0:2, 2:4)."""
    outer_ranges: list[Range] = []
    inner_ranges: list[Range] = []
    for element, (first, last) in enumerate(split_evenly(tp, outer)):
        for part in split_evenly(inner, last - first):
            outer_ranges.append((element, element + 1))
            inner_ranges.append(part)
    return tuple(outer_ranges), tuple(inner_ranges)


def atoms_of(dims: Iterable[Dim]) -> Iterator[Atom]:
    """Every atom in these dims, with repetitions, major to minor."""
    for dim in dims:
        for factor in dim:
            if isinstance(factor, Cat):
                yield from atoms_of(factor.parts)
            else:
                yield factor


def meetings(dims: Iterable[Dim]) -> tuple[set[Atom], set[frozenset[Atom]]]:
    """(the atoms of a value, the pairs that meet in it); a repeated atom is a pair of one."""
    seen: set[Atom] = set()
    pairs: set[frozenset[Atom]] = set()
    for dim in dims:
        for factor in dim:
            here: set[Atom] = set()
            if isinstance(factor, Cat):
                for part in factor.parts:
                    part_atoms, part_pairs = meetings([part])
                    here |= part_atoms
                    pairs |= part_pairs
            else:
                here = {factor}
            pairs |= {frozenset((a, b)) for a in seen for b in here}
            seen |= here
    return seen, pairs


def _neighbours(dim: Dim) -> Iterator[tuple[Atom, Atom]]:
    """Pairs of axes that stand next to each other in a product."""
    for factor in dim:
        if isinstance(factor, Cat):
            for part in factor.parts:
                yield from _neighbours(part)
    for a, b in zip(dim, dim[1:], strict=False):
        if isinstance(a, Atom) and isinstance(b, Atom):
            yield a, b


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def axis_keys(analysis: Analysis) -> dict[Atom, str]:
    """A name for each axis that corresponding axes of repeated layers share: where it stands first."""
    places: dict[Atom, str] = {}
    for fqn, node in analysis.trace.params.items():
        for d, dim in enumerate(analysis.dims[node][0]):
            for i, atom in enumerate(atoms_of([dim])):
                places.setdefault(atom, f"{_NUMBER.sub('*', '.' + fqn + '.')[1:-1]}[{d}].{i}")
    return places


def candidates(analysis: Analysis, tp: int) -> tuple[Candidate, ...]:
    """Every axis, and every nested pair of axes, of the model's parameters that ``tp`` ranks can share."""
    keys, units = axis_keys(analysis), analysis.units()
    frozen = analysis.frozen | _gathered_weights(analysis) | _cut_away(analysis)
    found: dict[tuple[Atom, ...], Candidate] = {}
    for fqn, node in analysis.trace.params.items():
        if fqn in analysis.trace.is_buffer:
            continue
        dims = analysis.dims[node][0]
        for atom in atoms_of(dims):
            unit = units.get(atom, 1)
            if atom not in frozen and atom.size >= tp * unit and atom.size % unit == 0:
                ranges = split_evenly(atom.size, tp, unit)
                found.setdefault((atom,), Candidate((atom,), (ranges,), keys[atom]))
        for dim in dims:
            for outer, inner in _neighbours(dim):
                if outer in frozen or inner in frozen or not 1 < outer.size < tp <= outer.size * inner.size:
                    continue
                if inner.size < -(-tp // outer.size):
                    continue
                if units.get(inner, 1) > 1:
                    continue  # split_nested knows no units
                nested = split_nested(outer.size, inner.size, tp)
                found.setdefault(
                    (outer, inner), Candidate((outer, inner), nested, f"{keys[outer]} {keys[inner]}")
                )
    return tuple(found.values())


def _cut_away(analysis: Analysis) -> frozenset[Atom]:
    """The parts of concatenations that no op takes by themselves: the rows of a position table beyond the traced
    length. With a longer input they are used, by ops that nobody saw."""
    params = set(analysis.trace.params.values())
    used = {
        factor
        for node, outputs in analysis.dims.items()
        if node not in params
        for dims in outputs
        for dim in dims
        for factor in dim
        if isinstance(factor, Atom)
    }
    joined = {
        atom
        for node in params
        for dim in analysis.dims[node][0]
        for factor in dim
        if isinstance(factor, Cat)
        for atom in atoms_of([(factor,)])
    }
    return frozenset(joined - used)


def _gathered_weights(analysis: Analysis) -> frozenset[Atom]:
    """Axes of a parameter that a use of it needs whole: sharding them would mean gathering a weight at each forward."""
    return frozenset(atom for _, atoms in gathered_weights(analysis) for atom in atoms)


def gathered_weights(analysis: Analysis) -> Iterator[tuple[fx.Node, set[Atom]]]:
    """Each op that needs axes of a weight whole, and those. A weight that is transposed, or viewed, is one."""
    weights = {node: math.prod(node.meta["val"].shape) for node in analysis.trace.params.values()}
    for node, info in analysis.ops.items():
        for operand in info.operands:
            if operand.node in weights:
                made = set(atoms_of(analysis.dims[operand.node][operand.output]))
                if gathered := made - set(atoms_of(operand.dims)):
                    yield node, gathered
        viewed = [arg for arg, writes in aliased_args(node) if not writes and arg in weights]
        value = node.meta.get("val")
        if viewed and isinstance(value, torch.Tensor) and math.prod(value.shape) == weights[viewed[0]]:
            weights[node] = weights[viewed[0]]


def sharded_share(dims: Iterable[Dim], sharded: frozenset[Atom]) -> float:
    """Which share of a value's elements lies on one rank only: 1 for ``(F | F)`` over F, H/(H+2) for ``(H|1|1)``."""
    whole = 1.0
    for dim in dims:
        for factor in dim:
            if isinstance(factor, Cat):
                total = sum(_size(part) for part in factor.parts)
                share = sum(_size(part) * sharded_share([part], sharded) for part in factor.parts) / total
                whole *= 1 - share
            elif factor in sharded:
                whole = 0.0
    return 1 - whole


def _size(dim: Dim) -> int:
    n = 1
    for factor in dim:
        n *= sum(_size(part) for part in factor.parts) if isinstance(factor, Cat) else factor.size
    return n


def conflicts(
    analysis: Analysis, found: Iterable[Candidate]
) -> tuple[frozenset[Candidate], Mapping[Candidate, frozenset[Candidate]]]:
    """(candidates that conflict with themselves, the conflicts of each candidate).

    An axis on two dims of one value (an M×M weight between two residual adds) conflicts with itself.
    """
    found = tuple(found)
    pairs: set[frozenset[Atom]] = set()
    seen: set[tuple[Dim, ...]] = set()
    for value in _values(analysis):
        if value not in seen:
            seen.add(value)
            pairs |= meetings(value)[1]
    near: dict[Atom, set[Atom]] = defaultdict(set)
    for pair in pairs:
        a, b = (*pair, *pair)[:2]
        near[a].add(b)
        near[b].add(a)
    holders: dict[Atom, list[Candidate]] = defaultdict(list)
    for candidate in found:
        for atom in candidate.atoms:
            holders[atom].append(candidate)
    own = {c for c in found if any(a in near[a] for a in c.atoms)}
    result: dict[Candidate, frozenset[Candidate]] = {}
    for candidate in found:
        others = {
            other
            for a in candidate.atoms
            for b in (*near[a], a)
            for other in holders[b]
            if other is not candidate
        }
        result[candidate] = frozenset(others)
    return frozenset(own), result


def _values(analysis: Analysis) -> Iterator[tuple[Dim, ...]]:
    for outputs in analysis.dims.values():
        yield from outputs
    for info in analysis.ops.values():
        for operand in info.operands:
            yield operand.dims
