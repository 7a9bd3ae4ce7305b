"""Proves a sharding rule against its real op: whole in one process, and on the shards of each axis alone.

For one sample (an op and real arguments in float64) the rule runs on a graph of that one op. Then, for each
axis that the rule lets be sharded, over 2 and 3 ranks with uneven shards:

* the operands are sliced as the rule says, the op runs on each rank with the local arguments, and the
  results are held against the slices of the whole result; where the axis is contracted, their sum is (what
  is `added` is zero on all ranks but one);
* the linear claim is tried with unequal addends, and an operand that the op is linear in, unclaimed, is
  reported too.

`signature` shows what a rule says as one line: letters are axes, ``*`` an axis that is blocked or whole,
``1`` a dim of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import autotp.axes.rules  # noqa: F401  (registers them)
from autotp.axes.rules.registry import OpContext, Rule, find_rule
from autotp.axes.term import Atom, Cat, Dim, Solver, size_of
from tests.axes.replay import Ranges, call_on_rank, even_ranges, local_indices, local_size, take


def real(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of float64."""
    generator = torch.Generator().manual_seed(seed + sum((k + 1) * s for k, s in enumerate(shape)))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def ints(high: int, *shape: int) -> torch.Tensor:
    """Random indices below `high`."""
    generator = torch.Generator().manual_seed(high + sum(shape))
    return torch.randint(0, high, shape, generator=generator)


def bools(*shape: int) -> torch.Tensor:
    """Random truth values."""
    return real(*shape) > 0


@dataclass(frozen=True)
class Sample:
    """One call of an op, and what its rule is expected to say about it."""

    target: str  # "linear", "max.dim"
    expected: str  # see `signature`; "" to leave it open
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    unclaimed: bool = False  # the op is linear in an operand without the rule saying so, for a reason
    rtol: float = 1e-9

    def __str__(self) -> str:
        return f"{self.target}: {self.expected}"

    @property
    def op(self) -> Any:
        name, _, overload = self.target.partition(".")
        return getattr(getattr(torch.ops.aten, name), overload or "default")


class OneOp:
    """The rule of one op, run on a graph of that op alone."""

    def __init__(self, sample: Sample, rule: Rule | None = None) -> None:
        self.sample = sample
        self.solver = Solver()
        graph = fx.Graph()
        self.values: dict[fx.Node, torch.Tensor] = {}

        def placeholder(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            node = graph.placeholder(f"t{len(self.values)}")
            node.meta["val"] = value
            self.values[node] = value
            return node

        args = fx.node.map_aggregate(sample.args, placeholder)
        kwargs = fx.node.map_aggregate(sample.kwargs, placeholder)
        self.node = graph.call_function(sample.op, args, kwargs)
        self.reference = self.run({n: v.clone() for n, v in self.values.items()})
        self.node.meta["val"] = self.reference
        dims = {
            n: tuple(self.solver.fresh(s) if s != 1 else () for s in v.shape) for n, v in self.values.items()
        }
        self.context = OpContext(self.node, self.solver, lambda node: (dims[node],))
        found = rule or find_rule(self.node.target)
        assert found is not None, f"{sample.target} has no rule"
        found(self.context)
        resolve = self.solver.resolve
        self.operands = [(o.node, tuple(map(resolve, o.dims))) for o in self.context.operands()]
        assert self.context.results is not None
        self.results = [tuple(map(resolve, dims)) for dims in self.context.results]
        self.contracted = [resolve(d) for d in self.context.contracted]

    def run(self, values: dict[fx.Node, torch.Tensor], args: Any = None, kwargs: Any = None) -> Any:
        """The op on other values of its operands."""
        args = self.node.args if args is None else args
        kwargs = self.node.kwargs if kwargs is None else kwargs
        torch.manual_seed(0)
        return self.node.target(
            *fx.node.map_arg(args, values.__getitem__), **fx.node.map_arg(kwargs, values.__getitem__)
        )

    def outputs(self, value: Any) -> list[Any]:
        """The results as a list."""
        return list(value) if isinstance(value, (tuple, list)) else [value]

    def axes(self) -> list[Atom]:
        """The axes that may be sharded, without those that the op makes."""
        every = [dims for _, dims in self.operands] + [tuple(d for d in ds) for ds in self.results]
        found = {a: None for dims in every for dim in dims for a in atoms(dim)}
        return [a for a in found if not self.solver.is_frozen((a,)) and not self._made_here(a)]

    def _made_here(self, atom: Atom) -> bool:
        """Whether the axis is only in dims that are whole as computed."""
        if any(atom in atoms(d) for _, dims in self.operands for d in dims) or any(
            atom in atoms(d) for d in self.contracted
        ):
            return False
        return all(
            (k, i) in self.context.whole_results
            for k, dims in enumerate(self.results)
            for i, dim in enumerate(dims)
            if atom in atoms(dim)
        )


def atoms(dim: Dim) -> Iterator[Atom]:
    for factor in dim:
        if isinstance(factor, Cat):
            for part in factor.parts:
                yield from atoms(part)
        else:
            yield factor


def signature(one: OneOp) -> str:
    """``abc, dc, d -> abd``; factors of a product stand in brackets, cuts are marked by ``|``."""
    letters: dict[Atom, str] = {}

    def letter(atom: Atom) -> str:
        if one.solver.is_frozen((atom,)):
            return "*"
        return letters.setdefault(atom, "abcdefghijklmnopqrstuvwxyz"[len(letters)])

    def show(dim: Dim) -> str:
        if not dim:
            return "1"
        text = ""
        for factor in dim:
            if isinstance(factor, Cat):
                text += "|".join(show(part) for part in factor.parts)
            else:
                text += letter(factor)
        return text if len(text) == 1 else f"({text})"

    consumed = {
        operand.path: dims for operand, (_, dims) in zip(one.context.operands(), one.operands, strict=True)
    }
    order = one.context.tensor_paths()
    left = ["".join(show(d) for d in consumed[path]) for path in order if path in consumed]
    right = [
        "".join("*" if (k, i) in one.context.whole_results and d else show(d) for i, d in enumerate(dims))
        for k, dims in enumerate(one.results)
    ]
    return ", ".join(left) + " -> " + ", ".join(right)


def problems(sample: Sample, rule: Rule | None = None) -> list[str]:
    """What is wrong with the rule, on this sample."""
    one = OneOp(sample, rule)
    found: list[str] = []
    for atom in one.axes():
        for tp in (2, 3):
            if atom.size >= tp:
                found += [f"axis of {atom.size} over {tp}: {p}" for p in _shard_problems(one, atom, tp)]
    if not one.context.is_random:
        found += _linear_problems(one)
    return found


def _close(a: Any, b: Any, rtol: float) -> bool:
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return False
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b.to(a.dtype), rtol=rtol, atol=rtol, equal_nan=True)


def _shard_problems(one: OneOp, atom: Atom, tp: int) -> list[str]:
    ranges: Ranges = {atom.id: even_ranges(atom.size, tp)}
    contracted = any(atom in atoms(dim) for dim in one.contracted)
    rule = one.context
    per_rank = []
    for rank in range(tp):
        values = {}
        for i, (node, dims) in enumerate(one.operands):
            value = take(one.values[node], dims, ranges, rank).clone()
            if contracted and i in rule.added_operands and rank:
                value = torch.zeros_like(value)
            values[node] = value
        args, kwargs = one.node.args, one.node.kwargs
        localize = rule.localizer()
        if localize is not None:
            args, kwargs = localize(lambda dim, r=rank: local_size(one.solver.resolve(dim), ranges, r))
        torch.manual_seed(0)
        try:
            layouts = [dims for _, dims in one.operands]
            whole = fx.node.map_arg(args, lambda n, own=values: own.get(n, one.values[n]))
            whole_kw = fx.node.map_arg(kwargs, lambda n, own=values: own.get(n, one.values[n]))
            result = call_on_rank(one.node.target, whole, whole_kw, layouts, ranges, rank)
        except (RuntimeError, IndexError, ValueError) as error:
            return [f"the op refuses its shard on rank {rank}: {str(error).splitlines()[0]}"]
        outputs = one.outputs(result)
        if rule.is_mean and contracted:
            share = math.prod(local_size(d, ranges, rank) / size_of(d) for d in one.contracted)
            outputs = [value * share for value in outputs]
        per_rank.append(outputs)
    found = []
    for k, reference in enumerate(one.outputs(one.reference)):
        if not isinstance(reference, torch.Tensor):
            continue
        dims = tuple(
            () if (k, i) in rule.whole_results else dim for i, dim in enumerate(one.results[k])
        )  # () : not sliced
        parts = [row[k] for row in per_rank]
        if contracted:
            expected = [reference]
            if any(p.shape != reference.shape for p in parts):
                found.append(
                    f"result {k}: a part of shape {tuple(parts[0].shape)} of a sum {tuple(reference.shape)}"
                )
                continue
            parts = [torch.stack(parts).sum(0).to(reference.dtype)]
        else:
            expected = [take(reference, dims, ranges, rank, keep_unit=False) for rank in range(tp)]
        for rank, (part, wanted) in enumerate(zip(parts, expected, strict=True)):
            if rule.is_random:
                if part.shape != wanted.shape:
                    found.append(
                        f"result {k} on rank {rank}: shape {tuple(part.shape)}, not {tuple(wanted.shape)}"
                    )
            elif not _close(part, wanted, one.sample.rtol):
                found.append(f"result {k} on rank {rank} is not the slice of the whole" if not contracted else
                             f"result {k}: the sum of the parts is not the whole")  # fmt: skip
    return found


def _linear_problems(one: OneOp) -> list[str]:
    rule = one.context
    kind, of = rule.linearity.kind, rule.linearity.of
    operands = [node for node, _ in one.operands]
    if kind == "add" and not of:
        of = frozenset(range(len(operands)))
    floating = [
        i for i, n in enumerate(operands) if one.values[n].is_floating_point() or one.values[n].is_complex()
    ]
    zeroed = set(rule.added_operands)

    def sums(partial: Sequence[int], masked: set[int]) -> bool:
        """Whether the op of two unequal addends of some operands, others masked on rank 1, adds up."""
        ranks = [], []
        for rank in (0, 1):
            values = {n: v.clone() for n, v in one.values.items()}
            for i in set(partial):
                part = one.values[operands[i]] * 0.3 + real(*one.values[operands[i]].shape, seed=i + 11) * 0.1
                part = part.to(one.values[operands[i]].dtype)
                values[operands[i]] = part if rank == 0 else one.values[operands[i]] - part
            for i in masked if rank else ():
                values[operands[i]] = torch.zeros_like(values[operands[i]])
            try:
                ranks[rank].extend(one.outputs(one.run(values)))
            except RuntimeError:
                return False
        whole = one.outputs(one.reference)
        return all(
            c.dtype != torch.bool and _close((a + b).to(c.dtype), c, one.sample.rtol)
            for a, b, c in zip(*ranks, whole, strict=True)
            if isinstance(c, torch.Tensor)
        )

    found = []
    if kind == "mul":
        for i in sorted(of):
            if i in floating and not sums([i], zeroed):
                found.append(f"said to be linear in operand {i}, and is not")
    if kind == "add":
        members = [i for i in sorted(of) if i in floating]
        if members and not sums(members, zeroed):
            found.append("said to be a sum of its operands, and is not")
        for i in members:
            if not sums([i], (set(of) - {i}) | zeroed):
                found.append(f"said to be a sum, and is not where operand {i} alone is Partial")
    if not one.sample.unclaimed:
        for i in floating:
            if i not in of and i not in zeroed and one.values[operands[i]].numel() and sums([i], zeroed):
                found.append(f"is linear in operand {i}, and the rule does not say so")
        if kind == "none" and len(floating) > 1 and sums(floating, set()):
            found.append("is a sum of its operands, and the rule does not say so")
    return found


def check(sample: Sample, rule: Rule | None = None) -> None:
    """The assertion of the tests."""
    found = problems(sample, rule)
    assert not found, f"{sample.target}:\n  " + "\n  ".join(found)
    if sample.expected:
        said = signature(OneOp(sample, rule))
        assert said == sample.expected, (
            f"{sample.target}: expected {sample.expected!r}, the rule says {said!r}"
        )


_Check = Callable[[Sample], None]
__all__ = [
    "OneOp",
    "Sample",
    "bools",
    "check",
    "ints",
    "local_indices",
    "problems",
    "real",
    "signature",
    "size_of",
]
