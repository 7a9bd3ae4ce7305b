"""From the planner's answer, in atoms and nodes of a folded trace, to a `Plan` in the model's own names."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from ..axes.analysis import Analysis
from ..axes.layout import Partition, common_parts, local_shape
from ..axes.term import Atom, Dim, show
from ..trace.fold import Folds
from .candidates import Candidate, atoms_of, candidates, conflicts, sharded_share
from .communication import is_loss_of_parts
from .letters import letters
from .names import fold
from .placement import Uses
from .plan import Axis, Collective, Entry, Plan
from .planner import Choice
from .price import nbytes

UNUSED = "nothing in the traced forward uses it"


def build_plan(
    model: nn.Module,
    tp: int,
    analysis: Analysis,
    choice: Choice,
    folds: Folds,
    *,
    fingerprint: str,
    diff: str = "",
    notes: Sequence[str] = (),
) -> Plan:
    """The plan of ``model`` (the original, unfolded one) for an analysis of its (folded) skeleton.

    Repeated layers count as often as they are there.
    """
    return _Builder(model, tp, analysis, choice, folds).build(fingerprint, diff, notes)


class _Builder:
    def __init__(self, model: nn.Module, tp: int, analysis: Analysis, choice: Choice, folds: Folds) -> None:
        self.model = model
        self.tp = tp
        self.analysis = analysis
        self.choice = choice
        self.folds = folds
        self.ranges = choice.ranges
        self.sharded = frozenset(self.ranges)
        self.partition = Partition({atom.id: ranges for atom, ranges in self.ranges.items()})
        self.letters = letters(analysis, self.sharded)
        self.uses = Uses(analysis)
        found = candidates(analysis, tp)
        _, self.against = conflicts(analysis, found)
        self.candidates_of: dict[Atom, list[Candidate]] = defaultdict(list)
        for candidate in found:
            for atom in candidate.atoms:
                self.candidates_of[atom].append(candidate)

    def build(self, fingerprint: str, diff: str, notes: Sequence[str]) -> Plan:
        entries = self.entries()
        return Plan(
            tp=self.tp,
            model=type(self.model).__name__,
            fingerprint=fingerprint,
            proven=self.choice.proven,
            weight_bytes=sum(e.global_bytes * e.count for e in entries),
            sharded_bytes=self.sharded_bytes(),
            axes=self.axes(),
            entries=entries,
            collectives=self.collectives(),
            notes=tuple(notes),
            patches=_portable(diff),
        )

    # ---- axes

    def axes(self) -> tuple[Axis, ...]:
        found: dict[Axis, int] = defaultdict(int)
        for candidate in self.choice.candidates:
            axis = Axis(
                candidate.key,
                "·".join(self.letters[atom] for atom in candidate.atoms),
                tuple(atom.size for atom in candidate.atoms),
                tuple(tuple(stop - start for start, stop in ranges) for ranges in candidate.ranges),
            )
            found[axis] += self.layers(candidate.atoms[0])
        return tuple(
            replace(axis, layers=layers)
            for axis, layers in sorted(found.items(), key=lambda item: (item[0].key, item[0].sizes))
        )

    def layers(self, atom: Atom) -> int:
        """How many axes of the model this one of the skeleton stands for."""
        for fqn, node in self.analysis.trace.params.items():
            if fqn not in self.analysis.trace.is_buffer and atom in set(
                atoms_of(self.analysis.dims[node][0])
            ):
                return len(self.folds.originals(fqn))
        return 1

    # ---- entries

    def originals(self) -> dict[str, str]:
        """For each parameter of the model, its name in the skeleton."""
        trace = self.analysis.trace
        found: dict[str, str] = {}
        for fqn in [*trace.params, *trace.aliases]:
            for name in self.folds.originals(fqn):
                found.setdefault(name, fqn)
        return found

    def entries(self) -> tuple[Entry, ...]:
        trace = self.analysis.trace
        stands = self.originals()
        first: dict[int, str] = {}
        tied: dict[str, list[str]] = defaultdict(list)
        for name, param in self.model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(param), name) != name:
                tied[first[id(param)]].append(name)
        kinds: dict[str, Entry] = {}
        named: list[tuple[str, Entry]] = []
        for name in first.values():
            fqn = trace.aliases.get(stands[name], stands[name])
            if fqn not in kinds:
                kinds[fqn] = self.entry(fqn)
            entry = kinds[fqn]
            if name in tied:
                note = "; ".join(filter(None, ["tied to " + ", ".join(tied[name]), entry.note]))
                entry = replace(entry, note=note)
            named.append((name, entry))
        return tuple(replace(entry, name=pattern, count=count) for pattern, entry, count in fold(named))

    def entry(self, fqn: str) -> Entry:
        """One parameter of the skeleton, its name and count left open."""
        node = self.analysis.trace.params[fqn]
        dims = self.analysis.dims[node][0]
        whole = nbytes(node)
        shape = tuple(node.meta["val"].shape)
        local = tuple(local_shape(dims, self.partition, rank) for rank in range(self.tp))
        width = node.meta["val"].element_size()
        placement = self.uses.placement(node, self.sharded)
        note = "" if placement != "replicate" else self.why_whole(node)
        return Entry(
            "",
            0,
            placement,
            self.text(dims),
            shape,
            local,
            whole,
            tuple(math.prod(s) * width for s in local),
            note,
        )

    def text(self, dims: Sequence[Dim]) -> str:
        def name(atom: Atom) -> str:
            ranges = self.ranges.get(atom)
            return f"{self.letters[atom]}{atom.size}" + (f"/{len(set(ranges))}" if ranges else "")

        return " , ".join(show(dim, name) for dim in dims) or "1"

    def why_whole(self, node: fx.Node) -> str:
        """Why no axis of a parameter is sharded: needed whole by an op, too small, or excluded by others."""
        if self.tp == 1:
            return ""
        atoms = list(dict.fromkeys(atoms_of(self.analysis.dims[node][0])))
        if not atoms:
            return "a single element"
        if not any(operand.node is node for info in self.analysis.ops.values() for operand in info.operands):
            return UNUSED
        for user, _ in self.uses.ends(node):
            for operand in self.analysis.ops[user].operands:
                if operand.node is node and not set(atoms) <= set(atoms_of(operand.dims)):
                    return f"{op_name(user)} needs it whole"
        free = [atom for atom in atoms if atom not in self.analysis.frozen]
        if not free:
            return "an op needs it whole"
        if all(atom.size < self.tp for atom in free):
            return f"{self.axes_text(free)}: fewer elements than ranks"
        against = {
            b for a in free for c in self.candidates_of[a] for o in self.against[c] for b in o.atoms
        } & self.sharded
        if against:
            order = sorted(against, key=lambda atom: atom.id)
            others = self.axes_text(order)
            return f"{self.axes_text(free)}: on one tensor with {others}, of which one can be sharded"
        return f"{self.axes_text(free)}: whole"

    def axes_text(self, atoms: Sequence[Atom]) -> str:
        return ", ".join(dict.fromkeys(self.letters[atom] for atom in atoms))

    def sharded_bytes(self) -> int:
        trace = self.analysis.trace
        total = 0.0
        for fqn, node in trace.params.items():
            if fqn not in trace.is_buffer:
                share = sharded_share(self.analysis.dims[node][0], self.sharded)
                total += nbytes(node) * share * len(self.folds.originals(fqn))
        return round(total)

    # ---- collectives

    def collectives(self) -> tuple[Collective, ...]:
        comm = self.choice.communication
        order = {node: i for i, node in enumerate(self.analysis.trace.graph.nodes)}
        names = {node: fqn for fqn, node in self.analysis.trace.params.items()}
        found: list[tuple[str, Collective]] = []
        gathers = [c for c in comm.conversions if c.kind == "gather"]
        gathered = {(c.producer, c.dim): c.producer for c in gathers if not is_loss_of_parts(c)}
        losses = {c.consumer: None for c in gathers if is_loss_of_parts(c) and c.consumer is not None}
        forward = [("all_reduce", node) for node in comm.reduce] + [
            ("all_gather", node) for node in gathered.values()
        ]
        for kind, node in sorted(forward, key=lambda item: order[item[1]]):
            found += self.at("forward", kind, node)
        for node in losses:
            found += self.loss(node)
        for node in sorted({*comm.enter, *comm.close}, key=order.__getitem__, reverse=True):
            found += self.at("backward", "all_reduce", node)
        steps = self.gradient_sums(sorted(comm.sync, key=order.__getitem__), names)
        return (*(replace(c, where=where, count=count) for where, c, count in fold(found)), *steps)

    def gradient_sums(self, synced: Sequence[fx.Node], names: Mapping[fx.Node, str]) -> list[Collective]:
        """The sums of parameters' gradients: one all-reduce for all that the same groups of ranks sum."""
        buckets: dict[tuple[object, torch.dtype], list[fx.Node]] = defaultdict(list)
        for node in synced:
            groups, _ = common_parts(self.analysis.dims[node][0], self.partition, 0)
            buckets[groups, node.meta["val"].dtype].append(node)
        found = []
        for nodes in buckets.values():
            originals = [(node, self.folds.originals(names[node])) for node in nodes]
            where = ", ".join(pattern for pattern, _, _ in fold((n, 0) for _, all_ in originals for n in all_))
            most = max(
                sum(self.common_bytes(node, rank) * len(all_) for node, all_ in originals)
                for rank in range(self.tp)
            )
            found.append(Collective("step", "all_reduce", where, "gradients", most, 1))
        return found

    def loss(self, node: fx.Node) -> list[tuple[str, Collective]]:
        """A cross-entropy over sharded classes: each token's greatest logit, then its sums."""
        target = node.args[1]
        assert isinstance(target, fx.Node)
        tokens = target.meta["val"].numel() * max(4, node.meta["val"].element_size())
        sums = 3 if node.args[5:] and node.args[5] else 2
        where, op = node.meta.get("module", ""), op_name(node)
        return [(where, Collective("forward", "all_reduce", "", op, n * tokens, 0)) for n in (1, sums)]

    def at(self, phase: str, kind: str, node: fx.Node) -> list[tuple[str, Collective]]:
        """A collective at a value, once for each layer that the skeleton's stands for."""
        if node.op == "placeholder":
            path = next((p.path for p in self.analysis.trace.inputs if p.node is node), ())
            where, op = [str(path[-1]) if path else node.name], "input"
        else:
            module = node.meta.get("module", "")
            where, op = list(self.folds.originals(module)) if module else [""], op_name(node)
        size = nbytes(node) if kind == "all_gather" else self.summed_bytes(node)
        return [(name, Collective(phase, kind, "", op, size, 0)) for name in where]

    def summed_bytes(self, node: fx.Node) -> int:
        """Of a value that groups of ranks have in common, what one group sums."""
        dims = self.analysis.dims[node][0]
        if node in self.choice.communication.close or self.sharded.isdisjoint(atoms_of(dims)):
            return nbytes(node)
        shapes = (local_shape(dims, self.partition, rank) for rank in range(self.tp))
        return max(map(math.prod, shapes)) * int(node.meta["val"].element_size())

    def common_bytes(self, node: fx.Node, rank: int) -> int:
        """Of a parameter's gradient, what a rank sums: the part that others hold too."""
        dims = self.analysis.dims[node][0]
        _, part = common_parts(dims, self.partition, rank)
        shape = list(local_shape(dims, self.partition, rank))
        if part is not None:
            shape[part[0]] = sum(part[2])
        return math.prod(shape) * int(node.meta["val"].element_size())


def op_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _portable(diff: str) -> str:
    """A diff with file names as an import sees them, the same on every machine, and without repetitions.

    Layers of the same class are patched alike.
    """
    blocks: list[list[str]] = []
    lines = diff.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.startswith("--- ") and lines[i + 1 : i + 2] and lines[i + 1].startswith("+++ "):
            blocks.append([])
        if blocks:
            blocks[-1].append(line)
    roots = sorted((root.rstrip("/") + "/" for root in sys.path if root), key=len, reverse=True)
    for block in blocks:
        for i in range(min(2, len(block))):
            mark, name = block[i][:4], block[i][4:]
            root = next((root for root in roots if name.startswith(root)), "")
            block[i] = mark + name[len(root) :]
    return "".join(dict.fromkeys("".join(block) for block in blocks))
