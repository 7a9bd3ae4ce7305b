"""Which integers the Python code has to pass on one rank: the local size arguments, call by call.

The plan says the local arguments of each ATen op (`OpInfo.localize`); the code passed integers to the Python-level call
that made the op. Both lists are aligned, so that each integer of the call has a wanted local value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..axes.analysis import Analysis
from ..trace.graph import Call
from .bind import Rank


@dataclass(frozen=True, slots=True)
class Wanted:
    """Integer number ``index`` of ``call.ints``, ``value`` in the whole model, has to be ``local`` on this rank."""

    call: Call
    index: int
    value: int
    local: int


@dataclass(frozen=True, slots=True)
class Lost:
    """An op whose local arguments differ from the global ones though no integer of the call stands for them."""

    node: fx.Node
    value: int
    local: int


def local_args(analysis: Analysis, node: fx.Node, rank: Rank) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of this op on a rank: sizes local, tensors still the nodes of the graph."""
    info = analysis.ops.get(node)
    if info is None or info.localize is None:
        return tuple(node.args), dict(node.kwargs)
    return info.localize(rank.size)


def wanted_ints(analysis: Analysis, rank: Rank, skip: frozenset[fx.Node]) -> tuple[list[Wanted], list[Lost]]:
    """For each Python-level call of the trace, its integers with their local values.

    Args:
        skip: nodes inside swapped leaf modules, whose sizes the sharded classes set themselves.
    """
    by_call: dict[int, list[fx.Node]] = defaultdict(list)
    calls: dict[int, Call] = {}
    lost: list[Lost] = []
    for node in analysis.ops:
        call: Call | None = node.meta.get("call")
        if node in skip:
            continue
        if call is None:
            lost += [Lost(node, a, b) for a, b in _pairs(analysis, node, rank) if a != b]
            continue
        by_call[call.index].append(node)
        calls[call.index] = call
    wanted: list[Wanted] = []
    for index, nodes in by_call.items():
        pairs = [pair for node in nodes for pair in _pairs(analysis, node, rank)]
        found, missing = _align(calls[index], pairs)
        wanted += found
        lost += [Lost(nodes[-1], a, b) for a, b in missing]
    return wanted, lost


def _pairs(analysis: Analysis, node: fx.Node, rank: Rank) -> list[tuple[int, int]]:
    """(global, local) of each integer argument of the op, in order."""
    args, kwargs = local_args(analysis, node, rank)
    before = list(_ints((node.args, dict(node.kwargs))))
    after = list(_ints((args, {k: kwargs[k] for k in node.kwargs if k in kwargs})))
    if len(before) != len(after):
        return []
    return list(zip(before, after, strict=True))


def _ints(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield int(value)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _ints(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _ints(v)


def _align(call: Call, pairs: list[tuple[int, int]]) -> tuple[list[Wanted], list[tuple[int, int]]]:
    """Match the ops' integers with the call's: one to one where the lists agree, else by value and order."""
    ints = [int(v) for _, v in call.ints]
    if [a for a, _ in pairs] == ints:
        return [Wanted(call, i, a, b) for i, (a, b) in enumerate(pairs)], []
    found: list[Wanted] = []
    changed = [(a, b) for a, b in pairs if a != b]
    taken: set[int] = set()
    missing: list[tuple[int, int]] = []
    for a, b in changed:
        index = next((i for i, v in enumerate(ints) if v == a and i not in taken), None)
        if index is None:
            missing.append((a, b))
        else:
            taken.add(index)
            found.append(Wanted(call, index, a, b))
    kept = {a for a, b in pairs if a == b}
    found += [Wanted(call, i, v, v) for i, v in enumerate(ints) if i not in taken and v in kept]
    return found, missing
