"""The examples can say no: their comparison fails where the numbers differ, and where nothing was sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.dist.pool import Pool

EXAMPLES = Path(__file__).parents[1] / "examples"


def _import_ranks():
    import importlib.util

    spec = importlib.util.spec_from_file_location("ranks", EXAMPLES / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compare(differences: list[float]) -> bool:
    """Rank r's tensor is off by differences[r]."""
    mine = torch.zeros(3)
    mine[1] = differences[torch.distributed.get_rank()]
    return _import_ranks().agree("numbers", mine, torch.zeros(3), 1e-3)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.0, 0.0], True),
        ([0.0, 1e-4], True),
        ([0.0, 1e-2], False),
        ([-1e-2, 0.0], False),
        ([0, torch.nan], False),
    ],
)
def test_agree_asks_every_rank(dist: Pool, differences: list[float], expected: bool) -> None:
    assert dist.run(2, _compare, differences) == [expected, expected]


def _holds(features: int) -> bool:
    return _import_ranks().every_rank_holds(nn.Linear(7, features), nn.Linear(7, 10))


def test_a_model_that_is_not_sharded_is_noticed(dist: Pool) -> None:
    assert dist.run(2, _holds, 5) == [True, True]
    assert dist.run(2, _holds, 10) == [False, False]


def test_the_text_is_as_its_note_says() -> None:
    text = (EXAMPLES / "text" / "king_james.txt").read_text(encoding="ascii")
    assert 100_000 < len(text) < 120_000
    assert len(set(text)) == 71
    assert max(map(len, text.splitlines())) <= 90


def test_configs_are_plain_json() -> None:
    for path in (EXAMPLES / "configs").glob("*.json"):
        assert json.loads(path.read_text())["model_type"]
