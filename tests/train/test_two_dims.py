"""Tensor parallel within data parallel: four ranks as (dp, tp) = (2, 2)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import autotp
from autotp.errors import AutoTPError
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import STEPS, batches, loss_of


def run(model: nn.Module, ids: list[Tensor]) -> list[float]:
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = [], []
    for batch in ids:
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        opt.step()
    return losses + norms


def two_dims(name: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    case = MODELS[name]
    reference = case.build()
    wanted = run(reference, batches(STEPS, batch=4))
    model: nn.Module = autotp.parallelize(
        case.build(), mesh["tp"], example_inputs={"input_ids": batches(1)[0]}
    )
    for how in ("ddp", "fsdp"):
        same_training(how, name, mesh, copy.deepcopy(model), reference, wanted)
    views = DistributedDataParallel(model, process_group=mesh["dp"].get_group(), gradient_as_bucket_view=True)
    with pytest.raises(AutoTPError, match="gradient_as_bucket_view=False"):
        loss_of(views, batches(1)[0])


def same_training(
    how: str, name: str, mesh: DeviceMesh, model: nn.Module, reference: nn.Module, wanted: list[float]
) -> None:
    inner, dp = model, mesh["dp"].get_local_rank()
    if how == "ddp":
        model = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    else:
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    found = run(model, [b[2 * dp : 2 * dp + 2] for b in batches(STEPS, batch=4)])
    losses = torch.tensor(found[:STEPS], dtype=torch.float64)
    torch.distributed.all_reduce(losses, group=mesh["dp"].get_group())
    rtol = 1e-5 if name == "qwen3" else 1e-8  # its norms work in float32
    assert_close(losses / 2, torch.tensor(wanted[:STEPS], dtype=torch.float64), rtol=rtol, atol=rtol)
    assert_close(torch.tensor(found[STEPS:]), torch.tensor(wanted[STEPS:]), rtol=rtol, atol=rtol)
    if how == "ddp":
        whole = autotp.full_state_dict(inner)
        for key, value in reference.state_dict().items():
            assert_close(whole[key], value, rtol=10 * rtol, atol=10 * rtol)


def test_llama_with_q_norms(dist: Pool) -> None:
    dist.run(4, two_dims, "qwen3", one_plans=True)
