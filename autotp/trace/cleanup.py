"""Take out of a graph what computes nothing: conversions to the same dtype, aliases, dropout that is off
(or of probability 0),
mode switches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from autotp.errors import TraceError
from autotp.trace.graph import Call
from autotp.trace.provenance import Dim, Expr, Op, ProvInt

aten = torch.ops.aten

_ALIASES = {"alias", "lift_fresh", "lift", "resolve_conj", "resolve_neg", "positive"}
_CONVERSIONS = {"to", "type_as", "_to_copy"}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_SWITCHES = {"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"}
_CHECKS = {"_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size"}


def op_name(node: fx.Node) -> str:
    """`view` for `aten.view.default`, the function's name otherwise."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))


def same_as(node: fx.Node) -> fx.Node | None:
    """The input that `node` returns as it is, if it does that."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    name = op_name(node)
    if before.shape != after.shape or before.dtype != after.dtype or before.device != after.device:
        return None
    if name in _ALIASES and not (before.is_conj() or before.is_neg()):
        return source
    if name in _CONVERSIONS and not _copies(node) and before.stride() == after.stride():
        return source
    if name == "contiguous":
        wanted = node.kwargs.get(
            "memory_format", node.args[1] if len(node.args) > 1 else torch.contiguous_format
        )
        return source if before.is_contiguous(memory_format=wanted) else None  # type: ignore[arg-type]
    if name == "detach" and not source.meta.get("requires_grad", True):
        return source
    if name in _DROPOUTS and len(node.args) > 2 and (node.args[2] is False or node.args[1] == 0):
        return source
    return None


def _copies(node: fx.Node) -> bool:
    if op_name(node) == "_to_copy":
        return True
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    return bool(given.get("copy", False))


def remove_noops(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Remove them and return what each removed node became."""
    replaced: dict[fx.Node, fx.Node] = {}
    autocast = [n for n in graph.nodes if op_name(n) == "_enter_autocast"]
    no_autocast = all(len(n.args) > 2 and n.args[2] is False for n in autocast)
    for node in list(graph.nodes):
        source = same_as(node)
        name = op_name(node) if node.op == "call_function" else ""
        if source is not None:
            replaced[node] = source
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif name in _SWITCHES or name in _CHECKS or (name == "_exit_autocast" and no_autocast):
            graph.erase_node(node)
    if no_autocast:
        for node in autocast:
            graph.erase_node(node)
    for node in replaced:
        while replaced[node] in replaced:
            replaced[node] = replaced[replaced[node]]
    return replaced


def check_indices(graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor]) -> None:
    """Indices whose values are known lie inside, which a fake tensor does not look at; of dead nodes, too: they run.

    Raises:
        TraceError: one does not (a rank has fewer elements than the model).
    """
    for node in graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "index":
            given = dict(enumerate(node.args[1]))
        elif name == "index_select":
            given = {node.args[1]: node.args[2]}
        else:
            continue
        shape = node.args[0].meta["val"].shape
        known = {d: constants.get(index) for d, index in given.items() if isinstance(index, fx.Node)}
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in known.values()):
            continue  # a mask stands for as many dims as it has
        for d, index in known.items():
            if index is not None and index.numel() and not -shape[d] <= index.min() <= index.max() < shape[d]:
                module = node.meta.get("module", "")
                raise TraceError(
                    f"in {module or 'the root module'!r}, {node.meta.get('call') or name}: an index reaches from "
                    f"{int(index.min())} to {int(index.max())} in a dim of {shape[d]}",
                    module,
                )


def remove_dead(graph: fx.Graph, keep: Iterable[fx.Node]) -> None:
    """Remove nodes that nothing needs: not the output, not `keep`, no size read from them, no effect of their
    own."""
    alive: set[fx.Node] = set()
    todo = [*keep, *(n for n in graph.nodes if n.op in ("placeholder", "output") or _has_effect(n))]
    while todo:
        node = todo.pop()
        if node in alive:
            continue
        alive.add(node)
        todo += node.all_input_nodes
        call: Call | None = node.meta.get("call")
        if call is not None:
            for _, value in call.ints:
                if isinstance(value, ProvInt):
                    todo += _sized_nodes(value.expr)
    for node in reversed(list(graph.nodes)):
        if node not in alive:
            graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        # a random op whose result nobody wants still moves the generator on
        return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
    return op_name(node) != "getitem"


def _sized_nodes(expr: Expr) -> list[fx.Node]:
    if isinstance(expr, Dim):
        return [expr.node]
    return [node for arg in expr.args for node in _sized_nodes(arg)] if isinstance(expr, Op) else []
