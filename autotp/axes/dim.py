"""Dims as terms: products of atoms and concatenations, their normal form, and how they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias


class CannotUnify(Exception):
    """Two dims cannot be made one axis, or a dim cannot be refined as asked: the op is blocked there."""


class Atom:
    """A logical axis. Two atoms are the same only if they are the same object."""

    __slots__ = ("id", "size")

    def __init__(self, id: int, size: int) -> None:
        self.id = id
        self.size = size

    def __repr__(self) -> str:
        return f"a{self.id}:{self.size}"


class Cat:
    """A concatenation of dims, equal if the parts are. Size and hash are kept: they are asked for often."""

    __slots__ = ("_hash", "parts", "size")

    def __init__(self, parts: tuple[Dim, ...]) -> None:
        self.parts = parts
        self.size = sum(size_of(part) for part in parts)
        self._hash = hash(parts)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Cat) and self._hash == other._hash and self.parts == other.parts
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Cat({self.parts!r})"


Factor: TypeAlias = Atom | Cat
Dim: TypeAlias = tuple[Factor, ...]


def size_of(dim: Dim) -> int:
    """The number of elements of a dim."""
    n = 1
    for factor in dim:
        n *= factor.size
    return n


def atoms_of(dim: Dim) -> Iterator[Atom]:
    """The atoms of a dim as it is written, in order, with repetitions."""
    for factor in dim:
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from atoms_of(part)


def concat(parts: Iterable[Dim]) -> Dim:
    """The concatenation of dims, nested ones flattened and empty ones left out."""
    flat: list[Dim] = []
    for part in parts:
        if len(part) == 1 and isinstance(part[0], Cat):
            flat += part[0].parts
        elif size_of(part):
            flat.append(part)
    return flat[0] if len(flat) == 1 else (Cat(tuple(flat)),)


def product(factors: Sequence[Factor]) -> Dim:
    """The product of factors in normal form: what follows a `Cat` moves into its parts."""
    for k, factor in enumerate(factors[:-1]):
        if isinstance(factor, Cat):
            rest = tuple(factors[k + 1 :])
            return (*factors[:k], *concat(product((*part, *rest)) for part in factor.parts))
    return tuple(factors)


def repeated_atoms(dims: Sequence[Dim]) -> frozenset[Atom]:
    """Atoms that stand on two dims of one value, or twice in one product: they would shard it twice.

    Segments of a concatenation lie side by side, so an atom in several segments of one dim counts once.
    """
    count: dict[Atom, int] = {}
    for dim in dims:
        for atom, n in _multiplicity(dim).items():
            count[atom] = count.get(atom, 0) + n
    return frozenset(atom for atom, n in count.items() if n > 1)


def _multiplicity(dim: Dim) -> dict[Atom, int]:
    count: dict[Atom, int] = {}
    for factor in dim:
        if isinstance(factor, Atom):
            count[factor] = count.get(factor, 0) + 1
            continue
        most: dict[Atom, int] = {}
        for part in factor.parts:
            for atom, n in _multiplicity(part).items():
                most[atom] = max(most.get(atom, 0), n)
        for atom, n in most.items():
            count[atom] = count.get(atom, 0) + n
    return count


def show(dim: Dim, name: Callable[[Atom], str] = repr) -> str:
    """A dim as text: ``K·G·D``, ``(F | F)``, ``(H | 1 | 1)·D``; common minor factors stand once."""

    def factor_text(factor: Factor) -> str:
        if isinstance(factor, Atom):
            return name(factor)
        parts, tail = factor.parts, 0
        while all(len(p) > tail for p in parts) and len({p[len(p) - 1 - tail] for p in parts}) == 1:
            tail += 1
        if tail and len(set(parts)) == 1:  # (H·D | H·D | H·D) rather than 3 times
            tail = 0
        text = "(" + " | ".join(show(p[: len(p) - tail], name) for p in parts) + ")"
        return "·".join([text, *(factor_text(f) for f in parts[0][len(parts[0]) - tail :])])

    return "·".join(factor_text(factor) for factor in dim) or "1"
