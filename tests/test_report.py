"""The text of a plan, from a made-up plan: sizes, folding, the whole table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from autotp import report


def entry(
    name: str, placement: str, dims: str, whole: int, local: tuple[int, ...], note: str = ""
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, placement=placement, dims=dims, global_bytes=whole, local_bytes=local, note=note
    )


def collective(phase: str, kind: str, where: str, cost: int) -> SimpleNamespace:
    return SimpleNamespace(phase=phase, kind=kind, where=where, cost_bytes=cost)


PLAN = SimpleNamespace(
    tp=2,
    entries=[
        entry("wte.weight", "S(0) vocab", "vocab , model", 9760, (4960, 4800)),
        *(entry(f"h.{i}.up.weight", "S(0) column", "ff , model", 4160, (2080, 2080)) for i in range(3)),
        *(entry(f"h.{i}.norm.weight", "R", "model", 80, (80, 80), "holds no sharded axis") for i in range(3)),
    ],
    collectives=[
        *(collective("forward", "all_reduce", f"h.{i}.down", 1200) for i in range(3)),
        collective("backward", "all_reduce", "h.0", 1200),
    ],
    notes=["h.1.odd stays whole: model.py:7 'x.view(a, b)' cannot be split"],
)

TABLE = """\
tp=2: 98.93 % of 22.5 kB of weights sharded, 11.3 kB to 11.4 kB on each rank

parameter           count   placement     logical axes       each           on a rank
─────────────────────────────────────────────────────────────────────────────────────
wte.weight                  S(0) vocab    vocab , model   9.76 kB   4.8 kB to 4.96 kB
h.0-2.up.weight        x3   S(0) column   ff , model      4.16 kB             2.08 kB
h.0-2.norm.weight      x3   R [1]         model              80 B                80 B
[1] holds no sharded axis

3 collectives forward, 3.6 kB
  all_reduce  h.0-2.down  x3  1.2 kB
1 collective backward, 1.2 kB
  all_reduce  h.0    1.2 kB

Notes
  h.1.odd stays whole: model.py:7 'x.view(a, b)' cannot be split
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.w", "a.1.w", "a.2.w", "a.5.w"], ["a.0-2,5.w"]),
        (["a.0", "b", "a.1"], ["a.0-1", "b"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.0-1.b.0-1"]),
        (["a.0.b.0", "a.1.b.1"], ["a.0.b.0", "a.1.b.1"]),  # no a.0.b.1
        (["conv1d.w", "conv2d.w"], ["conv1d.w", "conv2d.w"]),  # digits inside a word are part of the name
        (["a", "a"], ["a"]),
        ([], []),
    ],
)
def test_fold(names: list[str], expected: list[str]) -> None:
    assert [name for name, _ in report.fold((name, "same", name) for name in names)] == expected


def test_table() -> None:
    assert report.table(PLAN) == TABLE


def test_fold_keeps_different_keys_apart() -> None:
    folded = report.fold([("a.0", "x", 0), ("a.1", "y", 1), ("a.2", "x", 2)])
    assert folded == [("a.0,2", [0, 2]), ("a.1", [1])]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (999_999, "1 MB"),
        (811_706_777_600, "812 GB"),
    ],
)
def test_size(number: int, expected: str) -> None:
    assert report.size(number) == expected


def test_percent_is_100_only_for_all() -> None:
    assert report.percent(99_999_999, 100_000_000) == "99.99 %"
    assert report.percent(5, 5) == "100 %"
    assert report.percent(0, 0) == "0 %"


def test_ranks() -> None:
    assert report.ranks([5, 5]) == "5 B"
    assert report.ranks([7, 5, 6]) == "5 B to 7 B"
