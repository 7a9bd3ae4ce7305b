"""10 steps, saved and resumed at another degree, and 10 more, are 20 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist_api
from torch import Tensor

import autotp
from tests.dist.pool import Pool
from tests.e2e.compare import loss_of, tensors_of
from tests.models import MODELS
from tests.models.case import call

STEPS = 10


def train(name: str, start: int, load: str, save: str) -> dict[str, Tensor]:
    """Steps ``start`` … of one model in float64; the whole weights at the end."""
    case = MODELS[name]
    model = case.build().train(False)
    if dist_api.get_world_size() > 1:
        autotp.parallelize(model, example_inputs=case.inputs())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    if load:
        assert autotp.load_training_state(load, model, optimizer, scheduler) == {"step": start}
    for step in range(start, start + STEPS):
        optimizer.zero_grad()
        loss_of(tensors_of(call(model, case.inputs(seed=step)))).backward()
        optimizer.step()
        scheduler.step()
    if save:
        autotp.save_training_state(save, model, optimizer, scheduler, {"step": start + STEPS})
    return autotp.full_state_dict(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "first", "second"), [("gpt2", 2, 3), ("llama", 3, 4), ("falcon", 4, 2), ("llama", 2, 1)]
)
def test_resumed_at_another_degree(dist: Pool, name: str, first: int, second: int, tmp_path: Path) -> None:
    at_10, at_20 = str(tmp_path / "10"), str(tmp_path / "20")
    dist.run(first, train, name, 0, "", at_10)
    resumed = dist.run(second, train, name, STEPS, at_10, "")[0]
    dist.run(1, train, name, 0, "", at_20)
    straight = dist.run(1, train, name, STEPS, at_20, "")[0]
    for key, value in straight.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-6, atol=1e-8, msg=key)
