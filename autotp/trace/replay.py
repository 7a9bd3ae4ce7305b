"""Run a captured graph with real tensors: what tests hold against the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from autotp.trace.graph import Trace
from autotp.trace.leaves import tensor_leaves


def replay(
    trace: Trace,
    params: Mapping[str, torch.Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    visit: Callable[[fx.Node, Any], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The outputs of the graph, in the order of `trace.outputs`. `visit` sees each node with its value."""
    leaves = dict((*tensor_leaves(tuple(args), ("args",)), *tensor_leaves(dict(kwargs or {}), ("kwargs",))))
    values: dict[fx.Node, Any] = {node: params[name] for name, node in trace.params.items()}
    values |= {port.node: leaves[port.path] for port in trace.inputs}
    root: Any = trace.graph.owning_module
    for node in trace.graph.nodes:
        if node.op == "output":
            return tuple(values[port.node] for port in trace.outputs)
        if node.op == "get_attr":
            values[node] = getattr(root, str(node.target))
        elif node.op == "call_function":
            node_args, node_kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*node_args, **node_kwargs)
        if visit is not None:
            visit(node, values[node])
    raise AssertionError("a graph ends with its output")


def state_of(model: nn.Module, trace: Trace) -> dict[str, torch.Tensor]:
    """The tensors of `model` that `trace.params` names."""
    state = dict(
        (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    )
    return {name: state[name] for name in trace.params}
