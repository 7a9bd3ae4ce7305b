"""The five moves against the unsharded maths, in float64, with exact counts and bytes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor

from autotp.errors import AutoTPError
from autotp.runtime import (
    SharedEnter,
    all_reduce,
    enter,
    gather,
    get_group,
    mask,
    record_collectives,
    register_group,
    register_subgroups,
    take,
)
from tests.dist.pool import Pool, RankFailed

WORLDS = (2, 3, 4)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
close = torch.testing.assert_close


def start() -> tuple[int, int]:
    register_group("tp", torch_dist.group.WORLD)
    return torch_dist.get_rank(), torch_dist.get_world_size()


def rand(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_(grad)


# --- each move alone
# ---------------------------------------------------------------------------------------------


def moves() -> None:
    rank, world = start()
    parts = [rand(3, 5, seed=10 + r) for r in range(world)]
    up = rand(3, 5, seed=99)  # a whole gradient, the same on every rank

    x = parts[rank].clone().requires_grad_()
    with record_collectives() as log:
        y = all_reduce(x, "tp")
        y.backward(up)
    close(y.detach(), torch.stack(parts).sum(0), **EXACT)
    close(x.detach(), parts[rank], rtol=0, atol=0)  # the caller's tensor is left alone
    close(x.grad, up, **EXACT)
    assert [(c.kind, c.bytes, c.direction, c.group) for c in log] == [("all_reduce", 120, "forward", "tp")]

    x = parts[0].clone().requires_grad_()
    with record_collectives() as log:
        y = enter(x, "tp")
        y.backward(parts[rank])
    close(y.detach(), x.detach(), rtol=0, atol=0)
    close(x.grad, torch.stack(parts).sum(0), **EXACT)
    assert [(c.kind, c.bytes, c.direction) for c in log] == [("all_reduce", 120, "backward")]

    x = parts[0].clone().requires_grad_()
    y = mask(x, rank == 1)
    close(y.detach(), parts[0] if rank == 1 else torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=0)
    all_reduce(y, "tp").backward(up)
    close(x.grad, up, **EXACT)

    x = parts[0].clone().requires_grad_()
    y = take(x, 1, (3, 0), (2, 1))
    close(y.detach(), parts[0][:, [3, 4, 0]], rtol=0, atol=0)
    y.backward(up[:, :3])
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[:, [3, 4, 0]] = up[:, :3]
    close(x.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("world", WORLDS)
def test_each_move(dist: Pool, world: int) -> None:
    dist.run(world, moves)


def gathers() -> None:
    rank, world = start()
    cases: list[tuple[list[int], list[int], list[int]]] = [
        ([2] * world, [], []),
        ([3, 1, 0, 2][:world], [], []),
        ([0] * (world - 1) + [4], [], []),
        # two segments a rank, as in a fused projection: all first ones, then all second ones
        (
            [4] * world,
            [4 * r for r in range(world)] + [4 * r + 1 for r in range(world)],
            [1] * world + [3] * world,
        ),
        # a run over the border of two shards, and back to front
        ([3, 2, 1, 2][:world], [2, 0], [3, 2]),
        # some of it only: the rest gets a zero gradient
        ([2] * world, [2], [2]),
        ([2] * world, [1], [2]),
        # more runs than are worth a cat
        ([40] * world, list(reversed(range(40 * world))), [1] * (40 * world)),
    ]
    for sizes, starts, lengths in cases:
        for dim in (0, 1, -1):
            shape = [2, 3, 4]
            shards = []
            for r in range(world):
                shape[dim] = sizes[r]
                shards.append(rand(*shape, seed=r))
            ranks_order = torch.cat(shards, dim)
            index = (
                torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
                if starts
                else None
            )
            whole = ranks_order if index is None else ranks_order.index_select(dim, index)
            up = rand(*whole.shape, seed=50)
            x = shards[rank].clone().requires_grad_()
            with record_collectives() as log:
                y = gather(x, dim, sizes, starts, lengths, "tp")
                y.backward(up)
            close(y.detach(), whole, rtol=0, atol=0)
            assert [(c.kind, c.bytes, c.direction) for c in log] == [
                ("all_gather", whole.numel() * 8, "forward")
            ]
            transposed = torch.zeros_like(ranks_order)
            transposed = up if index is None else transposed.index_add(dim, index, up)
            close(x.grad, transposed.narrow(dim, sum(sizes[:rank]), sizes[rank]), **EXACT)


@pytest.mark.parametrize("world", WORLDS)
def test_gather(dist: Pool, world: int) -> None:
    dist.run(world, gathers)


def other_dtypes() -> None:
    rank, world = start()
    sizes = [r + 1 for r in range(world)]
    for dtype in (
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
    ):
        whole = (torch.arange(3 * sum(sizes)).reshape(3, -1) % 5).to(dtype)
        mine = take(whole, -1, [sum(sizes[:rank])], [sizes[rank]])
        close(gather(mine, -1, sizes, (), (), "tp"), whole, rtol=0, atol=0)
        close(gather(mine.t(), 0, sizes, (), (), "tp"), whole.t(), rtol=0, atol=0)  # not contiguous
        if dtype is not torch.bool:
            close(all_reduce(whole, "tp"), whole * world, rtol=0, atol=0)
            close(all_reduce(whole.t(), "tp"), whole.t() * world, rtol=0, atol=0)
    close(all_reduce(torch.tensor(2.0), "tp"), torch.tensor(2.0 * world))  # no dims
    assert all_reduce(torch.zeros(0, 3), "tp").shape == (0, 3)


@pytest.mark.parametrize("world", WORLDS)
def test_dtypes_and_layouts(dist: Pool, world: int) -> None:
    dist.run(world, other_dtypes)


def no_grad_is_free() -> None:
    _rank, _ = start()
    x = rand(2, 3, grad=True)
    with torch.no_grad(), record_collectives() as log:
        assert enter(x, "tp") is x
        assert mask(x, True) is x
        all_reduce(x, "tp")
    assert [c.kind for c in log] == ["all_reduce"]
    with torch.inference_mode():
        y = all_reduce(x * 1, "tp")
        close(y, x.detach() * 2)


def test_without_gradients_enter_costs_nothing(dist: Pool) -> None:
    dist.run(2, no_grad_is_free)


# --- together
# ----------------------------------------------------------------------------------------------------


def split(size: int, world: int, rank: int) -> tuple[int, int]:
    """(start, length), uneven where it does not divide."""
    lengths = [size // world + (r < size % world) for r in range(world)]
    return sum(lengths[:rank]), lengths[rank]


def mlp(width: int) -> None:
    rank, world = start()
    x, w1, w2, b2 = (
        rand(3, 5, grad=True),
        rand(width, 5, seed=1),
        rand(7, width, seed=2),
        rand(7, seed=3, grad=True),
    )
    w1.requires_grad_(), w2.requires_grad_()
    whole = F.linear(F.relu(F.linear(x, w1)), w2, b2)
    whole.square().sum().backward()
    wanted = [x.grad, w1.grad, w2.grad, b2.grad]

    begin, length = split(width, world, rank)
    mine = [
        t.detach().clone().requires_grad_()
        for t in (x, w1[begin : begin + length], w2[:, begin : begin + length], b2)
    ]
    with record_collectives() as log:
        y = F.linear(F.relu(F.linear(enter(mine[0], "tp"), mine[1])), mine[2], mask(mine[3], rank == 0))
        y = all_reduce(y, "tp")
        y.square().sum().backward()
    close(y, whole, **EXACT)
    close(mine[0].grad, wanted[0], **EXACT)
    close(mine[1].grad, wanted[1][begin : begin + length], **EXACT)
    close(mine[2].grad, wanted[2][:, begin : begin + length], **EXACT)
    close(mine[3].grad, wanted[3], **EXACT)
    assert log.count("all_reduce", "forward") == 1 and log.count("all_reduce", "backward") == 1
    assert (
        log.bytes("all_reduce", "forward") == 3 * 7 * 8 and log.bytes("all_reduce", "backward") == 3 * 5 * 8
    )
    assert log.count() == 2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("width", (12, 5))
def test_mlp(dist: Pool, world: int, width: int) -> None:
    dist.run(world, mlp, width)


def slice_in_gather_out() -> None:
    """A replicated value meets a sharded one by a free slice; the result is gathered and used whole."""
    rank, world = start()
    x, gate, w = rand(4, 7, grad=True), rand(7, seed=1, grad=True), rand(7, 7, seed=2, grad=True)
    (F.linear(x, w) * gate).tanh().square().sum().backward()
    begin, length = split(7, world, rank)
    sizes = [split(7, world, r)[1] for r in range(world)]
    x2, gate2 = (t.detach().clone().requires_grad_() for t in (x, gate))
    w2 = w.detach()[begin : begin + length].clone().requires_grad_()
    with record_collectives() as log:
        h = F.linear(enter(x2, "tp"), w2) * take(enter(gate2, "tp"), 0, [begin], [length])
        gather(h, 1, sizes, (), (), "tp").tanh().square().sum().backward()
    close(x2.grad, x.grad, **EXACT)
    close(gate2.grad, gate.grad, **EXACT)
    close(w2.grad, w.grad[begin : begin + length], **EXACT)
    assert [(c.kind, c.direction) for c in log] == [("all_gather", "forward")] + [
        ("all_reduce", "backward")
    ] * 2


@pytest.mark.parametrize("world", WORLDS)
def test_slice_in_and_gather_out(dist: Pool, world: int) -> None:
    dist.run(world, slice_in_gather_out)


def second_derivatives() -> None:
    """d/dx |d loss / dx|²: the backward of each backward has its collective, too."""
    rank, world = start()
    width = 5
    x, w1, w2 = rand(3, 4, grad=True), rand(width, 4, seed=1), rand(6, width, seed=2)
    begin, length = split(width, world, rank)
    sizes = [split(width, world, r)[1] for r in range(world)]

    def penalty(y: Tensor, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x)
        return gg

    wanted = penalty(F.linear(torch.tanh(F.linear(x, w1)), w2), x)
    local = torch.tanh(F.linear(enter(x, "tp"), w1[begin : begin + length]))
    close(penalty(all_reduce(F.linear(local, w2[:, begin : begin + length]), "tp"), x), wanted, **EXACT)
    local = torch.tanh(F.linear(enter(x, "tp"), w1[begin : begin + length]))
    close(penalty(F.linear(gather(local, 1, sizes, (), (), "tp"), w2), x), wanted, **EXACT)


@pytest.mark.parametrize("world", (2, 3))
def test_second_derivatives(dist: Pool, world: int) -> None:
    dist.run(world, second_derivatives)


def subgroups() -> None:
    """Two kv heads on four ranks: the weight of each is replicated in a pair of ranks."""
    rank, _ = start()
    pair = register_subgroups("kv", [[0, 1], [2, 3]])
    assert pair.ranks == ((0, 1), (2, 3))[rank // 2] and pair.index == rank % 2 and pair.size == 2
    x = torch.full((2,), float(rank), requires_grad=True)
    with record_collectives() as log:
        y = all_reduce(x, "kv")
        enter(x, "kv").backward(torch.full((2,), float(rank)))
    assert y.tolist() == [[1.0, 1.0], [5.0, 5.0]][rank // 2]
    assert x.grad is not None and x.grad.tolist() == y.tolist()
    assert log.count(group="kv") == 2

    # gathering the kv axis over all four takes one copy of each head; the other copy's gradient is zero, and
    # the sum over the pair is what it should be
    heads = rand(2, 3)
    mine = heads[rank // 2 : rank // 2 + 1].clone().requires_grad_()
    whole = gather(mine, 0, [1, 1, 1, 1], [0, 2], [1, 1], "tp")
    close(whole.detach(), heads, rtol=0, atol=0)
    up = rand(2, 3, seed=5)
    whole.backward(up)
    close(all_reduce(mine.grad, "kv"), up[rank // 2 : rank // 2 + 1], **EXACT)


def test_subgroups(dist: Pool) -> None:
    dist.run(4, subgroups)


def wrong_use() -> None:
    _rank, world = start()
    with pytest.raises(AutoTPError, match="no process group is registered as 'dp' in this process"):
        all_reduce(torch.ones(2), "dp")
    with pytest.raises(AutoTPError, match="of 2 ranks was given 3 sizes"):
        gather(torch.ones(2), 0, [2, 2, 2], (), (), "tp")
    with pytest.raises(AutoTPError, match="holds 2 elements in dim 0"):
        gather(torch.ones(2), 0, [3, 3], (), (), "tp")
    with pytest.raises(AutoTPError, match="outside the 4 gathered elements"):
        gather(torch.ones(2), 0, [2, 2], [3], [2], "tp")
    with pytest.raises(AutoTPError, match="is not in its ranks"):
        register_group("other", torch_dist.group.WORLD, [7])
    x = torch.ones(2, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="modified inplace"):
        enter(x, "tp").add_(1)  # would make the gradient of x wrong in silence
    assert get_group("tp").size == world


def test_wrong_use(dist: Pool) -> None:
    dist.run(2, wrong_use)


def half_gone() -> None:
    start()
    if torch_dist.get_rank() == 0:
        all_reduce(torch.ones(2), "tp")
        raise RuntimeError("rank 0 stops here")
    all_reduce(torch.ones(2), "tp")
    all_reduce(torch.ones(2), "tp")


def test_a_rank_that_stops_is_reported(dist: Pool) -> None:
    with pytest.raises(RankFailed, match="rank 0 stops here"):
        dist.run(2, half_gone)


# --- one enter for several consumers
# -----------------------------------------------------------------------------


def shared_enters() -> None:
    rank, world = start()
    share = SharedEnter("tp", 3)
    x = rand(2, 3, grad=True)
    for _ in range(2):  # again with the same tensor: a new enter
        x.grad = None
        with record_collectives() as log:
            y = [share(x) for _ in range(3)]
            assert y[0] is y[1] is y[2] and share._x is None and share._entered is None
            sum((i + 1) * (t * (rank + 1)).sum() for i, t in enumerate(y)).backward()
        assert [c.direction for c in log] == ["backward"]
        close(x.grad, torch.full((2, 3), 6.0 * world * (world + 1) / 2, dtype=torch.float64))

    x2 = rand(2, 3, seed=1, grad=True)
    a, b = share(x), share(x2)  # another tensor
    assert a is not b and share._x is x2
    share.clear()

    a = share(x)
    with torch.no_grad():
        assert share(x) is x  # another mode
    a = share(x)
    with torch.no_grad():
        x.add_(1)
    assert share(x) is not a  # it was written to

    share.clear()
    one = SharedEnter("tp", 1)
    one(x)
    assert one._x is None

    def consumer() -> weakref.ref[Tensor]:
        h = rand(2, 3, grad=True) * 1
        for _ in range(3):
            share(h)
        return weakref.ref(h)

    gone = consumer()
    gc.collect()
    assert gone() is None  # nothing is kept after the last consumer


def test_shared_enter(dist: Pool) -> None:
    dist.run(2, shared_enters)


def checkpointed() -> None:
    """Activation checkpointing runs the forward again in the backward, and may stop it early."""
    from torch.utils.checkpoint import checkpoint

    rank, _world = start()
    share = SharedEnter("tp", 2)
    w = rand(3, 3, seed=rank + 1, grad=True)

    def block(x: Tensor) -> Tensor:
        return all_reduce(F.linear(torch.tanh(F.linear(share(x), w) * F.linear(share(x), w.t())), w), "tp")

    grads = []
    for how in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        x = rand(2, 3, grad=True)
        w.grad = None
        for _ in range(2):
            h = how(block, x * 1)
            how(block, h).sum().backward()
        grads.append((x.grad, w.grad))
    close(grads[0], grads[1], **EXACT)


def test_shared_enter_under_checkpointing(dist: Pool) -> None:
    dist.run(2, checkpointed)
