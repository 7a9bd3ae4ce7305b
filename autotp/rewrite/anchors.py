"""Where in the user's model a step can be put: leaf modules, module boundaries, expressions of the source.

In this order of preference: inside a leaf module that is swapped (its input or output is the value), at the
boundary of a module (a hook on one leaf of its arguments or results), around an expression in the source of a
forward (a patch).
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from ..plan.communication import Edge, Places
from ..trace.graph import Call, ModuleCall, Path, Site, Trace

LeafKind = Literal["linear", "conv1d", "embedding", "attention", "conv"]

_CONVOLUTIONS = (
    *(nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward),
    *(nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward),
)


@dataclass(frozen=True, slots=True)
class Boundary:
    """The leaf at ``path`` of the arguments (``side="in"``) or results (``"out"``) of module ``fqn``."""

    fqn: str
    side: Literal["in", "out"]
    path: Path


Barred = Boundary | tuple[str, tuple[Site, ...]] | tuple[str, tuple[Site, ...], Literal["operand"]]
"""A module's boundary, or an expression (the module that runs it, and its frames), or that as it takes its operands."""


def leaf_kind(module: nn.Module) -> LeafKind | None:
    """Which sharded class stands in for this module, by what its forward *is* (a subclass that redefines it: none)."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Embedding.forward:
        return "embedding"
    if forward is nn.MultiheadAttention.forward:
        return "attention"
    if forward in _CONVOLUTIONS:
        return "conv"
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and forward is pytorch_utils.Conv1D.forward:
        return "conv1d"
    return None


def computed_weights(trace: Trace, leaves: Container[str]) -> frozenset[fx.Node]:
    """What leaf modules compute of parameters alone, where their weight is none of their parameters: a weight-normed
    or otherwise parametrized weight, and what it is made by."""
    modules = dict(trace.module.named_modules())
    nodes = list(trace.graph.nodes)
    own = {node for node in nodes if node.op == "get_attr"} | set(trace.params.values())
    found: set[fx.Node] = set()
    for call in trace.calls:
        module = modules[call.fqn]
        if isinstance(module, nn.MultiheadAttention):  # it has several weights, and is looked at from outside
            continue
        if call.fqn in leaves and "weight" not in module._parameters:
            for node in nodes[call.first : call.last]:
                if node.all_input_nodes and own.issuperset(node.all_input_nodes):
                    own.add(node)
                    found.add(node)
    return frozenset(found)


def _reused(trace: Trace) -> frozenset[str]:
    """Modules that one call of their parent calls several times: the one ReLU of a block, a layer that is run again."""
    calls = Counter(call.fqn for call in trace.calls)

    def of_parent(fqn: str) -> int:
        while fqn and (fqn := fqn.rpartition(".")[0]) not in calls:  # a ModuleList is not called itself
            pass
        return calls.get(fqn, 1)

    return frozenset(fqn for fqn, n in calls.items() if fqn and n > of_parent(fqn))


class Anchors:
    """An index of one trace: which module calls each value enters and leaves, and the leaf module that made it."""

    def __init__(self, trace: Trace, barred: frozenset[Barred] = frozenset()) -> None:
        self.trace = trace
        self.barred = barred
        """Where no step may be put, as one set of edits cannot serve all the times that it runs."""
        self.position = {node: i for i, node in enumerate(trace.graph.nodes)}
        self.modules = dict(trace.module.named_modules())
        self.leaves: dict[str, LeafKind] = {}
        for call in trace.calls:
            kind = leaf_kind(self.modules[call.fqn])
            if kind is not None:
                self.leaves[call.fqn] = kind
        self.weights = computed_weights(trace, self.leaves)
        """What leaf modules compute to have a weight."""
        self.inner = {
            call.fqn
            for call in trace.calls
            if call.fqn not in self.leaves and isinstance(self.modules[call.fqn], nn.Embedding)
        }
        """Embeddings with a forward of their own, around the lookup that `super().forward` does."""
        self.inputs: dict[fx.Node, list[tuple[ModuleCall, Path]]] = defaultdict(list)
        self.outputs: dict[fx.Node, list[tuple[ModuleCall, Path]]] = defaultdict(list)
        self.reused = _reused(trace)
        # Innermost first, so that a step sits as close to the op as a hook can.
        for call in sorted(trace.calls, key=lambda c: (c.last - c.first, -len(c.fqn))):
            for port in call.inputs:
                self.inputs[port.node].append((call, port.path))
            for port in call.outputs:
                self.outputs[port.node].append((call, port.path))

    def alike(self, first: Barred, others: Iterable[Barred]) -> frozenset[Barred]:
        """``first``, and those of the others that are the same place in the code, of another layer, say."""

        def code(place: Barred) -> object:
            if isinstance(place, Boundary):
                return type(self.modules[place.fqn]), place.side, place.path
            return place[1:]

        return frozenset((first, *(place for place in others if code(place) == code(first))))

    def leaf_of(self, node: fx.Node) -> str | None:
        """The swappable leaf module inside which ``node`` was made, or None."""
        fqn: str = node.meta.get("module", "")
        while True:
            if fqn in self.leaves:
                return fqn
            if not fqn:
                return None
            fqn = fqn.rpartition(".")[0]

    def can_look_up(self, node: fx.Node) -> bool:
        """Whether this embedding op can be made vocab-parallel: it is inside an embedding module."""
        return node.meta.get("module", "") in self.inner or self.leaf_of(node) is not None

    def leaves_by(self, node: fx.Node) -> str | None:
        """The leaf module whose result ``node`` is."""
        leaf = self.leaf_of(node)
        if leaf is not None and any(call.fqn == leaf for call, _ in self.outputs[node]):
            return leaf
        return None

    def boundary_after(self, node: fx.Node, users: Iterable[fx.Node]) -> Boundary | None:
        """A module's result through which all of these users get the value."""
        users = list(users)
        for call, path in self._plain_first(self.outputs[node]):
            made_inside = call.first <= self.position[node] < call.last
            if Boundary(call.fqn, "out", path) in self.barred or self._dropped_in(node, call):
                continue
            if made_inside and all(self.position[user] >= call.last for user in users):
                return Boundary(call.fqn, "out", path)
        return None

    def _dropped_in(self, node: fx.Node, around: ModuleCall) -> bool:
        """Whether a dropout inside that call lets the value through: in train mode another one comes out."""
        return any(
            call.fqn.startswith(f"{around.fqn}." if around.fqn else "")
            and isinstance(self.modules[call.fqn], nn.modules.dropout._DropoutNd)
            for call, _ in self.inputs[node]
        )

    def _plain_first(self, calls: list[tuple[ModuleCall, Path]]) -> list[tuple[ModuleCall, Path]]:
        """Hooks on a module that its parent calls several times act in each call: only where nothing else will."""
        return sorted(calls, key=lambda found: found[0].fqn in self.reused)

    def input_boundary(self, node: fx.Node) -> list[Boundary]:
        """The arguments of the model through which it gets an input."""
        return [Boundary("", "in", path) for call, path in self.inputs[node] if call.fqn == ""]

    def boundaries_before(
        self, node: fx.Node, users: Iterable[fx.Node], others: Iterable[fx.Node]
    ) -> list[Boundary]:
        """The arguments of one module through which all ``users`` and none of ``others`` get the value; else [].

        A module that hands the value on as well is none where it is used elsewhere: that might be behind it.
        """
        users, others = list(users), list(others)

        def inside(call: ModuleCall, user: fx.Node) -> bool:
            return call.first <= self.position[user] < call.last

        for call, _ in self._plain_first(self.inputs[node]):
            found = [Boundary(c.fqn, "in", path) for c, path in self.inputs[node] if c is call]
            if not self.barred.isdisjoint(found):
                continue
            if any(c is call for c, _ in self.outputs[node]) and not all(inside(call, u) for u in node.users):
                continue
            if all(inside(call, u) for u in users) and not any(inside(call, o) for o in others):
                return found
        return []

    def site_of(self, node: fx.Node) -> Call | None:
        """The expression of the user's source whose value ``node`` is; none in code that only the trace runs."""
        call: Call | None = node.meta.get("call")
        if call is None or call.site is None or not call.frames or call.twin_of:
            return None
        return call

    def has_site(self, node: fx.Node) -> bool:
        """Whether the expression that makes the value can be patched."""
        call = self.site_of(node)
        return call is not None and (call.module, call.frames) not in self.barred

    def places(self) -> Places:
        """For the planner: what can be placed, and whether by a hook (0) or a patch (1)."""

        def takes_as_it_is(user: fx.Node) -> bool:
            """Whether no operand of the op can be entered where it is used: for some rounds of a loop it would be."""
            call = self.site_of(user)
            return call is not None and (call.module, call.frames, "operand") in self.barred

        def after(node: fx.Node) -> int | None:
            if self.leaves_by(node) is not None or self.boundary_after(node, ()) is not None:
                return 0
            if self.leaf_of(node) is not None:
                return None  # inside a leaf that is swapped as a whole
            return 1 if self.has_site(node) else None

        users: dict[fx.Node, list[fx.Node]] = {n: list(n.users) for n in self.position}

        def takes_patches(user: fx.Node) -> bool:
            return self.leaf_of(user) is not None or self.has_site(user)

        def enter(node: fx.Node) -> int | None:
            if node.op == "placeholder":
                return 0
            if len(users[node]) > 1 and any(map(takes_as_it_is, users[node])):
                return None  # one of those uses may be among the ones that share the sum
            boundary = self.boundary_after(node, users[node])
            if boundary is not None and boundary.fqn not in self.reused:
                return 0
            if self.leaf_of(node) is not None and self.leaves_by(node) is None:
                return None  # inside a leaf that is swapped as a whole
            if self.leaves_by(node) is not None:
                return 0
            if any(call.fqn not in self.reused for call, _ in self.inputs[node]):
                return 0
            if all(self.leaf_of(user) is not None for user in users[node]):
                return 0
            return 1 if self.has_site(node) or all(map(takes_patches, users[node])) else None

        def mask(edge: Edge) -> bool:
            return self.leaf_of(edge.consumer) is None and self.has_site(edge.consumer)

        def contract(node: fx.Node) -> bool:
            return node.target is not torch.ops.aten.embedding.default or self.can_look_up(node)

        return Places(reduce=after, enter=enter, mask=mask, contract=contract)
