"""Rules of structural ops: what they say of axes, their local arguments, and that slicing commutes with them."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autotp.axes.analysis import Analysis
from autotp.axes.layout import Partition, local_size
from autotp.axes.rules.view import groups
from autotp.axes.term import Atom, Dim, atoms_of, repeated_atoms, show
from tests.axes.proof import OneOp, Sample, check, ints, real, signature
from tests.axes.sketch import Sketch, aten, commutes, on_rank


def s(target: str, expected: str, *args: Any, unclaimed: bool = False, **kwargs: Any) -> Sample:
    return Sample(target, expected, args, kwargs, unclaimed)


C = torch.complex(real(3, 5), real(3, 5, seed=1))

SAMPLES = [
    s("view", "a(bc) -> abc", real(5, 12), [5, 3, 4]),
    s("view", "abc -> (ab)c", real(2, 3, 5), [-1, 5]),
    s("view", "abc -> a(bc)", real(2, 3, 5), [2, -1]),
    s("view", "a1b -> ab1", real(3, 1, 5), [3, 5, 1]),
    s("view", "** -> **", real(4, 9), [6, 6]),
    s("reshape", "(ab)cd -> a(bc)d", real(4, 3, 5), [2, 6, 5]),
    s("flatten.using_ints", "abc -> a(bc)", real(2, 3, 5), 1),
    s("unflatten.int", "(ab)c -> abc", real(6, 5), 0, [2, 3]),
    s("permute", "abc -> cab", real(2, 3, 5), [2, 0, 1]),
    s("transpose.int", "abc -> acb", real(2, 3, 5), 1, -1),
    s("t", "ab -> ba", real(3, 5)),
    s("movedim.int", "abc -> bca", real(2, 3, 5), 0, -1),
    s("movedim.intlist", "abc -> cab", real(2, 3, 5), [2, 0], [0, 1]),
    s("squeeze", "*1* -> **", real(3, 1, 5)),
    s("squeeze.dim", "a* -> a*", real(3, 5), 1),
    s("squeeze.dim", "a1b -> ab", real(3, 1, 5), 1),
    s("squeeze.dims", "1*1 -> *1", real(1, 3, 1), [0, 1]),
    s("unsqueeze", "ab -> ab1", real(3, 5), -1),
    s("expand", "1a -> ba", real(1, 5), [3, -1]),
    s("expand", "a -> bca", real(5), [2, 3, 5]),
    s("expand_as", "1a, ba -> ba", real(1, 5), real(3, 5), unclaimed=True),
    s("repeat", "a -> b(ca)", real(5), [2, 3]),
    s("tile", "ab -> a(cb)", real(3, 5), [2]),
    s("repeat_interleave.self_int", "ab -> (ac)b", real(3, 5), 2, 0),
    s("repeat_interleave.self_int", "ab -> (abc)", real(3, 5), 2),
    s("repeat_interleave.self_Tensor", "*a, * -> *a", real(3, 5), torch.tensor([1, 2, 2]), 0),
    s("split_with_sizes", "a(b|c|d) -> ab, ac, ad", real(5, 9), [4, 2, 3], -1),
    s("tensor_split.indices", "(a|b)c -> ac, bc", real(5, 3), [3]),
    s("unbind.int", "*a -> a, a, a", real(3, 5)),
    s("select.int", "a* -> a", real(3, 5), 1, -2),
    s("slice.Tensor", "a(b|c) -> ab", real(3, 5), 1, 0, 3),
    s("slice.Tensor", "a(b|c) -> ac", real(3, 5), 1, 3, sys.maxsize),
    s("slice.Tensor", "a(b|c) -> ac", real(3, 5), 1, -2),
    s("slice.Tensor", "a(1|b|1) -> ab", real(3, 5), 1, 1, -1),
    s("slice.Tensor", "ab -> ab", real(3, 5), 1, 0, 99),
    s("slice.Tensor", "ab -> ab", real(3, 5), 0, -9, 3),
    s("slice.Tensor", "a(b*) -> ab", real(3, 6), 1, 0, sys.maxsize, 2),
    s("slice.Tensor", "a(b*) -> ab", real(3, 6), 1, 1, 6, 2),
    s("slice.Tensor", "a* -> a*", real(3, 7), 1, 0, sys.maxsize, 2),
    s("slice.Tensor", "a* -> a*", real(3, 6), 1, 2, sys.maxsize, 2),
    s("narrow", "a(1|b|c) -> ab", real(3, 6), 1, 1, 3),
    s("cat", "ab, cb -> (a|c)b", [real(2, 5), real(3, 5)]),
    s("cat", "ab, ac -> a(b|c)", [real(3, 2), real(3, 4)], -1),
    s("stack", "ab, ab -> ab*", [real(2, 5), real(2, 5, seed=3)], -1),
    s("hstack", "ab, ac -> a(b|c)", [real(3, 2), real(3, 4)]),
    s("index.Tensor", "*a, b -> ba", real(3, 5), [ints(3, 7)]),
    s("index.Tensor", "a*, bc -> abc", real(3, 5), [None, ints(5, 2, 3)]),
    s("index.Tensor", "a**b, cd, d -> acdb", real(2, 3, 5, 7), [None, ints(3, 2, 4), ints(5, 4)]),
    s("index.Tensor", "*a*b, cd, d -> cdab", real(2, 3, 5, 7), [ints(2, 6, 4), None, ints(5, 4)]),
    s("index.Tensor", "*a, b1 -> b1a", real(3, 5), [ints(3, 2, 1)]),
    s("gather", "a*, ab -> ab", real(3, 5), 1, ints(5, 3, 2)),
    s("gather", "**, *a -> *a", real(3, 5), 1, ints(5, 2, 4)),
    s("index_select", "a*, b -> ab", real(3, 5), 1, ints(5, 4)),
    s("scatter.src", "a*, a*, a* -> a*", real(3, 5), 1, torch.argsort(real(3, 5)), real(3, 5, seed=2)),
    s("scatter.value", "a*, a* -> a*", real(3, 5), 1, ints(5, 3, 2), 0.0, unclaimed=True),
    s("scatter_add", "a*, a*, a* -> a*", real(3, 5), 1, ints(5, 3, 5), real(3, 5, seed=4)),
    s("index_add", "*a, *, *a -> *a", real(3, 5), 0, ints(3, 4), real(4, 5)),
    s("index_copy", "*a, *, *a -> *a", real(3, 5), 0, torch.tensor([2, 0]), real(2, 5)),
    s("index_put", "*a, *, *a -> *a", real(3, 5), [torch.tensor([2, 0])], real(2, 5)),
    s("index_put", "*a, *, a -> *a", real(3, 5), [torch.tensor([2, 0])], real(5)),
    s("index_fill.int_Scalar", "*a, * -> *a", real(3, 5), 0, torch.tensor([2, 0]), 1.0),
    s("roll", "a* -> a*", real(3, 5), [1], [1]),
    s("roll", "** -> **", real(3, 5), [1]),
    s("flip", "a* -> a*", real(3, 5), [1]),
    s("tril", "a** -> a**", real(2, 3, 5)),
    s("triu", "** -> **", real(3, 5), 1),
    s("diagonal", "a** -> a*", real(2, 3, 3), 0, 1, 2),
    s("diag_embed", "a* -> a**", real(2, 3)),
    s("constant_pad_nd", "", real(3, 5), [2, 1]),
    s("constant_pad_nd", "a* -> a*", real(3, 5), [-1, 1]),
    s("constant_pad_nd", "", real(3, 5), [0, 0, 1, 0], 2.0),
    s("pad", "ab* -> ab*", real(2, 3, 5), [1, 1], mode="reflect"),
    s("unfold", "a* -> a**", real(3, 7), 1, 3, 2),
    s("view_as_complex", "ab* -> ab", real(3, 5, 2)),
    s("view_as_real", "ab -> ab*", C),
    s("clone", "ab -> ab", real(3, 5)),
    s("contiguous", "ab -> ab", real(3, 5)),
    s("to.dtype", "ab -> ab", real(3, 5), torch.float64),
    s("to.dtype", "ab -> ab", real(3, 5), torch.int64),
    s("detach", "ab -> ab", real(3, 5)),
    s("alias", "ab -> ab", real(3, 5)),
    s("meshgrid.indexing", "a, b -> ab, ab", [real(3), real(5)], indexing="ij", unclaimed=True),
]  # fmt: skip


# local pieces may need a list of sizes where these ops take a number: `commutes` below tries them
SPLITS = [
    s("split.Tensor", "(a|b)c -> ac, bc", real(6, 5), 4),
    s("chunk", "(a|b)c -> ac, bc", real(6, 5), 2),
    s("chunk", "(a|b|1)c -> ac, bc, 1c", real(5, 3), 3),
    s("tensor_split.sections", "(a|b)c -> ac, bc", real(5, 3), 2),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_rule(sample: Sample) -> None:
    check(sample)


@pytest.mark.parametrize("sample", SPLITS, ids=str)
def test_split_rule(sample: Sample) -> None:
    assert signature(OneOp(sample)) == sample.expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((6, 5), (2, 3, 5), [((0,), (0, 1)), ((1,), (2,))]),
        ((2, 1, 3), (2, 3), [((0,), (0,)), ((1, 2), (1,))]),
        ((4, 9), (6, 6), [((0, 1), (0, 1))]),
        ((3,), (3, 1, 1), [((0,), (0,)), ((), (1,)), ((), (2,))]),
        ((), (1,), [((), (0,))]),
    ],
)
def test_groups(before: tuple[int, ...], after: tuple[int, ...], expected: list[Any]) -> None:
    found = [(tuple(a), tuple(b)) for a, b in groups(before, after)]
    merged = [pair for pair in found if pair != ((), ())]
    assert merged == expected


# ---- local arguments, for partitions that are not even


def sharded(analysis: Analysis, dim: Dim, *ranges: tuple[int, int], which: int = 0) -> Partition:
    """A partition of one atom of a dim."""
    atom = list(dict.fromkeys(atoms_of(dim)))[which]
    assert ranges[-1][1] == atom.size
    return Partition({atom.id: ranges})


def local_args(analysis: Analysis, node: fx.Node, partition: Partition, rank: int) -> tuple[Any, ...]:
    localize = analysis.ops[node].localize
    if localize is None:
        return node.args
    args, kwargs = localize(lambda dim: local_size(dim, partition, rank))
    return (*args, *kwargs.values())


def test_local_view_sizes() -> None:
    sketch = Sketch()
    x = sketch.param(2, 7, 30)
    view = sketch(aten.view, x, [2, 7, 6, 5])
    keep = sketch(aten.view, x, [2, 7, -1, 5])
    merged = sketch(aten.reshape, view, [14, 30])
    analysis = sketch.analyse(merged)
    heads = sharded(analysis, analysis.dims[view][0][2], (0, 4), (4, 6))
    assert local_args(analysis, view, heads, 0) == (x, [2, 7, 4, 5])
    assert local_args(analysis, view, heads, 1) == (x, [2, 7, 2, 5])
    assert local_args(analysis, keep, heads, 1) == (x, [2, 7, -1, 5])
    assert local_args(analysis, merged, heads, 1) == (view, [14, 10])


def test_local_split_of_a_fused_projection() -> None:
    sketch = Sketch()
    x = sketch.param(7, 90)
    q, k, v = sketch(aten.split.Tensor, x, 30, -1)
    parts = [sketch(aten.view, part, [7, 6, 5]) for part in (q, k, v)]
    sketch(aten.add.Tensor, parts[0], sketch(aten.add.Tensor, parts[1], parts[2]))
    analysis = sketch.analyse(q)
    split = q.args[0]
    heads = sharded(analysis, analysis.dims[parts[0]][0][1], (0, 4), (4, 6))
    assert local_args(analysis, split, heads, 0) == (x, 20, -1)
    assert local_args(analysis, split, heads, 1) == (x, 10, -1)
    commutes(sketch, analysis, heads)


def test_local_split_of_parts_that_differ_is_a_list() -> None:
    sketch = Sketch()
    x = sketch.param(7, 12)
    a, b = sketch(aten.split.Tensor, x, 6, -1)
    c, d = sketch(aten.chunk, x, 2, -1)
    analysis = sketch.analyse(a, b, c, d)
    first = sharded(analysis, analysis.dims[a][0][1], (0, 4), (4, 6))
    assert local_args(analysis, a.args[0], first, 0) == (x, [4, 6], -1)
    assert local_args(analysis, c.args[0], first, 1) == (x, [2, 6], -1)
    commutes(sketch, analysis, first)


def test_local_slices_start_where_the_parts_before_end() -> None:
    """Falcon: all but the last two heads are queries; and the same written from the front."""
    sketch = Sketch()
    x = sketch.param(7, 8, 5)
    queries = sketch(aten.slice.Tensor, x, 1, 0, -2)
    key = sketch(aten.slice.Tensor, x, 1, 6, 7)
    value = sketch(aten.slice.Tensor, x, 1, -1, sys.maxsize)
    everything = sketch(aten.slice.Tensor, x, 1, 0, 8)
    listed = sketch(aten.index.Tensor, x, [None, sketch.constant(-2), None])
    front = sketch(aten.index.Tensor, x, [None, sketch.constant(6), None])
    narrowed = sketch(aten.narrow, x, 1, 6, 2)
    analysis = sketch.analyse(queries, key, value)
    assert show(analysis.dims[x][0][1], lambda a: str(a.size)) == "(6 | 1 | 1)"
    heads = sharded(analysis, analysis.dims[queries][0][1], (0, 4), (4, 6))
    for rank, n in ((0, 4), (1, 2)):
        assert local_args(analysis, queries, heads, rank) == (x, 1, 0, -2)
        assert local_args(analysis, key, heads, rank) == (x, 1, n, n + 1)
        assert local_args(analysis, value, heads, rank) == (x, 1, -1, sys.maxsize)
        assert local_args(analysis, everything, heads, rank) == (x, 1, 0, n + 2)
        assert local_args(analysis, listed, heads, rank) == listed.args
        assert local_args(analysis, front, heads, rank)[1][1].tolist() == [n]
        assert local_args(analysis, narrowed, heads, rank) == (x, 1, n, 2)
    commutes(sketch, analysis, heads)


def test_local_counts_of_copies() -> None:
    sketch = Sketch()
    x = sketch.param(2, 1, 5)
    y = sketch.param(2, 5)
    expanded = sketch(aten.expand, x, [-1, 6, -1])
    repeated = sketch(aten.repeat, y, [3, 4])
    interleaved = sketch(aten.repeat_interleave.self_int, y, 6, 0)
    analysis = sketch.analyse(expanded, repeated, interleaved)
    a = sharded(analysis, analysis.dims[expanded][0][1], (0, 4), (4, 6))
    assert [local_args(analysis, expanded, a, r)[1] for r in (0, 1)] == [[-1, 4, -1], [-1, 2, -1]]
    b = sharded(analysis, analysis.dims[repeated][0][1], (0, 3), (3, 4))
    assert [local_args(analysis, repeated, b, r)[1] for r in (0, 1)] == [[3, 3], [3, 1]]
    c = sharded(analysis, analysis.dims[interleaved][0][0], (0, 1), (1, 6), which=1)
    assert [local_args(analysis, interleaved, c, r)[1] for r in (0, 1)] == [1, 5]
    for partition in (a, b, c):
        commutes(sketch, analysis, partition)


def test_an_empty_shard() -> None:
    sketch = Sketch()
    x = sketch.param(7, 12)
    view = sketch(aten.view, x, [7, 2, 6])
    a, b = sketch(aten.split.Tensor, view, 3, -1)
    analysis = sketch.analyse(a, b)
    heads = sharded(analysis, analysis.dims[view][0][1], (0, 1), (1, 2), (2, 2))
    assert on_rank(sketch, analysis, view, heads, 2).shape == (7, 0, 6)
    commutes(sketch, analysis, heads)


# ---- who is tied to whom


def test_tables_without_parameters_tie_nothing() -> None:
    """One rotary table for two layers whose widths have nothing to do with each other."""
    sketch = Sketch()
    x = sketch.input(torch.ones(2, 3, 8))
    table = sketch(aten.cat, [sketch.buffer(3, 4), sketch.buffer(3, 4)], -1)
    first, second = sketch.param(8, 8), sketch.param(8, 8)
    y = sketch(aten.mul.Tensor, sketch(aten.linear, x, first), table)
    z = sketch(aten.mul.Tensor, sketch(aten.linear, x, second), table)
    analysis = sketch.analyse(y, z)
    (rows, columns), (other_rows, other_columns) = analysis.dims[first][0], analysis.dims[second][0]
    assert len({*atoms_of(rows)} & {*atoms_of(other_rows)}) == 0
    assert columns != other_columns  # the input's features are cloned too
    assert not analysis.is_frozen(columns)
    assert analysis.is_frozen(analysis.dims[y][0][0])  # batch and sequence
    assert analysis.is_frozen(analysis.dims[y][0][1])
    assert show(rows, lambda a: str(a.size)) == "8"  # nor cut


def test_a_square_linear_between_residuals_repeats_its_axis() -> None:
    sketch = Sketch()
    x = sketch(aten.linear, sketch.input(torch.ones(2, 3, 5)), sketch.param(8, 5))
    square = sketch.param(8, 8)
    y = sketch(aten.add.Tensor, x, sketch(aten.linear, x, square))
    analysis = sketch.analyse(y)
    rows, columns = analysis.dims[square][0]
    assert rows == columns
    assert repeated_atoms(analysis.dims[square][0]) == set(atoms_of(rows))


def test_an_op_without_a_rule_blocks_everything_it_touches() -> None:
    sketch = Sketch()
    x = sketch.param(6, 6)
    y = sketch(aten.linalg_matrix_exp, x)
    analysis = sketch.analyse(y)
    info = analysis.ops[y]
    assert all(analysis.is_frozen(d) for d in info.operands[0].dims)
    assert not any(analysis.is_frozen(d) for d in analysis.dims[x][0])
    assert info.whole_out == {(0, 0), (0, 1)}
    assert "no sharding rule" in str(analysis.notes[0])


def test_what_is_written_into_is_held() -> None:
    """A cache: writing at positions blocks that dim, and a blocked dim of a written tensor cannot be
    converted.
    """
    sketch = Sketch()
    cache = sketch.buffer(2, 4, 9, 5)
    k = sketch(
        aten.view, sketch(aten.linear, sketch.input(torch.ones(2, 1, 6)), sketch.param(20, 6)), [2, 1, 4, 5]
    )
    k = sketch(aten.transpose.int, k, 1, 2)
    written = sketch(aten.index_copy_, cache, 2, sketch.input(torch.tensor([3])), k)
    analysis = sketch.analyse(written)
    assert cache in analysis.derived
    batch, heads, positions, width = analysis.dims[cache][0]
    assert analysis.is_frozen(batch)
    assert analysis.is_frozen(positions)
    assert heads == analysis.dims[k][0][1]
    assert not analysis.is_frozen(heads)
    assert width == analysis.dims[k][0][3]


# ---- any composition of structural ops, sharded any way


@st.composite
def factorization(draw: st.DrawFn, n: int) -> list[int]:
    sizes = []
    while n > 1:
        divisor = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        sizes.append(divisor)
        n //= divisor
    return sizes or [1]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_slicing_commutes_with_every_op(data: st.DataObject) -> None:
    sketch = Sketch()
    pool: list[fx.Node] = [
        sketch.param(data.draw(st.sampled_from([4, 6, 12])), data.draw(st.sampled_from([6, 8, 12])))
    ]
    pool.append(sketch.param(*pool[0].meta["val"].shape))
    for _ in range(data.draw(st.integers(2, 8))):
        x = pool[data.draw(st.integers(0, len(pool) - 1))]
        shape = list(x.meta["val"].shape)
        d = data.draw(st.integers(0, len(shape) - 1))
        n = shape[d]
        action = data.draw(
            st.sampled_from(
                ["view", "view", "split", "slice", "permute", "cat", "add", "repeat", "expand", "step"]
            )
        )
        if action == "view":
            flat = sketch(aten.reshape, x, [math.prod(shape)]) if data.draw(st.booleans()) else x
            size = list(flat.meta["val"].shape)
            d = data.draw(st.integers(0, len(size) - 1))
            pool.append(
                sketch(aten.reshape, flat, [*size[:d], *data.draw(factorization(size[d])), *size[d + 1 :]])
            )
        elif action == "split" and n > 1:
            pool += sketch(aten.split.Tensor, x, data.draw(st.integers((n + 2) // 3, n - 1)), d)
        elif action == "slice" and n > 1:
            start = data.draw(st.integers(0, n - 1))
            stop = data.draw(st.integers(start + 1, n))
            pool.append(
                sketch(
                    aten.slice.Tensor, x, d, start - n if start and data.draw(st.booleans()) else start, stop
                )
            )
        elif action == "permute":
            pool.append(sketch(aten.permute, x, data.draw(st.permutations(range(len(shape))))))
        elif action == "cat":
            pool.append(sketch(aten.cat, [x, x], d))
        elif action == "add":
            same = [y for y in pool if y.meta["val"].shape == x.meta["val"].shape]
            pool.append(sketch(aten.add.Tensor, x, data.draw(st.sampled_from(same))))
        elif action == "repeat":
            pool.append(sketch(aten.repeat_interleave.self_int, x, 2, d))
        elif action == "expand":
            pool.append(sketch(aten.expand, sketch(aten.unsqueeze, x, 0), [3, *[-1] * len(shape)]))
        elif action == "step" and n % 2 == 0:
            pool.append(sketch(aten.slice.Tensor, x, d, data.draw(st.integers(0, 1)), sys.maxsize, 2))
        pool = [y for y in pool if y.meta["val"].numel() <= 600 and y.meta["val"].dim() <= 5]
    analysis = sketch.analyse(pool[-1])
    atoms: dict[Atom, None] = {}
    for outputs in analysis.dims.values():
        for dims in outputs:
            atoms.update(dict.fromkeys(a for dim in dims for a in atoms_of(dim) if a not in analysis.frozen))
    for atom in data.draw(st.lists(st.sampled_from(list(atoms)), max_size=2, unique=True)) if atoms else []:
        tp = data.draw(st.integers(2, 3))
        cuts = sorted(data.draw(st.lists(st.integers(0, atom.size), min_size=tp - 1, max_size=tp - 1)))
        ends = [0, *cuts, atom.size]
        commutes(sketch, analysis, Partition({atom.id: tuple(zip(ends, ends[1:], strict=False))}))
