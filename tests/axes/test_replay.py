"""Soundness: every value of every model, on simulated ranks, for each logical axis that its weights hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from autotp.axes.analysis import Analysis, Operand, OpInfo, analyse
from autotp.axes.term import Atom, repeated_atoms
from autotp.plan.candidates import candidates
from autotp.trace.capture import trace
from autotp.trace.leaves import tensor_leaves
from autotp.trace.skeleton import skeleton
from tests.axes.replay import Replay, ReplayError, atoms_in, even_ranges
from tests.models import ModelCase, variants

CASES = {name: (case, variant) for name, case, variant in variants()}


@cache
def replay_of(name: str) -> Replay:
    """The analysed model, run whole."""
    case: ModelCase
    case, variant = CASES[name]
    inputs = case.inputs()
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (inputs, {})
    model = case.build(**variant)
    if "input_ids" in kwargs and hasattr(model.config, "use_cache"):
        kwargs["use_cache"] = False
    traced = trace(skeleton(model), args, kwargs, "forward")
    leaves = dict((*tensor_leaves(args, ("args",)), *tensor_leaves(kwargs, ("kwargs",))))
    state = dict(
        (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    )
    return Replay.of(
        analyse(traced),
        {port.node: leaves[port.path] for port in traced.inputs},
        {n: state[n] for n in traced.params},
    )


def single_axes(analysis: Analysis, tp: int) -> list[Atom]:
    """The axes that parameters hold and that can be sharded alone."""
    values = [dims for outputs in analysis.dims.values() for dims in outputs]
    values += [operand.dims for info in analysis.ops.values() for operand in info.operands]
    twice = {atom for dims in values for atom in repeated_atoms(dims)}
    held = atoms_in(
        dim
        for name, node in analysis.trace.params.items()
        if name not in analysis.trace.is_buffer
        for dim in analysis.dims[node][0]
    )
    return [a for a in held if a.size >= tp and a not in analysis.frozen and a not in twice]


@pytest.mark.parametrize("name", CASES)
def test_each_axis_alone(name: str) -> None:
    replay = replay_of(name)
    problems = []
    for tp in (2, 3):
        for atom in single_axes(replay.analysis, tp):
            try:
                replay.check({atom.id: even_ranges(atom.size, tp)}, tp)
            except AssertionError as error:
                problems.append(f"{atom!r} over {tp}: {error}")
    assert not problems, "\n".join(problems)


NESTED = ["llama-kv_heads=2", "llama-kv_heads=2-eager", "phi3-kv_heads=2", "gemma2-kv_heads=2"]


@pytest.mark.parametrize("name", [name for name in NESTED if name in CASES])
def test_kv_heads_shared_by_ranks(name: str) -> None:
    """2 kv heads over 4 ranks: K first, then the group; k and v are held twice."""
    replay = replay_of(name)
    pairs = [c for c in candidates(replay.analysis, 4) if len(c.atoms) == 2 and c.atoms[0].size == 2]
    assert pairs
    for pair in pairs:
        ranges = {atom.id: split for atom, split in zip(pair.atoms, pair.ranges, strict=True)}
        replay.check(ranges, 4)


def unsliced(operand: Operand) -> Operand:
    return replace(operand, dims=tuple(() for _ in operand.dims)) if operand.path == ("args", 0) else operand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: replace(info, contracted=()), "off by"),
        (lambda info: replace(info, added=frozenset()), "off by"),
        (lambda info: replace(info, operands=tuple(map(unsliced, info.operands))), "on rank 0"),
    ],
)
def test_a_wrong_analysis_is_found(change: Callable[[OpInfo], OpInfo], message: str) -> None:
    """The replay can fail: a sum forgotten, a bias that every rank adds, an operand that is not sliced."""
    replay = replay_of("mlp")
    analysis = replay.analysis
    last = [n for n, info in analysis.ops.items() if info.contracted][-1]
    spoilt = {n: change(info) if n is last else info for n, info in analysis.ops.items()}
    dims = {n: spoilt[n].out if n is last else d for n, d in analysis.dims.items()}
    wrong = Replay(replace(analysis, ops=spoilt, dims=dims), replay.reference)
    (hidden,) = atoms_in(analysis.ops[last].contracted)
    with pytest.raises(ReplayError, match=message):
        wrong.check({hidden.id: even_ranges(hidden.size, 2)}, 2)
