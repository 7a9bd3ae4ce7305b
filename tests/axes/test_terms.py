"""Terms: unification as one-line tables, and laws of it by hypothesis."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.axes.layout import Partition, runs
from autotp.axes.term import (
    MAX_PARTS,
    Atom,
    CannotUnify,
    Cat,
    Dim,
    Solver,
    atoms_of,
    concat,
    product,
    repeated_atoms,
    show,
    size_of,
)


class Names:
    """Letters for atoms in order of appearance, their sizes after them."""

    def __init__(self) -> None:
        self.seen: dict[Atom, str] = {}

    def __call__(self, atom: Atom) -> str:
        return self.seen.setdefault(atom, "abcdefghijklmnopqrstuvwxyz"[len(self.seen)]) + str(atom.size)


def text(solver: Solver, *dims: Dim) -> str:
    names = Names()
    return " , ".join(show(solver.resolve(dim), names) for dim in dims)


SPLITS = [  # size of an atom, how it is split in turn, how it reads then
    (96, [[4, 3, 8]], "a4·b3·c8"),
    (96, [[4, 24], [4, 3, 8]], "a4·b3·c8"),
    (96, [[4, 24], [12, 8]], "a4·b3·c8"),
    (96, [[96]], "a96"),
    (96, [[1, 96, 1]], "a96"),
    (12, [[4, 3], [2, 6]], "a2·b2·c3"),
]


@pytest.mark.parametrize(("size", "splits", "expected"), SPLITS)
def test_split(size: int, splits: list[list[int]], expected: str) -> None:
    solver = Solver()
    dim = solver.fresh(size)
    for sizes in splits:
        pieces = solver.split(dim, sizes)
        assert [size_of(p) for p in pieces] == sizes
        assert solver.product(pieces) == solver.resolve(dim)
    assert text(solver, dim) == expected


CUTS = [
    (96, [[32, 32, 32]], "(a32 | b32 | c32)"),
    (96, [[64, 32], [32, 64]], "(a32 | b32 | c32)"),
    (10, [[0, 10]], "a10"),
    (10, [[1, 9], [9, 1]], "(1 | a8 | 1)"),
]


@pytest.mark.parametrize(("size", "cuts", "expected"), CUTS)
def test_cut(size: int, cuts: list[list[int]], expected: str) -> None:
    solver = Solver()
    dim = solver.fresh(size)
    for sizes in cuts:
        pieces = solver.cut(dim, sizes)
        assert [size_of(p) for p in pieces] == sizes
        assert solver.concat(pieces) == solver.resolve(dim)
    assert text(solver, dim) == expected


def test_fused_projection_is_a_concatenation_of_equal_products() -> None:
    """GPT-2: split in three, each viewed as heads by width, the heads one axis."""
    solver = Solver()
    weight = solver.fresh(96)
    q, k, v = (solver.split(piece, [4, 8]) for piece in solver.cut(weight, [32, 32, 32]))
    for other in (k, v):
        for a, b in zip(q, other, strict=True):
            solver.unify(a, b)
    assert text(solver, weight) == "(a4·b8 | a4·b8 | a4·b8)"
    three, heads, width = solver.split(weight, [3, 4, 8])  # ViT views the same weight as (3, heads, width)
    assert three == (Cat(((), (), ())),)
    assert (heads, width) == (solver.resolve(q[0]), solver.resolve(q[1]))


def test_view_of_three_unifies_with_a_chunk_in_three() -> None:
    solver = Solver()
    viewed, chunked = solver.fresh(96), solver.fresh(96)
    solver.split(viewed, [3, 32])
    solver.cut(chunked, [32, 32, 32])
    solver.unify(viewed, chunked)
    assert solver.resolve(viewed) == solver.resolve(chunked)
    assert text(solver, viewed) == "(a32 | a32 | a32)"


def test_multi_query_cut_of_heads_leaves_the_width_inside() -> None:
    """Falcon: (heads + 2)·width, of which the last two are key and value."""
    solver = Solver()
    weight = solver.fresh(6 * 8)
    heads, _ = solver.split(weight, [6, 8])
    assert text(solver, *solver.cut(heads, [4, 1, 1])) == "a4 , 1 , 1"
    assert text(solver, weight) == "(a4 | 1 | 1)·b8"
    flat = solver.fresh(6 * 8)
    solver.cut(flat, [32, 8, 8])
    solver.unify(flat, weight)
    assert solver.resolve(flat) == solver.resolve(weight)


def test_multi_query_with_a_width_of_two_halves() -> None:
    """Falcon again, in the second step of a generation: the width has been cut by the rotary embedding."""
    solver = Solver()
    weight = solver.fresh(6 * 8)
    heads, width = solver.split(weight, [6, 8])
    queries, *_ = solver.cut(heads, [4, 1, 1])
    solver.cut(width, [4, 4])
    assert text(solver, weight) == "(a4·(b4 | c4) | b4 | c4 | b4 | c4)"
    again, halves = solver.split(weight, [6, 8])
    assert text(solver, again, halves) == "(a4 | 1 | 1) , (b4 | c4)"
    assert again == solver.resolve(heads)
    assert solver.atoms(queries) < solver.atoms(weight)


def test_query_heads_become_kv_heads_by_group() -> None:
    """Llama: repeated keys say that the queries' heads are kv heads by group."""
    solver = Solver()
    q, k = solver.fresh(64), solver.fresh(32)
    q_heads, _ = solver.split(q, [4, 16])
    k_heads, _ = solver.split(k, [2, 16])
    solver.unify(q_heads, solver.product([k_heads, solver.fresh(2)]))
    assert text(solver, q, k) == "a2·b2·c16 , a2·d16"


def times(solver: Solver, *sizes: int) -> Dim:
    """A product of new atoms."""
    return solver.product([solver.fresh(size) for size in sizes])


REFUSED = [
    ("cut inside an inner factor", lambda s: s.cut(times(s, 4, 6), [9, 15])),
    ("products that do not nest", lambda s: s.unify(times(s, 4, 9), times(s, 6, 6))),
    ("split across factors", lambda s: s.split(times(s, 6, 6), [4, 9])),
    ("sizes", lambda s: s.unify(s.fresh(4), s.fresh(6))),
    ("split sizes", lambda s: s.split(s.fresh(4), [3, 2])),
    ("cut sizes", lambda s: s.cut(s.fresh(4), [3, 2])),
    ("single elements", lambda s: s.cut(s.fresh(MAX_PARTS + 1), [1] * (MAX_PARTS + 1))),
    ("cut inside a factor of a part", lambda s: s.cut(s.concat([times(s, 4, 6), s.fresh(5)]), [9, 20])),
]  # fmt: skip


@pytest.mark.parametrize(("what", "attempt"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(what: str, attempt) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CannotUnify):
        attempt(Solver())


def test_shifted_slices_do_not_recurse_to_single_elements() -> None:
    """`x[1:] + x[:-1]`: unifying the pieces would make every element the same as the next one."""
    solver = Solver()
    dim = solver.fresh(1000)
    first, _ = solver.cut(dim, [999, 1])
    _, last = solver.cut(dim, [1, 999])
    before = solver.resolve(dim)
    with pytest.raises(CannotUnify):
        solver.unify(first, last)
    assert solver.resolve(dim) == before


def test_failed_unification_leaves_no_trace() -> None:
    solver = Solver()
    a = solver.product(
        [solver.fresh(10), solver.fresh(4), solver.fresh(9)]
    )  # the first factors unify, the rest does not
    b = solver.product([solver.fresh(2), solver.fresh(5), solver.fresh(6), solver.fresh(6)])
    before = [solver.resolve(d) for d in (a, b)]
    with pytest.raises(CannotUnify):
        solver.unify(a, b)
    assert [solver.resolve(d) for d in (a, b)] == before
    solver.unify(a[:1], b[:2])
    assert solver.resolve(a[:1]) == solver.resolve(b[:2])


def test_frozen_dims_are_not_refined() -> None:
    solver = Solver()
    batch, free = solver.fresh(6, frozen=True), solver.fresh(6)
    solver.split(free, [2, 3])
    solver.unify(batch, free)
    assert solver.is_frozen(free)
    assert text(solver, batch) == "a6"
    pieces = solver.cut(batch, [1, 5])
    assert text(solver, batch) == "a6"
    assert all(solver.is_frozen(p) for p in pieces)


def test_children_of_a_frozen_atom_are_frozen() -> None:
    solver = Solver()
    heads = solver.fresh(5)
    dim = solver.product([solver.fresh(6, frozen=True), heads])
    two, rest = solver.split(dim, [2, 15])
    assert solver.is_frozen(two)
    assert not solver.is_frozen(rest)
    assert not solver.is_frozen(heads)


def test_the_older_atom_stays() -> None:
    solver = Solver()
    old, new = solver.fresh(7), solver.fresh(7)
    solver.unify(new, old)
    assert solver.resolve(new) == old


def test_clone_keeps_sizes_and_frozenness_only() -> None:
    solver = Solver()
    half, batch = solver.fresh(4), solver.fresh(3, frozen=True)
    dims = (batch, solver.concat([half, half]), half, ())
    copy = solver.clone(dims)
    assert text(solver, *copy) == "a3 , b8 , c4 , 1"
    assert not solver.atoms(copy[1]) & solver.atoms(dims[1])
    assert solver.is_frozen(copy[0])
    assert not solver.is_frozen(copy[1])


def test_undo() -> None:
    solver = Solver()
    dim = solver.fresh(12)
    mark = solver.mark()
    solver.split(dim, [3, 4])
    solver.freeze(dim)
    solver.undo(mark)
    assert text(solver, dim) == "a12"
    assert not solver.is_frozen(dim)


def test_repeated_atoms() -> None:
    a, b, c = (Atom(k, 4) for k in range(3))
    assert repeated_atoms([(a,), (b,), (a,)]) == {a}
    assert repeated_atoms([(Cat(((a,), (a,), (b,))),), (c,)]) == frozenset()  # segments lie side by side
    assert repeated_atoms([(Cat(((a,), (b,))),), (b,)]) == {b}
    assert repeated_atoms([(a, b, a)]) == {a}


NORMAL = [
    (lambda a, b, c: concat([(a,), concat([(b,), (c,)])]), "(a2 | b3 | c5)"),
    (lambda a, b, c: concat([(a, b)]), "a2·b3"),
    (lambda a, b, c: product([Cat(((a,), ())), b]), "(a2 | 1)·b3"),
    (lambda a, b, c: product([Cat(((a,), (c,))), b]), "(a2 | b5)·c3"),
    (lambda a, b, c: product([a, *concat([(b,), (c,)])]), "a2·(b3 | c5)"),
    (lambda a, b, c: product([Cat(((), ())), a, b]), "(a2·b3 | a2·b3)"),
]


@pytest.mark.parametrize(("make", "expected"), NORMAL, ids=[n[1] for n in NORMAL])
def test_normal_form(make, expected: str) -> None:  # type: ignore[no-untyped-def]
    dim = make(Atom(0, 2), Atom(1, 3), Atom(2, 5))
    assert show(dim, Names()) == expected
    assert Solver().resolve(dim) == dim


# ---- laws


@st.composite
def factorization(draw: st.DrawFn, n: int) -> list[int]:
    sizes = []
    while n > 1:
        divisor = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        sizes.append(divisor)
        n //= divisor
    return sizes


@st.composite
def composition(draw: st.DrawFn, n: int) -> list[int]:
    cuts = draw(st.sets(st.integers(1, n - 1), max_size=3)) if n > 1 else set()
    ends = [0, *sorted(cuts), n]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def check_consistent(solver: Solver, dims: list[Dim], sizes: list[int]) -> None:
    for dim, size in zip(dims, sizes, strict=True):
        resolved = solver.resolve(dim)
        assert size_of(resolved) == size
        assert solver.resolve(resolved) == resolved
        check_normal(resolved)


def check_same_layout(solver: Solver, a: Dim, b: Dim) -> None:
    """What unifies is sharded alike, whatever axis is sharded; frozen factors may be written in two ways."""
    a, b = solver.resolve(a), solver.resolve(b)
    for atom in {*atoms_of(a), *atoms_of(b)}:
        if not solver.is_frozen((atom,)):
            partition = Partition({atom.id: ((0, 1), (1, atom.size))})
            assert runs(a, partition, 0) == runs(b, partition, 0)
            assert runs(a, partition, 1) == runs(b, partition, 1)


def check_normal(dim: Dim) -> None:
    assert not any(isinstance(f, Cat) for f in dim[:-1])
    for factor in dim:
        if isinstance(factor, Cat):
            assert len(factor.parts) > 1
            for part in factor.parts:
                assert not (len(part) == 1 and isinstance(part[0], Cat))
                check_normal(part)
        else:
            assert factor.size > 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_sequence_of_refinements_keeps_sizes_and_normal_form(data: st.DataObject) -> None:
    solver = Solver()
    dims = [solver.fresh(data.draw(st.sampled_from([6, 12, 24]))) for _ in range(3)]
    for _ in range(data.draw(st.integers(1, 7))):
        dim = dims[data.draw(st.integers(0, len(dims) - 1))]
        before = [solver.resolve(d) for d in dims]
        action = data.draw(st.sampled_from(["split", "cut", "unify", "concat", "freeze"]))
        try:
            if action == "split":
                sizes = data.draw(factorization(size_of(dim)))
                pieces = solver.split(dim, sizes)
                assert [size_of(p) for p in pieces] == sizes
                if not solver.is_frozen(dim):
                    check_same_layout(solver, solver.product(pieces), dim)
                dims += pieces[:2]
            elif action == "cut":
                sizes = data.draw(composition(size_of(dim)))
                pieces = solver.cut(dim, sizes)
                assert [size_of(p) for p in pieces] == sizes
                if not solver.is_frozen(dim):
                    check_same_layout(solver, solver.concat(pieces), dim)
                dims += pieces[:2]
            elif action == "unify":
                same = [d for d in dims if size_of(d) == size_of(dim)]
                other = data.draw(st.sampled_from(same))
                solver.unify(dim, other)
                check_same_layout(solver, dim, other)
            elif action == "concat":
                joined = solver.concat([dim, data.draw(st.sampled_from(dims))])
                if size_of(joined) <= 48:
                    dims.append(joined)
            elif data.draw(st.integers(0, 3)) == 0:
                solver.freeze(dim)
        except CannotUnify:
            assert [solver.resolve(d) for d in dims] == before
        check_consistent(solver, dims, [size_of(d) for d in dims])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_undo_restores_everything(data: st.DataObject) -> None:
    solver = Solver()
    dims = [solver.fresh(12) for _ in range(3)]
    solver.split(dims[0], data.draw(factorization(12)))
    before = [solver.resolve(d) for d in dims]
    mark = solver.mark()
    for k in range(3):
        try:
            solver.unify(dims[k], dims[data.draw(st.integers(0, 2))])
            solver.cut(dims[k], data.draw(composition(12)))
        except CannotUnify:
            pass
    solver.undo(mark)
    assert [solver.resolve(d) for d in dims] == before


def test_sizes_are_products_and_sums() -> None:
    dim = (Atom(0, 2), Cat(((Atom(1, 3), Atom(2, 5)), ())))
    assert size_of(dim) == 2 * (15 + 1) == math.prod([2, 16])
    assert [a.id for a in atoms_of(dim)] == [0, 1, 2]
