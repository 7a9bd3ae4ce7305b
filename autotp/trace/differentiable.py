"""Which values of a traced forward have a gradient."""

from __future__ import annotations

import torch
from torch import fx

from .graph import Trace


def has_gradient(node: fx.Node) -> bool:
    """Whether a value can have a gradient: real and complex numbers."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def differentiable(trace: Trace) -> frozenset[fx.Node]:
    """Values with a gradient: what depends on a parameter or a float input through float values that nobody
    detached."""
    found = {node for fqn, node in trace.params.items() if fqn not in trace.is_buffer and has_gradient(node)}
    found |= {port.node for port in trace.inputs if has_gradient(port.node)}
    for node in trace.graph.nodes:
        if node.op == "call_function" and node.target is not torch.ops.aten.detach.default:
            if has_gradient(node) and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
    return frozenset(found)
