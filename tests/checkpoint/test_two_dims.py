"""A model that is sharded over one dim of a mesh, and replicated (DDP) or sharded once more (FSDP2) over the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist_api
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import autotp
from tests.checkpoint import models
from tests.dist.pool import Pool
from tests.e2e.compare import loss_of, tensors_of
from tests.models.case import call

NAME, STEPS = "nanogpt", 3


def train(folder: str, kind: str, dp: int, tp: int, start: int) -> dict[str, Tensor]:
    """Steps of one run, on the ``dp`` and ``tp`` of the mesh; the whole weights at the end, from files."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    with models.planned_once(NAME):
        model = autotp.parallelize(models.build(NAME), mesh["tp"], example_inputs=models.inputs(NAME))
    if kind == "fsdp":
        fully_shard(model, mesh=mesh["dp"])
        wrapped: nn.Module = model
    else:
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    if start:
        torch.manual_seed(99)
        autotp.load_training_state(Path(folder) / "state", model, optimizer)
        replica = dist_api.get_rank() // tp
        expected = torch.Generator().manual_seed(7 + replica)
        assert replica or torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    for step in range(start, start + STEPS):
        optimizer.zero_grad()
        loss_of(tensors_of(call(wrapped, models.inputs(NAME, seed=step)))).backward()
        optimizer.step()
    torch.manual_seed(7 + dist_api.get_rank() // tp)
    autotp.save_training_state(Path(folder) / "state", model, optimizer)
    autotp.save_pretrained(model, Path(folder) / "weights")
    return {name: value.clone() for name, value in autotp.full_state_dict(model).items()}


def straight(steps: int) -> dict[str, Tensor]:
    model = models.build(NAME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(tensors_of(call(model, models.inputs(NAME, seed=step)))).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("first", "second"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_resumed_at_another_layout(dist: Pool, first: str, second: str, tmp_path: Path) -> None:
    folder = str(tmp_path)
    dist.run(4, train, folder, first, 2, 2, 0)
    _assert_same(dist.run(4, train, folder, second, 2, 2, STEPS), straight(2 * STEPS))
    _assert_same(dist.run(3, train, folder, first, 1, 3, 2 * STEPS), straight(3 * STEPS))
    loaded = models.build(NAME, seed=1)
    loaded.load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"), strict=False)
    _assert_same([loaded.state_dict()], straight(3 * STEPS))


def _assert_same(ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for found in ranks:
        assert set(found) == set(expected)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)
