"""Each mechanism on its own (`tests.models.mechanisms`): right, sharded where it has to be, and at the planned cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.rewrite.state import sharding_of
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool
from tests.e2e.compare import Problems, compare_collectives, compare_passes
from tests.models.mechanisms import IN_GROUPS, MECHANISMS, OwnLoss, PositionTable, floats, ids


def compare_mechanism(
    name: str, build: Callable[[], nn.Module], given: Tensor, sharded: str
) -> tuple[str, ...]:
    """What is wrong, on one rank."""
    torch.manual_seed(1)
    reference = build().double().eval()
    torch.manual_seed(1)
    model = build().double().eval()
    inputs = (given,)
    autotp.parallelize(model, example_inputs=inputs)
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems()
    with record_collectives() as log:
        compare_passes(problems, name, model, reference, inputs, sharding)
    compare_collectives(problems, log, sharding.plan, sharding.rank.rank)
    whole = {e.name for e in sharding.plan.entries if e.placement == "replicate"}
    problems.equal("sharded", set(sharded.split()) & whole, set())
    return tuple(problems.found)


def compare_all() -> dict[str, tuple[str, ...]]:
    return {
        name: compare_mechanism(name, build, make_input(), sharded)
        for name, (build, make_input, sharded) in MECHANISMS.items()
    }


@pytest.mark.parametrize("tp", [2, 3])
def test_mechanisms(dist: Pool, tp: int) -> None:
    assert dist.run(tp, compare_all) == [dict.fromkeys(MECHANISMS, ())] * tp


def compare_in_groups(tp: int) -> dict[str, tuple[str, ...]]:
    """With fewer features in a group than ranks, so that no axis but both together can be sharded."""
    return {
        name: compare_mechanism(name, partial(build, tp - 1), floats(2), sharded)
        for name, (build, sharded) in IN_GROUPS.items()
    }


@pytest.mark.parametrize("tp", [4, 5])
def test_groups_of_ranks(dist: Pool, tp: int) -> None:
    """What some of the ranks sum, they have in common: so is its gradient, before it goes back to each one's addend."""
    assert dist.run(tp, compare_in_groups, tp) == [dict.fromkeys(IN_GROUPS, ())] * tp


def compare_longer() -> tuple[str, ...]:
    """A table of positions that is cut to the input's length serves longer inputs than the traced one, too."""
    torch.manual_seed(1)
    reference = PositionTable().double()
    model = copy.deepcopy(reference)
    autotp.parallelize(model, example_inputs=(ids()[:, :1],), plan={"modules": {"tokens": "shard(0)"}})
    longer = ids().repeat(1, 4)
    problems = Problems()
    problems.close("output", model(longer), reference(longer))
    return tuple(problems.found)


def test_longer_inputs_than_the_traced_ones(dist: Pool) -> None:
    assert dist.run(2, compare_longer) == [()] * 2


def compare_loss(in_place: bool) -> tuple[str, ...]:
    """The model was traced without labels; of its sharded output it then computes a loss."""
    torch.manual_seed(1)
    reference = OwnLoss(in_place).double()
    model = copy.deepcopy(reference)
    x, labels = floats(10), torch.rand(158).double()
    autotp.parallelize(model, example_inputs=(x,))
    problems = Problems()
    problems.equal("rows of the head", model.head.weight.shape[0], 158 // 2)
    problems.close("output", model(x), reference(x))
    problems.close("loss", model(x, labels), reference(x, labels))
    return tuple(problems.found)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_loss_in_a_branch_that_was_not_traced(dist: Pool, in_place: bool) -> None:
    assert dist.run(2, compare_loss, in_place) == [()] * 2
