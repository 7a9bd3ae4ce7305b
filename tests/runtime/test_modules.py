"""Each sharded module against the one that it was made from: outputs, gradients of parameters and of inputs,
in float64.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from autotp.errors import RewriteError
from autotp.runtime import (
    ConvOptions,
    EmbeddingOptions,
    Gather,
    LinearOptions,
    Sharded,
    ShardedConv,
    ShardedEmbedding,
    ShardedLinear,
    ShardedTransposedLinear,
    SharedEnter,
    Take,
    all_reduce,
    pretend_group,
    record_collectives,
    slice_parameter,
    sync_gradient,
)
from autotp.runtime.gradients import forget_gradients
from tests.dist.pool import Pool, RankFailed
from tests.runtime.test_ops import EXACT, WORLDS, close, rand, split, start

Slices = dict[str, tuple[int, list[tuple[int, int]]]]  # parameter -> dim, runs


def shard(model: nn.Module, slices: Slices) -> nn.Module:
    """A copy of the model with these parameters sliced."""
    local = copy.deepcopy(model)
    for name, (dim, runs) in slices.items():
        owner, _, leaf = name.rpartition(".")
        slice_parameter(local.get_submodule(owner), leaf, dim, runs)
    return local


def rows(t: Tensor, dim: int, runs: list[tuple[int, int]]) -> Tensor:
    return t.index_select(dim, torch.cat([torch.arange(s, s + n) for s, n in runs]))


def agree(
    whole: nn.Module, local: nn.Module, slices: Slices, call: Callable[[nn.Module, Any], Any], *inputs: Tensor
) -> None:
    """Both give the same outputs and gradients. ``call`` may return a tuple."""
    results = []
    for model in (whole, local):
        model.zero_grad()
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = call(model, *xs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        sum((o * rand(*o.shape, seed=77 + i)).sum() for i, o in enumerate(outs)).backward()
        results.append((outs, [x.grad for x in xs]))
    (wanted, wanted_grads), (got, got_grads) = results
    assert len(wanted) == len(got)
    for a, b in zip(got + got_grads, wanted + wanted_grads, strict=True):
        close(a, b, rtol=1e-10, atol=1e-10)
    parameters = dict(whole.named_parameters())
    for name, p in local.named_parameters():
        expected = parameters[name].grad
        assert expected is not None and p.grad is not None, name
        if name in slices:
            expected = rows(expected, *slices[name])
        close(p.grad, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def plain(m: nn.Module, x: Tensor) -> Tensor:
    return m(x)


def summed(m: nn.Module, x: Tensor) -> Tensor:
    """For a module that leaves its output Partial."""
    return all_reduce(m(x), "tp") if isinstance(m, Sharded) else m(x)


def runs_of(size: int, rank: int, world: int) -> list[tuple[int, int]]:
    return [split(size, world, rank)]


def sizes_of(size: int, world: int) -> tuple[int, ...]:
    return tuple(split(size, world, r)[1] for r in range(world))


# --- linear
# ------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """transformers' GPT-2 layer, word for word in what matters."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size()[:-1] + (self.nf,))


class NoBias(nn.Linear):  # a subclass that keeps nn.Linear's forward
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, bias=False)


def linears(kind: str) -> None:
    rank, world = start()
    size_in, size_out = 7, 9
    torch.manual_seed(1)
    make: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(size_in, size_out),
        "no bias": lambda: NoBias(size_in, size_out),
        "transposed": lambda: Conv1D(size_out, size_in),
    }
    whole = make[kind]().double()
    swap: Any = ShardedTransposedLinear.swap if kind == "transposed" else ShardedLinear.swap
    out_dim = 1 if kind == "transposed" else 0
    x = rand(2, 3, size_in)
    mine_out, mine_in = runs_of(size_out, rank, world), runs_of(size_in, rank, world)

    # column-parallel, gathered
    slices: Slices = {"weight": (out_dim, mine_out), "bias": (0, mine_out)}
    local = shard(whole, slices)
    swap(local, LinearOptions(enter="tp", gather=Gather("tp", sizes_of(size_out, world))))
    with record_collectives() as log:
        agree(whole, local, slices, plain, x)
    assert [(c.kind, c.direction) for c in log] == [("all_gather", "forward"), ("all_reduce", "backward")]
    assert log.bytes("all_gather") == 2 * 3 * size_out * 8 and log.bytes("all_reduce") == 2 * 3 * size_in * 8
    if kind == "transposed":
        assert (local.nx, local.nf) == (size_in, size_out)  # the whole, by which adapters are made
    else:
        assert (local.in_features, local.out_features) == (size_in, size_out)
        assert (
            isinstance(local, nn.Linear)
            and isinstance(local, type(whole))
            and isinstance(local, ShardedLinear)
        )

    # row-parallel on a replicated input: the slice is free
    slices = {"weight": (1 - out_dim, mine_in)}
    local = shard(whole, slices)
    swap(local, LinearOptions(enter="tp", take=Take.runs(mine_in), reduce="tp", bias="after"))
    with record_collectives() as log:
        agree(whole, local, slices, plain, x)
    assert [(c.kind, c.direction) for c in log] == [("all_reduce", "forward"), ("all_reduce", "backward")]

    # left Partial, reduced by a later op: the bias on the last rank only
    local = shard(whole, slices)
    swap(local, LinearOptions(enter="tp", take=Take.runs(mine_in), bias="masked", keep=rank == world - 1))
    agree(whole, local, slices, summed, x)

    # gathered in another order: rows dealt out in turns
    turns = [(i, 1) for i in range(rank, size_out, world)]
    slices = {"weight": (out_dim, turns), "bias": (0, turns)}
    local = shard(whole, slices)
    sizes = tuple(len(range(r, size_out, world)) for r in range(world))
    starts = tuple(sum(sizes[: i % world]) + i // world for i in range(size_out))
    swap(local, LinearOptions(enter="tp", gather=Gather("tp", sizes, starts, (1,) * size_out)))
    agree(whole, local, slices, plain, x)

    # shards with nothing in them
    empty_but_one = [(0, size_in if rank == world - 1 else 0)]
    slices = {"weight": (1 - out_dim, empty_but_one)}
    local = shard(whole, slices)
    swap(local, LinearOptions(enter="tp", take=Take.runs(empty_but_one), reduce="tp", bias="after"))
    agree(whole, local, slices, plain, x)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ("linear", "no bias", "transposed"))
def test_linear(dist: Pool, world: int, kind: str) -> None:
    dist.run(world, linears, kind)


class Attention(nn.Module):
    """q, k and v on one input, with a norm on q that all heads share."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.Parameter(torch.rand(width // heads) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.norm.shape[0])).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q * self.norm, k, v).transpose(1, 2).flatten(2))


def shared_attention() -> None:
    rank, world = start()
    torch.manual_seed(1)
    whole = Attention(20, 5).double()
    head_start, head_count = split(5, world, rank)
    mine = [(head_start * 4, head_count * 4)]
    slices: Slices = {f"{n}.{p}": (0, mine) for n in "qkv" for p in ("weight", "bias")} | {
        "o.weight": (1, mine)
    }
    local = shard(whole, slices)
    share = SharedEnter("tp", 3)
    for name in "qkv":
        ShardedLinear.swap(getattr(local, name), LinearOptions(enter=share))
    ShardedLinear.swap(local.o, LinearOptions(reduce="tp", bias="after"))
    sync_gradient(local, "norm", "tp")
    sync_gradient(local, "norm", "tp")  # once is enough
    x = rand(2, 3, 20)
    with record_collectives() as log:
        agree(whole, local, slices, plain, x)
    assert log.count("all_reduce", "forward") == 1 and log.count("all_reduce", "backward") == 2
    assert log.bytes("all_reduce", "backward") == (2 * 3 * 20 + 4) * 8

    # a copy shares among its own modules and sums its own parameter's gradient
    for other in (copy.deepcopy(local), pickle.loads(pickle.dumps(local))):
        assert other.q._tp.enter is other.k._tp.enter is not share
        assert type(other.q) is type(local.q)
        with record_collectives() as log:
            agree(whole, other, slices, plain, x)
        assert log.count("all_reduce", "backward") == 2

    # accumulation, and a parameter object that is replaced
    local.zero_grad()
    for _ in range(2):
        local(x).sum().backward()
    twice = local.norm.grad.clone()
    local.norm = nn.Parameter(local.norm.detach().clone())
    for _ in range(2):
        local(x).sum().backward()
    close(local.norm.grad, twice, **EXACT)
    forget_gradients(local)
    local.norm.grad = None
    for _ in range(2):
        local(x).sum().backward()
    close(all_reduce(local.norm.grad, "tp"), twice, **EXACT)


@pytest.mark.parametrize("world", WORLDS)
def test_shared_enter_and_gradient_sums(dist: Pool, world: int) -> None:
    dist.run(world, shared_attention)


def partly_summed() -> None:
    """A fused weight of which only some rows are replicated: the others' gradients stay this rank's own."""
    rank, world = start()
    fused = nn.Linear(2, 5, bias=False).double()
    sync_gradient(fused, "weight", "tp", (0, (0, 3), (1, 2)))
    up = rand(4, 5, seed=rank)
    x = rand(4, 2)
    fused(x).backward(up)
    own = up.t() @ x
    total = sum(rand(4, 5, seed=r).t() @ x for r in range(world))
    expected = own.clone()
    expected[[0, 3, 4]] = total[[0, 3, 4]]
    close(fused.weight.grad, expected, **EXACT)


@pytest.mark.parametrize("world", (2, 3))
def test_gradient_sum_of_some_rows(dist: Pool, world: int) -> None:
    dist.run(world, partly_summed)


def half_precision() -> None:
    rank, world = start()
    torch.manual_seed(1)
    whole = nn.Linear(8, 6)
    slices: Slices = {"weight": (1, runs_of(8, rank, world))}
    local = shard(whole, slices)
    ShardedLinear.swap(
        local, LinearOptions(take=Take.runs(runs_of(8, rank, world)), reduce="tp", bias="after")
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = local(torch.ones(2, 8))
        assert y.dtype == torch.bfloat16
        close(y, whole(torch.ones(2, 8)), rtol=0.05, atol=0.05)


def test_autocast_keeps_the_dtype(dist: Pool) -> None:
    dist.run(2, half_precision)


# --- embedding
# ---------------------------------------------------------------------------------------------------


def embeddings(padding_idx: int | None) -> None:
    rank, world = start()
    vocab, width = 11, 6
    torch.manual_seed(1)
    whole = nn.Embedding(vocab, width, padding_idx=padding_idx).double()
    ids = torch.tensor([[0, 10, 3, 3], [5, 7, 2, 9]])
    turns = [(i, 1) for i in range(rank, vocab, world)]
    empty_but_one = [(0, vocab)] if rank == world - 1 else []
    for mine in (runs_of(vocab, rank, world), turns, empty_but_one):
        slices: Slices = {"weight": (0, mine or [(0, 0)])}
        for reduce in ("tp", None):
            local = shard(whole, slices)
            ShardedEmbedding.swap(local, EmbeddingOptions(rows=tuple(mine), vocab=vocab, reduce=reduce))
            assert local.num_embeddings == vocab and isinstance(local, nn.Embedding)
            with record_collectives() as log:
                agree(
                    whole,
                    local,
                    slices,
                    plain if reduce else summed,
                    ids,
                )
            assert [(c.kind, c.bytes, c.direction) for c in log] == [("all_reduce", 8 * width * 8, "forward")]
        for bad in (-1, vocab, vocab + 5):
            with pytest.raises(IndexError):
                local(torch.tensor([bad, 1]))

    columns = runs_of(width, rank, world)
    slices = {"weight": (1, columns)}
    local = shard(whole, slices)
    ShardedEmbedding.swap(local, EmbeddingOptions(gather=Gather("tp", sizes_of(width, world))))
    assert local.embedding_dim == width
    with record_collectives() as log:
        agree(whole, local, slices, plain, ids)
    assert log.count() == log.count("all_gather", "forward") == 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("padding_idx", (None, 3))
def test_embedding(dist: Pool, world: int, padding_idx: int | None) -> None:
    dist.run(world, embeddings, padding_idx)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def tied() -> None:
    rank, world = start()
    torch.manual_seed(1)
    whole = Tied().double()
    mine = runs_of(10, rank, world)
    slices: Slices = {"embed.weight": (0, mine)}
    local = shard(whole, slices)
    local.head.weight = local.embed.weight
    ShardedEmbedding.swap(local.embed, EmbeddingOptions(rows=tuple(mine), vocab=10, reduce="tp"))
    ShardedLinear.swap(local.head, LinearOptions(enter="tp", gather=Gather("tp", sizes_of(10, world))))
    agree(whole, local, slices, plain, torch.tensor([[1, 9, 4]]))
    other = copy.deepcopy(local)
    assert other.head.weight is other.embed.weight


@pytest.mark.parametrize("world", (2, 3))
def test_tied_embedding(dist: Pool, world: int) -> None:
    dist.run(world, tied)


# --- convolution
# -------------------------------------------------------------------------------------------------


def convolutions(dims: int) -> None:
    rank, world = start()
    torch.manual_seed(1)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    x = rand(2, 6, *[5] * dims)
    mine_out, mine_in = runs_of(8, rank, world), runs_of(6, rank, world)
    for extra in ({}, {"padding": 1, "padding_mode": "circular", "stride": 2}, {"bias": False}):
        whole = kind(6, 8, 3, **extra).double()
        slices: Slices = {"weight": (0, mine_out), "bias": (0, mine_out)}
        if whole.bias is None:
            del slices["bias"]
        local = shard(whole, slices)
        ShardedConv.swap(local, ConvOptions(enter="tp", gather=Gather("tp", sizes_of(8, world))))
        assert (local.in_channels, local.out_channels, local.groups) == (6, 8, 1)
        with record_collectives() as log:
            agree(whole, local, slices, plain, x)
        assert [(c.kind, c.direction) for c in log] == [("all_gather", "forward"), ("all_reduce", "backward")]
        agree(whole, local, slices, lambda m, x: m(x[0]), x)  # no batch dim

        slices = {"weight": (1, mine_in)}
        local = shard(whole, slices)
        ShardedConv.swap(local, ConvOptions(enter="tp", take=Take.runs(mine_in), reduce="tp", bias="after"))
        agree(whole, local, slices, plain, x)
        local = shard(whole, slices)
        ShardedConv.swap(
            local, ConvOptions(enter="tp", take=Take.runs(mine_in), bias="masked", keep=rank == 0)
        )
        agree(whole, local, slices, summed, x)

    # depthwise: two output channels for each of its inputs
    whole = kind(6, 12, 3, groups=6).double()
    out = [(2 * mine_in[0][0], 2 * mine_in[0][1])]
    slices = {"weight": (0, out), "bias": (0, out)}
    local = shard(whole, slices)
    sizes = tuple(2 * n for n in sizes_of(6, world))
    options = ConvOptions(
        groups=mine_in[0][1], enter="tp", take=Take.runs(mine_in), gather=Gather("tp", sizes)
    )
    ShardedConv.swap(local, options)
    assert (local.in_channels, local.out_channels, local.groups) == (6, 12, mine_in[0][1])
    agree(whole, local, slices, plain, x)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dims", (1, 2, 3))
def test_convolution(dist: Pool, world: int, dims: int) -> None:
    dist.run(world, convolutions, dims)


# --- what stays, and what is refused
# ---------------------------------------------------------------------------


def test_a_swap_keeps_the_module() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    linear, seen = model[0], []
    linear.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    linear.weight.mark = "kept"
    linear.weight.requires_grad_(False)
    slice_parameter(linear, "weight", 0, [(0, 2)])
    slice_parameter(linear, "bias", 0, [(0, 2)])
    ShardedLinear.swap(linear, LinearOptions(enter="tp"))
    assert model[0] is linear and list(model.state_dict()) == ["0.weight", "0.bias"]
    with pretend_group("tp", 0, 3):
        model(torch.randn(5, 4))
    assert seen == [(5, 2)]
    assert linear.weight.mark == "kept" and not linear.weight.requires_grad and linear.bias.requires_grad
    assert "in_features=4, out_features=6" in repr(linear) and "enter='tp'" in repr(linear)


def test_refusals() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    with pytest.raises(RewriteError, match=r"its forward is its own, not Linear\.forward"):
        ShardedLinear.swap(Scaled(2, 2), LinearOptions())
    parametrized: list[tuple[Any, nn.Module, str, Any]] = [
        (ShardedLinear, nn.Linear(2, 2), "bias", LinearOptions()),
        (ShardedConv, nn.Conv1d(2, 2, 1), "bias", ConvOptions()),
        (ShardedEmbedding, nn.Embedding(2, 2), "weight", EmbeddingOptions()),
    ]
    for kind, module, name, options in parametrized:
        register_parametrization(module, name, nn.Tanh())
        with pytest.raises(RewriteError, match=f"its '{name}' is not a plain parameter"):
            kind.swap(module, options)
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RewriteError, match="forward of its own"):
        ShardedLinear.swap(patched, LinearOptions())
    twice = nn.Linear(2, 2)
    ShardedLinear.swap(twice, LinearOptions())
    with pytest.raises(RewriteError, match="twice"):
        ShardedLinear.swap(twice, LinearOptions())
    with pytest.raises(RewriteError, match="transposed weight"):
        ShardedTransposedLinear.swap(nn.Linear(2, 2), LinearOptions())
    rows = EmbeddingOptions(rows=((0, 4),), vocab=8)
    for extra in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(RewriteError, match=next(iter(extra))):
            ShardedEmbedding.swap(nn.Embedding(4, 2, **extra), rows)
    with pytest.raises(RewriteError, match="a weight of 5 rows"):
        ShardedEmbedding.swap(nn.Embedding(5, 2), rows)
    with pytest.raises(RewriteError, match="ConvTranspose1d is none of nn.Conv1d, nn.Conv2d, nn.Conv3d"):
        ShardedConv.swap(nn.ConvTranspose1d(2, 2, 1), ConvOptions())  # type: ignore[arg-type]


def wrong_bias() -> None:
    """The meta-test: a bias that every rank adds before the sum does not pass ``agree``."""
    rank, world = start()
    whole = nn.Linear(4, 4).double()
    slices: Slices = {"weight": (1, runs_of(4, rank, world))}
    local = shard(whole, slices)
    ShardedLinear.swap(
        local, LinearOptions(take=Take.runs(runs_of(4, rank, world)), reduce="tp", bias="local")
    )
    agree(whole, local, slices, plain, rand(2, 4))


def test_the_comparison_can_fail(dist: Pool) -> None:
    with pytest.raises(RankFailed, match="not close"):
        dist.run(2, wrong_bias)
