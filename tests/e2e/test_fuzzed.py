"""What random models found, each as small as it gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.plan.plan import Plan
from autotp.rewrite.state import sharding_of
from tests.dist.pool import Pool
from tests.e2e.compare import Problems, compare_passes
from tests.models.case import randomize

WIDTH = 10


class Positions(nn.Module):
    """Positions that the example does not reach are needed by longer sequences, so they are no axis of their own."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.mixed = mixed
        self.table = nn.Parameter(torch.zeros(17, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)  # used twice, and each time otherwise

    def forward(self, x: Tensor) -> Tensor:
        table = self.table[: x.shape[1]]
        x = x + (table.sum(0) if self.mixed else table)
        return self.norm(x) + self.down(F.relu(self.up(self.norm(x))))


class Bias(nn.Module):
    """A bias for each pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * 3 * 4), nn.Linear(3 * 4, WIDTH)
        self.table = nn.Parameter(torch.zeros(3, 17, 17))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT + self.table[:, :t, :t]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class ThroughALinear(nn.Module):
    """A Partial that passes through two more linear layers, to where it is smallest: their biases count once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(F.gelu(self.up(x))))


class Loop(nn.Module):
    """One line runs for all layers, the first of which is unlike the others: it is given the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12, bias=False), nn.Tanh(), nn.Linear(12, WIDTH, bias=False))
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x[:, -1:])


class Dropout(nn.Module):
    """In train mode a dropout stands where the gradient is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(14, 5), nn.Linear(5, 14, bias=False)
        self.drop = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(14)
        self.inward = nn.Linear(WIDTH, 14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        return self.down(self.drop(F.gelu(self.up(self.norm(x))))) * x


class Unused(nn.Module):
    """An index that a rank's part of the width has not, in code whose result nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        h[..., [5, 3, 4]]
        return self.down(h)


class Branch(nn.Module):
    """What the example does not run is not rewritten either, so it keeps its weights whole."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = (nn.Sequential(nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.short if x.shape[1] < 8 else self.long
        h = layer[0](x)
        if x.shape[1] >= 8:
            h = h * self.gain
        return layer[1](F.relu(h)) + x


class Kept(nn.Module):
    """A value with three uses, one of which counts on one rank only: its gradient has the same bits on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(7, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.up, self.down, self.head = nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain
        x = x + self.down(F.relu(self.up(normed)))
        return self.head(x.mean(1))


class Counted(nn.Module):
    """Rows that are zero are left out, and how many features there are is held against how many places there are."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.inward = nn.Linear(WIDTH, 13), nn.Linear(WIDTH, 13)
        self.head = nn.Linear(13, 11)

    def forward(self, x: Tensor) -> Tensor:
        inward = self.inward(x)
        real = (x == 0).sum(-1) != x.shape[-1]
        features = self.features(x[real])
        torch._check_tensor_all_with(ValueError, real.sum() * inward.shape[-1] == features.numel(), lambda: "counts")
        return self.head(inward.masked_scatter(real.unsqueeze(-1), features))


class Attends(nn.Module):
    """Uses a bias, or makes one, and hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 24) for _ in range(3))
        self.out = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        if bias is None:
            bias = torch.ones(1, 6, x.shape[1], x.shape[1], dtype=x.dtype).tril()
        return x + self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)), bias


class HandsOn(nn.Module):
    """The first layer's bias is every layer's, and comes to each through the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attends() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


class Unordered(nn.Module):
    """Angles for each kind of layer, in the order of a set, which a deep copy of it has not (7 and 15 collide)."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = {7, 15}
        for kind in self.kinds:
            self.register_buffer(f"frequency_{kind}", torch.rand(WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        angles = {
            kind: positions[:, None].to(torch.float64) * getattr(self, f"frequency_{kind}") for kind in self.kinds
        }
        return self.down(F.gelu(self.up(x * angles[7].cos() + x * angles[15].sin())))


CASES = {
    "positions": (Positions, WIDTH),
    "mixed positions": (lambda: Positions(mixed=True), WIDTH),
    "bias of pairs": (Bias, WIDTH),
    "through a linear": (ThroughALinear, WIDTH),
    "loop": (Loop, WIDTH),
    "dropout": (Dropout, WIDTH),
    "unused": (Unused, WIDTH),
    "branch": (Branch, WIDTH),
    "kept": (Kept, 7),
    "counted": (Counted, WIDTH),
    "handed on": (HandsOn, WIDTH),
    "unordered": (Unordered, WIDTH),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name][0]().double().eval()
    randomize(model, 0)
    return model


def example(name: str, batch: int, seq: int) -> tuple[Tensor, ...]:
    shape = (batch, seq, CASES[name][1])
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seq), dtype=torch.float64),)


def sharded(name: str) -> tuple[list[str], Plan]:
    reference, model = build(name), build(name)
    autotp.parallelize(model, example_inputs=example(name, 3, 5))
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems()
    for batch, seq in ((3, 5), (2, 3), (2, 11)):
        compare_passes(problems, f"{seq} positions", model, reference, example(name, batch, seq), sharding)
    return problems.found, sharding.plan


@pytest.mark.parametrize("name", CASES)
def test_right(dist: Pool, name: str) -> None:
    for found, plan in dist.run(3, sharded, name):
        assert found == []
        assert plan.sharded_bytes > 0.4 * plan.weight_bytes


@pytest.mark.parametrize("name", ["positions", "mixed positions", "bias of pairs"])
def test_the_rest_of_a_table_is_no_axis(name: str) -> None:
    plan = autotp.plan(build(name), 3, example_inputs=example(name, 3, 5))
    (entry,) = [e for e in plan.entries if e.name == "table"]
    assert {shape[-2] for shape in entry.local_shapes} == {17}


def test_a_bias_is_added_after_the_sum() -> None:
    plan = autotp.plan(build("through a linear"), 3, example_inputs=example("through a linear", 3, 5))
    assert [(c.where, c.op) for c in plan.collectives if c.phase == "forward"] == [("down", "linear")]


def test_a_count_of_features_is_patched() -> None:
    plan = autotp.plan(build("counted"), 3, example_inputs=example("counted", 3, 5))
    assert plan.notes == () and "features.numel()" in plan.diff()


def test_a_value_that_modules_hand_on_is_cut_where_it_is_used() -> None:
    plan = autotp.plan(build("handed on"), 3, example_inputs=example("handed on", 3, 5))
    assert plan.notes == () and not [c for c in plan.collectives if c.kind == "all_gather"]


class Uneven(nn.Module):
    """Two query heads of one key head over three ranks: its elements are on the first two, and all on the third."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4)
        self.out = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 4).transpose(1, 2)
        k, v = (
            y.view(b, t, 1, 4).transpose(1, 2).repeat_interleave(2, dim=1) for y in (self.k(x), self.v(x))
        )
        scores = (q @ k.mT).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


def test_ranks_with_parts_in_common_in_several_ways_are_not_planned() -> None:
    for verify in (False, True):
        plan = autotp.plan(Uneven(), 3, example_inputs=(torch.zeros(2, 5, 12),), verify=verify)
        assert plan.sharded_bytes > 0


class Bounded(nn.Module):
    """Looks at every element of what is sharded."""

    def __init__(self, smallest: bool) -> None:
        super().__init__()
        self.smallest = smallest
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        torch._check_tensor_all((hidden.amin(-1) if self.smallest else hidden) > -30, lambda: "out of bounds")
        return self.down(hidden)


def bounded(smallest: bool, place: int | None) -> str:
    torch.manual_seed(0)
    model = Bounded(smallest).double()
    if place is not None:
        model.up.bias.data[place] = -50
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    autotp.parallelize(model, example_inputs=(x,))
    assert model.up.weight.shape[0] == 12
    try:
        model(x)
    except RuntimeError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize(("place", "expected"), [(None, "passed"), (3, "out of bounds"), (20, "out of bounds")])
def test_every_rank_checks_all_values(dist: Pool, smallest: bool, place: int | None, expected: str) -> None:
    assert dist.run(2, bounded, smallest, place) == [expected, expected]
