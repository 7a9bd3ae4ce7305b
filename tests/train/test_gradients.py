"""Sums of replicated parameters' gradients: one all-reduce a backward pass, right however the pass is run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from autotp.runtime import mesh, sync_gradient
from autotp.runtime.gradients import _buckets
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool

WORLD = 2


class Scales(nn.Module):
    """Each rank scales its own rows of a batch; the output's gradient reaches the weights as a Partial one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            [torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 1, 3)]
        )
        self.fused = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.weights
        return ((x * a).tanh() * b + c * a) @ self.fused.t()


def rows(rank: int, seed: int = 0) -> Tensor:
    x = torch.randn(WORLD, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x[rank]


def start() -> tuple[Scales, Scales, int]:
    """The model with sums, the same without, the rank. Of ``fused`` rows 1 and 2 are summed."""
    prefix = mesh.connect(mesh.default_mesh("cpu"), {"": ((0, 1),)})
    model, plain = Scales(), Scales()
    for name in ("0", "1", "2"):
        sync_gradient(model.weights, name, prefix)
    sync_gradient(model, "fused", prefix, (0, (1,), (2,)))
    return model, plain, torch.distributed.get_rank()


def expected(plain: Scales, rank: int, seeds: tuple[int, ...]) -> list[Tensor]:
    by_rank = []
    for r in range(WORLD):
        plain.zero_grad()
        for seed in seeds:
            plain(rows(r, seed)).sin().sum().backward()
        by_rank.append([p.grad.clone() for p in plain.parameters()])
    total = [sum(grads) for grads in zip(*by_rank, strict=True)]
    fused = next(i for i, p in enumerate(plain.parameters()) if p is plain.fused)
    total[fused] = torch.stack([by_rank[rank][fused][0], *total[fused][1:3], by_rank[rank][fused][3]])
    return total


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-13)


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def backward_ways() -> None:
    model, plain, rank = start()
    parameters = list(model.parameters())

    def loss(seed: int) -> Tensor:
        return model(rows(rank, seed)).sin().sum()

    with record_collectives() as log:
        loss(0).backward()
    close(grads(model), expected(plain, rank, (0,)))
    assert [(c.kind, c.direction, c.shape) for c in log] == [("all_reduce", "backward", (3 + 1 + 3 + 2 * 3,))]

    with record_collectives() as log:  # accumulated
        loss(1).backward()
    close(grads(model), expected(plain, rank, (0, 1)))
    assert len(log) == 1
    model.zero_grad(set_to_none=False)
    loss(1).backward()
    close(grads(model), expected(plain, rank, (1,)))

    model.zero_grad()  # autograd.grad, of all and of some; nothing is accumulated
    with record_collectives() as log:
        found = torch.autograd.grad(loss(0), parameters)
    close(list(found), expected(plain, rank, (0,)))
    found = torch.autograd.grad(loss(0), parameters[1:2])
    close(list(found), expected(plain, rank, (0,))[1:2])
    assert len(log) == 1 and grads(model) == []

    loss(0).backward(inputs=parameters[:2])  # a part of the parameters
    close(grads(model), expected(plain, rank, (0,))[:2])
    model.zero_grad()

    # twice differentiated: summed at once, and the sums are differentiable
    found = torch.autograd.grad(loss(0), parameters, create_graph=True)
    close([g.detach() for g in found], expected(plain, rank, (0,)))
    assert all(g.requires_grad for g in found)

    for reentrant in (False, True):  # recomputed
        x = rows(rank).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).sin().sum().backward()
        close(grads(model), expected(plain, rank, (0,)))
        model.zero_grad()
    assert not _buckets


def changed_models() -> None:
    model, plain, rank = start()

    def check(m: nn.Module, sums: int) -> None:
        m.zero_grad()
        with record_collectives() as log:
            m(rows(rank)).sin().sum().backward()
        close(grads(m), expected(plain, rank, (0,)))
        assert len(log) == sums

    twin = copy.deepcopy(model)
    check(twin, 1)
    assert grads(model) == []
    check(model, 1)

    model.fused.requires_grad_(False)  # frozen, and trained again
    model.zero_grad()
    model(rows(rank)).sin().sum().backward()
    wanted = {id(p): g for p, g in zip(model.parameters(), expected(plain, rank, (0,)), strict=True)}
    assert model.fused.grad is None
    close(grads(model), [wanted[id(p)] for p in model.parameters() if p is not model.fused])
    model.fused.requires_grad_(True)
    check(model, 1)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # other parameter objects, seen before the next forward
    model(rows(rank))
    m = model
    m.zero_grad()
    m.fused.grad = None
    m(rows(rank)).sin().sum().backward()
    close([m.fused.grad], [expected(plain, rank, (0,))[[p is m.fused for p in m.parameters()].index(True)]])


def watched() -> None:
    """A hook that looks at a gradient within the pass sees the sum."""
    model, plain, rank = start()
    wanted = expected(plain, rank, (0,))
    seen = []
    handle = model.fused.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model(rows(rank)).sin().sum().backward()
    names = [n for n, _ in model.named_parameters()]
    close(seen, [wanted[names.index("fused")]])
    handle.remove()
    model.zero_grad()
    model.fused.register_hook(lambda g: 2 * g)
    model(rows(rank)).sin().sum().backward()
    close([model.fused.grad], [2 * wanted[names.index("fused")]])


@pytest.mark.parametrize("case", [backward_ways, changed_models, watched], ids=lambda f: f.__name__)
def test_sums(dist: Pool, case: object) -> None:
    dist.run(WORLD, case)
