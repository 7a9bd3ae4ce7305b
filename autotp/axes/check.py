"""Is a sharding rule right? The op on the shards of each axis that its rule lets be sharded, against the whole op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import autotp.axes.rules  # noqa: F401  registers the rules
from autotp.axes.layout import Partition, local_size, slice_tensor
from autotp.axes.rules.context import OpContext
from autotp.axes.rules.custom import op_name, overloads
from autotp.axes.rules.registry import find_rule
from autotp.axes.term import Atom, CannotUnify, Dim, Solver, atoms_of, size_of, units_in
from autotp.errors import RuleError

#: How far a sum of parts may be from the whole, by dtype, on the scale of the largest element.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class RuleCheck:
    """What `check_rule` found right.

    Attributes:
        op: the overload.
        axes: each axis that the rule lets be sharded, named by where it stands first: ``"dim 1 of 'q' (6)"``.
        summed: those of them that the op sums over, so that its result is Partial.
        gradients: whether gradients were compared (the op has a backward, and some operand is differentiable).
    """

    op: str
    axes: tuple[str, ...]
    summed: tuple[str, ...]
    gradients: bool

    def __str__(self) -> str:
        words = [f"{axis}{' (summed)' if axis in self.summed else ''}" for axis in self.axes]
        backward = "values and gradients" if self.gradients else "values (it has no gradients)"
        return (
            f"{self.op}: sharded over {', '.join(words) or 'no axis'}, {backward} are those of the whole op"
        )


def check_rule(
    op: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    tp: Sequence[int] = (2, 3),
    rtol: float | None = None,
) -> RuleCheck:
    """Hold an op's sharding rule against the op: on the shards of every axis, over every degree of ``tp``.

    In one process: for each axis that the rule lets be sharded, each rank's call of the op is made in turn on that
    rank's slices, uneven ones too. The results have to be the slices of the whole op's result, or, where the axis is
    summed, to add up to it; and likewise the gradients of the operands. What the rule says of linearity is tried on
    unequal addends.

    Args:
        op: as for `register_rule`; an op of several overloads by ``"namespace::name.overload"``.
        args, kwargs: example arguments: real tensors, best of float64, of sizes that differ from one another and
            that ``tp`` does not divide.
        tp: the degrees; an axis is tried at those that it has enough elements for.
        rtol: tolerance on the scale of a tensor's largest element (by default from its dtype).

    Raises:
        RuleError: the op has no rule, or what differs: which axis, over how many ranks, which result or gradient.
    """
    case = _Case(_overload(op), tuple(args), dict(kwargs or {}), rtol)
    axes = case.axes()
    for atom in axes:
        for degree in tp:
            if atom.size >= degree * case.unit(atom) and atom.size % case.unit(atom) == 0:
                case.check_axis(atom, degree)
    case.check_linear()
    names = tuple(case.name(atom) for atom in axes)
    summed = tuple(case.name(atom) for atom in axes if case.sums(atom))
    return RuleCheck(case.shown, names, summed, case.has_gradients)


def _overload(op: Any) -> Any:
    name = op_name(op)
    found = overloads(name.replace(".", "::", 1))
    if len(found) > 1:
        names = [str(o).replace(".", "::", 1) for o in found]
        raise RuleError(
            f"check_rule: {name.replace('.', '::', 1)} has several overloads, name one of {names}"
        )
    return found[0]


@dataclass
class _Case:
    """One call of an op, what its rule says about it, and what the whole op returns."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rtol: float | None
    values: dict[fx.Node, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.solver = Solver()
        graph = fx.Graph()

        def placeholder(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            node = graph.placeholder(f"t{len(self.values)}")
            node.meta["val"] = value.detach()
            self.values[node] = value.detach()
            return node

        args = fx.node.map_aggregate(self.args, placeholder)
        kwargs = fx.node.map_aggregate(self.kwargs, placeholder)
        self.node = graph.call_function(self.target, args, kwargs)
        self.whole = self.run(self.values, self.node.args, self.node.kwargs)
        self.node.meta["val"] = self.whole.raw
        self.rule = self._asked()
        resolve = self.solver.resolve
        self.operands = [(o.node, tuple(map(resolve, o.dims))) for o in self.rule.operands()]
        self.results = [tuple(map(resolve, dims)) for dims in self.rule.results or ()]
        if self.whole.raw is None:
            self.results = []
        self.results += [dict(self.operands)[node] for node in self.written()]
        self.contracted = [resolve(dim) for dim in self.rule.contracted]

    @property
    def has_gradients(self) -> bool:
        return bool(self.whole.gradients)

    def _asked(self) -> OpContext:
        """The rule's answer for this call."""
        rule = find_rule(self.target)
        if rule is None:
            raise RuleError(
                f"check_rule: {self.shown} has no sharding rule; register one with autotp.register_rule"
            )
        dims = {node: tuple(self.solver.fresh(n) for n in value.shape) for node, value in self.values.items()}
        context = OpContext(self.node, self.solver, lambda node: (dims[node],))
        try:
            rule(context)
        except CannotUnify as error:
            raise self.wrong(f"it does not fit these arguments: {error}") from error
        if context.results is None:
            raise self.wrong("it does not say what the results are")
        return context

    @property
    def shown(self) -> str:
        return str(self.target).replace(".", "::", 1)

    def wrong(self, text: str) -> RuleError:
        return RuleError(f"the sharding rule of {self.shown} is wrong: {text}")

    # ---- axes

    def axes(self) -> tuple[Atom, ...]:
        """The axes of the operands that may be sharded."""
        found: dict[Atom, None] = {}
        for _, dims in self.operands:
            found.update(dict.fromkeys(atoms_in(dims)))
        return tuple(a for a in found if not self.solver.is_frozen((a,)))

    def unit(self, atom: Atom) -> int:
        """The elements that a rank gets some of, as the kernel wants."""
        found = [
            n
            for dim, unit in self.rule.units
            for a, n in units_in(self.solver.resolve(dim), unit)
            if a is atom
        ]
        return math.lcm(*found)

    def sums(self, atom: Atom) -> bool:
        return atom in set(atoms_in(self.contracted))

    def name(self, atom: Atom) -> str:
        for operand, (_, dims) in zip(self.rule.operands(), self.operands, strict=True):
            for d, dim in enumerate(dims):
                if atom in set(atoms_in([dim])):
                    return f"dim {d} of {self.argument(operand.path)} ({atom.size})"
        raise AssertionError(f"{atom} is on no operand")

    def argument(self, path: tuple[str | int, ...]) -> str:
        name = next((n for n, p in self.rule.paths.items() if p == path[:2]), str(path[1]))
        return repr(name) + "".join(f"[{k}]" for k in path[2:])

    def written(self) -> list[fx.Node]:
        """The operands that the op writes into."""
        found = []
        for k, a in enumerate(self.target._schema.arguments):
            value = self.node.args[k] if k < len(self.node.args) else self.node.kwargs.get(a.name)
            if a.alias_info is not None and a.alias_info.is_write and isinstance(value, fx.Node):
                found.append(value)
        return found

    # ---- running

    def run(
        self,
        values: Mapping[fx.Node, Tensor],
        args: Any,
        kwargs: Any,
        upstream: Callable[[list[Any]], list[Tensor | None]] | None = None,
        share: float = 1.0,
    ) -> _Run:
        """The op on other values of its operands, forward and backward.

        Args:
            upstream: the gradients of the results (by default random ones, which depend on their shapes alone).
            share: what the results, local means, count.
        """
        leaves = {
            node: value.clone().requires_grad_(value.is_floating_point() or value.is_complex())
            for node, value in values.items()
        }
        written = self.written()
        given = {node: leaf.clone() if written else leaf for node, leaf in leaves.items()}
        torch.manual_seed(0)
        raw = self.target(
            *fx.node.map_arg(args, given.__getitem__), **fx.node.map_arg(kwargs, given.__getitem__)
        )
        outputs = list(raw) if isinstance(raw, (tuple, list)) else [] if raw is None else [raw]
        if share != 1.0:
            outputs = [o * share for o in outputs]
        outputs += [given[node] for node in written]  # what it wrote is a result too
        grads = (upstream or _random_like)(outputs)
        pairs = [
            (o, g)
            for o, g in zip(outputs, grads, strict=True)
            if g is not None and o.requires_grad and o.grad_fn is not None
        ]
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        found: dict[fx.Node, Tensor] = {}
        if pairs and wanted:
            try:
                made = torch.autograd.grad(
                    [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
                )
            except (RuntimeError, NotImplementedError) as error:
                if not _no_backward(error):
                    raise
                made = ()
            names = [node for node, leaf in leaves.items() if leaf.requires_grad]
            found = {node: grad for node, grad in zip(names, made, strict=False) if grad is not None}
        detached = [o.detach() if isinstance(o, Tensor) else o for o in outputs]
        return _Run(_detached(raw), detached, grads, found)

    # ---- one axis

    def check_axis(self, atom: Atom, tp: int) -> None:
        """Every rank's part of the op against the whole.

        Raises:
            RuleError: what differs.
        """
        unit = self.unit(atom)
        base, extra = divmod(atom.size // unit, tp)
        bounds = [unit * (r * base + min(r, extra)) for r in range(tp + 1)]
        partition = Partition({atom.id: tuple(zip(bounds, bounds[1:], strict=False))})
        summed = self.sums(atom)
        where = f"over {self.name(atom)}, {tp} ranks"
        ranks = [self._rank(partition, rank, summed, where) for rank in range(tp)]
        for k, whole in enumerate(self.whole.outputs):
            if isinstance(whole, Tensor):
                self._check_result(k, whole, [run.outputs[k] for run in ranks], partition, summed, where)
        if self.rule.is_random:
            return
        for i, (node, dims) in enumerate(self.operands):
            gradient = self.whole.gradients.get(node)
            if gradient is not None and sum(n is node for n, _ in self.operands) == 1:
                own = [run.gradients.get(node) for run in ranks]
                self._check_gradient(i, gradient, own, dims, atom, partition, summed, where)

    def _rank(self, partition: Partition, rank: int, summed: bool, where: str) -> _Run:
        values = dict(self.values)
        for i, (node, dims) in enumerate(self.operands):
            value = slice_tensor(self.values[node], dims, partition, rank)
            values[node] = (
                torch.zeros_like(value) if summed and rank and i in self.rule.added_operands else value
            )
        args, kwargs = self.node.args, self.node.kwargs
        localize = self.rule.localizer()
        if localize is not None:
            args, kwargs = localize(lambda dim: local_size(self.solver.resolve(dim), partition, rank))

        share = 1.0
        if summed and self.rule.is_mean:
            share = math.prod(local_size(dim, partition, rank) / size_of(dim) for dim in self.contracted)

        def upstream(outputs: list[Any]) -> list[Tensor | None]:
            return [
                None if g is None or not isinstance(o, Tensor) else self._slice(k, g, partition, rank, summed)
                for k, (o, g) in enumerate(zip(outputs, self.whole.upstream, strict=True))
            ]

        try:
            run = self.run(values, args, kwargs, upstream, share)
        except Exception as error:  # whatever an op of somebody else raises on a shard is the answer
            text = " ".join(str(error).split())[:300]
            raise self.wrong(f"{where}: rank {rank}'s call fails ({type(error).__name__}: {text})") from error
        return run

    def _slice(self, k: int, value: Tensor, partition: Partition, rank: int, summed: bool) -> Tensor:
        """The part of result ``k`` that a rank makes: all of a dim that is whole as computed, or of a sum."""
        if summed:
            return value
        dims = [
            self.solver.fresh(n) if (k, d) in self.rule.whole_results else dim
            for d, (dim, n) in enumerate(zip(self.results[k], value.shape, strict=True))
        ]
        return slice_tensor(value, dims, partition, rank)

    def _check_result(
        self, k: int, whole: Tensor, parts: list[Tensor], partition: Partition, summed: bool, where: str
    ) -> None:
        for rank, part in enumerate(parts):
            expected = self._slice(k, whole, partition, rank, summed)
            if part.shape != expected.shape:
                raise self.wrong(
                    f"{where}: result {k} of rank {rank} has shape {list(part.shape)}, by the rule "
                    f"{list(expected.shape)}"
                )
            if not summed and not self.rule.is_random:
                self._close(
                    f"{where}: result {k} of rank {rank} is not the slice of the whole result", part, expected
                )
        if summed and not self.rule.is_random:
            self._close(
                f"{where}: the results {k} of the ranks do not add up to the whole result", _sum(parts), whole
            )

    def _check_gradient(
        self,
        i: int,
        whole: Tensor,
        parts: list[Tensor | None],
        dims: tuple[Dim, ...],
        atom: Atom,
        partition: Partition,
        summed: bool,
        where: str,
    ) -> None:
        """A slice's gradient is the slice of the gradient; of an operand that all have, their sum."""
        name = self.argument(self.rule.operands()[i].path)
        own = [
            torch.zeros_like(slice_tensor(whole, dims, partition, r)) if p is None else p
            for r, p in enumerate(parts)
        ]
        if atom in set(atoms_in(dims)):
            for rank, part in enumerate(own):
                expected = slice_tensor(whole, dims, partition, rank)
                self._close(
                    f"{where}: the gradient of {name} on rank {rank} is not the slice of the whole one",
                    part,
                    expected,
                )
        elif summed and i in self.rule.added_operands:
            self._close(f"{where}: the gradient of {name} is not that of the whole op", own[0], whole)
        else:
            self._close(
                f"{where}: the gradients of {name} on the ranks do not add up to the whole one",
                _sum(own),
                whole,
            )

    def _close(self, what: str, mine: Tensor, theirs: Tensor) -> None:
        if mine.dtype != theirs.dtype:
            raise self.wrong(f"{what}: {mine.dtype}, not {theirs.dtype}")
        if not theirs.numel() or torch.equal(mine, theirs):
            return
        if not (theirs.is_floating_point() or theirs.is_complex()):
            raise self.wrong(f"{what}: {int((mine != theirs).sum())} of {theirs.numel()} elements differ")
        error, scale = float((mine - theirs).abs().max()), float(theirs.abs().max())
        rtol = self.rtol if self.rtol is not None else TOLERANCE.get(theirs.dtype, 1e-4)
        if not error <= rtol * max(scale, 1e-30):
            raise self.wrong(f"{what}: off by {error:.3g}, its largest element is {scale:.3g}")

    # ---- linearity

    def check_linear(self) -> None:
        """Two unequal addends of what the op is said to be linear in.

        Raises:
            RuleError: their results do not add up.
        """
        if self.rule.is_random:
            return
        kind, of = self.rule.linearity.kind, self.rule.linearity.of
        members = sorted(of or range(len(self.operands)))
        if kind == "mul":
            for i in members:
                self._check_addends([i], f"linear in {self.argument(self.rule.operands()[i].path)}")
        elif kind == "add":
            self._check_addends(members, "a sum of its operands")

    def _check_addends(self, members: Sequence[int], claim: str) -> None:
        parts: list[list[Any]] = []
        generator = torch.Generator().manual_seed(1)
        share = {
            i: torch.rand(self.values[self.operands[i][0]].shape, generator=generator, dtype=torch.float64)
            for i in members
        }
        for rank in (0, 1):
            values = dict(self.values)
            for i in members:
                node = self.operands[i][0]
                weight = (share[i] if rank == 0 else 1 - share[i]).to(values[node])
                values[node] = self.values[node] * weight
            for i in self.rule.added_operands:
                if rank and i not in members:
                    values[self.operands[i][0]] = torch.zeros_like(self.values[self.operands[i][0]])
            parts.append(self.run(values, self.node.args, self.node.kwargs).outputs)
        for k, whole in enumerate(self.whole.outputs):
            if isinstance(whole, Tensor):
                self._close(
                    f"it says that the op is {claim}, and result {k} is not",
                    _sum([p[k] for p in parts]),
                    whole,
                )


@dataclass(frozen=True)
class _Run:
    """One call: what it returned (as it is, and as a list), the gradients given to it and those that it gave."""

    raw: Any
    outputs: list[Any]
    upstream: list[Tensor | None]
    gradients: dict[fx.Node, Tensor]


def _random_like(outputs: list[Any]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    found: list[Tensor | None] = []
    for output in outputs:
        floating = isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex())
        draw = (
            torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            if floating
            else None
        )
        found.append(draw)
    return found


def _detached(raw: Any) -> Any:
    if isinstance(raw, (tuple, list)):
        return [item.detach() if isinstance(item, Tensor) else item for item in raw]
    return raw.detach() if isinstance(raw, Tensor) else raw


def _no_backward(error: Exception) -> bool:
    """Whether this says that the op has no backward, and not that its backward failed."""
    text = str(error)
    return (
        "no autograd formula was registered" in text
        or "is not implemented" in text
        or (isinstance(error, NotImplementedError) and "Could not run" in text and "backward" in text)
        or "does not require grad" in text
    )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0).to(parts[0].dtype)


def atoms_in(dims: Sequence[Dim]) -> Iterator[Atom]:
    """Every atom of these dims."""
    for dim in dims:
        yield from atoms_of(dim)
