"""Layout: the elements that each rank holds, and the whole tensor back from them."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.axes.layout import (
    Partition,
    indices_of,
    local_shape,
    local_size,
    merge,
    owners,
    runs,
    slice_tensor,
)
from autotp.axes.term import Atom, Cat, Dim, concat, product, size_of

H, K, G, D, F, M = (Atom(k, n) for k, n in enumerate((6, 2, 4, 5, 7, 11)))
EVEN = Partition({H.id: ((0, 2), (2, 4), (4, 6))})
UNEVEN = Partition({H.id: ((0, 2), (2, 4), (4, 5), (5, 6))})
NESTED = Partition({K.id: ((0, 1), (0, 1), (1, 2), (1, 2)), G.id: ((0, 2), (2, 4), (0, 2), (2, 4))})
WIDTH = Partition({F.id: ((0, 4), (4, 7))})
EMPTY = Partition({K.id: ((0, 1), (1, 2), (2, 2))})

RUNS: list[tuple[str, Dim, Partition, int, list[tuple[int, int]]]] = [
    ("heads are contiguous", (H, D), EVEN, 1, [(10, 10)]),
    ("heads, uneven", (H, D), UNEVEN, 2, [(20, 5)]),
    ("width inside heads", (D, H), EVEN, 0, [(0, 2), (6, 2), (12, 2), (18, 2), (24, 2)]),
    ("fused gate and up", (Cat(((F,), (F,))),), WIDTH, 1, [(4, 3), (11, 3)]),
    ("fused qkv", (Cat(((H, D), (H, D), (H, D))),), EVEN, 2, [(20, 10), (50, 10), (80, 10)]),
    ("multi-query", (Cat(((H, D), (D,), (D,))),), EVEN, 0, [(0, 10), (30, 10)]),
    ("multi-query, last rank", (Cat(((H, D), (D,), (D,))),), EVEN, 2, [(20, 20)]),
    ("interleaved", (H, Cat(((D,), (D,), (D,)))), EVEN, 1, [(30, 30)]),
    ("kv heads by group", (K, G, D), NESTED, 3, [(30, 10)]),
    ("kv heads, held twice", (K, D), NESTED, 3, [(5, 5)]),
    ("not sharded", (M,), EVEN, 0, [(0, 11)]),
    ("size 1", (), EVEN, 0, [(0, 1)]),
    ("empty", (K, D), EMPTY, 2, []),
    ("part of a part", (Cat(((K, D), (M,))),), EMPTY, 1, [(5, 16)]),
]


@pytest.mark.parametrize(("what", "dim", "partition", "rank", "expected"), RUNS, ids=[r[0] for r in RUNS])
def test_runs(what: str, dim: Dim, partition: Partition, rank: int, expected: list[tuple[int, int]]) -> None:
    assert runs(dim, partition, rank) == expected
    assert local_size(dim, partition, rank) == sum(n for _, n in expected)


def test_ranks_that_hold_the_same() -> None:
    assert owners([(K, D), (M,)], NESTED) == ((0, 1), (2, 3))
    assert owners([(K, G, D)], NESTED) == ((0,), (1,), (2,), (3,))
    assert owners([(M,)], NESTED) == ((0, 1, 2, 3),)


ROUND_TRIPS: list[tuple[tuple[Dim, ...], Partition]] = [
    (((H, D), (M,)), EVEN),
    (((M,), (H, D)), UNEVEN),
    (((Cat(((F,), (F,))),), (M,)), WIDTH),
    (((M,), (Cat(((K, G, D), (K, D), (K, D))),)), NESTED),
    (((K, D),), NESTED),
    (((K, D), (M,)), EMPTY),
    (
        ((D, H), (M,), (K, Cat(((H,), (D,))))),
        EVEN,
    ),  # two scattered dims; nonsense as a sharding, fine as a layout
    (((), (Cat(((H, D), (D,), (D,))),)), UNEVEN),
]


@pytest.mark.parametrize(("dims", "partition"), ROUND_TRIPS)
def test_round_trip(dims: tuple[Dim, ...], partition: Partition) -> None:
    whole = torch.arange(math.prod(size_of(d) for d in dims)).reshape([size_of(d) for d in dims])
    parts = [slice_tensor(whole, dims, partition, rank) for rank in range(partition.size)]
    assert [tuple(p.shape) for p in parts] == [
        local_shape(dims, partition, rank) for rank in range(partition.size)
    ]
    repeated = dims == ROUND_TRIPS[6][0]
    if repeated:  # H stands on two dims: the slices are a diagonal, they do not tile the tensor
        with pytest.raises(ValueError, match="does not tile"):
            merge(parts, dims, partition)
    else:
        assert torch.equal(merge(parts, dims, partition), whole)


def test_scattered_dims_are_written_where_they_were_read() -> None:
    a, b = Atom(10, 4), Atom(11, 6)
    partition = Partition({a.id: ((0, 2), (2, 4), (0, 2), (2, 4)), b.id: ((0, 3), (0, 3), (3, 6), (3, 6))})
    dims = ((D, a), (M,), (K, b))
    whole = torch.randn([size_of(d) for d in dims])
    parts = [slice_tensor(whole, dims, partition, rank) for rank in range(4)]
    assert torch.equal(merge(parts, dims, partition), whole)


def test_a_contiguous_slice_is_a_view() -> None:
    whole = torch.randn(30, 11)
    assert slice_tensor(whole, ((H, D), (M,)), EVEN, 1).data_ptr() == whole[10:].data_ptr()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        slice_tensor(torch.zeros(3, 11), ((H, D), (M,)), EVEN, 0)
    with pytest.raises(ValueError, match="its layout says"):
        merge([torch.zeros(30, 11)] * 3, ((H, D), (M,)), EVEN)


def test_missing_elements_are_refused() -> None:
    partition = Partition({H.id: ((0, 2), (3, 6))})
    parts = [slice_tensor(torch.zeros(6), ((H,),), partition, rank) for rank in range(2)]
    with pytest.raises(ValueError, match="no rank holds 1 elements of 6"):
        merge(parts, ((H,),), partition)


def test_a_large_vocabulary_is_fast() -> None:
    vocab, width = Atom(20, 128_256), Atom(21, 2)
    partition = Partition({vocab.id: tuple((k * 16032, (k + 1) * 16032) for k in range(8))})
    whole = torch.zeros(128_256 * 2, 4, dtype=torch.int8)
    start = time.perf_counter()
    for rank in range(8):
        slice_tensor(whole, ((width, vocab), (Atom(22, 4),)), partition, rank)
        slice_tensor(whole, ((vocab, width), (Atom(22, 4),)), partition, rank)
    assert time.perf_counter() - start < 2


@st.composite
def some_dim(draw: st.DrawFn, depth: int = 2) -> Dim:
    atoms = [H, K, G, D, F]
    if depth == 0 or draw(st.booleans()):
        return product(draw(st.lists(st.sampled_from(atoms), min_size=0, max_size=2)))
    parts = draw(st.lists(some_dim(depth - 1), min_size=2, max_size=3))
    majors = draw(st.lists(st.sampled_from(atoms), max_size=1))
    return product([*majors, *concat(parts)])


@st.composite
def some_partition(draw: st.DrawFn) -> Partition:
    tp = draw(st.integers(1, 4))
    ranges = {}
    for atom in draw(st.sets(st.sampled_from([H, K, G, D, F]), min_size=1, max_size=2)):
        cuts = sorted(draw(st.lists(st.integers(0, atom.size), min_size=tp - 1, max_size=tp - 1)))
        ends = [0, *cuts, atom.size]
        ranges[atom.id] = tuple(zip(ends, ends[1:], strict=False))
    return Partition(ranges)


def label(dim: Dim, partition: Partition, rank: int) -> list[bool]:
    """Element by element, by the definition: whether a rank holds it."""
    held = [True]
    for factor in dim:
        if isinstance(factor, Cat):
            own = [h for part in factor.parts for h in label(part, partition, rank)]
        else:
            start, stop = partition.range_of(factor, rank)
            own = [start <= k < stop for k in range(factor.size)]
        held = [a and b for a in held for b in own]
    return held


@settings(max_examples=100, deadline=None)
@given(some_dim(), some_partition())
def test_runs_are_the_elements_that_the_definition_says(dim: Dim, partition: Partition) -> None:
    for rank in range(partition.size):
        found = runs(dim, partition, rank)
        assert indices_of(found).tolist() == np.flatnonzero(label(dim, partition, rank)).tolist()
        assert local_size(dim, partition, rank) == len(indices_of(found))
        assert all(a + n < b for (a, n), (b, _) in zip(found, found[1:], strict=False)), (
            "adjacent runs are merged"
        )
