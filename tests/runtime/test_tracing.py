"""The moves in graphs: make_fx, torch.compile and torch's own checks of custom ops, all without a process
group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from autotp.errors import AutoTPError
from autotp.runtime import (
    AttentionOptions,
    ConvOptions,
    EmbeddingOptions,
    Gather,
    LinearOptions,
    ShardedConv,
    ShardedEmbedding,
    ShardedLinear,
    ShardedMultiheadAttention,
    SharedEnter,
    all_reduce,
    attention_slices,
    enter,
    gather,
    get_group,
    has_group,
    mask,
    pretend_group,
    record_collectives,
    slice_parameter,
    take,
)
from tests.dist.pool import Pool


@pytest.fixture
def tp() -> Iterator[None]:
    with pretend_group("tp", 1, 3):
        yield


class Moves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(4))
        self.share = SharedEnter("tp", 2)

    def forward(self, x: Tensor) -> Tensor:
        x = enter(x, "tp")
        y = all_reduce(F.linear(x, self.weight, mask(self.bias, False)), "tp")
        y = self.share(y) * self.share(y)
        y = take(y, -1, (1, 3), (1, 1))
        return gather(y, -1, (1, 2, 2), (), (), "tp")


KINDS = ["enter", "mask", "all_reduce", "enter", "take", "gather"]


def kinds(graph: torch.fx.Graph) -> list[str]:
    return [n.target.overloadpacket.__name__ for n in graph.nodes if str(n.target).startswith("autotp.")]


@pytest.mark.parametrize("mode", ("fake", "real"))
@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("wants_grad", (True, False))
def test_one_node_for_each_move(tp: None, mode: str, grad: bool, wants_grad: bool) -> None:
    model, x = Moves(), torch.randn(3, 6, requires_grad=wants_grad)
    with torch.set_grad_enabled(grad):
        traced = make_fx(
            lambda x: model(x), tracing_mode=mode, pre_dispatch=True, _allow_non_fake_inputs=True
        )(x)
    assert kinds(traced.graph) == KINDS
    assert all(n.op != "call_module" for n in traced.graph.nodes)
    assert model.share._x is None
    out = next(n for n in traced.graph.nodes if str(n.target) == "autotp.gather.default")
    assert out.args[1:] == (-1, [1, 2, 2], [], [], "tp")
    assert traced(x).shape == (3, 5)


def test_tracing_needs_no_group() -> None:
    assert not has_group("tp")
    model = Moves()
    traced = make_fx(lambda x: model(x), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
        torch.randn(3, 6)
    )
    assert kinds(traced.graph) == KINDS


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 7)
        assert all_reduce(x.t(), "tp").is_contiguous()
        assert gather(x, 0, [3, 5], [0], [4], "tp").shape == (4, 7)
        assert take(x, 1, [0, 4], [2, 2]).shape == (3, 4)
        with pytest.raises(AutoTPError, match="outside dim 1"):
            take(x, 1, [6], [2])
    x = torch.empty(3, 7, device="meta")
    assert torch.ops.autotp.all_reduce(x, "tp").device.type == "meta"
    with pretend_group("tp", 0, 2):
        assert gather(x, 0, [3, 5], (), (), "tp").shape == (8, 7)
        assert all_reduce(x, "tp").shape == (3, 7)


def test_pretended_groups_nest_and_go() -> None:
    assert not has_group("tp")
    with pretend_group("tp", 0, 2):
        with pretend_group("tp", 3, 4) as inner:
            assert get_group("tp") is inner and inner.index == 3 and inner.size == 4
        assert get_group("tp").size == 2
    assert not has_group("tp")
    with pytest.raises(AutoTPError, match="rank 4 of 4"), pretend_group("tp", 4, 4):
        pass


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (torch.ops.autotp.all_reduce.default, ("tp",)),
        (torch.ops.autotp.enter.default, ("tp",)),
        (torch.ops.autotp.gather.default, (1, [2, 4, 1], [], [], "tp")),
        (torch.ops.autotp.gather.default, (1, [2, 4, 1], [1, 0], [4, 1], "tp")),
        (torch.ops.autotp.take.default, (1, [1], [2])),
        (torch.ops.autotp.take.default, (1, [2, 0], [1, 1])),
        (torch.ops.autotp.mask.default, (True,)),
        (torch.ops.autotp.mask.default, (False,)),
    ],
)
@pytest.mark.parametrize("strided", (False, True))
def test_opcheck(tp: None, op: Any, args: tuple[Any, ...], strided: bool) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch, by torch's own checker."""
    x = torch.randn(4, 3).t() if strided else torch.randn(3, 4)
    torch.library.opcheck(op, (x.detach().requires_grad_(), *args))


def test_ops_and_functions_agree(tp: None) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    pairs = [
        (all_reduce(x, "tp"), torch.ops.autotp.all_reduce(x, "tp")),
        (enter(x, "tp"), torch.ops.autotp.enter(x, "tp")),
        (gather(x, 1, [2, 4, 1], (), (), "tp"), torch.ops.autotp.gather(x, 1, [2, 4, 1], [], [], "tp")),
        (take(x, 1, [1], [2]), torch.ops.autotp.take(x, 1, [1], [2])),
        (mask(x, False), torch.ops.autotp.mask(x, False)),
        (mask(x, True), torch.ops.autotp.mask(x, True)),
    ]
    for function, op in pairs:
        torch.testing.assert_close(function, op)
        up = torch.randn_like(op)
        torch.testing.assert_close(torch.autograd.grad(function, x, up), torch.autograd.grad(op, x, up))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def sharded_mlp(rank: int, world: int) -> Mlp:
    torch.manual_seed(0)
    model = Mlp().double()
    runs = [(rank * 12 // world, 12 // world)]
    slice_parameter(model.up, "weight", 0, runs)
    slice_parameter(model.up, "bias", 0, runs)
    slice_parameter(model.down, "weight", 1, runs)
    ShardedLinear.swap(model.up, LinearOptions(enter="tp"))
    ShardedLinear.swap(model.down, LinearOptions(reduce="tp", bias="after"))
    return model


def compiled(backend: str) -> None:
    import torch.distributed as torch_dist

    from autotp.runtime import register_group

    register_group("tp", torch_dist.group.WORLD)
    rank, world = torch_dist.get_rank(), torch_dist.get_world_size()
    model = sharded_mlp(rank, world)
    torch.manual_seed(0)
    whole = Mlp().double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    whole(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    fast = torch.compile(model, fullgraph=True, backend=backend)
    with record_collectives() as log:
        y = fast(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, whole(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.down.bias.grad, whole.down.bias.grad, rtol=1e-12, atol=1e-12)
    assert [(c.kind, c.direction) for c in log] == [("all_reduce", "forward"), ("all_reduce", "backward")]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), whole(x), rtol=1e-12, atol=1e-12)


def test_compiled_mlp(dist: Pool) -> None:
    dist.run(2, compiled, "aot_eager")


def test_compiling_a_shared_enter_does_not_share(tp: None) -> None:
    share = SharedEnter("tp", 2)

    def f(x: Tensor) -> Tensor:
        return share(x) * 2 + share(x)

    x = torch.randn(3, requires_grad=True)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, 3 * x)
    assert share._x is None


def attention() -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    m = nn.MultiheadAttention(8, 4, batch_first=True)
    for name, (dim, runs) in attention_slices(m, 1, 2).items():
        owner, _, leaf = name.rpartition(".")
        slice_parameter(m.get_submodule(owner), leaf, dim, runs)
    ShardedMultiheadAttention.swap(m, AttentionOptions("tp", (1, 2, 1), 1, "tp"))
    x = torch.randn(2, 3, 8)
    return m, (x, x, x), ["enter", "all_reduce", "all_reduce"]


def embedding() -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    m = nn.Embedding(5, 4)
    ShardedEmbedding.swap(m, EmbeddingOptions(rows=((3, 5),), vocab=10, reduce="tp"))
    return m, (torch.tensor([1, 9, 4]),), ["lookup", "all_reduce"]


def convolution() -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    m = nn.Conv2d(4, 2, 3)
    ShardedConv.swap(m, ConvOptions(enter="tp", gather=Gather("tp", (2, 2, 2))))
    return m, (torch.randn(1, 4, 6, 6),), ["enter", "gather"]


@pytest.mark.parametrize("make", (attention, embedding, convolution))
def test_sharded_modules_trace_and_compile(tp: None, make: Callable[[], Any]) -> None:
    model, inputs, expected = make()
    traced = make_fx(
        lambda *a: model(*a), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
    )(*inputs)
    assert kinds(traced.graph) == expected
    eager = model(*inputs)
    torch.testing.assert_close(traced(*inputs), eager)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs), eager)
