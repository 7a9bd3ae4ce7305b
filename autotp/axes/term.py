"""Logical axes of dims, inferred by unification.

A dim is a term: a product of factors, major to minor, each an `Atom` (an axis nobody has looked into yet) or
a `Cat` (a concatenation of dims). A dim of size 1 is the empty product ``()``::

    (K, G, D)                 k·g·d, as in a query projection of grouped-query attention
    (Cat(((F,), (F,))),)      (f | f), as in a fused gate and up projection

Ops *refine*: a view splits an atom into a product, a split cuts it into a concatenation, and an op with two
operands makes their dims one. An atom that was refined is bound to its term, and `Solver.resolve` replaces
bound atoms everywhere. Resolved dims have a normal form: a `Cat` stands only last in a product (what follows
it is distributed into its parts), its parts are no bare `Cat`, and there are at least two. So equal axes are
equal Python values.

Equality asked for by `unify` is made *syntactic*: the solver may refuse (`CannotUnify`) what some cleverer
refinement would allow, but what it accepts, holds. A frozen atom is never sharded, so nothing needs to be
known of its structure: a frozen dim unifies with any dim of its size, which becomes frozen, and neither is
refined. A *varying* atom is a frozen one whose size is the batch's or the sequence's, another one at each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autotp.axes.dim import (
    Atom,
    CannotUnify,
    Cat,
    Dim,
    Factor,
    atoms_of,
    concat,
    product,
    repeated_atoms,
    show,
    size_of,
)

__all__ = [
    "Atom",
    "CannotUnify",
    "Cat",
    "Dim",
    "Factor",
    "Solver",
    "atoms_of",
    "concat",
    "product",
    "repeated_atoms",
    "show",
    "size_of",
]

MAX_PARTS = 64  # a cut into more parts is a loop over single elements, not an axis that somebody would shard
MAX_STEPS = 400  # shifted slices (`x[1:] + x[:-1]`) would refine down to single elements, one at a time


class Solver:
    """All atoms of one analysis, what they are bound to, and which are frozen; every change can be undone."""

    def __init__(self) -> None:
        self._next = 0
        self._bound: dict[Atom, Dim] = {}
        self._frozen: dict[Atom, bool] = {}
        self._varying: dict[Atom, bool] = {}
        self._trail: list[tuple[dict[Atom, Any], Atom, Any]] = []
        self._steps = 0

    # ---- making and reading dims

    def fresh(self, size: int, frozen: bool = False) -> Dim:
        """A dim about which nothing is known: one new atom. Of size 1: the empty product."""
        return () if size == 1 else (self._atom(size, frozen),)

    def _atom(self, size: int, frozen: bool) -> Atom:
        atom = Atom(self._next, size)
        self._next += 1
        if frozen or size == 0:
            self._set(self._frozen, atom, True)
        return atom

    def size(self, dim: Dim) -> int:
        """The number of elements of a dim."""
        return size_of(dim)

    def concat(self, dims: Sequence[Dim]) -> Dim:
        """The concatenation of dims, in order."""
        return concat(self.resolve(dim) for dim in dims)

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The product of dims, major to minor (flatten)."""
        return product([factor for dim in dims for factor in self.resolve(dim)])

    def resolve(self, dim: Dim) -> Dim:
        """The dim in normal form, with all that is known of its atoms."""
        bound = self._bound
        if all(factor.__class__ is Atom and factor not in bound for factor in dim):
            return dim
        factors: list[Factor] = []
        changed = False
        for factor in dim:
            if isinstance(factor, Atom):
                if factor in bound:
                    changed = True
                    old = bound[factor]
                    new = self.resolve(old)
                    if new is not old:
                        self._set(bound, factor, new)
                    factors += new
                else:
                    factors.append(factor)
            else:
                parts = tuple(self.resolve(part) for part in factor.parts)
                if len(parts) > 1 and all(
                    new is old and not (len(new) == 1 and new[0].__class__ is Cat)
                    for new, old in zip(parts, factor.parts, strict=True)
                ):
                    factors.append(factor)
                else:
                    changed = True
                    factors += concat(parts)
        cats = sum(isinstance(f, Cat) for f in factors)
        if cats > 1 or (cats and not isinstance(factors[-1], Cat)):
            return product(factors)
        return tuple(factors) if changed else dim

    def atoms(self, dim: Dim) -> set[Atom]:
        """The atoms of the resolved dim."""
        return set(atoms_of(self.resolve(dim)))

    def clone(self, dims: Sequence[Dim]) -> tuple[Dim, ...]:
        """Dims of the same sizes with atoms of their own, for one use of a value that is whole on every rank.

        What is frozen stays frozen, and what varies varies. Structure is not kept: whichever slice the use
        needs can be cut from the whole value. (ALiBi slopes of 6 heads are made as 4 and 2; that must not cut
        the heads so.)
        """
        clones = tuple(self.fresh(size_of(dim), frozen=self.is_frozen(dim)) for dim in dims)
        for dim, clone in zip(dims, clones, strict=True):
            if self.is_frozen(dim) and self.varies(dim):  # batch times heads can be heads by rank
                self.vary(clone)
        return clones

    # ---- freezing

    def freeze(self, dim: Dim) -> None:
        """Never shard any of this dim's atoms."""
        for atom in atoms_of(self.resolve(dim)):
            if atom not in self._frozen:
                self._set(self._frozen, atom, True)

    def is_frozen(self, dim: Dim) -> bool:
        """Whether all of the dim's atoms are frozen (as those of a dim of size 1 are)."""
        return all(atom in self._frozen for atom in atoms_of(self.resolve(dim)))

    def vary(self, dim: Dim) -> None:
        """Each call has another number of this dim's elements; it is frozen, too."""
        self.freeze(dim)
        for atom in atoms_of(self.resolve(dim)):
            if atom not in self._varying:
                self._set(self._varying, atom, True)

    def varies(self, dim: Dim) -> bool:
        """Whether an atom of this dim varies."""
        return bool(self._varying) and any(atom in self._varying for atom in atoms_of(self.resolve(dim)))

    def frozen_atoms(self) -> frozenset[Atom]:
        """All frozen atoms."""
        return frozenset(atom for atom in self._frozen if atom not in self._bound)

    # ---- undoing

    def mark(self) -> int:
        """A point to return to with `undo`."""
        return len(self._trail)

    def undo(self, mark: int) -> None:
        """Take back everything since `mark`. Atoms made since then must no longer be used."""
        while len(self._trail) > mark:
            table, atom, old = self._trail.pop()
            if old is None:
                del table[atom]
            else:
                table[atom] = old

    def _set(self, table: dict[Atom, Any], atom: Atom, value: Any) -> None:
        self._trail.append((table, atom, table.get(atom)))
        table[atom] = value

    def _attempt(self, *ways: Callable[[], Any]) -> Any:
        """The result of the first way that works, all traces of the others undone."""
        for k, way in enumerate(ways):
            mark = self.mark()
            try:
                return way()
            except CannotUnify:
                self.undo(mark)
                if k == len(ways) - 1:
                    raise
        raise AssertionError("no ways")

    # ---- refining

    def unify(self, a: Dim, b: Dim) -> None:
        """Make two dims one axis, or raise `CannotUnify` and leave all as it was."""
        self._steps = 0
        self._attempt(lambda: self._unify(a, b))

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Refine the dim into a product of dims of these sizes, major to minor, as a view does."""
        if math.prod(sizes) != size_of(dim):
            raise CannotUnify(f"a dim of {size_of(dim)} is not a product of {list(sizes)}")
        real = [s for s in sizes if s != 1]
        if len(real) == 1:
            pieces = iter([self.resolve(dim)])
        elif self.is_frozen(dim):
            pieces = iter([self.fresh(s, frozen=True) for s in real])
        else:
            self._steps = 0
            pieces = iter(self._attempt(lambda: self._split(dim, real)))
        return [() if s == 1 else next(pieces) for s in sizes]

    def cut(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Refine the dim into a concatenation of dims of these sizes, as a split does."""
        if sum(sizes) != size_of(dim):
            raise CannotUnify(f"a dim of {size_of(dim)} is not a concatenation of {list(sizes)}")
        real = [s for s in sizes if s]
        if self.is_frozen(dim) and len(real) > 1:
            pieces = iter([self.fresh(s, frozen=True) for s in real])
        else:
            self._steps = 0
            pieces = iter(self._attempt(lambda: self._cut(dim, real)))
        return [self.resolve(next(pieces)) if s else self.fresh(0) for s in sizes]

    def _bind(self, atom: Atom, dim: Dim) -> None:
        if atom in set(atoms_of(dim)):
            raise CannotUnify(f"{atom} would contain itself: {show(dim)}")
        if atom in self._frozen:
            self.freeze(dim)
        if atom in self._varying:
            self.vary(dim)
        self._set(self._bound, atom, dim)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise CannotUnify("the refinement does not end (shifted slices of one axis)")

    def _unify(self, a: Dim, b: Dim) -> None:
        self._step()
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if size_of(a) != size_of(b):
            raise CannotUnify(f"{show(a)} has {size_of(a)} elements and {show(b)} has {size_of(b)}")
        for one, other in ((a, b), (b, a)):
            if any(atoms_of(one)) and self.is_frozen(one):  # (1 | 1 | 1) has no atoms
                self.freeze(other)
                if self.varies(one) or self.varies(other):
                    self.vary(one)
                    self.vary(other)
                return
        while a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        while a[0] == b[0]:
            a, b = a[1:], b[1:]
        mine, its = _lone_atom(a), _lone_atom(b)
        if mine is not None and its is not None:  # the older one stays: a weight's axis keeps its name
            self._bind(*((mine, b) if mine.id > its.id else (its, a)))
        elif mine is not None:
            self._bind(mine, b)
        elif its is not None:
            self._bind(its, a)
        else:
            ways: list[Callable[[], Any]] = []
            if len(a) > 1 or len(b) > 1:
                ways.append(lambda: self._align(a, b))
            if len(a) == 1:
                ways.append(lambda: self._unify_parts(a, b))
            if len(b) == 1:
                ways.append(lambda: self._unify_parts(b, a))
            self._attempt(*ways)

    def _align(self, a: Dim, b: Dim) -> None:
        """Unify products factor by factor, splitting the larger of the two major factors."""
        while a or b:
            self._step()
            a, b = self.resolve(a), self.resolve(b)
            if a == b:
                return
            n = min(a[0].size, b[0].size)
            head_a, a = self._take(a, n)
            head_b, b = self._take(b, n)
            self._unify(head_a, head_b)

    def _unify_parts(self, cat: Dim, other: Dim) -> None:
        """Unify a concatenation, part by part, with another term that is cut alike."""
        (factor,) = cat
        assert isinstance(factor, Cat)
        if len(factor.parts) > MAX_PARTS:
            raise CannotUnify(f"a concatenation of {len(factor.parts)} parts")
        sizes = [size_of(part) for part in factor.parts]
        if isinstance(other[0], Cat) and sizes != [size_of(part) for part in other[0].parts]:
            # the occurs check: (a | 1) against (1 | a), from shifted slices, would go down to single elements
            shared = {x for x in atoms_of(cat) if x not in self._frozen}.intersection(atoms_of(other))
            if shared:
                raise CannotUnify(
                    f"{show(cat)} against {show(other)} would shift {min(shared, key=lambda x: x.id)}"
                )
        pieces = self._cut(other, sizes)
        for part, piece in zip(factor.parts, pieces, strict=True):
            self._unify(part, piece)

    def _split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        pieces: list[Dim] = []
        rest = dim
        for size in sizes[:-1]:
            head, rest = self._take(self.resolve(rest), size)
            pieces.append(head)
        return [self.resolve(piece) for piece in (*pieces, rest)]

    def _take(self, dim: Dim, size: int) -> tuple[Dim, Dim]:
        """The dim as a product of an outer dim of this size and the rest."""
        head: list[Factor] = []
        rest = dim
        while size > 1:
            first = rest[0]
            if size % first.size == 0:
                head.append(first)
                rest, size = rest[1:], size // first.size
            elif first.size % size == 0:
                outer, inner = self._halve(first, size)
                head += outer
                rest, size = (*inner, *rest[1:]), 1
            else:
                raise CannotUnify(f"{show(dim)} has no outer factor of {size}")
        return self.resolve(tuple(head)), self.resolve(rest)

    def _halve(self, factor: Factor, outer: int) -> tuple[Dim, Dim]:
        """One factor as outer times inner."""
        self._step()
        inner = factor.size // outer
        if isinstance(factor, Atom):
            frozen = factor in self._frozen
            major, minor = self.fresh(outer, frozen), self.fresh(inner, frozen)
            self._bind(factor, (*major, *minor))
            return major, minor

        def each_part() -> tuple[Dim, Dim]:  # (H·D | D | D) = (H | 1 | 1)·D
            groups = _grouped(factor.parts, inner)
            if len(groups) == 1:
                raise CannotUnify(f"{show((factor,))} has no inner factor of {inner}")
            majors: list[Dim] = []
            minor: Dim | None = None
            for group in groups:
                major, own = self._take(self.resolve(group), size_of(group) // inner)
                majors.append(major)
                if minor is None:
                    minor = own
                else:
                    self._unify(minor, own)
            assert minor is not None
            return concat(self.resolve(m) for m in majors), self.resolve(minor)

        def whole_parts() -> tuple[Dim, Dim]:  # (A | B | A | B) = (1 | 1)·(A | B)
            if outer > MAX_PARTS:
                raise CannotUnify(f"{show((factor,))} as {outer} equal parts")
            pieces = self._cut((factor,), [inner] * outer)
            for piece in pieces[1:]:
                self._unify(pieces[0], piece)
            return (Cat(((),) * outer),), self.resolve(pieces[0])

        result: tuple[Dim, Dim] = self._attempt(each_part, whole_parts)
        return result

    def _cut(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        self._step()
        dim = self.resolve(dim)
        if len(sizes) == 1:
            return [dim]
        if len(sizes) > MAX_PARTS:
            raise CannotUnify(f"a cut into {len(sizes)} parts")
        first, rest = dim[0], dim[1:]
        if isinstance(first, Cat):
            return self._cut_parts(first, sizes)
        if not rest:
            frozen = first in self._frozen
            pieces = [self.fresh(s, frozen) for s in sizes]
            self._bind(first, concat(pieces))
            return pieces
        inner = size_of(rest)
        if any(s % inner for s in sizes):
            raise CannotUnify(f"{show(dim)} cannot be cut into {list(sizes)}, which {inner} does not divide")
        majors = self._cut((first,), [s // inner for s in sizes])
        return [self.product([major, rest]) for major in majors]

    def _cut_parts(self, cat: Cat, sizes: Sequence[int]) -> list[Dim]:
        pieces: list[Dim] = []
        queue = list(cat.parts)
        for size in sizes:
            piece: list[Dim] = []
            while size:
                self._step()
                part = self.resolve(queue.pop(0))
                n = size_of(part)
                if n > size:
                    part, remainder = self._cut(part, [size, n - size])
                    queue.insert(0, remainder)
                    n = size
                piece.append(part)
                size -= n
            pieces.append(concat(piece))
        return pieces


def _lone_atom(dim: Dim) -> Atom | None:
    return dim[0] if len(dim) == 1 and isinstance(dim[0], Atom) else None


def _grouped(parts: Sequence[Dim], inner: int) -> list[Dim]:
    """Consecutive parts put together until each group is a multiple of `inner`.

    With D of two halves, (H·D | D) is written (H·(d | d) | d | d), of which the last two belong together.
    """
    groups: list[Dim] = []
    group: list[Dim] = []
    for part in parts:
        group.append(part)
        if sum(size_of(p) for p in group) % inner == 0:
            groups.append(concat(group))
            group = []
    return groups


def units_in(dim: Dim, unit: int) -> Iterator[tuple[Atom, int]]:
    """How each atom of a dim has to be split so that what is left of the dim is a multiple of `unit`."""
    inner = 1
    for factor in reversed(dim):
        own = unit // math.gcd(unit, inner)
        if isinstance(factor, Cat):
            for part in factor.parts:
                yield from units_in(part, own)
        elif own > 1:
            yield factor, own
        inner *= size_of((factor,))
