"""What a training run uses, each for twenty steps against the unsharded run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.errors import AutoTPError
from autotp.runtime.sharded_gradient import ShardedGradient
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import batches, loss_of, same_training

OPTIMIZERS: dict[str, Any] = {
    "adamw-foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adamw-single": (torch.optim.AdamW, {"lr": 1e-2, "foreach": False, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "sgd-foreach": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "foreach": True}),
}


def train(
    model: nn.Module,
    ids: list[Tensor],
    optimizer: str = "adamw-foreach",
    clip: float | None = 1.0,
    accumulate: int = 1,
    forward: Any = loss_of,
) -> list[float]:
    """The loss of each step, and the norms that were clipped."""
    make, options = OPTIMIZERS[optimizer]
    opt = make(model.parameters(), **options)
    losses, norms = [], []
    for step, batch in enumerate(ids):
        loss = forward(model, batch)
        loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            if clip is not None:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            opt.step()
            opt.zero_grad()
    for state in opt.state.values():
        assert all(type(value) in (Tensor, int, float) for value in state.values())
    return losses + norms


def optimizers(names: list[str]) -> None:
    for name in names:
        same_training(lambda m, ids, name=name: train(m, ids, name), kv_heads=4)


def test_optimizers_and_clipping(dist: Pool) -> None:
    dist.run(2, optimizers, list(OPTIMIZERS))


def accumulation_and_subgroups() -> None:
    """Two kv heads on four ranks: pairs of ranks sum the gradients of theirs, and train them alike."""
    same_training(lambda m, ids: train(m, ids, accumulate=4), kv_heads=2)


def test_accumulation_with_kv_heads_in_subgroups(dist: Pool) -> None:
    dist.run(4, accumulation_and_subgroups)


def checkpointed() -> None:
    for reentrant in (False, True):

        def train_checkpointed(model: Any, ids: list[Tensor], reentrant: bool = reentrant) -> list[float]:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            return train(model, ids)

        same_training(train_checkpointed, "llama")

        def whole(model: nn.Module, ids: Tensor, reentrant: bool = reentrant) -> Tensor:
            anchor = torch.zeros((), requires_grad=True)  # the reentrant mode wants an input with a gradient
            return checkpoint(lambda _: loss_of(model, ids), anchor, use_reentrant=reentrant)  # type: ignore[no-any-return]

        same_training(lambda m, ids, f=whole: train(m, ids, forward=f), "gpt2")


def test_activation_checkpointing(dist: Pool) -> None:
    dist.run(2, checkpointed)


def autocast() -> None:
    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, ids)

    same_training(lambda m, ids: train(m, ids, forward=forward), "gpt2", dtype=torch.float32, rtol=2e-2)


def scaler() -> None:
    """An overflow on one rank is one on all: all skip the step and halve the scale."""

    def run(model: nn.Module, ids: list[Tensor]) -> list[float]:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaled = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
        losses, scales = [], []
        for step, batch in enumerate(ids):
            opt.zero_grad()
            loss = loss_of(model, batch)
            scaled.scale(loss).backward()
            if step % 5 == 2:  # in a row that one rank has only
                grad = model.get_parameter("transformer.h.0.mlp.c_fc.weight").grad
                assert grad is not None
                if not isinstance(grad, ShardedGradient):
                    grad[0, 0] = float("inf")
                elif torch.distributed.get_rank() == 1:
                    grad._tp_local[0, 0] = float("inf")
            scaled.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaled.step(opt)
            scaled.update()
            losses.append(loss.item())
            scales.append(scaled.get_scale())
        assert len(set(scales)) > 1
        return losses + scales

    same_training(run, "gpt2")


def test_autocast(dist: Pool) -> None:
    dist.run(2, autocast)


def test_grad_scaler(dist: Pool) -> None:
    dist.run(2, scaler)


def average() -> None:
    """An average of the weights in a deep copy, evaluated without gradients, and trained on by itself."""

    def run(model: nn.Module, ids: list[Tensor]) -> list[float]:
        ema = copy.deepcopy(model).requires_grad_(False)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses, evaluated = [], []
        for batch in ids:
            opt.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mine, new in zip(ema.parameters(), model.parameters(), strict=True):
                    mine.lerp_(new, 0.1)
                evaluated.append(loss_of(ema.eval(), batch).item())
        ema.requires_grad_(True)
        return losses + evaluated + train(ema, ids[:5])

    same_training(run, "qwen3", dtype=torch.float64, rtol=1e-5)  # its norms work in float32


def test_ema_and_evaluation(dist: Pool) -> None:
    dist.run(2, average)


@pytest.mark.parametrize("name", ["gpt2"])
def test_autograd_modes(dist: Pool, name: str) -> None:
    dist.run(2, frozen, name)


def frozen(name: str) -> None:
    """A part of the model is frozen, and thawed half-way."""

    def run(model: nn.Module, ids: list[Tensor]) -> list[float]:
        some = [p for n, p in model.named_parameters() if ".0." in n]
        for p in some:
            p.requires_grad_(False)
        first = train(model, ids[:10])
        for p in some:
            p.requires_grad_(True)
        return train(model, ids[10:]) + first

    def twenty(model: nn.Module, ids: list[Tensor]) -> list[float]:
        found = run(model, ids)
        return [*found[20:30], *found[:10], *found[10:20], *found[30:]]

    same_training(twenty, name)


def refused() -> None:
    ids = batches(1)[0]
    whole = MODELS["llama"].build(dtype=torch.float32)
    before = torch.optim.AdamW(whole.parameters())
    model = autotp.parallelize(whole, example_inputs={"input_ids": ids})
    loss_of(model, ids).backward()
    with pytest.raises(AutoTPError, match="made before the model was sharded"):
        before.step()
    for name in ("Adafactor", "Muon"):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = getattr(torch.optim, name)(matrices, lr=1e-3)
        with pytest.raises(AutoTPError, match=f"{name} cannot train .* mixes the elements"):
            optimizer.step()
    whole_ones = [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]
    torch.optim.Adafactor(whole_ones).step()  # replicated parameters are whole


def test_optimizers_that_cannot_be_right_are_refused(dist: Pool) -> None:
    dist.run(2, refused)
