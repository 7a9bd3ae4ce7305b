"""What a trace is: a `torch.fx` graph of ATen ops, and for each node the Python that made it.

The graph's placeholders are the parameters, the buffers and the inputs; its nodes are pre-dispatch ATen ops
on fake CPU tensors. Read these classes first: every later stage speaks in them.

    node.meta["val"]            the fake tensor, or a tuple of them
    node.meta["call"]           the `Call` that made the node, or None
    node.meta["module"]         fqn of the innermost module whose forward was running ('' is the root)
    node.meta["requires_grad"]  whether a gradient flows through the value
"""

from __future__ import annotations

import linecache
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType

import torch
from torch import fx, nn

Path = tuple[str | int, ...]
"""Where a leaf sits: ("args", 0), ("kwargs", "hidden_states"), ("out",), ("out", 0), ("args", 1, "start") in
a slice."""


@dataclass(frozen=True, slots=True)
class Site:
    """One expression in somebody's source. Lines count from 1; columns are UTF-8 byte offsets, as Python
    records them."""

    filename: str
    qualname: str
    code: CodeType = field(repr=False)
    line: int
    end_line: int
    col: int
    end_col: int

    @property
    def text(self) -> str:
        """The source of the expression; '' where the source cannot be read."""
        lines = [linecache.getline(self.filename, n).encode() for n in range(self.line, self.end_line + 1)]
        if not lines or not all(lines):
            return ""
        lines[-1] = lines[-1][: self.end_col]
        lines[0] = lines[0][self.col :]
        return b"".join(lines).decode(errors="replace")

    def __str__(self) -> str:
        text = " ".join(self.text.split())
        text = text if len(text) <= 100 else text[:99] + "…"
        where = f"{os.path.basename(self.filename)}:{self.line}"
        return f"{where} {text!r}" if text else f"{where} in {self.qualname}"


@dataclass(frozen=True, slots=True)
class Call:
    """One Python-level torch call, as a `TorchFunctionMode` sees it. It may make several nodes, or share
    none."""

    func: str
    site: Site | None
    frames: tuple[Site, ...]
    module: str
    ints: tuple[tuple[Path, int], ...]
    index: int
    twin_of: str = ""
    """The kernel in whose place this call was traced, in code that the model itself does not run; frames up to
    `around` are of that code."""
    around: tuple[Site, ...] = ()
    """The frames from the call of that code outwards."""

    def __str__(self) -> str:
        return (
            str(self.site)
            if self.site is not None
            else f"{self.func} in {self.module or 'the root module'!r}"
        )


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor leaf at a boundary (of a module or of the graph) and the node that holds it."""

    path: Path
    node: fx.Node


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One run of a module's forward; `first:last` are the positions of the nodes made while it ran."""

    fqn: str
    index: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A model's forward as a graph. `graph.owning_module` holds the constants that `get_attr` nodes read."""

    graph: fx.Graph
    module: nn.Module
    scenario: str
    params: Mapping[str, fx.Node]
    is_buffer: frozenset[str]
    aliases: Mapping[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    calls: tuple[ModuleCall, ...]
    constants: Mapping[fx.Node, torch.Tensor]
    notes: tuple[str, ...] = ()
    """What the trace had to give up (provenance of a class's attributes, say), in words."""

    def where(self, node: fx.Node) -> str:
        """`module` and source line of a node, for messages."""
        call: Call | None = node.meta.get("call")
        module = repr(node.meta.get("module", "") or "the root module")
        return f"{module} at {call.site}" if call is not None and call.site is not None else module
