"""The promise "least communication", tested: the planner's optimum is that of brute force (see `bruteforce`)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from autotp.axes.analysis import Analysis
from autotp.axes.term import Atom
from autotp.errors import PlanError
from autotp.plan import planner, reductions
from autotp.plan.candidates import Candidate, candidates, conflicts
from autotp.plan.communication import ANYWHERE, Communication, Places
from autotp.plan.cut import VertexCut
from autotp.plan.planner import TOLERANCE, Choice, choose
from autotp.plan.reductions import Flow
from tests.plan.bruteforce import Answer, Impossible, Ranks, check_valid, legal, maximal_sets, weight_bytes
from tests.plan.nets import Net, analysed, draw, seeded, sums

TP = 2
SHORT, LONG = 5, 2003  # tokens: a collective costs its start, or its bytes


def able(analysis: Analysis) -> list[Candidate]:
    found = candidates(analysis, TP)
    own, _ = conflicts(analysis, found)
    return [c for c in found if c not in own]


def compared(analysis: Analysis, places: Places = ANYWHERE) -> Iterator[tuple[Choice, Answer]]:
    """For each set of axes the planner's communication, proved right, and the cheapest one."""
    flow = Flow(analysis, places)
    for chosen in maximal_sets(analysis, able(analysis)):
        try:
            best = Ranks(analysis, chosen, places).best()
        except Impossible as error:
            if "partly common" not in str(error):
                with pytest.raises(PlanError):
                    flow.communicate(chosen)
            continue
        choice = Choice(chosen, flow.communicate(chosen), 0, 0, True)
        assert check_valid(analysis, choice, places) == choice.communication.cost_bytes
        yield choice, best


def check(analysis: Analysis, places: Places = ANYWHERE) -> int:
    """The planner's communication is right and the cheapest for every set of axes; how many sets there are."""
    pairs = list(compared(analysis, places))
    for choice, best in pairs:
        assert choice.communication.cost_bytes == best.cost
    return len(pairs)


@pytest.mark.parametrize("seq", [SHORT, LONG])
@pytest.mark.parametrize("length", [5, 8, 11])
def test_reduce_points(length: int, seq: int) -> None:
    """Every set of values to reduce, every place of an enter: none is cheaper than the planner's."""
    sets = sum(check(analysed(seeded(seed, length, products=False), seq=seq)) for seed in range(20))
    assert sets > 30


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(3, 10), st.sampled_from([SHORT, LONG]))
def test_reduce_points_by_hypothesis(data: st.DataObject, length: int, seq: int) -> None:
    check(analysed(draw(lambda n: data.draw(st.integers(0, n - 1)), length, products=False), seq=seq))


@pytest.mark.parametrize("seq", [SHORT, LONG])
def test_sums_of_what_is_summed_already(seq: int) -> None:
    """Where a value is needed whole, it is whole for the sums that it is part of as well: it counts there once."""
    sets = sum(check(analysed(sums(seed), seq=seq)) for seed in range(40))
    assert sets > 60


@pytest.mark.parametrize("seq", [SHORT, LONG])
def test_sums_that_nothing_can_mask(seq: int) -> None:
    """Where some ops cannot take a whole value beside parts of others, others have to be summed, or be left to pass."""
    sets = dearer = 0
    for seed in range(40):
        analysis, rng = analysed(sums(seed), seq=seq), random.Random(seed)
        bare = {node for node in analysis.ops if rng.random() < 0.5}
        places = replace(ANYWHERE, mask=lambda edge, bare=bare: edge.consumer not in bare)
        sets += check(analysis, places)
        for chosen in maximal_sets(analysis, able(analysis)):
            costs = [Flow(analysis, p).communicate(chosen).cost_bytes for p in (ANYWHERE, places)]
            dearer += costs[0] < costs[1]
    assert sets > 60
    assert dearer > 5


@pytest.mark.parametrize("seq", [SHORT, LONG])
def test_products_of_activations(seq: int) -> None:
    """Where Partials meet in a product, one of them must be summed first, and a cut cannot say which: the planner's
    answer is right, and nearly always the cheapest."""
    pairs = [pair for seed in range(25) for pair in compared(analysed(seeded(seed, 9), seq=seq))]
    costs = [(choice.communication.cost_bytes, best.cost) for choice, best in pairs]
    assert all(found >= best for found, best in costs)
    assert sum(found == best for found, best in costs) >= 0.95 * len(costs)


@pytest.mark.parametrize("seed", range(30))
def test_choice_of_axes(seed: int) -> None:
    """Of all maximal sets of axes within the tolerance, none communicates less than the one chosen."""
    analysis = analysed(seeded(seed, 7, products=False))
    answers: list[tuple[float, int]] = []
    for chosen in maximal_sets(analysis, able(analysis)):
        try:
            answers.append((weight_bytes(analysis, chosen), Ranks(analysis, chosen).best().cost))
        except Impossible:
            pytest.skip("a set of axes that brute force does not know")
    choice = choose(analysis, TP)
    most = max(size for size, _ in answers)
    assert choice.proven
    assert choice.sharded_bytes >= (1 - TOLERANCE) * most
    assert choice.communication.cost_bytes == min(
        cost for size, cost in answers if size >= (1 - TOLERANCE) * most
    )
    assert choice.sharded_bytes == pytest.approx(weight_bytes(analysis, choice.candidates))
    assert check_valid(analysis, choice) == choice.communication.cost_bytes


@pytest.mark.parametrize("seed", range(4))
def test_choice_of_axes_where_one_has_to_be_sharded(seed: int) -> None:
    """The same for each axis that an override asks for: of the sets with it, none communicates less."""
    analysis = analysed(seeded(seed, 7, products=False))
    found = able(analysis)
    tried = 0
    for wanted in found:
        answers = []
        for chosen in maximal_sets(analysis, found):
            if wanted in chosen:
                with suppress(Impossible):
                    answers.append((weight_bytes(analysis, chosen), Ranks(analysis, chosen).best().cost))
        if not answers:
            continue
        choice = choose(analysis, TP, require=[frozenset(wanted.atoms)])
        most = max(size for size, _ in answers)
        assert wanted in choice.candidates
        assert choice.communication.cost_bytes == min(
            cost for size, cost in answers if size >= (1 - TOLERANCE) * most
        )
        tried += 1
    assert tried


def test_a_cut_enumeration_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hedged = 0
    for seed in range(2):
        analysis = analysed(seeded(seed, 7, products=False))
        found = able(analysis)
        sets = len(maximal_sets(analysis, found))
        for most in (1, sets - 1, sets):
            monkeypatch.setattr(planner, "MOST_ENUMERATED", most)
            assert choose(analysis, TP).proven == (most == sets)
        monkeypatch.setattr(planner, "MOST_ENUMERATED", 1)
        for wanted in found:  # what it conflicts with is not enumerated
            assert wanted in choose(analysis, TP, require=[frozenset(wanted.atoms)]).candidates
        for pair in itertools.combinations(found, 2):
            try:
                choose(analysis, TP, require=[frozenset(atom for wanted in pair for atom in wanted.atoms)])
            except PlanError as error:
                assert "that were looked at" in str(error)
                hedged += 1
        with pytest.raises(PlanError, match="as the overrides ask$"):
            choose(analysis, TP, require=[frozenset({Atom(-1, 4)})])
    assert hedged


@pytest.mark.parametrize("seed", range(20))
def test_conflicts(seed: int) -> None:
    """Two candidates conflict where one value would be sharded twice."""
    analysis = analysed(seeded(seed, 10))
    found = candidates(analysis, TP)
    own, against = conflicts(analysis, found)
    for a in found:
        assert legal(analysis, [a]) == (a not in own)
        for b in found:
            if a is not b and a not in own and b not in own:
                assert legal(analysis, [a, b]) == (b not in against[a])


# ---- that the check can fail ---------------------------------------------------------------------------


def nets() -> Iterator[Net]:
    return (seeded(seed, 8, products=False) for seed in range(12))


def wrong() -> int:
    """For how many of some networks the check fails."""
    failed = 0
    for net in nets():
        try:
            check(analysed(net))
        except (AssertionError, Impossible, PlanError):
            failed += 1
    return failed


def test_nothing_planted() -> None:
    assert wrong() == 0


def test_a_dropped_reduce_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Flow.communicate

    def drop(self: Flow, chosen: tuple[Candidate, ...], *args: bool) -> Communication:
        comm = right(self, chosen, *args)
        some = sorted(comm.reduce, key=str)[1:]
        return _changed(comm, reduce=frozenset(some))

    monkeypatch.setattr(Flow, "communicate", drop)
    assert wrong() > 6


def test_a_dropped_enter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Flow.communicate

    def drop(self: Flow, chosen: tuple[Candidate, ...], *args: bool) -> Communication:
        comm = right(self, chosen, *args)
        return _changed(comm, enter=dict(list(comm.enter.items())[1:]))

    monkeypatch.setattr(Flow, "communicate", drop)
    assert wrong() > 6


def test_a_forgotten_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Flow.communicate
    monkeypatch.setattr(
        Flow,
        "communicate",
        lambda self, chosen, *args: _changed(right(self, chosen, *args), masked=frozenset()),
    )
    assert wrong() > 3


def test_a_cut_that_is_not_the_least_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reducing each Partial where it is made, as a planner would that knows no cuts."""
    right = VertexCut.vertex
    monkeypatch.setattr(VertexCut, "vertex", lambda self, v, capacity: right(self, v, capacity and 1))
    assert wrong() > 3


def test_a_wrong_price_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "all_reduce_cost", lambda node: reductions.FINE * reductions.nbytes(node))
    assert wrong() > 6


def _changed(comm: Communication, **fields: object) -> Communication:
    return Communication(
        **{name: getattr(comm, name) for name in Communication.__dataclass_fields__} | fields
    )


# ---- by hand -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and MLP, one after the other or side by side; projections for q, k and v."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm, self.other_norm = nn.LayerNorm(24), nn.LayerNorm(24)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel:
            y = self.norm(x)
            return x + self.attention(y) + self.mlp(y)
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.other_norm(x))


@pytest.mark.parametrize(("parallel", "each"), [(False, 2), (True, 1)])
def test_blocks(parallel: bool, each: int) -> None:
    """A sequential block takes two all-reduces forward and two backward, a parallel one one and one."""
    analysis = analysed(Block(parallel), torch.zeros(2, 7, 24))
    comm = choose(analysis, TP).communication
    assert (len(comm.reduce), len(comm.enter), len(comm.sync)) == (each, each, 0)
    assert not any(c.kind == "gather" for c in comm.conversions)


def test_mlp() -> None:
    """One all-reduce forward and one backward."""
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
    choice = choose(analysed(model, torch.zeros(3, 24)), TP)
    comm = choice.communication
    assert (len(comm.reduce), len(comm.enter)) == (1, 1)
    assert [c.size for c in choice.candidates] == [40]
