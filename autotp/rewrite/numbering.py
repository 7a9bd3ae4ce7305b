"""The values of the whole model, numbered as one rank meets them: what its own values are matched with.

Ops that only reshape make no value of their own, and ops that are equal, whole and without a gradient make one value
together; ops are found by what they do to which values (`Numbering.by_key`). `PlannedSteps` tells what the plan does
to each value.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..axes.term import atoms_of
from ..plan.communication import Edge
from ..trace.memory import storages
from .bind import Rank, describe
from .planned import planned_steps
from .steps import Mask, Step
from .values import Shape, Steps, is_random, item_of, plain, tensor_args

if TYPE_CHECKING:
    from .verify import Verifier

Root = tuple[object, int]
"""A value of the whole model: what makes it, and which of its outputs it is."""

#: Ops that leave row-major data as it is, whatever their arguments.
_RESHAPES = frozenset(
    "view reshape _unsafe_view unsqueeze squeeze flatten unflatten contiguous clone alias detach lift_fresh_copy "
    "view_as reshape_as ravel".split()
)
#: Ops that do so where the shape (and dtype) of their result is that of their operand.
_MAYBE = frozenset("expand expand_as to _to_copy type_as slice repeat".split())


class Numbering:
    """One rank's numbering of the whole model."""

    def __init__(self, verifier: Verifier, rank: Rank) -> None:
        self.v = verifier
        self.trace = verifier.trace
        self.analysis = verifier.analysis
        self.rank = rank
        self.roots: dict[fx.Node, Root] = {}
        self.by_key: dict[object, list[fx.Node]] = defaultdict(list)
        self._number()

    def _number(self) -> None:
        constants = self.trace.constants
        first: dict[object, tuple[object, int]] = {}
        for fqn, node in self.trace.params.items():
            self.roots[node] = (("param", fqn), 0)
        for i, port in enumerate(self.trace.inputs):
            self.roots[port.node] = (("input", i), 0)
        for node in self.trace.graph.nodes:
            if node.op == "get_attr":
                self.roots[node] = (constant_key(self.trace.graph, node, constants), 0)
            if node.op != "call_function":
                continue
            source = collapsed(node, self.local_shape)
            if source is not None:
                self.roots[node] = self.roots[source]
                continue
            if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
                self.roots[node] = (self.roots[node.args[0]][0], item_of(node))
                continue
            self.roots[node] = (node, 0)
            if self._in_leaf(node) and node not in self.v.anchors.weights:
                continue
            key = (node.target, tuple(operand_roots(node, self.roots)))
            if self._is_plain(node):
                self.roots[node] = first.setdefault((key, repr(plain((node.args, node.kwargs)))), (node, 0))
            self.by_key[key].append(node)

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether the op has one value whenever it runs, whole on every rank and without a gradient: then it is one
        value, as often as it is made (positions for each kind of layer, in the order of a set, which copies of the
        model need not have)."""
        dims = self.analysis.dims.get(node)
        if dims is None or is_random(node) or node in self.v.differentiable:
            return False
        split = self.rank.partition.ranges
        if any(atom.id in split for out in dims for dim in out for atom in atoms_of(dim)):
            return False
        if node in self.v.choice.communication.partial:
            return False
        return self.v.written.isdisjoint(s for n in (node, *node.all_input_nodes) for s in storages(n))

    def _in_leaf(self, node: fx.Node) -> bool:
        leaf = self.v.anchors.leaf_of(node)
        return leaf is not None and leaf in self.v.leaves

    def local_shape(self, node: fx.Node) -> Shape | None:
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

    def operand_shape(self, edge: Edge) -> Shape:
        return self.rank.shape(self.analysis.ops[edge.consumer].operands[edge.operand].dims)


class PlannedSteps:
    """The steps that a value has gone through when it reaches a use, by plan."""

    def __init__(self, verifier: Verifier, rank: Rank) -> None:
        self.after, self.before, self.output = planned_steps(verifier.analysis, verifier.choice)
        self.rank = rank
        self.v = verifier
        self._cache: dict[fx.Node, Steps] = {}

    def _described(self, steps: Sequence[Step]) -> Steps:
        return tuple(describe(step, self.rank) for step in steps)

    def of(self, node: fx.Node) -> Steps:
        """Steps since the op that made the data of ``node``, through the chain of reshapes up to and after ``node``."""
        if node not in self._cache:
            source = None
            if node.op == "call_function":
                source = collapsed(node, self._shape)
                if source is None and node.target is operator.getitem:
                    source = node.args[0] if isinstance(node.args[0], fx.Node) else None
            inherited: Steps = ()
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

    def on_edge(self, edge: Edge) -> Steps:
        own = self.before.get(edge, ())
        if edge in self.v.choice.communication.masked and Mask() not in own:  # a bias, say
            own = (*own, Mask())
        return self.of(edge.producer) + self._described(own)

    def after_node(self, node: fx.Node) -> Steps:
        return self._described(self.after.get(node, ()))

    def at_output(self, node: fx.Node) -> Steps:
        return self.of(node) + self._described(self.output.get(node, ()))


def collapsed(node: fx.Node, shape_of: Callable[[fx.Node], Shape | None]) -> fx.Node | None:
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


def operand_roots(node: fx.Node, roots: Mapping[fx.Node, Root]) -> Iterator[object]:
    """What an op works on: the place of each operand in its arguments, and the value that it stands for."""
    for path, operand in tensor_args(node):
        yield path, roots[operand]


def constant_key(graph: fx.Graph, node: fx.Node, constants: Any) -> object:
    """What tells a constant from others: its values, where they are known."""
    value = constants.get(node)
    if value is None and graph.owning_module is not None:
        value = getattr(graph.owning_module, str(node.target), None)
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        try:
            return ("constant", tuple(value.shape), value.dtype, tuple(value.flatten().tolist()))
        except (RuntimeError, NotImplementedError):
            pass
    return ("constant", str(node.target))
