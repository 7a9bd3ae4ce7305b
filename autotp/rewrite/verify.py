"""Static verification: the rewritten model, traced again for one rank, computes what was planned, op by op.

The trace of the whole model (*reference*) and that of one rank's model (*local*) are matched by value numbering: each
local value is given the reference value of which it is this rank's slice, together with the steps (collectives,
slices, masks) that it has gone through since the op that made it. A local op matches a reference op of the same
target when its operands stand for the same reference values, have gone through exactly the steps planned on that edge,
have the planned local shapes, and all scalars are the planned ones. So a dropped or an extra all-reduce, a slice at a
wrong offset, a size that happens to fit, are all refused.

Ops that only reshape are not matched one by one: row-major data seen in the shape that the next op wants is one
value, however many views lie between (`repeat_kv` returns early where the local group is 1). The insides of
swapped leaf modules are told by `leaves`.

Everything is held against the planner's `Choice`, never against the `Program` that was made of it: so a fault
of the compiler is found as well as one of the code that applies its edits.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..axes.analysis import Analysis
from ..axes.term import Atom, atoms_of, size_of
from ..errors import VerifyError
from ..plan.communication import Edge
from ..plan.planner import Choice
from ..runtime.gradients import gradient_syncs
from ..runtime.lookup import local_row
from ..trace.differentiable import differentiable
from ..trace.graph import Call, ModuleCall, Trace
from ..trace.memory import storages
from ..trace.provenance import expression, sizes_in
from .anchors import Anchors, computed_weights
from .bind import Rank, group_name
from .leaves import Differs, LeafInside
from .numbering import Numbering, PlannedSteps, collapsed, constant_key, operand_roots
from .planned import sharded_parameters
from .program import Program
from .values import (
    Shape,
    Value,
    is_lookup,
    is_random,
    item_of,
    op_name,
    plain,
    shape_of,
    show_steps,
    step_of,
    tensor_args,
)
from .wanted import local_args


class Verifier:
    """Verifies the local traces of one plan; made once for all ranks."""

    def __init__(
        self, analysis: Analysis, choice: Choice, program: Program, anchors: Anchors, gradients: bool = True
    ) -> None:
        self.gradients = gradients  # without, the sums of gradients are not looked at
        self.analysis = analysis
        self.choice = choice
        self.program = program
        self.anchors = anchors
        self.trace = analysis.trace
        self.differentiable = differentiable(analysis.trace)
        self.written = {
            storage
            for info in analysis.ops.values()
            if info.mutates is not None
            for storage in storages(info.operands[info.mutates].node)
        }
        self.leaves = {leaf.fqn: leaf for leaf in program.leaves if leaf.fqn not in anchors.inner}

    def verify(self, local: Trace, rank: Rank) -> None:
        """Hold one rank's trace against the plan.

        Raises:
            VerifyError: naming the first op of the local graph that does not do what was planned.
        """
        self._check_edits(local, rank)
        Comparison(self, local, rank).run()

    def _check_edits(self, local: Trace, rank: Rank) -> None:
        """What no graph shows: which rows a parameter keeps, and whose gradients are summed."""
        wanted = sharded_parameters(self.analysis, self.choice)
        for fqn in {**wanted, **self.program.slices}:
            if self.program.slices.get(fqn) != wanted.get(fqn):
                raise VerifyError(f"{fqn}: is sliced otherwise than planned")
        if not self.gradients:
            return
        names = {node: fqn for fqn, node in self.trace.params.items()}
        planned = {}
        for node in self.choice.communication.sync:
            parts, part = rank.gradient_sum(names[node], self.analysis.dims[node][0])
            planned[names[node]] = (group_name(rank.prefix, parts), part)
        aliases = self.trace.aliases
        found = {aliases.get(fqn, fqn): how for fqn, how in gradient_syncs(local.module).items()}
        if found != planned:
            fqn = min(name for name in {**found, **planned} if found.get(name) != planned.get(name))
            raise VerifyError(
                f"{fqn}: its gradient is summed over {found.get(fqn)}, planned was {planned.get(fqn)}"
            )


class Comparison:
    """One rank's trace against the reference."""

    def __init__(self, verifier: Verifier, local: Trace, rank: Rank) -> None:
        self.v = verifier
        self.reference = verifier.trace
        self.analysis = verifier.analysis
        self.local = local
        self.rank = rank
        self.planned = PlannedSteps(verifier, rank)
        self.with_gradient = differentiable(local) if verifier.gradients else frozenset()
        self.whole = Numbering(verifier, rank)
        self.roots = self.whole.roots
        self.weights = computed_weights(local, verifier.leaves)
        self.serial: dict[object, int] = defaultdict(int)
        self.param_names = {node: self.reference.aliases.get(fqn, fqn) for fqn, node in local.params.items()}

    # ---- the local graph -------------------------------------------------------------------------

    def run(self) -> None:
        values: dict[fx.Node, Value] = {}
        nodes = list(self.local.graph.nodes)
        leaf_at = {call.first: call for call in self.local.calls if call.fqn in self.v.leaves}
        for fqn, node in self.local.params.items():
            self._check_param(fqn, node)
            values[node] = Value(("param", self.reference.aliases.get(fqn, fqn)), 0, ())
        if len(self.local.inputs) != len(self.reference.inputs):
            raise VerifyError("the rewritten model takes other inputs")
        for i, port in enumerate(self.local.inputs):
            values[port.node] = Value(("input", i), 0, ())
        done = 0
        for position, node in enumerate(nodes):
            if position < done:
                continue
            call = leaf_at.get(position)
            if call is not None:
                values.update(self._inside_leaf(call, nodes[call.first : call.last], values))
                done = call.last
            elif node.op == "get_attr":
                values[node] = Value(constant_key(self.local.graph, node, self.local.constants), 0, ())
            elif node.op == "call_function":
                values[node] = self.value_of(node, values)
        self._check_outputs(values)

    def _inside_leaf(
        self, call: ModuleCall, inside: Sequence[fx.Node], values: Mapping[fx.Node, Value]
    ) -> Mapping[fx.Node, Value]:
        twin = next((c for c in self.reference.calls if (c.fqn, c.index) == (call.fqn, call.index)), None)
        if twin is None:
            raise VerifyError(f"{call.fqn}: runs more often on rank {self.rank.rank} than in the whole model")
        try:
            return LeafInside(self, call, twin).values(inside, values)
        except Differs as difference:
            raise VerifyError(
                f"rank {self.rank.rank}: {call.fqn or 'the root module'}: {difference}", call.fqn
            ) from difference

    def passed_on(self, node: fx.Node, value: Value) -> Value:
        """The value after a step, or in another shape."""
        step = step_of(node)
        if step is None or (step[0] == "enter" and node not in self.with_gradient):
            return value
        return Value(value.root, value.output, (*value.steps, step))

    def value_of(self, node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
        """What the result of an op stands for.

        Raises:
            VerifyError: nothing that was planned.
        """
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if step_of(node) is not None:
            assert source is not None
            return self.passed_on(node, values[source])
        if node.target is operator.getitem and source is not None:
            value = values[source]
            return Value(value.root, item_of(node), value.steps)
        same = collapsed(node, shape_of)
        if same is not None:
            return values[same]
        return self._match(node, values)

    def _match(self, node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
        roots = {n: (values[n].root, values[n].output) for n in node.all_input_nodes if n in values}
        missing = [n for n in node.all_input_nodes if n not in roots]
        if missing:
            raise self._error(node, f"reads {missing[0].name}, which stands for no value of the whole model")
        target = torch.ops.aten.embedding.default if is_lookup(node) else node.target
        key = (target, tuple(operand_roots(node, roots)))
        twins = self.whole.by_key.get(key, [])
        if not twins:
            raise self._error(
                node, "has no counterpart in the whole model: other operands, or another branch"
            )
        reasons: list[str] = []
        # Equal ops run in the same order; only random ones (whose draws differ) have to.
        start = self.serial[key]
        for twin in [*twins[start:], *([] if is_random(node) else twins[:start])]:
            reason = self._differs(node, twin, values)
            if reason is None:
                self.serial[key] += 1
                return Value(*self.roots[twin], ())
            reasons.append(reason)
        raise self._error(node, reasons[0], self._sized_by(twins[0]))

    def _sized_by(self, twin: fx.Node) -> frozenset[str]:
        """The sharded axes of which the code takes a size as a number for this op."""
        call: Call | None = twin.meta.get("call")
        atoms: set[Atom] = set()
        for _, value in call.ints if call is not None else ():
            for size in sizes_in(expression(value)):
                dims = self.analysis.dims.get(size.node)
                atoms.update(atoms_of(dims[0][size.dim]) if dims else ())
        return frozenset(c.key for c in self.v.choice.candidates if not atoms.isdisjoint(c.atoms))

    def _differs(self, node: fx.Node, twin: fx.Node, values: Mapping[fx.Node, Value]) -> str | None:
        """Why ``node`` is not what was planned for the reference op ``twin``; None where it is."""
        info = self.analysis.ops.get(twin)
        local_operands = dict(tensor_args(node))
        for i, operand in enumerate(info.operands if info is not None else ()):
            edge = Edge(operand.node, twin, i)
            mine = local_operands.get(operand.path)
            if mine is None:
                return "takes other arguments"
            planned = self.planned.on_edge(edge)
            steps = values[mine].steps
            if steps != planned:
                return (
                    f"gets {operand.node.name} after {show_steps(steps)}, planned was {show_steps(planned)}"
                )
            want, have = self.whole.operand_shape(edge), shape_of(mine)
            if have is not None and operand.output == 0 and want != have:
                return f"gets {operand.node.name} with shape {have}, planned was {want}"
        want_shape = self.whole.local_shape(twin)
        have_shape = shape_of(node)
        if (
            isinstance(node.meta.get("val"), torch.Tensor)
            and want_shape is not None
            and want_shape != have_shape
        ):
            return f"makes shape {have_shape}, planned was {want_shape}"
        if twin.target is torch.ops.aten.embedding.default:
            return self.rows_differ(node, twin)
        args, kwargs = local_args(self.analysis, twin, self.rank)
        want_args, have_args = plain((args, kwargs)), plain((node.args, node.kwargs))
        if want_args != have_args and not self._same_effect(node, twin, want_args, have_args):
            return f"has arguments {have_args}, planned was {want_args}"
        return None

    def rows_differ(self, node: fx.Node, twin: fx.Node) -> str | None:
        """A lookup in some rows of the vocabulary has to know which rows they are."""
        weight, padding = twin.args[0], twin.args[2] if len(twin.args) > 2 else -1
        assert isinstance(weight, fx.Node) and isinstance(padding, int)
        vocabulary = self.analysis.dims[weight][0][0]
        if not any(a.id in self.rank.partition.ranges for a in atoms_of(vocabulary)):
            if is_lookup(node):
                return "looks only some rows up"
            have_padding = node.args[2] if len(node.args) > 2 else -1
            return None if have_padding == padding else f"has padding {have_padding}, planned was {padding}"
        if not is_lookup(node):
            return "looks rows up by ids of the whole vocabulary"
        starts, lengths = self.rank.take(vocabulary)
        local = local_row(padding, list(zip(starts, lengths, strict=True))) if padding >= 0 else None
        want = (tuple(starts), tuple(lengths), size_of(vocabulary), -1 if local is None else local)
        have = plain(node.args[2:])
        return None if want == have else f"looks up rows {have}, planned was {want}"

    def _same_effect(self, node: fx.Node, twin: fx.Node, want: Any, have: Any) -> bool:
        """Arguments that differ in writing only: -1 for a size, a slice's end beyond the last element."""
        name = op_name(node)
        if name in (
            "expand",
            "new_zeros",
            "new_ones",
            "zeros",
            "ones",
            "full",
            "new_full",
            "empty",
            "new_empty",
        ):
            sizes = [i for i, v in enumerate(want[0]) if isinstance(v, tuple)]
            return [v for i, v in enumerate(want[0]) if i not in sizes] == [
                v for i, v in enumerate(have[0]) if i not in sizes
            ] and want[1] == have[1]
        if name == "slice":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            shape = shape_of(source)
            return shape is not None and _slice_of(want, shape) == _slice_of(have, shape)
        return False

    # ---- leaves, parameters, outputs -------------------------------------------------------------

    def _check_param(self, fqn: str, node: fx.Node) -> None:
        reference = self.reference.params.get(self.reference.aliases.get(fqn, fqn))
        if reference is None:
            raise VerifyError(f"{fqn}: a parameter that the whole model does not have")
        want = self.rank.shape(self.analysis.dims[reference][0])
        unused = not reference.users and not node.users  # here: another scenario may use and shard it
        if want != shape_of(node) and not unused:
            raise VerifyError(
                f"{fqn}: has local shape {shape_of(node)}, planned was {want} on rank {self.rank.rank}"
            )

    def _check_outputs(self, values: dict[fx.Node, Value]) -> None:
        if len(self.local.outputs) != len(self.reference.outputs):
            raise VerifyError("the rewritten model returns another number of tensors")
        for mine, theirs in zip(self.local.outputs, self.reference.outputs, strict=True):
            value = values[mine.node]
            if mine.path != theirs.path or (value.root, value.output) != self.roots[theirs.node]:
                raise VerifyError(f"output {mine.path} is another value than in the whole model")
            if shape_of(mine.node) != shape_of(theirs.node):
                raise VerifyError(
                    f"output {mine.path} has shape {shape_of(mine.node)} on rank {self.rank.rank}, "
                    f"whole it is {shape_of(theirs.node)}"
                )
            planned = self.planned.at_output(theirs.node)
            if value.steps != planned:
                raise VerifyError(
                    f"output {mine.path} went through {show_steps(value.steps)}, planned was {show_steps(planned)}"
                )

    def _error(self, node: fx.Node, text: str, keys: frozenset[str] = frozenset()) -> VerifyError:
        return VerifyError(
            f"rank {self.rank.rank}: {node.target} in {self.local.where(node)}: {text}",
            node.meta.get("module", ""),
            keys,
        )


def _slice_of(args: Any, shape: Shape) -> tuple[int, int, int, int]:
    positional = list(args[0]) + [None] * 5
    dim = int(positional[1] or 0) % len(shape)
    start, stop, step = slice(positional[2], positional[3], positional[4] or 1).indices(shape[dim])
    return dim, start, stop, step
