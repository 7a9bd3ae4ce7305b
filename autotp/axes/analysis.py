"""Analysis: the logical axes of every dim of every value in a trace.

One walk over the graph, each op's rule relating the dims of its operands and results (see `rules.registry`).
A rule that fails to unify is taken back, and its op blocks every dim it touches.

Values that depend on no parameter (inputs, buffers, `arange`, masks) are the same on every rank. They have
axes of their own, and an op that works on parameters *clones* them at each use: the operand's dims get fresh
atoms, so that a rotary table or a mask that all layers share ties none of their axes together. What a clone
keeps is that the batch and sequence dims of the inputs are frozen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

import autotp.axes.rules  # noqa: F401  registers the rules
from autotp.axes.rules.factory import FILLS
from autotp.axes.rules.registry import (
    NOT_LINEAR,
    Linear,
    Localize,
    LocalSize,
    OpContext,
    Operand,
    block_everything,
    find_rule,
    is_tensor_node,
    output_shapes,
)
from autotp.axes.term import Atom, CannotUnify, Cat, Dim, Solver, atoms_of, repeated_atoms, units_in
from autotp.errors import RuleError
from autotp.trace.provenance import Dim as Size
from autotp.trace.provenance import Expr, expression
from autotp.trace.provenance import Op as Computed

if TYPE_CHECKING:
    from autotp.trace.graph import Trace

__all__ = ["Analysis", "Linear", "Note", "OpInfo", "Operand", "analyse", "repeated_atoms"]


_CUTS = frozenset(("aten.slice.Tensor", "aten.slice_copy.Tensor", "aten.narrow.default", "aten.narrow_copy.default"))


@dataclass(frozen=True, slots=True)
class OpInfo:
    """What one op does to logical axes."""

    operands: tuple[Operand, ...]
    out: tuple[tuple[Dim, ...], ...]  # one per output tensor, as consumers see it
    whole_out: frozenset[tuple[int, int]] = frozenset()  # (output, dim): computed whole, then sliced for free
    contracted: tuple[Dim, ...] = ()  # summed over: where sharded, the output is Partial
    linear: Linear = NOT_LINEAR  # how a Partial operand passes
    added: frozenset[int] = (
        frozenset()
    )  # operands added to the contraction (a bias): once, if the output is Partial
    random: bool = False
    averaged: bool = False  # the contraction is a mean: an addend is scaled by the rank's share of the elements
    mutates: int | None = None
    units: tuple[tuple[Dim, int], ...] = ()  # local sizes of the dim are multiples of the number
    localize: Localize | None = (
        None  # args and kwargs of a rank, given the local size of a dim; None: unchanged
    )


@dataclass(frozen=True, slots=True)
class Note:
    """Why an axis is blocked at an op, in words."""

    node: fx.Node
    where: str
    text: str

    def __str__(self) -> str:
        return (
            f"{self.node.target} in {self.where}: {self.text}"
            if self.where
            else f"{self.node.target}: {self.text}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """The axes of a traced model: everything resolved, nothing to be unified any more."""

    trace: Trace
    dims: Mapping[fx.Node, tuple[tuple[Dim, ...], ...]]
    ops: Mapping[fx.Node, OpInfo]
    frozen: frozenset[Atom]
    derived: frozenset[fx.Node]
    notes: tuple[Note, ...]

    def is_frozen(self, dim: Dim) -> bool:
        """Whether no atom of a resolved dim may be sharded."""
        return all(atom in self.frozen for atom in atoms_of(dim))

    def units(self) -> Mapping[Atom, int]:
        """Axes of which a rank gets whole units only, as a kernel asks for, and the elements of one."""
        found: dict[Atom, int] = {}
        for info in self.ops.values():
            for dim, unit in info.units:
                for atom, n in units_in(dim, unit):
                    found[atom] = math.lcm(found.get(atom, 1), n)
        return found

    def param_dims(self, fqn: str) -> tuple[Dim, ...]:
        """The dims of a parameter or buffer."""
        fqn = self.trace.aliases.get(fqn, fqn)
        return self.dims[self.trace.params[fqn]][0]


def analyse(trace: Trace) -> Analysis:
    """Infer the logical axes of every value of a trace."""
    return _Walk(trace).run()


class _Walk:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.solver = Solver()
        self.dims: dict[fx.Node, tuple[tuple[Dim, ...], ...]] = {}
        self.ops: dict[fx.Node, OpInfo] = {}
        self.notes: list[Note] = []
        self.derived = derived_nodes(trace)

    def run(self) -> Analysis:
        params = set(self.trace.params.values())
        for node in self.trace.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.source(node, is_input=node.op == "placeholder" and node not in params)
            elif node.op == "call_function":
                self.op(node)
        for node in self.ops:
            self.hold_mutated(node)
            self.hold_cut(node)
        used = {operand.node for info in self.ops.values() for operand in info.operands}
        for node in params:
            for dim in self.dims[node][0]:
                self.hold_rest(dim)
                if node not in used:  # by a branch that was not taken, or by nobody: how it would be used is not known
                    self.solver.freeze(dim)
        for node, outputs in self.dims.items():
            if node not in self.derived:
                for dims in outputs:
                    for dim in dims:
                        self.solver.freeze(dim)
        return self.frozen()

    def source(self, node: fx.Node, is_input: bool) -> None:
        """A placeholder: fresh axes. Of an input, those that are batch or sequence are frozen, for its clones
        too.
        """
        val = node.meta.get("val")
        values = val if isinstance(val, (list, tuple)) else [val]
        outputs = []
        for value, shape in zip(values, output_shapes(node), strict=True):
            floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
            dims = tuple(self.solver.fresh(n) for n in shape)
            for d, dim in enumerate(dims):
                if is_input and not (floating and d == len(shape) - 1):
                    self.solver.vary(dim)
            outputs.append(dims)
        self.dims[node] = tuple(outputs)

    def consume(self, user: fx.Node, node: fx.Node) -> tuple[tuple[Dim, ...], ...]:
        """A value's dims for one use of it."""
        outputs = self.dims[node]
        if user in self.derived and node not in self.derived:
            return tuple(self.solver.clone(dims) for dims in outputs)
        return tuple(tuple(self.solver.resolve(dim) for dim in dims) for dims in outputs)

    def context(self, node: fx.Node) -> OpContext:
        return OpContext(node, self.solver, lambda used: self.consume(node, used), self.trace.constants.get)

    def op(self, node: fx.Node) -> None:
        rule = find_rule(node.target)
        mark = self.solver.mark()
        context = self.context(node)
        try:
            if rule is None:
                raise CannotUnify("no sharding rule is known for this op, so it needs all of its operands")
            rule(context)
            if context.results is None:
                raise RuleError(f"the sharding rule of {node.target} does not say what its results are")
        except CannotUnify as error:
            self.solver.undo(mark)
            context = self.context(node)
            context.notes.append(str(error))
            block_everything(context)
        except RuleError as error:
            raise RuleError(f"{error} (at {self.where(node)})") from error
        assert context.results is not None
        if node in self.derived:
            self.notes += [Note(node, self.where(node), text) for text in context.notes]
        linear = context.linearity
        operands = context.operands()
        if linear.kind == "add" and not linear.of:
            linear = replace(linear, of=frozenset(range(len(operands))))
        self.dims[node] = context.results
        self.ops[node] = OpInfo(
            operands, context.results, frozenset(context.whole_results), tuple(context.contracted), linear,
            context.added_operands, context.is_random, context.is_mean, context.mutated,
            tuple(context.units), self.resolved_localize(context.localizer()),
        )  # fmt: skip

    def where(self, node: fx.Node) -> str:
        where = getattr(self.trace, "where", None)
        return str(where(node)) if where is not None else str(node.meta.get("module", ""))

    def hold_mutated(self, node: fx.Node) -> None:
        """A value that is written into cannot be converted on the way there: where it would be, it is never
        sharded.

        That holds for every view between the op that writes and the tensor that owns the memory.
        """
        if node not in self.derived:
            return
        written = [arg for arg, writes in aliased_args(node) if writes]
        queue, seen = [(node, arg) for arg in written], set()
        while queue:
            user, arg = queue.pop()
            if (user, arg) in seen:
                continue
            seen.add((user, arg))
            for operand in self.ops[user].operands:
                if operand.node is arg:
                    self.hold(operand.dims, self.dims[arg][operand.output])
                    for k, out in enumerate(self.ops[user].out):
                        if (
                            user is node
                            and len(out) == len(operand.dims)
                            and self.sizes(out) == self.sizes(operand.dims)
                        ):
                            self.hold(out, operand.dims)
                        for d, dim in enumerate(out):
                            if (k, d) in self.ops[user].whole_out:
                                self.solver.freeze(dim)
            if arg in self.ops:
                queue += [(arg, base) for base, _ in aliased_args(arg)]

    def hold_cut(self, node: fx.Node) -> None:
        """``table[:t]``: where a dim is cut at a place that each call says anew, no part of it is an axis.

        What is traced with 5 of 11 positions would have its other 6 sharded, which a longer sequence then needs.
        """
        call = node.meta.get("call")
        if node not in self.derived or str(node.target) not in _CUTS or call is None:
            return
        cuts = {a for a in (*node.args[2:], *node.kwargs.values()) if isinstance(a, int)}
        if any(value in cuts and self.depends_on_call(expression(value)) for _, value in call.ints):
            operand = self.ops[node].operands[0]
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            assert isinstance(dim, int)
            self.solver.freeze(self.dims[operand.node][operand.output][dim])

    def depends_on_call(self, expr: Expr) -> bool:
        """Whether a number is computed from a size that varies."""
        if isinstance(expr, Size):
            return expr.node in self.dims and self.solver.varies(self.dims[expr.node][0][expr.dim])
        return isinstance(expr, Computed) and any(map(self.depends_on_call, expr.args))

    def hold_rest(self, dim: Dim) -> None:
        """``(t | rest)``: with one part of as many elements as the call has positions, the others are what is left."""
        for factor in self.solver.resolve(dim):
            if isinstance(factor, Cat):
                if any(self.solver.varies(part) for part in factor.parts):
                    self.solver.freeze((factor,))
                for part in factor.parts:
                    self.hold_rest(part)

    def sizes(self, dims: Iterable[Dim]) -> list[int]:
        return [self.solver.size(dim) for dim in dims]

    def hold(self, a: tuple[Dim, ...], b: tuple[Dim, ...]) -> None:
        for one, other in zip(a, b, strict=True):
            if self.solver.resolve(one) != self.solver.resolve(other):
                self.solver.freeze(one)
                self.solver.freeze(other)

    def resolved_localize(self, localize: Localize | None) -> Localize | None:
        if localize is None:
            return None
        resolve = self.solver.resolve

        def resolved(size: LocalSize) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return localize(lambda dim: size(resolve(dim)))

        return resolved

    def frozen(self) -> Analysis:
        resolve = self.solver.resolve

        def all_of(dims: Iterable[Dim]) -> tuple[Dim, ...]:
            return tuple(resolve(dim) for dim in dims)

        ops = {
            node: replace(
                info,
                operands=tuple(replace(o, dims=all_of(o.dims)) for o in info.operands),
                out=tuple(all_of(dims) for dims in info.out),
                contracted=all_of(info.contracted),
                units=tuple((resolve(dim), unit) for dim, unit in info.units),
            )
            for node, info in self.ops.items()
        }
        dims = {node: tuple(all_of(d) for d in outputs) for node, outputs in self.dims.items()}
        return Analysis(
            self.trace, dims, ops, self.solver.frozen_atoms(), frozenset(self.derived), tuple(self.notes)
        )


def aliased_args(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """The tensor arguments whose memory the op's result shares or that the op writes into, and whether it
    writes.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        is_item = node.op == "call_function" and len(node.args) == 2 and is_tensor_node(node.args[0])
        return [(node.args[0], False)] if is_item else []  # type: ignore[list-item]
    found = []
    for i, name, writes in _aliases(node.target):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, fx.Node):
                found.append((item, writes))
    return found


@functools.cache
def _aliases(target: torch._ops.OpOverload) -> tuple[tuple[int, str, bool], ...]:
    """The arguments that an op's schema marks as aliased: position (past the end, by keyword only), name,
    written.
    """
    return tuple(
        (len(target._schema.arguments) if a.kwarg_only else i, a.name, bool(a.alias_info.is_write))
        for i, a in enumerate(target._schema.arguments)
        if a.alias_info is not None
    )


def derived_nodes(trace: Trace) -> set[fx.Node]:
    """The nodes that depend on a parameter, those that ops on such nodes write into (a cache), the buffers that go with
    a module's parameters (`own_buffers`), and constant fills for one such op (the initial state of a scan), which a
    rank makes as large as it needs."""
    derived = _dependents(trace, {node for name, node in trace.params.items() if name not in trace.is_buffer})
    fills = {n for n in trace.graph.nodes if n.target in FILLS and len(n.users) == 1 and derived.issuperset(n.users)}
    return derived | own_buffers(trace, derived) | fills


def own_buffers(trace: Trace, derived: Set[fx.Node]) -> set[fx.Node]:
    """The buffers that only ops on parameters use, and only in the module that holds them: a batch norm's statistics.

    Such a buffer has the axes of its module's parameters and is sliced as they are. One that is shared by layers, or
    that other constants are computed from (a rotary table, a mask), is whole on every rank, and cloned.
    """
    found = set()
    for fqn in trace.is_buffer:
        node, module = trace.params[fqn], fqn.rpartition(".")[0]
        users = list(node.users)
        if node.meta["val"].is_floating_point() and users and fqn not in trace.aliases.values():
            if all(user in derived and user.meta.get("module") == module for user in users):
                found.add(node)
    return found


def _dependents(trace: Trace, roots: set[fx.Node]) -> set[fx.Node]:
    derived = set(roots)
    nodes = list(trace.graph.nodes)
    changed = True
    while changed:
        changed = False
        for node in nodes:
            if node.op != "call_function":
                continue
            if node not in derived and any(arg in derived for arg in node.all_input_nodes):
                derived.add(node)
            if node not in derived:
                continue
            queue = [arg for arg, writes in aliased_args(node) if writes]
            while queue:
                arg = queue.pop()
                if arg not in derived:
                    derived.add(arg)
                    changed = True
                    queue += [base for base, _ in aliased_args(arg)]
    return derived
