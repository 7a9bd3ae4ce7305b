"""The norm of a sharded model's gradients is that of the whole one, whoever asks for it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import autotp
from autotp.errors import AutoTPError, RankMismatchError
from autotp.runtime.record import record_collectives
from autotp.runtime.sharded_gradient import ShardedGradient
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import batches, loss_of

CASES = [
    pytest.param("qwen3", {}, 3, id="q-norms-uneven"),
    pytest.param("falcon", {}, 2, id="partly-replicated-fused"),
]


def pair(name: str, variant: dict[str, object]) -> tuple[nn.Module, nn.Module]:
    case = MODELS[name]
    ids = batches(1)[0]
    whole = case.build(**variant)
    model = autotp.parallelize(case.build(**variant), example_inputs={"input_ids": ids})
    for m in (whole, model):
        loss_of(m, ids).backward()
    return whole, model


def check_drift(model: nn.Module) -> None:
    """The kv heads of a Llama that ranks hold in common, two by two, are looked at by `check_sync`."""
    autotp.debug.check_sync(model)
    key = model.get_parameter("model.layers.1.self_attn.k_proj.weight").detach()
    key[1, 1] += 0.25 * (torch.distributed.get_rank() == 3)
    with pytest.raises(RankMismatchError, match="k_proj.weight' differs between ranks 2 and 3"):
        autotp.debug.check_sync(model)


def norms(name: str, variant: dict[str, object]) -> None:
    check_norms(*pair(name, variant))


def check_norms(whole: nn.Module, model: nn.Module) -> None:
    """Of every kind, and clipped; with gradients that are there already."""

    def both(measure: Any, rtol: float = 1e-10) -> None:
        assert_close(measure(list(model.parameters())), measure(list(whole.parameters())), rtol=rtol, atol=0)

    for p in (2.0, 1.0, 3.0, float("inf")):
        for foreach in (None, True, False):
            with record_collectives() as log:
                both(
                    lambda ps, p=p, f=foreach: torch.nn.utils.get_total_norm(
                        [q.grad for q in ps], p, foreach=f
                    )
                )
            assert len(log) == 1, "one all-reduce for all norms"
    both(lambda ps: torch.sqrt(sum(q.grad.norm() ** 2 for q in ps)))
    both(lambda ps: sum(q.grad.detach().pow(2).sum() for q in ps))
    both(lambda ps: torch.stack([q.grad.data.norm(2) for q in ps]).norm())
    both(lambda ps: torch.stack([q.grad.view(-1).abs().max() for q in ps if q.grad.dim() == 1]))
    both(lambda ps: torch.stack([q.grad.abs().max() for q in ps]))
    both(lambda ps: torch.stack([q.grad.float().norm() for q in ps]), 1e-5)
    both(lambda ps: torch.stack([torch.isfinite(q.grad).all() for q in ps]))
    both(lambda ps: torch.tensor([q.grad.norm().item() for q in ps]))

    for p, foreach in ((2.0, None), (1.0, True), (float("inf"), False)):
        got = [
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1 / p, p, foreach=foreach)
            for m in (model, whole)
        ]
        assert_close(*got, rtol=1e-10, atol=0)
        both(lambda ps: torch.nn.utils.get_total_norm([q.grad for q in ps]))
    sharded = [p for p in model.parameters() if isinstance(p.grad, ShardedGradient)]
    assert sharded

    # the gradient stays what it is
    grad = sharded[0].grad
    assert grad is not None
    for other in (
        grad * 2,
        grad.clone(),
        grad.detach(),
        -grad,
        grad.add(grad),
        copy.deepcopy(grad),
        grad.mul_(1),
    ):
        assert type(other) is ShardedGradient
    sharded[0].grad *= 2
    assert type(sharded[0].grad) is ShardedGradient
    assert type(pickle.loads(pickle.dumps(grad))) is Tensor
    assert type(torch.zeros_like(grad)) is Tensor


@pytest.mark.parametrize(("name", "variant", "tp"), CASES)
def test_norms(dist: Pool, name: str, variant: dict[str, object], tp: int) -> None:
    dist.run(tp, norms, name, variant, one_plans=True)


def made_before() -> None:
    """An optimizer that was made before sharding holds what is no longer the model's; replicas on the ranks of one
    model are none."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    before = torch.optim.AdamW(model.parameters())
    x = torch.ones(2, 6)
    autotp.parallelize(model, example_inputs=(x,))
    model(x).sum().backward()
    with pytest.raises(AutoTPError, match="made before the model was sharded"):
        before.step()
    everyone = DistributedDataParallel(model)  # as a trainer does that knows of no mesh
    with pytest.raises(AutoTPError, match="treats ranks .* as replicas"):
        everyone(x)


def check_refusals(model: nn.Module) -> None:
    grad = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
    assert grad is not None
    for mixes in (
        lambda: grad @ grad.t(),
        lambda: grad.square().mean(dim=-1),
        lambda: grad.norm(dim=0),
        lambda: torch.linalg.svd(grad),
        lambda: grad[0].norm(),
    ):
        with pytest.raises(AutoTPError, match="of a sharded parameter"):
            mixes()


def test_an_optimizer_made_before(dist: Pool) -> None:
    dist.run(2, made_before)
