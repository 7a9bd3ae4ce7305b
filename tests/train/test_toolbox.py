"""What a training run uses, each for twenty steps against the unsharded run."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autotp.errors import AutoTPError
from autotp.rewrite.state import sharding_of
from autotp.runtime.sharded_gradient import ShardedGradient
from tests.dist.pool import Pool
from tests.train.steps import Pair, batches, loss_of, next_token_loss
from tests.train.test_clipping import check_drift, check_norms, check_refusals

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


def llama() -> None:
    """Every optimizer with clipping, transformers' activation checkpointing, torch.compile, and refusals."""
    pair = Pair("llama")
    for name in OPTIMIZERS:
        pair.same_training(lambda m, ids, name=name: train(m, ids, name))

    def checkpointed(model: Any, ids: list[Tensor], reentrant: bool) -> list[float]:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return train(model, ids)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it has a new name
        for reentrant in (False, True):
            pair.same_training(lambda m, ids, r=reentrant: checkpointed(m, ids, r))
    pair.same_training(compiled)
    refused(pair)


def compiled(model: nn.Module, ids: list[Tensor]) -> list[float]:
    """Forward and backward in one graph each, without a break."""
    runs: Any = model
    if sharding_of(model) is not None:
        torch._dynamo.reset()
        runs = torch.compile(model, backend="aot_eager", fullgraph=True)
    return train(model, ids, forward=lambda _, batch: next_token_loss(runs(batch, use_cache=False).logits, batch))


def refused(pair: Pair) -> None:
    _, model = pair.copies()
    loss_of(model, batches(1)[0]).backward()
    for name in ("Adafactor", "Muon"):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = getattr(torch.optim, name)(matrices, lr=1e-3)
        with pytest.raises(AutoTPError, match=f"{name} cannot train .* mixes the elements"):
            optimizer.step()
    whole_ones = [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]
    torch.optim.Adafactor(whole_ones).step()  # replicated parameters are whole


def test_llama(dist: Pool) -> None:
    dist.run(2, llama, one_plans=True)


def subgroups() -> None:
    """Two kv heads on four ranks: pairs of ranks sum the gradients of theirs, and train them alike."""
    pair = Pair("llama", kv_heads=2)
    pair.same_training(lambda m, ids: train(m, ids, accumulate=4))
    pair.same_training(average)
    whole, model = pair.copies()
    for m in (whole, model):
        loss_of(m, batches(1)[0]).backward()
    check_norms(whole, model)
    check_refusals(model)
    check_drift(model)


def average(model: nn.Module, ids: list[Tensor]) -> list[float]:
    """An average of the weights in a deep copy, evaluated without gradients, and trained on by itself."""
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


def test_kv_heads_in_subgroups(dist: Pool) -> None:
    dist.run(4, subgroups, one_plans=True)


def gpt2() -> None:
    """The whole model recomputed; a part of it frozen, and thawed half-way; a GradScaler."""
    pair = Pair("gpt2")
    for reentrant in (False, True):

        def whole(model: nn.Module, ids: Tensor, reentrant: bool = reentrant) -> Tensor:
            anchor = torch.zeros((), requires_grad=True)  # the reentrant mode wants an input with a gradient
            return checkpoint(lambda _: loss_of(model, ids), anchor, use_reentrant=reentrant)  # type: ignore[no-any-return]

        pair.same_training(lambda m, ids, f=whole: train(m, ids, forward=f))
    pair.same_training(frozen)
    pair.same_training(scaled)


def frozen(model: nn.Module, ids: list[Tensor]) -> list[float]:
    some = [p for n, p in model.named_parameters() if ".0." in n]
    for p in some:
        p.requires_grad_(False)
    first = train(model, ids[:10])
    for p in some:
        p.requires_grad_(True)
    second = train(model, ids[10:])
    return [*first[:10], *second[:10], *first[10:], *second[10:]]


def test_gpt2(dist: Pool) -> None:
    dist.run(2, gpt2, one_plans=True)


def autocast() -> None:
    pair = Pair("gpt2", torch.float32)

    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, ids)

    pair.same_training(lambda m, ids: train(m, ids, forward=forward), rtol=2e-2)


def scaled(model: nn.Module, ids: list[Tensor]) -> list[float]:
    """An overflow on one rank is one on all: all skip the step and halve the scale."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
    losses, scales = [], []
    for step, batch in enumerate(ids):
        opt.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        if step % 5 == 2:  # in a row that one rank has only
            grad = model.get_parameter("transformer.h.0.mlp.c_fc.weight").grad
            assert grad is not None
            if not isinstance(grad, ShardedGradient):
                grad[0, 0] = float("inf")
            elif torch.distributed.get_rank() == 1:
                grad._tp_local[0, 0] = float("inf")
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert len(set(scales)) > 1
    return losses + scales


def test_autocast(dist: Pool) -> None:
    dist.run(2, autocast, one_plans=True)
