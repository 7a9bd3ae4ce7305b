"""What a swapped leaf module does inside, told from its trace, for verification.

The sharded class of a leaf runs other ops than the module did (the bias is added after the sum, the lookup is
in some rows only), so its ops have no counterparts one by one. Instead, its *main* op, which uses its weight,
has to be that of the whole model: on the same value, after the steps planned for it, with the planned scalars.
What computes the weight, where it is parametrized, is matched op by op, as outside.
Its bias has to count once, and the steps after it have to be those planned for the module's result. Nothing
else may happen inside. Of `nn.MultiheadAttention`, whose class is proven by itself, only the edges are looked
at: what enters, and what becomes of the product with out_proj's weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..plan.communication import Edge
from ..trace.graph import ModuleCall, Path
from .values import Steps, Value, dimless, op_name, plain, shape_of, show_steps, step_of
from .wanted import local_args

if TYPE_CHECKING:
    from .verify import Comparison

_VIEWS = frozenset("view reshape _unsafe_view flatten unflatten squeeze unsqueeze contiguous clone".split())
_LAYOUTS = _VIEWS | {"transpose", "permute", "t"}
_CASTS = frozenset({"to", "_to_copy"})
_ENTERED = (0, 1, 2, "query", "key", "value")


class Differs(Exception):
    """A leaf does not do what was planned: why."""


@dataclass(frozen=True, slots=True)
class _Unbiased:
    """The value of the op ``main`` of the whole model, but for the bias, which has yet to be added."""

    main: object


@dataclass(frozen=True, slots=True)
class _Main:
    """The op of the whole model that uses the leaf's weight; ``source`` is its other operand."""

    node: fx.Node
    weight: Edge
    bias: fx.Node | None
    bias_masked: bool
    source: Edge


class LeafInside:
    """The inside of one call of a leaf module on one rank, against the same call in the whole model."""

    def __init__(self, comparison: Comparison, call: ModuleCall, twin: ModuleCall) -> None:
        self.c = comparison
        self.call = call
        self.twin = twin
        self.kind = comparison.v.anchors.leaves[call.fqn]
        self.theirs = list(comparison.reference.graph.nodes)[twin.first : twin.last]

    def values(self, inside: Sequence[fx.Node], outer: Mapping[fx.Node, Value]) -> Mapping[fx.Node, Value]:
        """The values of the nodes inside, its results among them.

        Raises:
            Differs: it is not what was planned.
        """
        self._check_arguments(outer)
        self._check_parameters(inside)
        if self.kind == "attention":
            return self._attention(inside, outer)
        return self._one_op(inside, outer)

    def _check_arguments(self, outer: Mapping[fx.Node, Value]) -> None:
        theirs = {port.path: port.node for port in self.twin.inputs}
        for port in self.call.inputs:
            reference = theirs.get(port.path)
            if reference is None or port.node not in outer:
                raise Differs(f"gets another argument {port.path}")
            value = outer[port.node]
            if (value.root, value.output) != self.c.roots[reference]:
                raise Differs(f"gets another value as {port.path}")

    def _check_parameters(self, inside: Sequence[fx.Node]) -> None:
        prefix = f"{self.call.fqn}." if self.call.fqn else ""
        names = [*self.c.reference.params, *self.c.reference.aliases]
        own = {self._first(name) for name in names if name.startswith(prefix)}
        for node in inside:
            for source in node.all_input_nodes:
                if source in self.c.param_names and self.c.param_names[source] not in own:
                    raise Differs(f"uses {self.c.param_names[source]}, which is not its own")

    def _first(self, fqn: str) -> str:
        """Of the names of a tied parameter the one that the trace knows."""
        return self.c.reference.aliases.get(fqn, fqn)

    def _parameter(self, name: str) -> fx.Node | None:
        """The leaf's own parameter in the whole model."""
        return self.c.reference.params.get(self._first(f"{self.call.fqn}.{name}".lstrip(".")))

    def _result(self, path: Path) -> fx.Node:
        """The result of the whole model's module at ``path``."""
        node = next((port.node for port in self.twin.outputs if port.path == path), None)
        if node is None:
            raise Differs("returns another structure")
        return node

    # ---- linear, transposed linear, embedding, convolution -----------------------------------------

    def _main(self) -> _Main:
        weight, bias = self._parameter("weight"), self._parameter("bias")
        weights = self.c.v.anchors.weights if weight is None else {weight}
        for node in self.theirs:
            info = self.c.analysis.ops.get(node)
            if info is None or node in weights:
                continue
            edges = [Edge(o.node, node, i) for i, o in enumerate(info.operands)]
            own = [e for e in edges if e.producer in weights]
            biases = [e for e in edges if e.producer is bias]
            sources = [e for e in edges if e not in own and e not in biases]
            if len(own) == len(sources) == 1:
                masked = any(e in self.c.v.choice.communication.masked for e in biases)
                return _Main(node, own[0], bias if biases else None, masked, sources[0])
        raise Differs("does not use its weight once in the whole model")

    def _one_op(self, inside: Sequence[fx.Node], outer: Mapping[fx.Node, Value]) -> Mapping[fx.Node, Value]:
        main = self._main()
        values = dict(outer)
        weight, unbiased = self.c.roots[main.weight.producer][0], _Unbiased(main.node)
        for node in inside:
            if node in self.c.weights:
                values[node] = self.c.value_of(node, values)
                continue
            unknown = [source for source in node.all_input_nodes if source not in values]
            if unknown or not node.all_input_nodes:
                raise Differs(f"does {node.target}, which was not planned")
            operands = [values[source] for source in node.all_input_nodes]
            roots = [value.root for value in operands]
            if len(operands) == 1 and self._passes_on(node, operands[0]):
                self._check_dim(node, main)
                values[node] = self.c.passed_on(node, operands[0])
            elif weight in roots:
                values[node] = self._value_of_main(node, main, values)
            elif unbiased in roots and op_name(node) == "add":
                values[node] = self._with_bias(main, operands)
            else:
                raise Differs(f"does {node.target}, which was not planned")
        for port in self.call.outputs:
            values[port.node] = self._returned(self._result(port.path), values[port.node])
        return values

    def _returned(self, theirs: fx.Node, value: Value) -> Value:
        root, output = self.c.roots[theirs]
        planned = self.c.planned.of(theirs)
        if isinstance(value.root, _Unbiased):
            raise Differs("leaves its bias out")
        if (value.root, value.output) != (root, output):
            raise Differs("returns another value")
        if dimless(value.steps) != dimless(planned):
            raise Differs(
                f"returns its result after {show_steps(value.steps)}, planned was {show_steps(planned)}"
            )
        return Value(root, output, planned)

    def _passes_on(self, node: fx.Node, value: Value) -> bool:
        """Whether the result stands for the same value: a step, another shape, a parameter turned or cast."""
        if step_of(node) is not None:
            return True
        of_parameter = isinstance(value.root, tuple) and value.root[0] == "param"
        return op_name(node) in (_LAYOUTS | _CASTS if of_parameter else _VIEWS)

    def _check_dim(self, node: fx.Node, main: _Main) -> None:
        """A slice or gather inside is along the features, or the channels of a convolution."""
        step, shape = step_of(node), shape_of(node)
        if step is None or step[0] not in ("take", "gather") or shape is None:
            return
        channels = main.weight.producer.meta["val"].dim() - 1 if self.kind == "conv" else 1
        if step[1] != len(shape) - channels:
            raise Differs(f"does {show_steps((step,))} along dim {step[1]} of {len(shape)}")

    def _value_of_main(self, node: fx.Node, main: _Main, values: Mapping[fx.Node, Value]) -> Value:
        by_root = {(values[n].root, values[n].output): n for n in node.all_input_nodes}
        mine = by_root.get(self.c.roots[main.source.producer])
        if mine is None:
            raise Differs("is applied to another value")
        steps, planned = values[mine].steps, self.c.planned.on_edge(main.source)
        if dimless(steps) != dimless(planned):
            raise Differs(f"takes its input after {show_steps(steps)}, planned was {show_steps(planned)}")
        weight = by_root.get(self.c.roots[main.weight.producer])
        if weight is None or values[weight].steps != self.c.planned.on_edge(main.weight):
            raise Differs("does something to its weight")
        if main.weight.producer in self.c.v.anchors.weights:
            want, have = self.c.whole.operand_shape(main.weight), shape_of(weight)
            if want != have:
                raise Differs(f"has a weight of shape {have}, planned was {want}")
        want, have = self.c.whole.operand_shape(main.source), shape_of(mine) or ()
        if self.kind in ("linear", "conv1d"):
            want, have = want[-1:], have[-1:]
        if want != have:
            raise Differs(f"gets shape {have}, planned was {want}")
        self._check_scalars(node, main)
        if main.bias is None:
            return Value(main.node, 0, ())
        bias = by_root.get(self.c.roots[main.bias])
        if bias is None:
            return Value(_Unbiased(main.node), 0, ())
        steps, planned = values[bias].steps, self._masked() if main.bias_masked else ()
        if steps != planned:
            raise Differs(f"adds its bias after {show_steps(steps)}, planned was {show_steps(planned)}")
        return Value(main.node, 0, ())

    def _masked(self) -> Steps:
        return (("mask", self.c.rank.rank == 0),)

    def _check_scalars(self, node: fx.Node, main: _Main) -> None:
        if self.kind == "embedding":
            reason = self.c.rows_differ(node, main.node)
            if reason is not None:
                raise Differs(reason)
        elif self.kind == "conv":
            args, kwargs = local_args(self.c.analysis, main.node, self.c.rank)
            want, have = (plain((args[3:], kwargs)), plain((node.args[3:], node.kwargs)))
            if node.target is not main.node.target or want != have:
                raise Differs(f"is {node.target}{have}, planned was {main.node.target}{want}")
        elif node.target is not torch.ops.aten.linear.default:
            raise Differs(f"is {node.target}, not a linear layer")

    def _with_bias(self, main: _Main, operands: Sequence[Value]) -> Value:
        """The bias is added to the whole sum, once."""
        unbiased = next(value for value in operands if isinstance(value.root, _Unbiased))
        assert main.bias is not None
        others = [value for value in operands if value is not unbiased]
        if others != [Value(*self.c.roots[main.bias], ())]:
            raise Differs("adds something else than its bias")
        planned = self.c.planned.of(self._result(self.call.outputs[0].path))
        if not self._counts_once(main.bias_masked, unbiased.steps, planned):
            raise Differs(f"adds its bias after {show_steps(unbiased.steps)}, where it does not count once")
        return replace(unbiased, root=main.node)

    @staticmethod
    def _counts_once(masked: bool, steps: Steps, planned: Steps) -> bool:
        """Whether a bias that is added after ``steps`` counts once: after the sum, where ranks hold addends."""
        summed = planned[:1] if planned and planned[0][0] == "all_reduce" else ()
        return steps == summed and (not masked or bool(summed))

    # ---- nn.MultiheadAttention -------------------------------------------------------------------

    def _attention(
        self, inside: Sequence[fx.Node], outer: Mapping[fx.Node, Value]
    ) -> Mapping[fx.Node, Value]:
        for port in self.twin.inputs:
            self._check_entered(port.path, port.node, inside, outer)
        found = dict(outer)
        for out in self.call.outputs:
            theirs = self._result(out.path)
            if out.path in (("out",), ("out", 0)):
                self._check_projection(out.node, theirs)
            elif not any(step_of(n) for n in (out.node, *out.node.all_input_nodes)):
                raise Differs("returns its attention weights without those of the other ranks")
            found[out.node] = Value(*self.c.roots[theirs], self.c.planned.of(theirs))
        return found

    def _check_entered(
        self, path: Path, theirs: fx.Node, inside: Sequence[fx.Node], outer: Mapping[fx.Node, Value]
    ) -> None:
        """The steps of an argument, up to where it is used inside."""
        users = [user for user in self.theirs if user in self.c.analysis.ops]
        planned = {
            self.c.planned.on_edge(Edge(theirs, user, i))
            for user in users
            for i, operand in enumerate(self.c.analysis.ops[user].operands)
            if operand.node is theirs
        }
        mine = {
            self.c.passed_on(user, outer[source]).steps
            for user in inside
            for source in user.all_input_nodes
            if source in outer and (outer[source].root, outer[source].output) == self.c.roots[theirs]
        }
        if path[1] not in _ENTERED:  # whether a mask is trained, a trace cannot tell
            planned, mine = ({_without_enter(s) for s in found} for found in (planned, mine))
            if not mine:  # is_causal says the same
                return
        if mine != planned:
            raise Differs(f"takes {path[1]} after {_each(mine)}, planned was {_each(planned)}")

    def _check_projection(self, node: fx.Node, theirs: fx.Node) -> None:
        """Back from the result to the product with out_proj's weight: what happened in between, here and there."""
        planned: Steps = ()
        main = theirs
        while op_name(main) in _LAYOUTS and isinstance(main.args[0], fx.Node):
            planned = self.c.planned.after_node(main) + planned
            main = main.args[0]
        planned = self.c.planned.after_node(main) + planned
        steps: Steps = ()
        before_bias: Steps | None = None
        while node.target is not torch.ops.aten.linear.default:
            step = step_of(node)
            if step is not None:
                steps = (step, *steps)
            elif op_name(node) == "add" and before_bias is None:
                self._check_own(node.args[1], "out_proj.bias")
                steps, before_bias = (), steps
            elif op_name(node) not in _LAYOUTS:
                raise Differs(f"does {node.target} to its result, which was not planned")
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        self._check_own(node.args[1], "out_proj.weight")
        added_after = steps if before_bias is not None else None
        steps = steps + (before_bias or ())
        if steps != planned:
            raise Differs(f"returns its result after {show_steps(steps)}, planned was {show_steps(planned)}")
        self._check_bias_once(node.args[2] if len(node.args) > 2 else None, added_after, main, planned)

    def _check_own(self, value: object, name: str) -> None:
        fqn = self._first(f"{self.call.fqn}.{name}".lstrip("."))
        if not isinstance(value, fx.Node) or self.c.param_names.get(value) != fqn:
            raise Differs(f"uses something else in the place of {name}")

    def _check_bias_once(
        self, inside: object, added_after: Steps | None, main: fx.Node, planned: Steps
    ) -> None:
        bias = self._parameter("out_proj.bias")
        edges = [Edge(o.node, main, i) for i, o in enumerate(self.c.analysis.ops[main].operands)]
        masked = any(e.producer is bias and e in self.c.v.choice.communication.masked for e in edges)
        if added_after is not None:
            ok = inside is None and self._counts_once(masked, added_after, planned)
        elif bias is None:
            ok = inside is None
        elif masked:
            ok = isinstance(inside, fx.Node) and (step_of(inside),) == self._masked()
            self._check_own(inside.args[0] if isinstance(inside, fx.Node) and ok else None, "out_proj.bias")
        else:
            ok = True
            self._check_own(inside, "out_proj.bias")
        if not ok:
            raise Differs("does not add out_proj's bias once")


def _without_enter(steps: Steps) -> Steps:
    return tuple(step for step in steps if step[0] != "enter")


def _each(several: set[Steps]) -> str:
    return " or ".join(sorted(map(show_steps, several))) or "nothing"
