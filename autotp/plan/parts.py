"""What the ranks have of a value, for one choice of axes: which elements lie on one rank, which are sliced alike."""

from __future__ import annotations

from ..axes.layout import Partition, common_parts
from ..axes.term import Atom, Cat, Dim
from .candidates import atoms_of


def covers(dim: Dim, sharded: frozenset[Atom]) -> bool:
    """Whether each element of ``dim`` lies on one rank only: no part of a Cat stays whole."""
    for factor in dim:
        if isinstance(factor, Atom):
            if factor in sharded:
                return True
        elif all(covers(part, sharded) for part in factor.parts):
            return True
    return False


def sliced_alike(a: Dim, b: Dim, sharded: frozenset[Atom]) -> bool:
    """Whether a rank's slices of two dims are the same elements, whatever the axes that are whole are called.

    A group norm takes channels ``H·D`` as ``H·d``, with a d that it needs whole: over H they are sliced alike.
    """
    return a == b or _cut_by(a, sharded) == _cut_by(b, sharded)


def _cut_by(dim: Dim, sharded: frozenset[Atom]) -> tuple[object, ...]:
    """The dim as a product of sharded axes, concatenations that hold some, and sizes of all else."""
    found: list[object] = []
    for factor in dim:
        if isinstance(factor, Cat) and sharded & frozenset(atoms_of([(factor,)])):
            found.append(tuple(_cut_by(part, sharded) for part in factor.parts))
        elif isinstance(factor, Atom) and factor in sharded:
            found.append(factor)
        elif found and isinstance(found[-1], int):
            found[-1] *= factor.size
        else:
            found.append(factor.size)
    return tuple(found)


def is_disjoint(dims: tuple[Dim, ...], sharded: frozenset[Atom], pairs: dict[Atom, Atom]) -> bool:
    """Whether each element of a value with these dims lies on exactly one rank.

    ``pairs`` maps the outer to the inner axis of nested candidates: only together do they tell ranks apart.
    """
    single = sharded - set(pairs) - set(pairs.values())
    if any(covers(dim, single) for dim in dims):
        return True
    return any(
        any(covers(dim, single | {outer}) for dim in dims)
        and any(covers(dim, single | {inner}) for dim in dims)
        for outer, inner in pairs.items()
    )


def sums_once(dims: tuple[Dim, ...], partition: Partition) -> bool:
    """Whether the gradient of a parameter with these dims can be summed in one group of ranks each.

    One key head for two query heads of 4 over 3 ranks: elements 0:2, 2:4 and 0:4, of which no two ranks are one group.
    """
    try:
        common_parts(dims, partition, 0)
    except ValueError:
        return False
    return True
