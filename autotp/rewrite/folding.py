"""Whether one layer's edits may stand for those of all layers between the first and the last of a run.

A folded run is traced as its first period, one from the middle, and its last. The layers that the middle one stands
for feed each other, which the trace never sees. That is right if a value enters the middle one as it enters the last
one: cut alike, whole or a Partial, with a gradient that is whole or partial, and with the same steps around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import fx, nn

from ..axes.layout import Partition
from ..axes.term import Cat, Dim
from ..trace.fold import Folds
from ..trace.graph import ModuleCall
from .bind import describe
from .views import View


def unlike(view: View, folds: Folds, tp: int) -> str | None:
    """A folded module whose edits would not do for all that it stands for, or None."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in view.analysis.trace.calls:
        calls.setdefault(call.fqn, []).append(call)
    states = _States(view, tp)
    for first, middle, last in _runs(view.analysis.trace.module, folds):
        for fqn in _called(middle, calls):
            own = fqn.removeprefix(middle)
            if not states.enter_alike(calls[fqn], calls.get(last + own, [])):
                return fqn
            if not states.leave_alike(calls.get(first + own, []), calls[fqn]):
                return fqn
    return None


def _runs(skeleton: nn.Module, folds: Folds) -> Iterator[tuple[str, str, str]]:
    """(first, middle, last) of each folded layer: siblings a period apart, of which the middle one stands for many."""
    for prefix, module in skeleton.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        names = [f"{prefix}.{name}" if prefix else name for name in module._modules]
        several = len(folds.originals(prefix)) if prefix else 1
        stands_for_many = {name: len(folds.originals(name)) > several for name in names}
        at = 0
        for middle, group in groupby(names, stands_for_many.__getitem__):
            members = list(group)
            if middle:
                for i, name in enumerate(members, at):
                    yield names[i - len(members)], name, names[i + len(members)]
            at += len(members)


def _called(fqn: str, calls: dict[str, list[ModuleCall]]) -> list[str]:
    """The module itself, or where only its parts are called, the outermost of those."""
    if fqn in calls:
        return [fqn]
    inside = [name for name in calls if name.startswith(f"{fqn}.")]
    return [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]


class _States:
    """What a value of a scenario is on the ranks."""

    def __init__(self, view: View, tp: int) -> None:
        self.view = view
        self.rank = view.rank(0, tp, "")
        self.flowing = view.choice.communication.partial - view.choice.communication.reduce
        self.unsummed = view.choice.communication.unsummed

    def enter_alike(self, middle: list[ModuleCall], last: list[ModuleCall]) -> bool:
        if len(middle) != len(last):
            return False
        for a, b in zip(middle, last, strict=True):
            there = {port.path: port.node for port in b.inputs}
            for port in a.inputs:
                if port.path in there and self._of(port.node) != self._of(there[port.path]):
                    return False
        return self._steps(middle, "in") == self._steps(last, "in")

    def leave_alike(self, first: list[ModuleCall], middle: list[ModuleCall]) -> bool:
        return self._steps(first, "out") == self._steps(middle, "out")

    def _of(self, node: fx.Node) -> tuple[object, ...]:
        dims = self.view.analysis.dims.get(node)
        cut = [[_cut(dim, self.rank.partition) for dim in value] for value in dims] if dims else None
        return cut, node in self.flowing, node in self.unsummed

    def _steps(self, calls: list[ModuleCall], side: str) -> dict[object, object]:
        fqn = calls[0].fqn if calls else ""
        return {
            boundary.path: [describe(step, self.rank) for step in steps]
            for boundary, steps in self.view.program.hooks.items()
            if calls and (boundary.fqn, boundary.side) == (fqn, side)
        }


def _cut(dim: Dim, partition: Partition) -> tuple[object, ...]:
    """A dim with its axes' names left out: sizes of what is whole, ranges of what is cut."""
    found: list[object] = []
    for factor in dim:
        if isinstance(factor, Cat):
            found.append(tuple(_cut(part, partition) for part in factor.parts))
        elif factor.id in partition.ranges:
            found.append(partition.ranges[factor.id])
        elif found and isinstance(found[-1], int):
            found[-1] *= factor.size
        else:
            found.append(factor.size)
    return tuple(found)


__all__ = ["unlike"]
