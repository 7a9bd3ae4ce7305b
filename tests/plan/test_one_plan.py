"""Each rank plans for itself: whatever the hashes of strings are in its process, it finds the same plan."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from tests.fuzz.models import draw_model

TIMEOUT_S = 240
SEEDS = range(4)


class Ties(nn.Module):
    """Either of two axes can be sharded, not both; they have as many bytes, and communicate as much."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(1, 8), nn.Linear(1, 8)
        self.by_row, self.by_column = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = (self.rows(x).unsqueeze(-1) * self.columns(x).unsqueeze(-2)).tanh()
        return self.by_row(both.sum(-1)) + self.by_column(both.sum(-2))


def print_plans() -> None:
    """Of some random models, and of one in which nothing but the order decides, everything that is planned."""
    from autotp.errors import AutoTPError
    from autotp.prepare import prepare

    drawn = [(model.build(), model.tp, model.inputs()) for model in map(draw_model, SEEDS)]
    for model, tp, inputs in [*drawn, (Ties(), 2, (torch.zeros(3, 1),))]:
        try:
            plan = prepare(model, tp, example_inputs=inputs).plan
        except AutoTPError as error:
            print(error)
        else:
            print(plan.fingerprint, plan.to_yaml())


def test_one_plan_in_every_process() -> None:
    run = "from tests.plan.test_one_plan import print_plans; print_plans()"
    said = [
        subprocess.run(
            [sys.executable, "-c", run],
            env={"PYTHONHASHSEED": hashes, "PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        ).stdout
        for hashes in ("1", "2", "3")
    ]
    assert said[0] == said[1] == said[2]
    assert said[0].count("\ntp:") > len(SEEDS) // 2
