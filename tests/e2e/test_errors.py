"""What is refused, and how: the text says what, where, why and what to do, and the model is as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.errors import AutoTPError, PlanError, RankMismatchError, TraceError
from autotp.rewrite.state import sharding_of
from tests.dist.pool import Pool
from tests.e2e.compare import Problems, compare_passes
from tests.models import MODELS
from tests.models.naive import FeedForward, MultiHeadAttention

HERE = re.escape(Path(__file__).name)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that parallelize could change: classes, attributes, parameters and their values, hooks."""
    found: dict[str, Any] = {}
    for fqn, module in model.named_modules():
        found[f"{fqn}: class"] = type(module)
        for key, value in module.__dict__.items():
            if isinstance(value, dict):  # _parameters, _modules, hooks: their items by identity
                found[f"{fqn}.{key}"] = [(k, id(v)) for k, v in value.items()]
            else:
                found[f"{fqn}.{key}"] = id(value) if isinstance(value, Tensor) else repr(value)
    for name, tensor in model.state_dict().items():
        found[f"{name}: values"] = tensor.tolist()
    return found


def refused(model: nn.Module, kind: type[Exception], attempt: Callable[[], object]) -> str:
    """The text of the error; the model is as it was."""
    before = state_of(model)
    with pytest.raises(kind) as caught:
        attempt()
    after = state_of(model)
    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == []
    return str(caught.value)


# ---- models that cannot be traced ----------------------------------------------------------------


class Branching(nn.Module):
    """Which way it goes depends on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FeedForward(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.sum() > 0:
            x = x * 2
        return x


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = FeedForward(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("the tide is out")


def test_a_branch_on_data() -> None:
    model = Branching()
    text = refused(model, TraceError, lambda: autotp.plan(model, 2, example_inputs=(torch.randn(3, 8),)))
    assert re.search(rf"{HERE}:\d+", text)
    assert "x.sum() > 0" in text


def test_a_forward_that_raises() -> None:
    model = Failing()
    text = refused(model, TraceError, lambda: autotp.plan(model, 2, example_inputs=(torch.randn(3, 8),)))
    assert "the tide is out" in text
    assert re.search(rf"{HERE}:\d+", text)


def test_inputs_that_do_not_fit() -> None:
    model = FeedForward(8, 12)
    text = refused(model, TraceError, lambda: autotp.plan(model, 2, example_inputs=(torch.randn(3, 9),)))
    assert "naive.py" in text


class Bare(nn.Module):
    """Nothing in it says what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, anything: Tensor) -> Tensor:
        return anything @ self.weight


def test_inputs_that_cannot_be_guessed() -> None:
    model = Bare()
    text = refused(model, TraceError, lambda: autotp.plan(model, 2))
    assert "example_inputs" in text


# ---- what stays replicated, and says why -----------------------------------------------------------


@torch.library.custom_op("autotp_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An op that no rule is known for."""
    return x.flip(-1).contiguous()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mysterious(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(mystery(self.up(x)))


class Folding(nn.Module):
    """Its view mixes features and tokens: no part of the features makes a part of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 9))


def test_an_op_without_a_rule() -> None:
    """What goes through it stays whole there; strict says so."""
    model = Mysterious()
    inputs = (torch.randn(3, 8),)
    plan = autotp.plan(model, 2, example_inputs=inputs)
    assert re.search(rf"gathered for autotp_tests.mystery.default in .* {HERE}:\d+", "\n".join(plan.notes))
    text = refused(model, AutoTPError, lambda: autotp.plan(model, 2, example_inputs=inputs, strict=True))
    assert "mystery" in text
    assert re.search(rf"{HERE}:\d+", text)


def test_a_view_that_cannot_be_split() -> None:
    model = Folding()
    plan = autotp.plan(model, 2, example_inputs=(torch.randn(3, 8),))
    assert re.search(rf"{HERE}:\d+ 'self.up\(x\).view\(-1, 9\)'", "\n".join(plan.notes))


def test_fewer_heads_than_ranks() -> None:
    """Two heads of one element on four ranks: attention stays whole, and the table says why."""
    model = MultiHeadAttention(2, 2)
    inputs = (torch.randn(3, 5, 2),)
    plan = autotp.plan(model, 4, example_inputs=inputs)
    assert {e.placement for e in plan.entries} == {"replicate"}
    assert "fewer elements than ranks" in str(plan)
    text = refused(model, PlanError, lambda: autotp.plan(model, 4, example_inputs=inputs, strict=True))
    assert "W_" in text
    assert "tp=4" in text


def run_with_too_few_heads() -> list[str]:
    torch.manual_seed(0)
    reference = nn.Sequential(MultiHeadAttention(2, 2), FeedForward(2, 52)).double()
    model = autotp.parallelize(copy.deepcopy(reference), example_inputs=(torch.randn(3, 5, 2).double(),))
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems()
    compare_passes(problems, "", model, reference, (torch.randn(2, 7, 2).double(),), sharding)
    return problems.found


def test_what_stays_whole_is_right(dist: Pool) -> None:
    assert dist.run(4, run_with_too_few_heads) == [[]] * 4


# ---- degrees and meshes ----------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [0, -2, True, 2.0, "2", None])
def test_a_degree_that_is_none(tp: Any) -> None:
    model = FeedForward(8, 12)
    text = refused(model, PlanError, lambda: autotp.plan(model, tp, example_inputs=(torch.randn(3, 8),)))
    assert repr(tp) in text


def in_two_meshes() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = FeedForward(8, 12)
    return refused(model, PlanError, lambda: autotp.parallelize(model, mesh))


def test_a_mesh_of_two_dims(dist: Pool) -> None:
    for text in dist.run(4, in_two_meshes):
        assert "mesh['tp']" in text


def with_a_plan_for(tp: int) -> str:
    case = MODELS["mlp"]
    model = case.build()
    plan = autotp.plan(model, tp, example_inputs=case.inputs())
    return refused(
        model, PlanError, lambda: autotp.parallelize(model, example_inputs=case.inputs(), plan=plan)
    )


def test_a_plan_for_more_ranks_than_there_are(dist: Pool) -> None:
    for text in dist.run(2, with_a_plan_for, 4):
        assert "4" in text and "2" in text


def sharded_twice() -> str:
    case = MODELS["mlp"]
    model = autotp.parallelize(case.build(), example_inputs=case.inputs())
    held = list(model.parameters())
    assert autotp.parallelize(model, example_inputs=case.inputs()) is model  # planned anew, which changes nothing
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["tp"]
    return refused(model, AutoTPError, lambda: autotp.parallelize(model, other))


def test_sharding_twice(dist: Pool) -> None:
    for text in dist.run(2, sharded_twice):
        assert "already, over ranks (0, 1)" in text


def alone() -> bool:
    model = FeedForward(8, 12)
    before = state_of(model)
    return autotp.parallelize(model) is model and state_of(model) == before


def test_one_rank_is_left_alone(dist: Pool) -> None:
    assert dist.run(1, alone) == [True]


def test_the_state_dict_of_an_unsharded_model() -> None:
    model = FeedForward(8, 12)
    assert all(
        value is model.state_dict()[name] or torch.equal(value, model.state_dict()[name])
        for name, value in autotp.full_state_dict(model).items()
    )


# ---- ranks that differ -----------------------------------------------------------------------------


def mismatched(how: str) -> tuple[str, str]:
    """On each rank: (kind, text) of the error. Rank 1 does otherwise than the others."""
    odd = torch.distributed.get_rank() == 1
    model: nn.Module = FeedForward(8, 12)
    inputs: Any = (torch.randn(3, 8),)
    plan: Any = None
    if odd and how == "width":
        model = FeedForward(8, 16)
    elif odd and how == "dtype":
        model = model.double()
        inputs = (torch.randn(3, 8).double(),)
    elif odd and how == "frozen":
        model.linear1.weight.requires_grad_(False)
    elif odd and how == "overrides":
        plan = {"modules": {"linear1": "replicate", "linear2": "replicate"}}
    elif odd and how == "branch":
        model = Branching()
    elif odd and how == "raises":
        model = Failing()
    elif odd and how == "inputs":
        inputs = (torch.randn(3, 9),)
    elif odd and how == "no inputs":
        inputs = 17
    elif odd and how == "plan file":
        plan = "no such file.yaml"
    kinds: list[type[Exception]] = []

    def attempt() -> None:
        try:
            autotp.parallelize(model, example_inputs=inputs, plan=plan)
        except Exception as error:
            kinds.append(type(error))
            raise

    text = refused(model, Exception, attempt)
    return kinds[0].__name__, text


@pytest.mark.parametrize("how", ["width", "dtype", "frozen", "overrides"])
def test_ranks_with_different_models(dist: Pool, how: str) -> None:
    """Every rank raises, none hangs, and the text says which rank has which."""
    for kind, text in dist.run(3, mismatched, how, timeout=60):
        assert kind == RankMismatchError.__name__
        assert "rank 1" in text


@pytest.mark.parametrize("how", ["branch", "raises", "inputs", "no inputs", "plan file"])
def test_a_rank_that_cannot_plan(dist: Pool, how: str) -> None:
    """It raises its own error; the others, who could, say which rank could not, and why."""
    found = dist.run(3, mismatched, how, timeout=60)
    own_kind, own_text = found[1]
    assert own_kind != RankMismatchError.__name__
    for kind, text in (found[0], found[2]):
        assert kind == RankMismatchError.__name__
        assert "rank 1 could not plan" in text
        assert own_text.split("\n")[0] in text
