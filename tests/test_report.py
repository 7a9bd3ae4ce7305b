"""The text of a plan, from a made-up plan: sizes, folding, the whole table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from autotp import report


def entry(
    name: str, count: int, placement: str, dims: str, whole: int, local: tuple[int, ...], note: str = ""
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        count=count,
        placement=placement,
        dims=dims,
        global_bytes=whole,
        local_bytes=local,
        note=note,
    )


def collective(phase: str, kind: str, where: str, op: str, size: int, count: int) -> SimpleNamespace:
    return SimpleNamespace(phase=phase, kind=kind, where=where, op=op, bytes=size, count=count)


PLAN = SimpleNamespace(
    tp=2,
    proven=False,
    weight_bytes=22480,
    sharded_bytes=22240,
    entries=[
        entry("wte.weight", 1, "vocab", "V61/2 , M40", 9760, (4960, 4800)),
        entry("h.{0-2}.up.weight", 3, "column", "F26/2 , M40", 4160, (2080, 2080)),
        entry("h.{0-2}.norm.weight", 3, "replicate", "M40", 80, (80, 80), "layer_norm needs it whole"),
    ],
    collectives=[
        collective("forward", "all_reduce", "h.{0-2}.down", "linear", 1200, 3),
        collective("backward", "all_reduce", "", "add", 1200, 1),
        collective("step", "all_reduce", "q_norm.weight", "gradient", 24, 1),
    ],
    notes=["h.1.odd stays whole: model.py:7 'x.view(a, b)' cannot be split"],
)

TABLE = """\
tp=2: 98.93 % of 22.5 kB of weights sharded, 11.3 to 11.4 kB on each rank

parameter            placement      logical axes        bytes       on a rank
─────────────────────────────────────────────────────────────────────────────
wte.weight           vocab          V61/2 , M40       9.76 kB  4.8 to 4.96 kB
h.{0-2}.up.weight    column         F26/2 , M40   3 x 4.16 kB         2.08 kB
h.{0-2}.norm.weight  replicate [1]  M40              3 x 80 B            80 B
[1] layer_norm needs it whole

3 collectives forward, 3.6 kB
  all_reduce  h.{0-2}.down  linear  x3  1.2 kB
1 collective backward, 1.2 kB
  all_reduce  (model)  add    1.2 kB
1 collective of gradients, once a step, 24 B
  all_reduce  q_norm.weight  gradient    24 B

Notes
  There were too many sets of axes to compare all: this is the best that was seen.
  h.1.odd stays whole: model.py:7 'x.view(a, b)' cannot be split
"""


def test_table() -> None:
    assert report.table(PLAN) == TABLE


def test_long_names_and_terms_are_broken_to_fit() -> None:
    name = "model.decoder.layers.{0-11}.self_attention.query_key_value.weight"
    dims = "(H71/8·(D32 | D32) | D32 | D32 | D32 | D32) , M4544"
    plan = SimpleNamespace(**vars(PLAN))
    plan.entries = [entry(name, 12, "column", dims, 42_500_000, (6_400_000, 5_820_000))]
    text = report.table(plan, width=100)
    assert max(map(len, text.splitlines())) <= 100
    row = text.splitlines()[4:7]
    assert "".join(line[: row[0].index("column")].strip() for line in row) == name
    assert "12 x 42.5 MB" in row[0] and "5.82 to 6.4 MB" in row[0]


def test_nothing_to_communicate() -> None:
    plan = SimpleNamespace(**vars(PLAN))
    plan.collectives, plan.notes, plan.proven = [], [], True
    text = report.table(plan)
    assert text.endswith("No collectives forward.\nNo collectives backward.\n")


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
    assert report.ranks([7, 5, 6]) == "5 to 7 B"
    assert report.ranks([960, 1920]) == "960 B to 1.92 kB"
