"""The second walk over a plan (`autotp.plan.proof`): what is right it takes, what is changed it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from autotp.axes.analysis import Analysis
from autotp.errors import AutoTPError, PlanError, VerifyError
from autotp.plan.candidates import Candidate, candidates
from autotp.plan.communication import Communication
from autotp.plan.planner import Choice, choose
from autotp.plan.proof import prove
from autotp.plan.reductions import Flow
from autotp.rewrite.planned import uses_of
from autotp.trace.differentiable import differentiable
from tests.fuzz.models import draw_model
from tests.models.mechanisms import IN_GROUPS, floats
from tests.plan.nets import analysed, seeded, sums

Planned = tuple[Analysis, tuple[Candidate, ...], Communication]


def proven(analysis: Analysis, chosen: tuple[Candidate, ...], plan: Communication) -> None:
    prove(analysis, plan, Choice(chosen, plan, 0, 0, True).ranges)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    """Every plan that the planner compares, not only the one that it takes."""
    found: list[Planned] = []
    right = Flow.communicate

    def communicate(self: Flow, chosen: tuple[Candidate, ...], gradients: bool = True) -> Communication:
        plan = right(self, chosen, gradients)
        found.append((self.analysis, chosen, plan))
        return plan

    monkeypatch.setattr(Flow, "communicate", communicate)
    return found


def random_model(seed: int) -> tuple[Analysis, int] | None:
    drawn = draw_model(seed)
    try:
        return analysed(drawn.build().eval(), *drawn.inputs()), drawn.tp
    except AutoTPError:
        return None


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_what_is_planned_is_proven(start: int, looked_at: list[Planned]) -> None:
    """Of random models over 2 to 5 ranks: heads shared by ranks, fused projections, writes in place."""
    for seed in range(start, start + 20):
        found = random_model(seed)
        if found is not None:
            choose(*found)
    assert len(looked_at) > 40
    for planned in looked_at:
        proven(*planned)


# ---- each change of a plan is refused ------------------------------------------------------------------


def with_gradient(analysis: Analysis) -> set[fx.Node]:
    """The values that a returned one depends on, differentiably."""
    own = differentiable(analysis.trace)
    found = {port.node for port in analysis.trace.outputs} & own
    for node in reversed(list(analysis.ops)):
        if node in found:
            found |= own.intersection(operand.node for operand in analysis.ops[node].operands)
    return found


def changed(analysis: Analysis, plan: Communication) -> Iterator[tuple[str, Communication]]:
    """Every plan that differs in one step, and what was done to the step."""
    live = with_gradient(analysis)
    uses = uses_of(analysis)
    for node in plan.reduce:
        yield "reduce dropped", replace(plan, reduce=plan.reduce - {node})
    for node, edges in plan.enter.items():
        edges = tuple(edge for edge in edges if edge.consumer in live)
        if edges:
            others = {n: e for n, e in plan.enter.items() if n is not node}
            yield "enter dropped", replace(plan, enter=others)
        if len(edges) > 1:
            yield "use dropped", replace(plan, enter=plan.enter | {node: edges[1:]})
    for node in plan.sync & live:
        yield "sync dropped", replace(plan, sync=plan.sync - {node})
    for edge in plan.masked:
        yield "mask dropped", replace(plan, masked=plan.masked - {edge})
    for node in plan.close & live:
        yield "close dropped", replace(plan, close=plan.close - {node})
    for step in plan.conversions:
        yield f"{step.kind} dropped", replace(plan, conversions=tuple(c for c in plan.conversions if c is not step))
    for node in set(analysis.ops) - plan.partial:
        yield "reduce added", replace(plan, reduce=plan.reduce | {node})
    for node in live - plan.enter.keys() - plan.sync:
        edges = tuple(edge for edge in uses.get(node, ()) if edge.consumer in live)
        if edges:
            yield "enter added", replace(plan, enter=plan.enter | {node: edges})
    for edge in {edge for own in uses.values() for edge in own} - plan.masked:
        yield "mask added", replace(plan, masked=plan.masked | {edge})


def refused(analysis: Analysis, tp: int) -> Counter[str]:
    """Of each kind of change how many there were; each one is refused."""
    choice = choose(analysis, tp)
    proven(analysis, choice.candidates, choice.communication)
    tried: Counter[str] = Counter()
    for kind, plan in changed(analysis, choice.communication):
        tried[kind] += 1
        with pytest.raises(VerifyError, match="the plan would be wrong at"):
            proven(analysis, choice.candidates, plan)
    return tried


def test_each_change_of_a_small_plan_is_refused() -> None:
    tried: Counter[str] = Counter()
    for seed in range(12):
        tried += refused(analysed(seeded(seed, 9)), 2) + refused(analysed(sums(seed)), 2)
    for build, _ in IN_GROUPS.values():
        tried += refused(analysed(build(3).eval(), floats(2)), 4)
    assert min(tried[kind] for kind in ("reduce dropped", "enter dropped", "mask dropped", "sync dropped")) > 3
    assert min(tried[kind] for kind in ("reduce added", "enter added", "mask added")) > 100


def test_each_change_of_a_random_models_plan_is_refused() -> None:
    tried: Counter[str] = Counter()
    for seed in range(24):
        found = random_model(seed)
        if found is not None:
            tried += refused(*found)
    assert min(tried[kind] for kind in ("gather dropped", "take dropped", "close dropped", "use dropped")) > 0


class WrittenTo(nn.Module):
    """A whole value is written into another one, which then enters a sharded region."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.up, self.down = nn.Linear(10, 10), nn.Linear(10, 46), nn.Linear(46, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, 1:] += self.own(x)[:, :-1]
        return self.down(torch.relu(self.up(y)))


def test_a_gradient_that_passes_through_memory_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed where the memory was made, it would not be summed for what was written there later."""
    analysis = analysed(WrittenTo(), torch.zeros(2, 5, 10))
    hidden = next(c for c in candidates(analysis, 2) if c.size == 46)
    with pytest.raises(PlanError):
        Flow(analysis).communicate((hidden,))
    monkeypatch.setattr(Flow, "_written_to_later", lambda self: frozenset())
    plan = Flow(analysis).communicate((hidden,))
    with pytest.raises(VerifyError, match="not for all uses from which it is an addend"):
        proven(analysis, (hidden,), plan)


class Bags(nn.Module):
    """An op with several outputs, of which only the first holds the table's axes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(23, 14))
        self.up, self.down = nn.Linear(14, 46, bias=False), nn.Linear(46, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(nn.functional.embedding_bag(ids, self.table, mode="sum"))))


def test_an_output_that_is_not_made_of_the_sharded_axes(looked_at: list[Planned]) -> None:
    analysis = analysed(Bags(), torch.zeros(3, 5, dtype=torch.long))
    assert len(next(info.out for node, info in analysis.ops.items() if "embedding_bag" in str(node.target))) == 4
    table = [c for c in candidates(analysis, 2) if c.size == 14]
    Flow(analysis).communicate(tuple(table))
    assert table
    for planned in looked_at:
        proven(*planned)


class ConvolvedThenFlat(nn.Module):
    """A convolution sums over the channels, and the columns of its result are features of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 14, 1), nn.Conv2d(14, 3, 3)
        self.last = nn.Linear(3 * 22, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(y.transpose(1, 2).flatten(2))


def test_a_sum_over_one_axis_that_is_sliced_along_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backwards each rank would have the gradient of its own columns only, and of its channels need that of all."""
    analysis = analysed(ConvolvedThenFlat(), torch.zeros(2, 1, 9, 24))
    chosen = tuple(c for c in candidates(analysis, 2) if c.size in (14, 22))
    assert len(chosen) == 2
    with pytest.raises(PlanError, match="sums over one sharded axis, and is sliced along another"):
        Flow(analysis).communicate(chosen)
    for each in chosen:
        proven(analysis, (each,), Flow(analysis).communicate((each,)))
    monkeypatch.setattr(Flow, "_closed", lambda self, sharded, conversions: frozenset())
    plan = Flow(analysis).communicate(chosen)
    with pytest.raises(VerifyError, match="its gradient is to be whole, and is an addend on each rank"):
        proven(analysis, chosen, plan)
