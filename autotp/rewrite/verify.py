"""Static verification: the rewritten model, traced again for one rank, computes what was planned, op by op.

The trace of the whole model (*reference*) and that of one rank's model (*local*) are matched by value numbering: each
local value is given the reference value of which it is this rank's slice, together with the steps (collectives,
slices, masks) that it has gone through since the op that made it. A local op matches a reference op of the same
target when its operands stand for the same reference values, have gone through exactly the steps planned on that edge,
have the planned local shapes, and all scalars are the planned ones. So a dropped or an extra all-reduce, a slice at a
wrong offset, a size that happens to fit, are all refused.

Ops that only reshape are not matched one by one: row-major data seen in the shape that the next op wants is one
value, however many views lie between (`repeat_kv` returns early where the local group is 1).
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..axes.analysis import Analysis
from ..axes.term import Dim, atoms_of, size_of
from ..errors import VerifyError
from ..plan.planner import Choice
from ..plan.reductions import Edge
from ..trace.graph import ModuleCall, Trace
from .anchors import Anchors
from .bind import Rank, describe
from .program import Leaf, Program, planned_steps
from .steps import Step
from .wanted import local_args

#: Ops that leave row-major data as it is, whatever their arguments.
_RESHAPES = frozenset(
    "view reshape _unsafe_view unsqueeze squeeze flatten unflatten contiguous clone alias detach lift_fresh_copy "
    "view_as reshape_as ravel".split()
)
#: Ops that do so where the shape (and dtype) of their result is that of their operand.
_MAYBE = frozenset("expand expand_as to _to_copy type_as slice repeat".split())

Described = tuple[object, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Value:
    """What a local value is: a slice of the reference value ``root`` (output number ``output``), after ``steps``."""

    root: object
    output: int
    steps: tuple[Described, ...]


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
        self.leaves = {leaf.fqn: leaf for leaf in program.leaves if leaf.fqn not in anchors.inner}

    def verify(self, local: Trace, rank: Rank) -> None:
        """Hold one rank's trace against the plan.

        Raises:
            VerifyError: naming the first op of the local graph that does not do what was planned.
        """
        _Comparison(self, local, rank).run()


class _Comparison:
    def __init__(self, verifier: Verifier, local: Trace, rank: Rank) -> None:
        self.v = verifier
        self.reference = verifier.trace
        self.analysis = verifier.analysis
        self.local = local
        self.rank = rank
        self.planned = _PlannedSteps(verifier, rank)
        self.roots: dict[fx.Node, tuple[object, int]] = {}
        self.by_key: dict[object, list[fx.Node]] = defaultdict(list)
        self.serial: dict[object, int] = defaultdict(int)
        self._number_reference()

    # ---- the reference ---------------------------------------------------------------------------

    def _number_reference(self) -> None:
        constants = self.reference.constants
        for fqn, node in self.reference.params.items():
            self.roots[node] = (("param", fqn), 0)
        for i, port in enumerate(self.reference.inputs):
            self.roots[port.node] = (("input", i), 0)
        for node in self.reference.graph.nodes:
            if node.op == "get_attr":
                self.roots[node] = (_constant_key(self.reference.graph, node, constants), 0)
            if node.op != "call_function":
                continue
            source = self._collapsed(node, lambda n: self._local_shape(n))
            if source is not None:
                self.roots[node] = self.roots[source]
                continue
            if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
                self.roots[node] = (self.roots[node.args[0]][0], _index(node))
                continue
            self.roots[node] = (node, 0)
            if not self._in_leaf(node):
                self.by_key[self._reference_key(node)].append(node)

    def _in_leaf(self, node: fx.Node) -> bool:
        leaf = self.v.anchors.leaf_of(node)
        return leaf is not None and leaf in self.v.leaves

    def _local_shape(self, node: fx.Node) -> Shape | None:
        """The shape, on this rank, of what the op itself makes (what it computes whole is whole)."""
        dims = self.analysis.dims.get(node)
        if dims is None or not dims:
            return None
        info = self.analysis.ops.get(node)
        whole = info.whole_out if info is not None else frozenset()
        value = node.meta["val"]
        sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        return tuple(
            sizes[d] if sizes is not None and (0, d) in whole else self.rank.size(dim)
            for d, dim in enumerate(dims[0])
        )

    def _operand_shape(self, edge: Edge) -> Shape:
        return self.rank.shape(self.analysis.ops[edge.consumer].operands[edge.operand].dims)

    @staticmethod
    def _collapsed(node: fx.Node, shape_of: Any) -> fx.Node | None:
        """The operand whose row-major data this op passes on unchanged."""
        if (
            not isinstance(node.target, torch._ops.OpOverload)
            or not node.args
            or not isinstance(node.args[0], fx.Node)
        ):
            return None
        name = node.target._schema.name.split("::")[-1]
        source = node.args[0]
        before, after = source.meta.get("val"), node.meta.get("val")
        if (
            not isinstance(before, torch.Tensor)
            or not isinstance(after, torch.Tensor)
            or before.dtype != after.dtype
        ):
            return None
        if name in _RESHAPES or (name in _MAYBE and shape_of(source) == shape_of(node)):
            return source
        return None

    def _reference_key(self, node: fx.Node) -> object:
        return (node.target, tuple(_operand_roots(node, self.roots)))

    # ---- the local graph -------------------------------------------------------------------------

    def run(self) -> None:
        values: dict[fx.Node, _Value] = {}
        nodes = list(self.local.graph.nodes)
        # Swapped leaf modules are opaque: their results stand for the results of the same call in the reference.
        opaque: dict[fx.Node, tuple[ModuleCall, ModuleCall]] = {}
        inside: set[int] = set()
        reference_calls = {(c.fqn, c.index): c for c in self.reference.calls}
        for call in self.local.calls:
            if call.fqn in self.v.leaves:
                twin = reference_calls.get((call.fqn, call.index))
                if twin is None:
                    raise VerifyError(
                        f"{call.fqn}: runs more often on rank {self.rank.rank} than in the whole model"
                    )
                inside |= set(range(call.first, call.last))
                for port in call.outputs:
                    opaque[port.node] = (call, twin)
        for fqn, node in self.local.params.items():
            self._check_param(fqn, node)
            values[node] = _Value(("param", self.reference.aliases.get(fqn, fqn)), 0, ())
        if len(self.local.inputs) != len(self.reference.inputs):
            raise VerifyError("the rewritten model takes other inputs")
        for i, port in enumerate(self.local.inputs):
            values[port.node] = _Value(("input", i), 0, ())
        shapes = {n: _shape(n) for n in nodes}
        for position, node in enumerate(nodes):
            if node in opaque:
                call, twin = opaque[node]
                values[node] = self._leaf_output(call, twin, node, nodes, values)
            elif position in inside:
                continue
            elif node.op == "get_attr":
                values[node] = _Value(_constant_key(self.local.graph, node, self.local.constants), 0, ())
            elif node.op == "call_function":
                values[node] = self._value_of(node, values, shapes)
        self._check_outputs(values)

    def _value_of(
        self, node: fx.Node, values: dict[fx.Node, _Value], shapes: dict[fx.Node, Shape | None]
    ) -> _Value:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        step = _step_of(node)
        if step is not None:
            assert source is not None
            value = values[source]
            if step[0] == "enter" and not self.v.gradients:
                return value
            return _Value(value.root, value.output, (*value.steps, step))
        if node.target is operator.getitem and source is not None:
            value = values[source]
            return _Value(value.root, _index(node), value.steps)
        same = self._collapsed(node, shapes.__getitem__)
        if same is not None:
            return values[same]
        return self._match(node, values)

    def _match(self, node: fx.Node, values: dict[fx.Node, _Value]) -> _Value:
        roots = {n: (v.root, v.output) for n, v in values.items() if n in node.all_input_nodes}
        missing = [n for n in node.all_input_nodes if n not in roots]
        if missing:
            raise self._error(node, f"reads {missing[0].name}, which stands for no value of the whole model")
        target = torch.ops.aten.embedding.default if _is_lookup(node) else node.target
        key = (target, tuple(_operand_roots(node, roots)))
        twins = self.by_key.get(key, [])
        if not twins:
            raise self._error(
                node, "has no counterpart in the whole model: other operands, or another branch"
            )
        reasons: list[str] = []
        # Equal ops run in the same order; only random ones (whose draws differ) have to.
        start = self.serial[key]
        for twin in [*twins[start:], *([] if _is_random(node) else twins[:start])]:
            reason = self._differs(node, twin, values)
            if reason is None:
                self.serial[key] += 1
                return _Value(twin, 0, ())
            reasons.append(reason)
        raise self._error(node, reasons[0])

    def _differs(self, node: fx.Node, twin: fx.Node, values: dict[fx.Node, _Value]) -> str | None:
        """Why ``node`` is not what was planned for the reference op ``twin``; None where it is."""
        info = self.analysis.ops.get(twin)
        local_operands = dict(_tensor_args(node))
        for i, operand in enumerate(info.operands if info is not None else ()):
            edge = Edge(operand.node, twin, i)
            mine = local_operands.get(operand.path)
            if mine is None:
                return "takes other arguments"
            planned = self.planned.on_edge(edge)
            if values[mine].steps != planned:
                return f"gets {operand.node.name} after {_show(values[mine].steps)}, planned was {_show(planned)}"
            want, have = self._operand_shape(edge), _shape(mine)
            if have is not None and operand.output == 0 and want != have:
                return f"gets {operand.node.name} with shape {have}, planned was {want}"
        want_shape = self._local_shape(twin)
        have_shape = _shape(node)
        if (
            isinstance(node.meta.get("val"), torch.Tensor)
            and want_shape is not None
            and want_shape != have_shape
        ):
            return f"makes shape {have_shape}, planned was {want_shape}"
        contracted = info is not None and any(
            a.id in self.rank.partition.ranges for dim in info.contracted for a in atoms_of(dim)
        )
        if _is_lookup(node) or (contracted and twin.target is torch.ops.aten.embedding.default):
            return self._lookup_differs(node, twin, contracted)
        args, kwargs = local_args(self.analysis, twin, self.rank)
        want_args, have_args = _plain((args, kwargs)), _plain((node.args, node.kwargs))
        if want_args != have_args and not self._same_effect(node, twin, want_args, have_args):
            return f"has arguments {have_args}, planned was {want_args}"
        return None

    def _lookup_differs(self, node: fx.Node, twin: fx.Node, contracted: bool) -> str | None:
        """A lookup in some rows of the vocabulary has to know which rows they are."""
        weight = twin.args[0]
        assert isinstance(weight, fx.Node)
        return self._rows_differ(node, self.analysis.dims[weight][0][0], contracted)

    def _rows_differ(self, node: fx.Node, vocabulary: Dim, contracted: bool) -> str | None:
        if not contracted:
            return "looks only some rows up" if _is_lookup(node) else None
        if not _is_lookup(node):
            return "looks rows up by ids of the whole vocabulary"
        starts, lengths = self.rank.take(vocabulary)
        want = (tuple(starts), tuple(lengths), size_of(vocabulary))
        have = (tuple(node.args[2]), tuple(node.args[3]), node.args[4])  # type: ignore[arg-type]
        return None if want == have else f"looks up rows {have}, planned was {want}"

    def _same_effect(self, node: fx.Node, twin: fx.Node, want: Any, have: Any) -> bool:
        """Arguments that differ in writing only: -1 for a size, a slice's end beyond the last element."""
        name = (
            node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""
        )
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
            shape = _shape(source)
            return shape is not None and _slice_of(want, shape) == _slice_of(have, shape)
        return False

    # ---- leaves, parameters, outputs -------------------------------------------------------------

    def _leaf_output(
        self,
        call: ModuleCall,
        twin: ModuleCall,
        node: fx.Node,
        nodes: Sequence[fx.Node],
        values: dict[fx.Node, _Value],
    ) -> _Value:
        leaf = self.v.leaves[call.fqn]
        theirs = {port.path: port.node for port in twin.inputs}
        before = tuple(dict.fromkeys(describe(step, self.rank) for step in leaf.before))
        for port in call.inputs:
            reference = theirs.get(port.path)
            if reference is None or port.node not in values:
                raise self._error(node, f"{call.fqn} gets another argument {port.path}")
            value = values[port.node]
            if (value.root, value.output) != self.roots[reference]:
                raise self._error(node, f"{call.fqn} gets another value as {port.path}")
            planned = self.planned.into_leaf(reference, twin, before if port.path in leaf.ports else ())
            if planned is not None and value.steps not in planned:
                raise self._error(
                    node,
                    f"{call.fqn} gets {reference.name} after {_show(value.steps)}, planned was {_show(planned[0])}",
                )
        self._check_inside(leaf, node, nodes[call.first : call.last])
        path = next(port.path for port in call.outputs if port.node is node)
        reference = next((port.node for port in twin.outputs if port.path == path), None)
        if reference is None:
            raise self._error(node, f"{call.fqn} returns another structure")
        root, output = self.roots[reference]
        return _Value(root, output, self.planned.of(reference))

    def _check_inside(self, leaf: Leaf, node: fx.Node, inside: Sequence[fx.Node]) -> None:
        """A swapped leaf is opaque but for this: its steps, its lookup's rows, and which weight it multiplies by."""
        found = [_dimless(s) for n in inside if (s := _step_of(n)) is not None]
        if not self.v.gradients:
            found = [s for s in found if s[0] != "enter"]
        expected = [_dimless(describe(s, self.rank)) for s in (*leaf.before, *leaf.after)]
        if leaf.kind == "attention":  # what it returns of its weights takes a step more
            reduces = sum(s[0] == "all_reduce" for s in expected)
            ok = [s for s in found if s[0] == "enter"] == [s for s in expected if s[0] == "enter"]
            ok = ok and sum(s[0] == "all_reduce" for s in found) >= reduces
            ok = ok and (("mask", self.rank.rank == 0) in found) == (leaf.bias == "masked")
        else:
            if leaf.bias == "masked":
                expected.append(("mask", self.rank.rank == 0))
            more, missing = Counter(found) - Counter(expected), Counter(expected) - Counter(found)
            ok = not more and all(s[0] == "enter" and leaf.share is not None for s in missing)
        if not ok:
            raise self._error(
                node, f"{leaf.fqn} does {_show(tuple(found))}, planned was {_show(tuple(expected))}"
            )
        own_weight = f"{leaf.fqn}.weight".lstrip(".")
        for n in inside:
            name = (
                n.target._schema.name.split("::")[-1] if isinstance(n.target, torch._ops.OpOverload) else ""
            )
            if name in ("linear", "embedding", "lookup") and leaf.kind in ("linear", "embedding"):
                weight = n.args[0] if name in ("embedding", "lookup") else n.args[1]
                fqn = self.reference.aliases.get(own_weight, own_weight)
                if self.local.params.get(fqn) is not weight:
                    raise self._error(node, f"{leaf.fqn} multiplies by another weight than its own")
            if leaf.kind == "embedding" and name in ("embedding", "lookup"):
                dims = self.analysis.param_dims(own_weight)
                contracted = any(a.id in self.rank.partition.ranges for a in atoms_of(dims[0]))
                reason = self._rows_differ(n, dims[0], contracted)
                if reason is not None:
                    raise self._error(node, f"{leaf.fqn} {reason}")

    def _check_param(self, fqn: str, node: fx.Node) -> None:
        reference = self.reference.params.get(self.reference.aliases.get(fqn, fqn))
        if reference is None:
            raise VerifyError(f"{fqn}: a parameter that the whole model does not have")
        whole = fqn in self.reference.is_buffer
        want = _shape(reference) if whole else self.rank.shape(self.analysis.dims[reference][0])
        if want != _shape(node):
            raise VerifyError(
                f"{fqn}: has local shape {_shape(node)}, planned was {want} on rank {self.rank.rank}"
            )

    def _check_outputs(self, values: dict[fx.Node, _Value]) -> None:
        if len(self.local.outputs) != len(self.reference.outputs):
            raise VerifyError("the rewritten model returns another number of tensors")
        for mine, theirs in zip(self.local.outputs, self.reference.outputs, strict=True):
            value = values[mine.node]
            if mine.path != theirs.path or (value.root, value.output) != self.roots[theirs.node]:
                raise VerifyError(f"output {mine.path} is another value than in the whole model")
            if _shape(mine.node) != _shape(theirs.node):
                raise VerifyError(
                    f"output {mine.path} has shape {_shape(mine.node)} on rank {self.rank.rank}, "
                    f"whole it is {_shape(theirs.node)}"
                )
            planned = self.planned.at_output(theirs.node)
            if value.steps != planned:
                raise VerifyError(
                    f"output {mine.path} went through {_show(value.steps)}, planned was {_show(planned)}"
                )

    def _error(self, node: fx.Node, text: str) -> VerifyError:
        return VerifyError(
            f"rank {self.rank.rank}: {node.target} in {self.local.where(node)}: {text}",
            node.meta.get("module", ""),
        )


class _PlannedSteps:
    """The steps that a value has gone through when it reaches a use, by plan."""

    def __init__(self, verifier: Verifier, rank: Rank) -> None:
        self.after, self.before, self.output = planned_steps(verifier.analysis, verifier.choice)
        self.rank = rank
        self.v = verifier
        self._cache: dict[fx.Node, tuple[Described, ...]] = {}

    def _described(self, steps: Sequence[Step]) -> tuple[Described, ...]:
        return tuple(describe(step, self.rank) for step in steps)

    def of(self, node: fx.Node) -> tuple[Described, ...]:
        """Steps since the op that made the data of ``node``, through the chain of reshapes up to and after ``node``."""
        if node not in self._cache:
            source = None
            if node.op == "call_function":
                source = _Comparison._collapsed(node, self._shape)
                if source is None and node.target is operator.getitem:
                    source = node.args[0] if isinstance(node.args[0], fx.Node) else None
            inherited: tuple[tuple[object, ...], ...] = ()
            if source is not None:
                inherited = self.of(source)
                edge = next((e for e in self.before if e.consumer is node and e.producer is source), None)
                if edge is not None:
                    inherited += self._described(self.before[edge])
            self._cache[node] = inherited + self._described(self.after.get(node, ()))
        return self._cache[node]

    def _shape(self, node: fx.Node) -> Shape | None:
        dims = self.v.analysis.dims.get(node)
        return self.rank.shape(dims[0]) if dims else None

    def on_edge(self, edge: Edge) -> tuple[Described, ...]:
        return self.of(edge.producer) + self._described(self.before.get(edge, ()))

    def into_leaf(
        self, node: fx.Node, call: ModuleCall, before: tuple[Described, ...]
    ) -> list[tuple[Described, ...]] | None:
        """What a leaf's argument may have gone through: the planned steps less those that the leaf takes itself."""
        options: list[tuple[Described, ...]] = []
        for edge, steps in self.before.items():
            if edge.producer is node and self._inside(edge.consumer, call):
                full = self.of(node) + self._described(steps)
                if before and full[len(full) - len(before) :] == before:
                    full = full[: len(full) - len(before)]
                options.append(full)
        full = self.of(node)
        if before and full[len(full) - len(before) :] == before:  # all of its uses are in this leaf
            full = full[: len(full) - len(before)]
        return options or [full]

    def _inside(self, node: fx.Node, call: ModuleCall) -> bool:
        return call.first <= self.v.anchors.position[node] < call.last

    def at_output(self, node: fx.Node) -> tuple[Described, ...]:
        return self.of(node) + self._described(self.output.get(node, ()))


def _shape(node: fx.Node) -> Shape | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _tensor_args(node: fx.Node) -> Iterator[tuple[tuple[str | int, ...], fx.Node]]:
    def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], fx.Node]]:
        if isinstance(value, fx.Node):
            yield path, value
        elif isinstance(value, (list, tuple)):
            for i, v in enumerate(value):
                yield from walk(v, (*path, i))

    for i, value in enumerate(node.args):
        yield from walk(value, ("args", i))
    for key, value in node.kwargs.items():
        yield from walk(value, ("kwargs", key))


def _operand_roots(node: fx.Node, roots: dict[fx.Node, tuple[object, int]]) -> Iterator[object]:
    for path, operand in _tensor_args(node):
        yield path, roots[operand]


def _plain(value: Any) -> Any:
    """Arguments with every tensor replaced by a mark, lists as tuples."""
    if isinstance(value, fx.Node):
        return "tensor"
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _slice_of(args: Any, shape: Shape) -> tuple[int, int, int, int]:
    positional = list(args[0]) + [None] * 5
    dim = int(positional[1] or 0) % len(shape)
    start, stop, step = slice(positional[2], positional[3], positional[4] or 1).indices(shape[dim])
    return dim, start, stop, step


def _step_of(node: fx.Node) -> Described | None:
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or node.target.namespace != "autotp"
        or _is_lookup(node)
    ):
        return None
    name = node.target._schema.name.split("::")[-1]
    rest = tuple(tuple(a) if isinstance(a, (list, tuple)) else a for a in node.args[1:])
    return (name, *rest)


def _dimless(step: Described) -> Described:
    """A step without its dim, which leaf modules count from the end."""
    return (step[0], *step[2:]) if step[0] in ("gather", "take") else step


def _index(getitem: fx.Node) -> int:
    index = getitem.args[1]
    assert isinstance(index, int)
    return index


def _is_lookup(node: fx.Node) -> bool:
    return str(node.target).startswith("autotp.lookup")


def _is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _constant_key(graph: fx.Graph, node: fx.Node, constants: Any) -> object:
    value = constants.get(node)
    if value is None and graph.owning_module is not None:
        value = getattr(graph.owning_module, str(node.target), None)
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        try:
            return ("constant", tuple(value.shape), value.dtype, tuple(value.flatten().tolist()))
        except (RuntimeError, NotImplementedError):
            pass
    return ("constant", str(node.target))


def _show(steps: tuple[Described, ...]) -> str:
    return (
        " → ".join(str(step[0]) if len(step) < 3 else f"{step[0]}{step[1:]}" for step in steps) or "no step"
    )
