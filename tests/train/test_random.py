"""Random numbers in training: equal on all ranks in replicated regions, independent in sharded ones, reproducible."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist_
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import autotp
from tests.dist.pool import Pool
from tests.models import MODELS

BATCH, WIDTH, HIDDEN = 64, 12, 640
RATE, DEPTH = 0.3, 0.25


class Net(nn.Module):
    """Dropout in a sharded region and in a replicated one, a residual branch that is dropped at random per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.hidden, self.out = nn.Dropout(RATE), nn.Dropout(RATE)
        self.checkpointed: bool | None = None  # reentrant or not, None: keep the activations

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.checkpointed)  # type: ignore[no-any-return]

    def run(self, x: Tensor) -> Tensor:
        y = self.out(self.down(self.hidden(torch.sigmoid(self.up(x)))))
        if self.training:
            y = y * (torch.rand(x.shape[0], 1, dtype=x.dtype) >= DEPTH)
        return x + y


def gathered(x: Tensor) -> list[Tensor]:
    """The same-shaped tensor of every rank."""
    parts = [torch.empty_like(x) for _ in range(dist_.get_world_size())]
    dist_.all_gather(parts, x.contiguous())
    return parts


def near(found: float, expected: float, samples: int) -> None:
    """Within five standard deviations of a rate."""
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / samples), (found, expected)


def masks() -> None:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    model = autotp.parallelize(model, example_inputs=(x,))
    model.train()
    seen: dict[str, list[Tensor]] = {"hidden": [], "out": []}
    for name, found in seen.items():
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, f=found: f.append((out == 0).to(torch.float64)))

    def run(seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden mask, out mask, output) of one forward"""
        if seed is not None:
            torch.manual_seed(seed)
        for found in seen.values():
            found.clear()
        y = model(x)
        return seen["hidden"][0], seen["out"][0], y.detach()

    hidden, out, first = run(1)
    n = hidden.numel()
    assert hidden.shape == (BATCH, HIDDEN // dist_.get_world_size())
    near(hidden.mean().item(), RATE, n)
    near(out.mean().item(), RATE, out.numel())
    a, b = gathered(hidden)
    near((a == b).double().mean().item(), RATE**2 + (1 - RATE) ** 2, n)  # independent ranks
    near((a * b).mean().item(), RATE**2, n)
    near((a[:, :-1] * b[:, 1:]).mean().item(), RATE**2, n)  # and not one shifted against the other
    assert all(torch.equal(other, out) for other in gathered(out))
    assert all(torch.equal(other, first) for other in gathered(first))

    again, _, _ = run()  # the next draw is another
    near((again == hidden).double().mean().item(), RATE**2 + (1 - RATE) ** 2, n)
    state = torch.get_rng_state()
    for other in gathered(state):  # the generators have moved alike
        assert torch.equal(other, state)

    same = run(1)  # one seed, one run
    assert torch.equal(same[0], hidden) and torch.equal(same[1], out) and torch.equal(same[2], first)
    state = torch.get_rng_state()  # as it is saved with a training run
    second = run()
    torch.set_rng_state(state)
    for mine, theirs in zip(run(), second, strict=True):
        assert torch.equal(mine, theirs)

    def gradients(seed: int) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        assert leaf.grad is not None
        return [leaf.grad, *(getattr(p.grad, "_tp_local", p.grad).clone() for p in model.parameters())]

    kept = gradients(5)
    for model.checkpointed in (False, True):  # what is recomputed draws the same again
        for mine, theirs in zip(gradients(5), kept, strict=True):
            assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    autotp.debug.check_sync(model)
    model.eval()
    model.checkpointed = None
    assert torch.equal(model(x), model(x))


def attention() -> None:
    """Dropout inside an attention kernel, and after it."""
    case = MODELS["nanogpt"]
    whole, model = (case.build(dropout=0.2) for _ in range(2))
    inputs = case.inputs(0)
    autotp.parallelize(model, example_inputs=inputs)
    model.train()

    def run(seed: int) -> float:
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(**inputs)[1]
        loss.backward()
        autotp.debug.check_sync(model)  # whatever is drawn in replicated regions is drawn alike
        return loss.item()  # type: ignore[no-any-return]

    losses = [run(seed) for seed in range(24)]
    assert run(3) == losses[3] and len(set(losses)) == len(losses)
    whole.train()
    expected = []
    for seed in range(24):
        torch.manual_seed(seed)
        expected.append(whole(**inputs)[1].item())
    mine, theirs = torch.tensor(losses), torch.tensor(expected)  # other draws, the same distribution
    spread = (mine.var() / 24 + theirs.var() / 24).sqrt()
    assert abs(mine.mean() - theirs.mean()) < 5 * spread, (mine.mean(), theirs.mean(), spread)


def both() -> None:
    masks()
    attention()


def test_masks_of_dropout(dist: Pool) -> None:
    dist.run(2, both)
