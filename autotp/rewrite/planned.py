"""What a plan does to which value, before anything is said of where in the code."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx

from ..axes.analysis import Analysis
from ..axes.term import Atom, Dim
from ..plan.candidates import atoms_of
from ..plan.communication import Edge, is_loss_of_parts
from ..plan.planner import Choice
from ..trace.differentiable import has_gradient
from .steps import AllReduce, Enter, Gather, Mask, Scale, Step, Take


def uses_of(analysis: Analysis) -> Mapping[fx.Node, list[Edge]]:
    """For each value, the operands that it is."""
    uses: dict[fx.Node, list[Edge]] = defaultdict(list)
    for node, info in analysis.ops.items():
        for i, operand in enumerate(info.operands):
            uses[operand.node].append(Edge(operand.node, node, i))
    return uses


def sharded_parameters(analysis: Analysis, choice: Choice) -> dict[str, tuple[Dim, ...]]:
    """The dims of each parameter that a rank holds a slice of, under all of its names."""
    sharded = {a for c in choice.candidates for a in c.atoms}
    found = {
        fqn: analysis.dims[node][0]
        for fqn, node in analysis.trace.params.items()
        if sharded & set(atoms_of(analysis.dims[node][0]))
    }
    return found | {alias: found[fqn] for alias, fqn in analysis.trace.aliases.items() if fqn in found}


def planned_steps(
    analysis: Analysis, choice: Choice
) -> tuple[dict[fx.Node, tuple[Step, ...]], dict[Edge, tuple[Step, ...]], dict[fx.Node, tuple[Step, ...]]]:
    """What happens to which value: steps right after it is made (for all uses), on one use, and where returned."""
    comm = choice.communication
    sharded = frozenset(a for c in choice.candidates for a in c.atoms)
    uses = uses_of(analysis)
    returned = {port.node for port in analysis.trace.outputs}
    after: dict[fx.Node, list[Step]] = defaultdict(list)
    before: dict[Edge, list[Step]] = defaultdict(list)
    outputs: dict[fx.Node, list[Step]] = defaultdict(list)

    def common(node: fx.Node) -> frozenset[Atom]:
        return sharded & frozenset(a for dims in analysis.dims[node] for a in atoms_of(dims))

    order = {node: i for i, node in enumerate(analysis.trace.graph.nodes)}
    for node, info in analysis.ops.items():
        if info.averaged and sharded & frozenset(atoms_of(info.contracted)):
            after[node].append(Scale(info.contracted))
    for node in sorted(comm.reduce, key=order.__getitem__):
        after[node].append(AllReduce(common(node)))
    for node in comm.close:
        after[node].append(Enter())
    for c in comm.conversions:
        if c.consumer is None:
            (after if c.kind == "take" else outputs)[c.producer].append(
                Take(c.dim, c.axes) if c.kind == "take" else Gather(c.dim, c.axes)
            )
    for node, edges in _entered_outputs(comm.enter, uses).items():
        others = set(uses[node]) - set(edges)
        # A leaf that reduces its result does not enter it too: that is left to the uses.
        one_of_several = node.target is operator.getitem  # no expression of its own
        if (
            one_of_several
            or node in returned
            or after.get(node)
            or any(has_gradient(edge.consumer) for edge in others)
        ):
            for edge in edges:
                before[edge].append(Enter(common(node)))
        else:
            after[node].append(Enter(common(node)))
    for c in comm.conversions:
        if c.consumer is not None:
            step = (
                Gather(c.dim, c.axes, is_loss_of_parts(c)) if c.kind == "gather" else Take(c.dim, c.axes)
            )
            before[Edge(c.producer, c.consumer, c.operand)].append(step)
    for edge in comm.masked:
        if edge.operand not in analysis.ops[edge.consumer].added:
            before[edge].append(Mask())
    for node, steps in list(outputs.items()):
        if all(before.get(edge) == steps for edge in uses[node]):
            for edge in uses[node]:
                del before[edge]
            after[node] += map(_lazily, steps)
            del outputs[node]
        else:
            outputs[node] = list(map(_lazily, steps))
    return (
        {n: tuple(s) for n, s in after.items()},
        {e: tuple(s) for e, s in before.items()},
        {n: tuple(s) for n, s in outputs.items()},
    )


def _lazily(step: Step) -> Step:
    return replace(step, lazy=True) if isinstance(step, Gather) else step


def _entered_outputs(
    enter: Mapping[fx.Node, Iterable[Edge]], uses: Mapping[fx.Node, list[Edge]]
) -> dict[fx.Node, list[Edge]]:
    """Which uses enter. One of several outputs is entered where it is used, as code names only the output itself."""
    found: dict[fx.Node, list[Edge]] = defaultdict(list)
    for node, edges in enter.items():
        for edge in edges:
            if edge.consumer.target is operator.getitem:
                found[edge.consumer] += uses[edge.consumer]
            else:
                found[node].append(edge)
    return found
