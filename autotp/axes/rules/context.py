"""What a sharding rule sees of one op, and what it says about it: `OpContext`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from autotp.axes.term import CannotUnify, Dim, Solver
from autotp.errors import RuleError

Path: TypeAlias = tuple[str | int, ...]
LocalSize: TypeAlias = Callable[[Dim], int]
Localize: TypeAlias = Callable[[LocalSize], tuple[tuple[Any, ...], dict[str, Any]]]
LinearKind: TypeAlias = Literal["none", "add", "mul"]
Rule: TypeAlias = Callable[["OpContext"], None]


@dataclass(frozen=True, slots=True)
class Linear:
    """How a Partial operand passes through an op.

    ``none``: it has to be reduced first. ``add``: the result is a sum, concatenation or view of the operands;
    each may be Partial, whole ones then enter masked (on one rank only). ``mul``: linear in each operand of
    ``of`` separately; at most one of them may be Partial.
    """

    kind: LinearKind = "none"
    of: frozenset[int] = frozenset()


NOT_LINEAR = Linear()


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor argument of an op, with its dims as this op consumes them."""

    node: fx.Node
    path: Path  # into the node's args or kwargs: ("args", 0), ("args", 0, 2), ("kwargs", "weight")
    dims: tuple[Dim, ...]
    output: int = 0  # which of the producer's outputs (only `getitem` reads another than 0)


class OpContext:
    """What a rule sees of one op, and says about it.

    Operands are numbered in the order of first mention. `dims` are as the producer has them until `block` (or
    a failed `join`) puts a fresh frozen axis in place of one.
    """

    def __init__(
        self,
        node: fx.Node,
        solver: Solver,
        consume: Callable[[fx.Node], tuple[tuple[Dim, ...], ...]],
        constant: Callable[[fx.Node], torch.Tensor | None] = lambda node: None,
    ) -> None:
        self.node = node
        self.solver = solver
        self._consume = consume
        self._constant = constant
        self.args: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        self.tensor_names: list[str] = []  # arguments of type Tensor, Tensor? or lists of them
        self._bind_schema()
        self._nodes: list[fx.Node] = []
        self._operand_paths: list[Path] = []
        self._operand_outputs: list[int] = []
        self._dims: list[list[Dim]] = []
        self._blocked: set[tuple[int, int]] = set()
        self._whole_dims: set[Any] = set()  # the atoms that `whole` made (held: an id may come again)
        self._local: dict[str, Callable[[LocalSize], Any]] = {}
        self._localize: Localize | None = None
        self.notes: list[str] = []
        # what the rule has said
        self.results: tuple[tuple[Dim, ...], ...] | None = None
        self.whole_results: set[tuple[int, int]] = set()
        self.contracted: list[Dim] = []
        self.is_mean = False
        self.linearity = NOT_LINEAR
        self.added_operands: frozenset[int] = frozenset()
        self.is_random = False
        self.mutated: int | None = None
        self.units: list[tuple[Dim, int]] = []

    def _bind_schema(self) -> None:
        node = self.node
        schema = getattr(node.target, "_schema", None)
        if schema is None:  # operator.getitem and other plain functions: positional names "0", "1", ...
            self.args = {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
            self.paths = {str(i): ("args", i) for i in range(len(node.args))}
            self.paths |= {k: ("kwargs", k) for k in node.kwargs}
            self.tensor_names = [n for n in self.paths if self.has(n)]
            return
        for i, (name, kwarg_only, default, is_tensor) in enumerate(_arguments(node.target)):
            if is_tensor:
                self.tensor_names.append(name)
            if i < len(node.args) and not kwarg_only:
                self.args[name], self.paths[name] = node.args[i], ("args", i)
            elif name in node.kwargs:
                self.args[name], self.paths[name] = node.kwargs[name], ("kwargs", name)
            else:
                self.args[name] = default
                self.paths[name] = ("kwargs", name) if kwarg_only else ("args", i)

    # ---- operands

    def has(self, name: str) -> bool:
        """Whether the op was given a tensor (or a non-empty list with tensors) for this argument."""
        value = self.args.get(name)
        if isinstance(value, (list, tuple)):
            return any(is_tensor_node(v) for v in value)
        return is_tensor_node(value)

    def tensor(self, arg: str | fx.Node, *index: int) -> int:
        """Register a tensor argument (by schema name, or by its node) as an operand; its operand number."""
        if isinstance(arg, fx.Node):
            path = next((p for p in self.tensor_paths() if self.at(p) is arg), None)
        else:
            path = next((p for p in self.tensor_paths() if p == (*self.paths.get(arg, ()), *index)), None)
        if path is None:
            raise RuleError(f"{self.node.target}: its rule asks for a tensor {arg!r} that it was not given")
        return self._register(path)

    def tensors(self, name: str) -> list[int]:
        """Register every tensor of a list argument (``Tensor[]``; ``None`` entries are skipped)."""
        value = self.args[name]
        return [self.tensor(name, k) for k, v in enumerate(value) if is_tensor_node(v)]

    def all_tensors(self) -> list[int]:
        """Register every tensor argument, in schema order."""
        return [self._register(path) for path in self.tensor_paths()]

    def _register(self, path: Path) -> int:
        if path in self._operand_paths:
            return self._operand_paths.index(path)
        self._nodes.append(self.at(path))
        self._operand_paths.append(path)
        self._operand_outputs.append(0)
        self._dims.append(list(self._consume(self._nodes[-1])[0]))
        return len(self._nodes) - 1

    def output_of(self, i: int, output: int) -> None:
        """Operand `i` is the producer's output number `output` (for getitem)."""
        self._operand_outputs[i] = output
        self._dims[i] = list(self._consume(self._nodes[i])[output])

    def tensor_paths(self) -> list[Path]:
        """The paths of all tensor arguments, in schema order."""
        found: list[Path] = []
        for name, path in self.paths.items():
            value = self.args[name]
            if is_tensor_node(value):
                found.append(path)
            elif isinstance(value, (list, tuple)):
                found += [(*path, k) for k, v in enumerate(value) if is_tensor_node(v)]
        return found

    def at(self, path: Path) -> Any:
        """The argument at a path."""
        value: Any = self.node.args if path[0] == "args" else self.node.kwargs
        for key in path[1:]:
            value = value[key]
        return value

    def dims(self, i: int) -> list[Dim]:
        """The dims of operand `i` as consumed (a copy)."""
        return list(self._dims[i])

    def shape(self, i: int) -> tuple[int, ...]:
        """The global shape of operand `i`."""
        return tuple(self.solver.size(d) for d in self._dims[i])

    def rank(self, i: int) -> int:
        """The number of dims of operand `i`."""
        return len(self._dims[i])

    def operand_node(self, i: int) -> fx.Node:
        """The node that makes operand `i`."""
        return self._nodes[i]

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a small tensor that the trace knows (an index list), else None."""
        return self._constant(node)

    def out_shapes(self) -> list[tuple[int, ...]]:
        """The global shapes of the results, one per output (an output that is no tensor has shape ())."""
        return output_shapes(self.node)

    # ---- relations

    def unify(self, a: Dim, b: Dim) -> None:
        """One axis; raises `CannotUnify`, which blocks the whole op. Mind size-1 dims: they broadcast."""
        self.solver.unify(a, b)

    def join(self, uses: Iterable[tuple[int, int]]) -> Dim:
        """Unify dims `(operand, dim)`, leaving out those of size 1; what cannot be unified is blocked at each
        of them.

        The dim of the result: the common one, or a fresh axis that is whole as computed.
        """
        real = [(i, d % self.rank(i)) for i, d in uses if self.solver.size(self._dims[i][d]) != 1]
        if not real:
            return ()
        first = self._dims[real[0][0]][real[0][1]]
        mark = self.solver.mark()
        try:
            if any(use in self._blocked for use in real):
                raise CannotUnify("blocked at this op")
            for i, d in real[1:]:
                self.solver.unify(first, self._dims[i][d])
        except CannotUnify as error:
            self.solver.undo(mark)
            self.notes.append(str(error))
            for i, d in real:
                self.block(i, d)
            return self.whole(self.solver.size(first))
        return first

    def broadcast(self, operands: Sequence[int]) -> list[Dim]:
        """Join operands dim by dim, aligned at the last, as pointwise ops do; the result's dims."""
        rank = max((self.rank(i) for i in operands), default=0)
        return [
            self.join((i, self.rank(i) - k) for i in operands if self.rank(i) >= k)
            for k in range(rank, 0, -1)
        ]

    def block(self, i: int, d: int) -> Dim:
        """This op needs dim `d` of operand `i` whole: the operand's dim becomes a fresh frozen axis."""
        d %= self.rank(i)
        dim = self._dims[i][d]
        self._blocked.add((i, d))
        if not self.solver.is_frozen(dim):
            dim = self.solver.fresh(self.solver.size(dim), frozen=True)
            self._dims[i][d] = dim
        return dim

    def is_blocked(self, i: int, d: int) -> bool:
        """Whether this op needs dim `d` of operand `i` whole."""
        return (i, d % self.rank(i)) in self._blocked

    def consume_as(self, i: int, d: int, dim: Dim) -> None:
        """Operand `i` enters with this dim in place of its producer's (some atoms of it blocked, say)."""
        assert self.solver.size(dim) == self.solver.size(self._dims[i][d])
        self._dims[i][d] = dim

    def whole(self, size: int) -> Dim:
        """A fresh axis for a result's dim that the op computes whole (and that may be sliced for free after
        it).
        """
        dim = self.solver.fresh(size)
        self._whole_dims.update(dim)
        return dim

    # ---- statements

    def contract(self, dim: Dim) -> None:
        """The op sums over this axis: where it is sharded, the result is Partial."""
        self.contracted.append(dim)

    def averages(self) -> None:
        """What is contracted is averaged: a rank's result counts by its share of the elements."""
        self.is_mean = True

    def out(self, dims: Sequence[Dim], whole: Iterable[int] = ()) -> None:
        """The dims of the only result."""
        self.outs([dims], [(0, d) for d in whole])

    def outs(self, results: Sequence[Sequence[Dim]], whole: Iterable[tuple[int, int]] = ()) -> None:
        """The dims of each result; `whole` lists `(result, dim)` that are computed whole, on top of those of
        `whole()`.
        """
        shapes = self.out_shapes()
        sizes = [tuple(self.solver.size(d) for d in dims) for dims in results]
        if sizes != shapes:
            raise RuleError(f"{self.node.target}: its rule makes results of shapes {sizes}, the op {shapes}")
        self.results = tuple(tuple(dims) for dims in results)
        self.whole_results = {(k, d % max(len(results[k]), 1)) for k, d in whole}
        for k, dims in enumerate(results):
            self.whole_results |= {
                (k, d) for d, dim in enumerate(dims) if any(f in self._whole_dims for f in dim)
            }

    def linear(self, kind: LinearKind, of: Iterable[int] = ()) -> None:
        """How Partial operands pass, see `Linear`. `add` without `of` means every operand."""
        self.linearity = Linear(kind, frozenset(of))

    def added(self, *operands: int) -> None:
        """Operands that are added to the result of the contraction (a bias): only once, where the result is
        Partial.
        """
        self.added_operands = frozenset(operands)

    def random(self) -> None:
        """The op draws random numbers."""
        self.is_random = True

    def in_units(self, dim: Dim, unit: int) -> None:
        """A kernel takes no other local sizes of this dim than multiples of `unit` (if the whole is one)."""
        if unit > 1 and self.solver.size(dim) % unit == 0:
            self.units.append((dim, unit))

    def mutates(self, i: int) -> None:
        """The op writes into operand `i`, whose dims can therefore not be converted."""
        self.mutated = i

    def local(self, name: str, value: Callable[[LocalSize], Any]) -> None:
        """On a rank, schema argument `name` is `value(local_size)`, where `local_size(dim)` gives a dim's
        local size.
        """
        self._local[name] = value

    def localize(self, fn: Localize) -> None:
        """The op's whole args and kwargs on a rank; mostly `local`, one argument at a time, is simpler."""
        self._localize = fn

    # ---- for the analysis

    def operands(self) -> tuple[Operand, ...]:
        """The operands as the rule left them."""
        rows = zip(self._nodes, self._operand_paths, self._dims, self._operand_outputs, strict=True)
        return tuple(Operand(n, p, tuple(d), o) for n, p, d, o in rows)

    def localizer(self) -> Localize | None:
        """The function for `OpInfo.localize`. A result's dim that is whole as computed has its global size
        there.
        """
        localize = self._localize or (self._localize_named() if self._local else None)
        if localize is None:
            return None
        whole = frozenset(self._whole_dims)

        def with_whole(size: LocalSize) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return localize(lambda dim: self.solver.size(dim) if any(f in whole for f in dim) else size(dim))

        return with_whole

    def _localize_named(self) -> Localize:
        changes = {self.paths[name]: value for name, value in self._local.items()}
        names = [n for n, p in self.paths.items() if p[0] == "args"]
        node = self.node

        def localize(size: LocalSize) -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, kwargs = list(node.args), dict(node.kwargs)
            for path, value in changes.items():
                key = path[1]
                if path[0] == "kwargs":
                    kwargs[str(key)] = value(size)
                elif int(key) < len(args):
                    args[int(key)] = value(size)
                else:  # given neither by position nor by name: it had its default
                    kwargs[names[int(key)]] = value(size)
            return tuple(args), kwargs

        return localize


@functools.cache
def _arguments(target: Any) -> tuple[tuple[str, bool, Any, bool], ...]:
    """Of each argument of an op: name, whether only by keyword, default, whether it is a tensor (or a list of
    them).
    """
    return tuple(
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else None, "Tensor" in str(a.type))
        for a in target._schema.arguments
    )


def is_tensor_node(value: Any) -> bool:
    """Whether an argument is a node that makes a tensor (or several)."""
    if not isinstance(value, fx.Node):
        return False
    val = value.meta.get("val")
    return isinstance(val, torch.Tensor) or (
        isinstance(val, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in val)
    )


def output_shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """The shapes of what a node makes, one per output; an output that is no tensor counts as shape ()."""
    val = node.meta.get("val")
    values = val if isinstance(val, (list, tuple)) else [val]
    return [tuple(int(s) for s in v.shape) if isinstance(v, torch.Tensor) else () for v in values]
