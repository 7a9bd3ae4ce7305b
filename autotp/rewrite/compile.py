"""From a choice of axes to edits: where in the code each step goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from ..axes.analysis import Analysis
from ..axes.term import Dim
from ..errors import RewriteError
from ..plan.candidates import atoms_of
from ..plan.communication import Edge
from ..plan.parts import is_disjoint
from ..plan.planner import Choice
from ..trace.differentiable import differentiable, has_gradient
from ..trace.graph import Call, Path, Site
from ..trace.sites import is_statement
from .anchors import Anchors, Boundary
from .planned import planned_steps, sharded_parameters, uses_of
from .program import Bias, Draw, Leaf, Program, Wrap
from .steps import AllReduce, Enter, Gather, Mask, Scale, Step


def compile_program(analysis: Analysis, choice: Choice, anchors: Anchors) -> Program:
    """Turn a choice of axes into edits.

    Raises:
        RewriteError: a step has no place where the code could take it, naming op and source line.
    """
    return _Compiler(analysis, choice, anchors).compile()


def _kernel_call(node: fx.Node) -> Draw | None:
    """Where the model calls the kernel in whose twin a random number is drawn: ``kernel(module, query, ...)``."""
    call: Call | None = node.meta.get("call")
    return Draw(call.module, call.around, ("args", 1)) if call is not None and call.around else None


@dataclass(slots=True)
class _Draft:
    """Steps as they are found, per call of a module, to be checked for agreement between its calls."""

    leaf_before: dict[str, dict[int, list[Step]]] = field(default_factory=lambda: defaultdict(dict))
    leaf_after: dict[str, dict[int, list[Step]]] = field(default_factory=lambda: defaultdict(dict))
    leaf_ports: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))
    bias: dict[str, Bias] = field(default_factory=dict)
    share: dict[str, int] = field(default_factory=dict)
    hooks: dict[Boundary, dict[int, list[Step]]] = field(default_factory=lambda: defaultdict(dict))
    wraps: dict[tuple[str, tuple[Site, ...], Path | None], dict[int, list[Step]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    hook_share: dict[Boundary, int] = field(default_factory=dict)
    wrap_share: dict[tuple[str, tuple[Site, ...], Path | None], int] = field(default_factory=dict)


class _Compiler:
    def __init__(self, analysis: Analysis, choice: Choice, anchors: Anchors) -> None:
        self.analysis = analysis
        self.trace = analysis.trace
        self.anchors = anchors
        self.choice = choice
        self.comm = choice.communication
        self.sharded = frozenset(a for c in choice.candidates for a in c.atoms)
        self.draft = _Draft()
        self.shares = 0
        self.uses = uses_of(analysis)

    def compile(self) -> Program:
        after, before, outputs = planned_steps(self.analysis, self.choice)
        for node, steps in after.items():
            self._place_after(node, list(steps))
        for node, steps in outputs.items():
            self._place_output(node, list(steps))
        by_steps: dict[tuple[fx.Node, tuple[Step, ...]], list[Edge]] = defaultdict(list)
        for edge, edge_steps in before.items():
            by_steps[edge.producer, tuple(edge_steps)].append(edge)
        for (node, steps_of), edges in by_steps.items():
            self._place_before(node, edges, steps_of)
        for edge in sorted(self.comm.masked, key=lambda e: self.anchors.position[e.consumer]):
            if edge.operand in self.analysis.ops[edge.consumer].added:
                self._place_bias(edge)
        slices = sharded_parameters(self.analysis, self.choice)
        names = {node: fqn for fqn, node in self.trace.params.items()}
        sync = {names[n]: self.analysis.dims[n][0] for n in sorted(self.comm.sync, key=lambda n: names[n])}
        return self._finish(slices, sync)

    def _draws(self) -> tuple[Draw, ...]:
        """The ops that draw random numbers for sharded values."""
        found: dict[Draw, None] = {}
        pairs = {c.atoms[0]: c.atoms[1] for c in self.choice.candidates if len(c.atoms) == 2}
        for node, info in self.analysis.ops.items():
            dims = [
                d for d in (*info.out, *(o.dims for o in info.operands)) if self.sharded & set(atoms_of(d))
            ]
            leaf = self.anchors.leaf_of(node)
            if not info.random or not dims or (leaf is not None and self.anchors.leaves[leaf] == "attention"):
                continue
            module, call = node.meta.get("module", ""), self.anchors.site_of(node)
            if not any(is_disjoint(d, self.sharded, pairs) for d in dims):
                raise RewriteError(
                    f"{node.target} in {self.trace.where(node)}: draws random numbers for a value that some ranks have "
                    "in common and others have not",
                    module,
                )
            if isinstance(self.anchors.modules[module], nn.modules.dropout._DropoutNd):
                found[Draw(module)] = None
            elif call is not None and info.operands:
                found[Draw(call.module, call.frames, info.operands[0].path)] = None
            elif (kernel := _kernel_call(node)) is not None:
                found[kernel] = None
            else:
                raise RewriteError(
                    f"{node.target} in {self.trace.where(node)}: cannot draw other numbers on each rank",
                    module,
                )
        return tuple(found)

    # ---- where it goes ---------------------------------------------------------------------------

    def _call_index(self, fqn: str, node: fx.Node) -> int:
        position = self.anchors.position[node]
        for call in self.trace.calls:
            if call.fqn == fqn and call.first <= position < call.last:
                return call.index
        return 0

    def _place_after(self, node: fx.Node, steps: list[Step]) -> None:
        leaf = self.anchors.leaves_by(node)
        if self._within_attention(node):
            if any(isinstance(step, Scale) for step in steps):
                return
            steps = [step for step in steps if not isinstance(step, Gather)]
        if leaf is not None:
            enters = next((i for i, step in enumerate(steps) if isinstance(step, Enter)), len(steps))
            index = self._call_index(leaf, node)
            if steps[:enters]:
                self.draft.leaf_after[leaf].setdefault(index, []).extend(steps[:enters])
            if steps[enters:]:  # what a leaf class does not do itself follows it
                self.draft.hooks[Boundary(leaf, "out", ())].setdefault(index, []).extend(steps[enters:])
            return
        users = [edge.consumer for edge in self.uses[node]]
        if node.op == "placeholder":
            boundaries = self.anchors.input_boundary(node)
        else:
            boundary = self.anchors.boundary_after(node, users)
            boundaries = [boundary] if boundary is not None else []
            if boundary is not None and boundary.fqn == "" and self._own_output(node, steps):
                boundaries = []
        if boundaries:
            for b in boundaries:
                at = users[0] if node.op == "placeholder" else node
                if b.fqn in self.anchors.leaves and b.side == "in":
                    self._enter_leaf(b.fqn, node, at, steps)
                else:
                    self.draft.hooks[b].setdefault(self._call_index(b.fqn, at), []).extend(steps)
            return
        elsewhere = not self.anchors.has_site(node) or self._is_barred(node)
        if elsewhere and all(isinstance(step, Enter) for step in steps):
            edges = [e for e in self.uses[node] if has_gradient(e.consumer)]
            self._place_before(node, edges, steps)  # where it is used, the same
            return
        self._wrap(node, None, steps)

    def _own_output(self, node: fx.Node, steps: list[Step]) -> bool:
        """Whether an output is gathered where the model's own forward makes it: a loss that it computes of it, in a
        branch that was not traced, then has the whole. Not at a statement (`x.add_(y)`), whose value nothing takes."""
        call = self.anchors.site_of(node)
        if call is None or call.module or len(call.frames) != 1 or not self.anchors.has_site(node):
            return False
        if is_statement(call.frames[0]):
            return False
        return any(isinstance(step, Gather) for step in steps)

    def _is_barred(self, node: fx.Node) -> bool:
        return any(
            Boundary(call.fqn, "out", path) in self.anchors.barred
            for call, path in self.anchors.outputs[node]
        )

    def _within_attention(self, node: fx.Node) -> bool:
        """Whether a value is made inside `nn.MultiheadAttention`, whose class does for itself what its weights need."""
        leaf = self.anchors.leaf_of(node)
        return leaf is not None and self.anchors.leaves[leaf] == "attention"

    def _place_before(self, node: fx.Node, edges: list[Edge], steps: Iterable[Step]) -> None:
        steps = list(steps)
        if self._within_attention(node):
            edges = [e for e in edges if self.anchors.leaf_of(e.consumer) != self.anchors.leaf_of(node)]
            if not edges:
                return
        users = [edge.consumer for edge in edges]
        others = [e.consumer for e in self.uses[node] if e not in edges and has_gradient(e.consumer)]
        if not all(isinstance(step, Enter) for step in steps):
            others = [e.consumer for e in self.uses[node] if e not in edges]
        boundaries = self.anchors.boundaries_before(node, users, others)
        if boundaries:
            leaf = boundaries[0].fqn if boundaries[0].fqn in self.anchors.leaves else None
            targets = (
                [self.draft.leaf_before[leaf]]
                if leaf is not None
                else [self.draft.hooks[b] for b in boundaries]
            )
            if leaf is not None:
                self.draft.leaf_ports[leaf] |= {b.path for b in boundaries}
            for target in targets:  # a leaf takes its steps once, however many of its arguments the value is
                target.setdefault(self._call_index(boundaries[0].fqn, users[0]), []).extend(steps)
            return
        entered = any(isinstance(step, Enter) for step in steps)
        if len(edges) == len(self.uses[node]) and not entered and not all(map(self.anchors.has_site, users)):
            self._place_after(node, steps)  # where it is made, the same
            return
        share = None
        if len(edges) > 1 and entered:
            share = self.shares = self.shares + 1
        for edge in edges:
            leaf = self.anchors.leaf_of(edge.consumer)
            if leaf is not None and node not in self.anchors.weights:
                self._enter_leaf(leaf, node, edge.consumer, steps)
                if share is not None:
                    self.draft.share[leaf] = share
                continue
            alone = [e.consumer for e in self.uses[node] if e.consumer is not edge.consumer]
            boundaries = self.anchors.boundaries_before(node, [edge.consumer], alone)
            if len(boundaries) == 1 and self.anchors.site_of(edge.consumer) is None:
                index = self._call_index(boundaries[0].fqn, edge.consumer)
                self.draft.hooks[boundaries[0]].setdefault(index, []).extend(steps)
                if share is not None:
                    self.draft.hook_share[boundaries[0]] = share
            else:
                self._wrap(
                    edge.consumer, self.analysis.ops[edge.consumer].operands[edge.operand].path, steps, share
                )

    def _enter_leaf(self, leaf: str, node: fx.Node, user: fx.Node, steps: list[Step]) -> None:
        """Steps on a value that a leaf module gets, taken inside it: once, whichever of its arguments the value is."""
        ports = {path for call, path in self.anchors.inputs[node] if call.fqn == leaf}
        target = self.draft.leaf_before[leaf].setdefault(self._call_index(leaf, user), [])
        if not ports <= self.draft.leaf_ports[leaf] or not target:
            target.extend(steps)
        self.draft.leaf_ports[leaf] |= ports

    def _place_bias(self, edge: Edge) -> None:
        """A bias counts once: inside a leaf module its class sees to that, elsewhere the operand is masked."""
        leaf = self.anchors.leaf_of(edge.consumer)
        if leaf is not None:
            self.draft.bias[leaf] = "masked"
        else:
            self._wrap(edge.consumer, self.analysis.ops[edge.consumer].operands[edge.operand].path, [Mask()])

    def _place_output(self, node: fx.Node, steps: list[Step]) -> None:
        if self._within_attention(node):
            return
        for port in self.trace.outputs:
            if port.node is node:
                self.draft.hooks[Boundary("", "out", port.path)].setdefault(0, []).extend(steps)

    def _wrap(self, node: fx.Node, operand: Path | None, steps: list[Step], share: int | None = None) -> None:
        call = self.anchors.site_of(node)
        leaf = self.anchors.leaf_of(node)
        traced: Call | None = node.meta.get("call")
        if traced is not None and traced.twin_of:
            raise RewriteError(
                f"{self.trace.where(node)}: would communicate in code that was traced in place of "
                f"{traced.twin_of!r}, which the model runs; an implementation that can be traced can be sharded",
                node.meta.get("module", ""),
            )
        if call is None or leaf is not None:
            raise RewriteError(
                f"{node.name} in {self.trace.where(node)}: no expression of the source to communicate at"
                + (f" (it is inside the leaf module {leaf!r})" if leaf is not None else ""),
                node.meta.get("module", ""),
            )
        key = (call.module, call.frames, operand)
        self.draft.wraps[key].setdefault(call.index, []).extend(steps)
        if share is not None:
            self.draft.wrap_share[key] = share

    # ---- agreement between calls ---------------------------------------------------------------

    def _finish(self, slices: dict[str, tuple[Dim, ...]], sync: dict[str, tuple[Dim, ...]]) -> Program:
        calls: dict[str, set[int]] = defaultdict(set)
        constant: dict[tuple[str, str, Path], set[int]] = defaultdict(set)  # the calls where it has no gradient
        with_gradient = differentiable(self.trace)
        for call in self.trace.calls:
            calls[call.fqn].add(call.index)
            for side, its_ports in (("in", call.inputs), ("out", call.outputs)):
                for port in its_ports:
                    if port.node not in with_gradient:
                        constant[call.fqn, side, port.path].add(call.index)

        failed: list[RewriteError] = []

        def agree(
            at: Boundary, by_call: dict[int, list[Step]], ports: Iterable[Path] = (), barrable: bool = True
        ) -> tuple[Step, ...]:
            variants = {tuple(by_call.get(index, ())) for index in calls[at.fqn] or {0}}
            if len(variants) > 1:  # a sum of gradients does nothing to a value that has none
                free = set.intersection(*(constant[at.fqn, at.side, path] for path in ports or [at.path]))
                needed = {tuple(by_call.get(index, ())) for index in calls[at.fqn] - free}
                if len(needed) == 1 and all(isinstance(step, Enter) for step in next(iter(needed))):
                    variants = needed | (variants - {()})
            if len(variants) > 1:
                where = "argument" if at.side == "in" else "result"
                failed.append(
                    RewriteError(
                        f"{at.fqn or 'the root module'}: its calls need different steps on one {where}, and one set of "
                        f"edits serves them all: {sorted(map(str, variants))}",
                        at.fqn,
                        places=frozenset([at] if barrable else []),
                    )
                )
            return next(iter(variants))

        leaf_names = {
            fqn
            for fqn in self.anchors.leaves
            if fqn in self.draft.leaf_after
            or fqn in self.draft.leaf_before
            or fqn in self.draft.bias
            or any(f"{fqn}.{p}" in slices for p in _parameter_names(self.anchors, fqn))
        }
        leaves: list[Leaf] = []
        rows = self._rows_of_convolutions()
        for fqn in sorted(leaf_names):
            ports = frozenset(self.draft.leaf_ports[fqn])
            before = agree(Boundary(fqn, "in", ()), self.draft.leaf_before[fqn], ports, barrable=False)
            after = agree(Boundary(fqn, "out", ()), self.draft.leaf_after[fqn], barrable=False)
            bias = self.draft.bias.get(fqn, "local")
            if bias == "masked" and any(isinstance(step, AllReduce) for step in after):
                bias = "after"
            kind, share = self.anchors.leaves[fqn], self.draft.share.get(fqn)
            leaves.append(Leaf(fqn, kind, before, after, bias, share, ports, rows.get(fqn)))
        hooks = {b: agree(b, by_call) for b, by_call in self.draft.hooks.items()}
        failed += self._uneven_wraps()
        if failed:
            first = next((error for error in failed if not error.places), failed[0])
            everywhere = [place for error in failed for place in error.places]
            # all layers at once; but other code may do with these places, once the first is left out
            first.places = frozenset(
                place for own in first.places for place in self.anchors.alike(own, everywhere)
            )
            raise first
        wraps = tuple(
            Wrap(module, frames, operand, tuple(next(iter(by_call.values()))), self.draft.wrap_share.get(key))
            for key, by_call in self.draft.wraps.items()
            for module, frames, operand in [key]
        )
        leaves += [Leaf(fqn, "embedding") for fqn in sorted(self.anchors.inner) if f"{fqn}.weight" in slices]
        return Program(
            slices,
            tuple(leaves),
            {b: s for b, s in hooks.items() if s},
            wraps,
            sync,
            self._draws(),
            self.draft.hook_share,
        )

    def _rows_of_convolutions(self) -> dict[str, Dim]:
        """The first dim of the weight that a convolution takes, which may be computed, by its leaf module."""
        found: dict[str, Dim] = {}
        for node, info in self.analysis.ops.items():
            leaf = self.anchors.leaf_of(node)
            if leaf is None or self.anchors.leaves[leaf] != "conv" or node in self.anchors.weights:
                continue
            if len(info.operands) > 1:  # padding has one
                found[leaf] = info.operands[1].dims[0]
        return found

    def _uneven_wraps(self) -> Iterator[RewriteError]:
        """Expressions in a loop, which are patched once for all of its rounds, that only some rounds need patched."""
        rounds: dict[tuple[str, tuple[Site, ...]], set[int]] = defaultdict(set)
        for node in self.analysis.ops:
            call = self.anchors.site_of(node)
            if call is not None:
                rounds[call.module, call.frames].add(call.index)
        for (module, frames, operand), by_call in self.draft.wraps.items():
            if len({tuple(by_call.get(index, ())) for index in rounds[module, frames] | set(by_call)}) > 1:
                yield RewriteError(
                    f"{module or 'the root module'}: {frames[0]} runs several times, and not each time with the same "
                    "communication",
                    module,
                    places=frozenset([(module, frames), *([(module, frames, "operand")] if operand else [])]),
                )


def _parameter_names(anchors: Anchors, fqn: str) -> list[str]:
    return [name for name, _ in anchors.modules[fqn].named_parameters(recurse=True, remove_duplicate=False)]
