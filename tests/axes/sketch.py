"""Small graphs by hand: each op runs on real numbers as it is added, so that its values are there to compare
with.

`commutes` is the law that a rule has to keep: the op on the slices of its operands gives the slices of its
result.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from autotp.axes.analysis import Analysis, analyse
from autotp.axes.layout import Partition, local_size, slice_tensor
from autotp.axes.term import Atom, Dim
from autotp.trace.graph import Port, Trace

aten = torch.ops.aten


class Sketch:
    """A graph under construction; parameters and inputs are numbered tensors unless given."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.params: dict[str, fx.Node] = {}
        self.inputs: list[Port] = []
        self.buffers: set[str] = set()
        self.constants: dict[fx.Node, torch.Tensor] = {}

    def _placeholder(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        self.values[node] = value
        return node

    def param(self, *shape: int) -> fx.Node:
        """A parameter, filled with its element numbers."""
        name = f"p{len(self.params)}"
        node = self._placeholder(name, torch.arange(float(torch.Size(shape).numel())).reshape(shape))
        self.params[name] = node
        return node

    def buffer(self, *shape: int) -> fx.Node:
        """A buffer."""
        node = self.param(*shape)
        self.buffers.add(node.name)
        return node

    def input(self, value: torch.Tensor) -> fx.Node:
        """An input of the graph."""
        node = self._placeholder(f"x{len(self.inputs)}", value)
        self.inputs.append(Port(("args", len(self.inputs)), node))
        return node

    def constant(self, *values: int) -> fx.Node:
        """An index list whose values the trace knows."""
        node = self._placeholder(f"c{len(self.constants)}", torch.tensor(values))
        self.constants[node] = torch.tensor(values)
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Add an op and run it; of an op with several results, a list of nodes."""
        target = getattr(target, "default", target)
        node = self.graph.call_function(target, args, kwargs)
        value = target(*fx.node.map_arg(args, self.values.get), **fx.node.map_arg(kwargs, self.values.get))
        node.meta["val"] = self.values[node] = value
        if isinstance(value, (list, tuple)):
            return [self(operator.getitem, node, k) for k in range(len(value))]
        return node

    def analyse(self, *outputs: fx.Node) -> Analysis:
        """The analysis of the graph as it stands."""
        self.graph.output(outputs)
        ports = tuple(Port(("out", k), node) for k, node in enumerate(outputs))
        trace = Trace(
            self.graph, nn.Module(), "forward", self.params, frozenset(self.buffers), {}, tuple(self.inputs),
            ports, (), self.constants,
        )  # fmt: skip
        return analyse(trace)


def on_rank(sketch: Sketch, analysis: Analysis, node: fx.Node, partition: Partition, rank: int) -> Any:
    """A node's op on the slices of its operands, with the local arguments of its rule."""
    info = analysis.ops[node]
    args, kwargs = node.args, node.kwargs
    if info.localize is not None:
        args, kwargs = info.localize(lambda dim: local_size(dim, partition, rank))
    at: dict[Any, torch.Tensor] = {}
    for operand in info.operands:
        value = sketch.values[operand.node]
        whole = value[operand.output] if isinstance(value, (list, tuple)) else value
        at[operand.path] = slice_tensor(whole, operand.dims, partition, rank)

    def fill(value: Any, path: tuple[Any, ...]) -> Any:
        if path in at:
            return at[path]
        if isinstance(value, (list, tuple)):
            return type(value)(fill(v, (*path, k)) for k, v in enumerate(value))
        if isinstance(value, fx.Node):
            return sketch.values[value]
        return value

    args = tuple(fill(v, ("args", k)) for k, v in enumerate(args))
    kwargs = {k: fill(v, ("kwargs", k)) for k, v in kwargs.items()}
    if node.target is operator.getitem:
        return args[0]
    if node.target in (aten.split.Tensor, aten.chunk.default) and isinstance(args[1], list):
        return aten.split_with_sizes.default(
            args[0], *args[1:]
        )  # local pieces that differ: what a source patch writes
    if node.target is aten.index.Tensor:
        args = (args[0], [torch.tensor(v) if isinstance(v, list) else v for v in args[1]])
    return node.target(*args, **kwargs)


def commutes(sketch: Sketch, analysis: Analysis, partition: Partition) -> int:
    """Hold every op on every rank against the slice of its result; how many results were compared."""
    compared = 0
    for node, info in analysis.ops.items():
        for rank in range(partition.size):
            result = on_rank(sketch, analysis, node, partition, rank)
            wholes = sketch.values[node]
            results, wholes = (v if isinstance(v, (list, tuple)) else [v] for v in (result, wholes))
            for k, (mine, whole) in enumerate(zip(results, wholes, strict=True)):
                dims = [
                    d_out if (k, d) not in info.whole_out else whole_dim(whole.shape[d])
                    for d, d_out in enumerate(info.out[k])
                ]
                expected = slice_tensor(whole, dims, partition, rank)
                assert torch.equal(mine, expected), f"{node.format_node()}: result {k} on rank {rank}"
                compared += 1
    return compared


def whole_dim(size: int) -> Dim:
    """A dim of an axis that no partition knows."""
    return (Atom(-1, size),)
