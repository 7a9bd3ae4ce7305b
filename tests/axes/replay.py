"""The soundness replay: a whole captured graph on p simulated ranks in one process, every node against the
reference.

The graph runs once whole, with random weights in float64, and once on each rank: parameters sliced by their
dims, ops called with the local arguments of their rules, operands gathered or sliced where an op consumes
other dims than its producer has. Then every value of every rank is held against its slice of the reference.
So a wrong rule, or a wrong term, shows at the first node that it spoils.

Partial values are summed right where they arise (``communication=None``), or at the reduce points of a
plan, with the
operands masked that the plan says.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import fx

from autotp.axes.analysis import Analysis, Operand, OpInfo, aliased_args
from autotp.axes.term import Atom, Cat, Dim, size_of

Ranges: TypeAlias = Mapping[int, Sequence[tuple[int, int]]]  # atom id → (start, stop) of each rank
UNEVEN = {  # where local pieces differ, a rank calls the op that takes a list in place of a count
    torch.ops.aten.chunk.default: torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.split.Tensor: torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.tensor_split.sections: torch.ops.aten.tensor_split.indices,
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ReplayError(AssertionError):
    """A value on a rank is not the slice of the reference."""


class Communication(Protocol):
    """What the replay needs to know of a plan (`autotp.plan.reductions.Communication`)."""

    @property
    def reduce(self) -> frozenset[fx.Node]: ...
    @property
    def masked(self) -> Iterable[Any]: ...


# ---- slices


def even_ranges(size: int, tp: int) -> tuple[tuple[int, int], ...]:
    """Ranges of an axis over the ranks, the first ones one longer where it does not divide."""
    ends = [0]
    for rank in range(tp):
        ends.append(ends[-1] + size // tp + (rank < size % tp))
    return tuple(zip(ends, ends[1:], strict=False))


def local_indices(dim: Dim, ranges: Ranges, rank: int) -> torch.Tensor:
    """The positions of a dim that a rank holds, in its order."""
    held = torch.zeros(1, dtype=torch.long)
    for factor in dim:
        if isinstance(factor, Cat):
            offset, parts = 0, []
            for part in factor.parts:
                parts.append(local_indices(part, ranges, rank) + offset)
                offset += size_of(part)
            own = torch.cat(parts)
        else:
            start, stop = ranges[factor.id][rank] if factor.id in ranges else (0, factor.size)
            own = torch.arange(start, stop)
        held = (held[:, None] * factor.size + own[None, :]).flatten()
    return held


def local_size(dim: Dim, ranges: Ranges, rank: int) -> int:
    """How many of a dim's elements a rank holds."""
    return len(local_indices(dim, ranges, rank))


def is_sharded(dim: Dim, ranges: Ranges) -> bool:
    """Whether an axis of the dim is sharded."""
    return any(
        any(is_sharded(part, ranges) for part in f.parts) if isinstance(f, Cat) else f.id in ranges
        for f in dim
    )


def take(
    value: torch.Tensor, dims: Sequence[Dim], ranges: Ranges, rank: int, keep_unit: bool = True
) -> torch.Tensor:
    """A rank's slice of a whole tensor; dims ``()`` stay as they are."""
    for d, dim in enumerate(dims):
        if is_sharded(dim, ranges):
            value = value.index_select(d, local_indices(dim, ranges, rank))
    return value


def merge(parts: Sequence[torch.Tensor], dims: Sequence[Dim], ranges: Ranges) -> torch.Tensor:
    """The whole tensor from the slices of all ranks."""
    whole = parts[0].new_zeros([size_of(dim) if is_sharded(dim, ranges) else n
                                for dim, n in zip(dims, parts[0].shape, strict=True)])  # fmt: skip
    for rank, part in enumerate(parts):
        index = torch.meshgrid(
            *(local_indices(dim, ranges, rank) if is_sharded(dim, ranges) else torch.arange(n)
              for dim, n in zip(dims, whole.shape, strict=True)), indexing="ij",
        ) if dims else ()  # fmt: skip
        whole[index] = part
    return whole


def owned(dims: Sequence[Dim], ranges: Ranges, rank: int) -> torch.Tensor:
    """Which of a rank's elements (over some dims together) are to count on it: those that no earlier rank
    holds.
    """
    mine = [local_indices(dim, ranges, rank) for dim in dims]
    free = torch.ones([len(index) for index in mine], dtype=torch.bool)
    for earlier in range(rank):
        held = torch.ones_like(free)
        for d, (dim, index) in enumerate(zip(dims, mine, strict=True)):
            shape = [-1 if e == d else 1 for e in range(len(dims))]
            held &= torch.isin(index, local_indices(dim, ranges, earlier)).view(shape)
        free &= ~held
    return free


# ---- one op on one rank


def call_on_rank(
    target: Any, args: Any, kwargs: Any, layouts: Sequence[tuple[Dim, ...]], ranges: Ranges, rank: int
) -> Any:
    """The op on local operands. A lookup in some rows of an embedding shifts its indices, and masks the
    others.
    """
    if target is torch.ops.aten.embedding.default and is_sharded(layouts[0][0], ranges):
        held = local_indices(layouts[0][0], ranges, rank)
        position = torch.full((size_of(layouts[0][0]),), -1).index_put((held,), torch.arange(len(held)))
        local = position[args[1]]
        found = torch.nn.functional.embedding(local.clamp(min=0), args[0]) if len(held) else None
        if found is None:
            return args[0].new_zeros(*local.shape, args[0].shape[1])
        return found * (local >= 0)[..., None]
    if target in UNEVEN and len(args) > 1 and isinstance(args[1], (list, tuple)):
        target, args = UNEVEN[target], [args[0], list(args[1]), *args[2:]]
    # the source's `contiguous()` did nothing in the trace, but may on a rank
    target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
    if target is operator.getitem:  # the operand is already the output that it reads
        return args[0]
    return _filled(target, target(*args, **kwargs))


def mask_contraction(values: list[Any], info: OpInfo, ranges: Ranges, rank: int) -> list[Any]:
    """Over ``(A | B)`` with only A sharded, B would be summed by every rank: zeros on all but the first that
    holds it.
    """
    values = list(values)
    summed = [dim for dim in info.contracted if is_sharded(dim, ranges)]
    mine = owned(summed, ranges, rank)
    if not summed or bool(mine.all()):
        return values
    for i, operand in enumerate(info.operands):
        at = [next((d for d, own in enumerate(operand.dims) if own == dim), None) for dim in summed]
        if None in at:
            continue
        places = [d for d in at if d is not None]
        mask = mine.permute(sorted(range(len(places)), key=places.__getitem__))
        shape = [values[i].shape[d] if d in places else 1 for d in range(values[i].dim())]
        values[i] = values[i] * mask.reshape(shape)
        return values
    raise ReplayError(f"no operand holds the contracted dims {summed}")


# ---- the graph


@dataclass
class Replay:
    """The reference values of a graph, ready to be compared with any sharding of it."""

    analysis: Analysis
    reference: dict[fx.Node, Any]
    seed: int = 0

    @classmethod
    def of(
        cls,
        analysis: Analysis,
        inputs: Mapping[fx.Node, torch.Tensor],
        params: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
    ) -> Replay:
        """Run the graph whole, with these inputs and with random parameters where none are given."""
        replay = cls(analysis, {}, seed)
        given = {
            node: (params or {})[name]
            for name, node in analysis.trace.params.items()
            if name in (params or {})
        }
        given.update(inputs)
        generator = torch.Generator().manual_seed(seed)
        for node in analysis.trace.graph.nodes:
            replay.reference[node] = replay._source(node, given, generator)
        # a second walk, because ops in place change values that were stored
        values: dict[fx.Node, Any] = {}
        for node in analysis.trace.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                values[node] = _copy(replay.reference[node])
            elif node.op == "call_function":
                args, kwargs = _widen(fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
                if replay.analysis.ops[node].random:
                    torch.manual_seed(seed)
                values[node] = _filled(node.target, node.target(*args, **kwargs))
                replay.reference[node] = _copy(values[node])
        return replay

    def _source(
        self, node: fx.Node, given: Mapping[fx.Node, torch.Tensor], generator: torch.Generator
    ) -> Any:
        val = node.meta.get("val")
        if node.op == "get_attr":
            value: Any = self.analysis.trace.graph.owning_module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return _widen_value(value)
        if node.op != "placeholder":
            return None
        if node in given:
            return _widen_value(given[node])
        if not isinstance(val, torch.Tensor):
            return val
        if val.is_floating_point():
            scale = 1 / math.sqrt(val.shape[-1]) if val.dim() > 1 else 0.5
            return torch.randn(val.shape, generator=generator, dtype=torch.float64) * scale + (val.dim() == 1)
        return torch.zeros(val.shape, dtype=val.dtype)

    def check(
        self, ranges: Ranges, tp: int, communication: Communication | None = None, rtol: float = 1e-9
    ) -> int:  # fmt: skip
        """Run on `tp` ranks and compare every node; how many values were compared. Raises `ReplayError`."""
        run = _Run(self, ranges, tp, communication, rtol)
        for node in self.analysis.trace.graph.nodes:
            run.step(node)
        return run.compared


class _Run:
    def __init__(
        self, replay: Replay, ranges: Ranges, tp: int, communication: Communication | None, rtol: float
    ) -> None:
        self.replay = replay
        self.analysis = replay.analysis
        self.ranges = ranges
        self.tp = tp
        self.communication = communication
        self.masked = {(e.consumer, e.operand) for e in communication.masked} if communication else set()
        self.rtol = rtol
        self.values: dict[fx.Node, list[Any]] = {}
        self.partial: set[fx.Node] = set()
        self.compared = 0
        self.written = written_nodes(self.analysis)

    def step(self, node: fx.Node) -> None:
        reference = self.replay.reference.get(node)
        # what no sharded axis touches is as in the reference (but somebody may write into it later)
        if node.op != "output" and node not in self.written and not self.touched(node):
            self.values[node] = [reference] * self.tp
            return
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = [
                _map_outputs(
                    reference,
                    self.analysis.dims[node],
                    lambda t, dims, r=rank: take(t, dims, self.ranges, r).clone(),
                )
                for rank in range(self.tp)
            ]
        elif node.op == "call_function":
            self.call(node)
        else:
            return
        self.compare(node)

    def touched(self, node: fx.Node) -> bool:
        """Whether a sharded axis, or a Partial operand, has anything to do with the node."""
        dims = [dim for outputs in self.analysis.dims[node] for dim in outputs]
        info = self.analysis.ops.get(node)
        if info is not None:
            dims += info.contracted
            for operand in info.operands:
                dims += [*operand.dims, *self.analysis.dims[operand.node][operand.output]]
                if operand.node in self.partial:
                    return True
        return any(is_sharded(dim, self.ranges) for dim in dims)

    def call(self, node: fx.Node) -> None:
        info = self.analysis.ops[node]
        eager = self.communication is None
        contracts = any(is_sharded(dim, self.ranges) for dim in info.contracted)
        converted = [self.convert(operand) for operand in info.operands]
        incoming = [operand.node in self.partial for operand in info.operands]
        partial = contracts or any(incoming)
        if any(incoming) and not eager:
            self.check_linear(node, info, incoming, contracts)
        lookup = node.target is torch.ops.aten.embedding.default
        outputs = []
        if info.random:
            outputs = [_copy(self.replay.reference[node]) for _ in range(self.tp)]
            outputs = [
                _map_outputs(o, self.layout(info), lambda t, dims, r=rank: take(t, dims, self.ranges, r))
                for rank, o in enumerate(outputs)
            ]
            assert not partial, "a random op of a Partial operand cannot be replayed"
        for rank in range(self.tp) if not info.random else ():
            values = [per_rank[rank] for per_rank in converted]
            if not lookup:
                values = mask_contraction(values, info, self.ranges, rank)
            for i in range(len(values)):
                first_only = (
                    (contracts or any(incoming)) and i in info.added if eager else (node, i) in self.masked
                )
                if first_only and rank:
                    values[i] = torch.zeros_like(values[i])
            args, kwargs = node.args, node.kwargs
            if info.localize is not None:
                args, kwargs = info.localize(lambda dim, r=rank: local_size(dim, self.ranges, r))
            by_path = {o.path: v for o, v in zip(info.operands, values, strict=True)}
            outer = {n: self.values[n][rank] for n in node.all_input_nodes}
            args = _fill(args, ("args",), by_path, outer)
            kwargs = _fill(kwargs, ("kwargs",), by_path, outer)
            args, kwargs = _widen((args, kwargs))
            try:
                layouts = [o.dims for o in info.operands]
                output = call_on_rank(node.target, args, kwargs, layouts, self.ranges, rank)
                if info.averaged and contracts:
                    held = (local_size(d, self.ranges, rank) / size_of(d) for d in info.contracted)
                    output = output * math.prod(held)
                outputs.append(output)
            except (RuntimeError, IndexError, ValueError) as error:
                raise ReplayError(f"{self.name(node)} on rank {rank}: {error}") from error
        if partial:
            if eager or node in self.communication.reduce:  # type: ignore[union-attr]
                outputs = self.summed(outputs)
            else:
                self.partial.add(node)
        # a dim that the op computes whole is sliced for free where its axis is sharded
        for k, d in sorted(info.whole_out):
            dim = info.out[k][d]
            if is_sharded(dim, self.ranges):
                only = tuple(dim if e == d else () for e in range(len(info.out[k])))
                for rank in range(self.tp):
                    outputs[rank] = _replace(
                        outputs[rank], k, take(_nth(outputs[rank], k), only, self.ranges, rank)
                    )
        self.values[node] = outputs

    def layout(self, info: OpInfo) -> tuple[tuple[Dim, ...], ...]:
        return tuple(
            tuple(() if (k, d) in info.whole_out else dim for d, dim in enumerate(dims))
            for k, dims in enumerate(info.out)
        )

    def check_linear(self, node: fx.Node, info: OpInfo, incoming: list[bool], contracts: bool) -> None:
        partial = {i for i, p in enumerate(incoming) if p}
        kind, of = info.linear.kind, info.linear.of
        if not partial <= of or kind == "none" or (kind == "mul" and (len(partial) > 1 or contracts)):
            raise ReplayError(
                f"{self.name(node)}: operands {sorted(partial)} arrive Partial, and it is not linear in them"
            )

    def convert(self, operand: Operand) -> list[Any]:
        """The operand on each rank with the dims as consumed."""
        have = self.analysis.dims[operand.node][operand.output]
        parts = [_nth(value, operand.output) for value in self.values[operand.node]]
        if not isinstance(parts[0], torch.Tensor):
            return parts
        differs = [
            own != wanted
            and (is_sharded(own, self.ranges) or is_sharded(wanted, self.ranges))
            and any(
                not torch.equal(local_indices(own, self.ranges, r), local_indices(wanted, self.ranges, r))
                for r in range(self.tp)
            )
            for own, wanted in zip(have, operand.dims, strict=True)
        ]
        if any(is_sharded(own, self.ranges) for own, other in zip(have, differs, strict=True) if other):
            whole = merge(parts, have, self.ranges)
            return [take(whole, operand.dims, self.ranges, rank) for rank in range(self.tp)]
        wanted = tuple(dim if other else () for dim, other in zip(operand.dims, differs, strict=True))
        return [take(part, wanted, self.ranges, rank) for rank, part in enumerate(parts)]

    def summed(self, outputs: list[Any]) -> list[Any]:
        if not isinstance(outputs[0], torch.Tensor):
            return [tuple(self.summed(list(column))[0] for column in zip(*outputs, strict=True))] * self.tp
        total = torch.stack(list(outputs)).sum(0).to(outputs[0].dtype)
        return [total.clone() for _ in outputs]

    def compare(self, node: fx.Node) -> None:
        dims = self.analysis.dims[node]
        reference = self.replay.reference[node]
        for k in range(len(dims)):
            whole = _nth(reference, k)
            if not isinstance(whole, torch.Tensor):
                continue
            parts = [_nth(value, k) for value in self.values[node]]
            if node in self.partial:
                if any(p.shape != whole.shape for p in parts):
                    raise ReplayError(
                        f"{self.name(node)}: Partial, and {tuple(parts[0].shape)} not {tuple(whole.shape)}"
                    )
                parts = [torch.stack(parts).sum(0)] * self.tp
            for rank, part in enumerate(parts):
                wanted = take(whole, dims[k], self.ranges, rank)
                self.compared += 1
                if part.shape != wanted.shape:
                    raise ReplayError(
                        f"{self.name(node)} on rank {rank}: {tuple(part.shape)}, not {tuple(wanted.shape)}"
                    )
                if not torch.allclose(
                    part.to(wanted.dtype), wanted, rtol=self.rtol, atol=self.rtol, equal_nan=True
                ):
                    off = (part.to(wanted.dtype) - wanted).abs().max() if wanted.dtype != torch.bool else "?"
                    raise ReplayError(f"{self.name(node)} on rank {rank}: off by {off}")

    def name(self, node: fx.Node) -> str:
        return f"{node.name} = {node.target} ({self.analysis.trace.where(node)})"


def written_nodes(analysis: Analysis) -> set[fx.Node]:
    """Everything that shares memory with something that an op writes into."""
    group: dict[fx.Node, set[fx.Node]] = {}
    written: list[fx.Node] = []
    for node in analysis.ops:
        for base, writes in aliased_args(node):
            both = group.get(node, {node}) | group.get(base, {base})
            group.update(dict.fromkeys(both, both))
            written += [base] if writes else []
    return {node for base in written for node in group[base]}


def _filled(target: Any, value: Any) -> Any:
    """What an ``empty`` makes is filled, so that it can be compared."""
    return value.zero_() if "empty" in str(target) else value


def _nth(value: Any, k: int) -> Any:
    return value[k] if isinstance(value, (tuple, list)) else value


def _replace(value: Any, k: int, item: Any) -> Any:
    return (
        type(value)(item if j == k else v for j, v in enumerate(value))
        if isinstance(value, (tuple, list))
        else item
    )


def _copy(value: Any) -> Any:
    return fx.node.map_aggregate(value, lambda v: v.clone() if isinstance(v, torch.Tensor) else v)


def _map_outputs(value: Any, dims: Sequence[tuple[Dim, ...]], fn: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [fn(v, dims[k]) if isinstance(v, torch.Tensor) else v for k, v in enumerate(value)]
    return fn(value, dims[0]) if isinstance(value, torch.Tensor) else value


def _fill(
    value: Any, path: tuple[Any, ...], operands: Mapping[Any, Any], outer: Mapping[fx.Node, Any]
) -> Any:
    """Arguments with the operands in their places; a tensor that the rule did not mention is as its producer
    has it.
    """
    if path in operands:
        return operands[path]
    if isinstance(value, fx.Node):
        return outer[value]
    if isinstance(value, (list, tuple)):
        return type(value)([_fill(v, (*path, k), operands, outer) for k, v in enumerate(value)])
    if isinstance(value, dict):
        return {k: _fill(v, (*path, k), operands, outer) for k, v in value.items()}
    return value


def _widen_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in FLOATS:
        return value.detach().to(torch.float64)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _widen(tree: Any) -> Any:
    """Low-precision dtypes among the arguments become float64."""
    if isinstance(tree, (list, tuple)):
        return type(tree)([_widen(v) for v in tree])
    if isinstance(tree, dict):
        return {k: _widen(v) for k, v in tree.items()}
    return torch.float64 if isinstance(tree, torch.dtype) and tree in FLOATS else tree


def atoms_in(dims: Iterable[Dim]) -> list[Atom]:
    """The atoms of some dims, each once, in order."""
    found: dict[Atom, None] = {}
    for dim in dims:
        for factor in dim:
            if isinstance(factor, Cat):
                found.update(dict.fromkeys(atoms_in(factor.parts)))
            else:
                found[factor] = None
    return list(found)
