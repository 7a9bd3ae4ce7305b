"""One choice of axes seen in several scenarios (forward, train mode, decoding with a cache), and one program for all.

The axes are chosen in the forward. Every other scenario has a trace and an analysis of its own; the chosen axes are
found there by the parameters that hold them. A scenario may reduce only where the forward does, so that one set of
edits serves both; gradients matter in train mode, where their sums have to fall on the same places too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from ..axes.analysis import Analysis
from ..axes.layout import Partition
from ..axes.term import Atom, Cat, Dim
from ..errors import PlanError, RewriteError
from ..plan.candidates import Candidate, atoms_of
from ..plan.communication import Places
from ..plan.planner import Choice
from ..plan.price import FINE
from ..plan.reductions import Flow
from ..trace.graph import Trace
from .anchors import Anchors, Barred, Boundary
from .bind import Rank, describe
from .compile import compile_program
from .program import Program, Wrap
from .steps import AllReduce, Enter, Gather, Mask, Scale, Step, Take

#: What a gradient sum at a place of its own costs a scenario: less than a byte, to tell equal places apart.
ELSEWHERE = FINE // 4


@dataclass(frozen=True, slots=True)
class View:
    """A scenario: its analysis, the choice in its terms, and how to trace a rewritten model in it."""

    analysis: Analysis
    choice: Choice
    anchors: Anchors
    program: Program
    retrace: Callable[[nn.Module], Trace]
    gradients: bool

    @property
    def name(self) -> str:
        return self.analysis.trace.scenario

    def rank(self, rank: int, tp: int, prefix: str) -> Rank:
        return Rank(rank, tp, Partition({a.id: r for a, r in self.choice.ranges.items()}), prefix)


def first_view(
    analysis: Analysis, choice: Choice, anchors: Anchors, retrace: Callable[[nn.Module], Trace]
) -> View:
    """The view in which the axes were chosen."""
    return View(analysis, choice, anchors, compile_program(analysis, choice, anchors), retrace, True)


def another_view(
    main: View, analysis: Analysis, retrace: Callable[[nn.Module], Trace], gradients: bool
) -> tuple[View, Mapping[Atom, Atom]]:
    """The same axes in another scenario; and, for each of its sharded axes, the one of the main view.

    Raises:
        RewriteError: the axes are not the same there, or it would have to communicate elsewhere.
    """
    name = analysis.trace.scenario
    twin: dict[Atom, Atom] = {}
    present: set[Atom] = set()
    for fqn, node in main.analysis.trace.params.items():
        other = analysis.trace.params.get(fqn)
        if other is None or fqn in analysis.trace.is_buffer or not other.users:
            continue
        present.update(atoms_of(main.analysis.dims[node][0]))
        mine, theirs = list(atoms_of(main.analysis.dims[node][0])), list(atoms_of(analysis.dims[other][0]))
        if [a.size for a in mine] == [a.size for a in theirs]:
            twin.update((a, b) for a, b in zip(mine, theirs, strict=True) if twin.get(a, b) is b)
    found = []
    for candidate in main.choice.candidates:
        if present.isdisjoint(candidate.atoms):
            continue  # of parameters that this scenario does without: an image tower, where there is only text
        atoms = tuple(twin.get(a) for a in candidate.atoms)
        if any(a is None or a in analysis.frozen for a in atoms):
            raise RewriteError(
                f"in scenario {name!r} the axis {candidate.key} cannot be sharded as in the forward"
            )
        found.append(Candidate(tuple(a for a in atoms if a is not None), candidate.ranges, candidate.key))
    anchors = Anchors(analysis.trace, main.anchors.barred)
    places = _only_where(anchors, main.program)
    flow = Flow(analysis, places)
    try:
        communication = flow.communicate(tuple(found), gradients=gradients)
    except PlanError as error:
        raise RewriteError(
            f"in scenario {name!r}: {error}", keys=_infeasible(flow, found, gradients)
        ) from error
    choice = replace(main.choice, candidates=tuple(found), communication=communication)
    view = View(analysis, choice, anchors, compile_program(analysis, choice, anchors), retrace, gradients)
    return view, {b: a for a, b in twin.items()}


def _infeasible(flow: Flow, found: Iterable[Candidate], gradients: bool) -> frozenset[str]:
    """The axes that cannot be sharded in this scenario even alone."""
    by_key: dict[str, list[Candidate]] = {}
    for candidate in found:
        by_key.setdefault(candidate.key, []).append(candidate)
    bad = set()
    for key, members in by_key.items():
        try:
            flow.communicate(tuple(members), gradients=gradients)
        except PlanError:
            bad.add(key)
    return frozenset(bad)


def _only_where(anchors: Anchors, program: Program) -> Places:
    """Reduces only where the program has one already; and gradient sums there, among places that cost the same."""
    leaves = {leaf.fqn for leaf in program.leaves if any(isinstance(s, AllReduce) for s in leaf.after)}
    hooks = {b for b, steps in program.hooks.items() if any(isinstance(s, AllReduce) for s in steps)}
    wraps = {
        (w.module, w.frames)
        for w in program.wraps
        if w.operand is None and any(isinstance(s, AllReduce) for s in w.steps)
    }
    free = anchors.places()

    def reduce(node: fx.Node) -> int | None:
        leaf = anchors.leaves_by(node)
        if leaf is not None:
            return 0 if leaf in leaves else None
        boundary = anchors.boundary_after(node, list(node.users))
        if boundary is not None:
            return 0 if boundary in hooks else None
        call = anchors.site_of(node)
        return 0 if call is not None and (call.module, call.frames) in wraps else None

    entered = _entered(program)

    def enter(node: fx.Node) -> int | None:
        price = free.enter(node)
        return price if price is None or entered & _places_of(anchors, node) else price + ELSEWHERE

    return replace(free, reduce=reduce, enter=enter)


def _entered(program: Program) -> frozenset[object]:
    """Where the program sums gradients: module arguments and results, and expressions."""
    hooks = {b for b, steps in program.hooks.items() if any(isinstance(s, Enter) for s in steps)}
    leaves = {
        Boundary(leaf.fqn, "in", path)
        for leaf in program.leaves
        if any(isinstance(s, Enter) for s in leaf.before)
        for path in leaf.ports
    }
    wraps = {(w.module, w.frames) for w in program.wraps if any(isinstance(s, Enter) for s in w.steps)}
    return frozenset((*hooks, *leaves, *wraps))


def _places_of(anchors: Anchors, node: fx.Node) -> frozenset[object]:
    """The places where a step on this value, or on its uses, may sit."""
    found: set[object] = {Boundary(call.fqn, "out", path) for call, path in anchors.outputs[node]}
    found |= {Boundary(call.fqn, "in", path) for call, path in anchors.inputs[node]}
    for user in (node, *node.users):
        site = anchors.site_of(user)
        if site is not None:
            found.add((site.module, site.frames))
    return frozenset(found)


def merged(main: View, others: Iterable[tuple[View, Mapping[Atom, Atom]]], tp: int) -> Program:
    """One program for all views: the main one's, with the edits that only another scenario's code needs.

    Raises:
        RewriteError: two scenarios want different things at one place.
    """
    program = main.program
    rank = main.rank(0, tp, "")
    for number, (view, twins) in enumerate(others):
        theirs = view.rank(0, tp, "")
        translate = _Translation(twins, number)
        calls = view.analysis.trace.calls
        ran = {call.fqn for call in calls}
        passed = {Boundary(call.fqn, "in", port.path) for call in calls for port in call.inputs}
        passed |= {Boundary(call.fqn, "out", port.path) for call in calls for port in call.outputs}

        def same(a: tuple[Step, ...], b: tuple[Step, ...], view: View = view, theirs: Rank = theirs) -> bool:
            mine = [describe(s, rank) for s in a if view.gradients or not isinstance(s, Enter)]
            return mine == [describe(s, theirs) for s in b]

        elsewhere = _gathered_elsewhere(view, program)
        by_fqn = {leaf.fqn: leaf for leaf in view.program.leaves}
        for leaf in program.leaves:
            twin = by_fqn.get(leaf.fqn)
            if twin is not None and not (
                same(leaf.before, twin.before) and same(leaf.after, twin.after) and leaf.bias == twin.bias
            ):
                raise _conflict(view, leaf.fqn, elsewhere)
        hooks = dict(program.hooks)
        unlike: list[Boundary] = []
        for boundary in {**hooks, **view.program.hooks}:
            a, b = hooks.get(boundary, ()), view.program.hooks.get(boundary, ())
            if boundary not in passed:
                continue  # an argument that is left out there, or a result that is (of an image that text has not)
            if boundary.fqn in ran and not a and b and not view.gradients:
                hooks[boundary] = tuple(translate(s) for s in b)
            elif boundary.fqn in ran and not same(a, b):
                unlike.append(boundary)
        if unlike:
            raise _conflict(view, unlike[0].fqn, elsewhere, *view.anchors.alike(unlike[0], unlike))
        wraps = {(w.module, w.frames, w.operand): w for w in program.wraps}
        for wrap in view.program.wraps:
            known = wraps.get((wrap.module, wrap.frames, wrap.operand))
            if known is None:
                steps = tuple(translate(s) for s in wrap.steps)
                wraps[wrap.module, wrap.frames, wrap.operand] = Wrap(
                    wrap.module, wrap.frames, wrap.operand, steps
                )
            elif not same(known.steps, wrap.steps):
                raise _conflict(view, wrap.module, elsewhere)
        draws = tuple(dict.fromkeys((*program.draws, *view.program.draws)))
        program = replace(program, hooks=hooks, wraps=tuple(wraps.values()), draws=draws)
    return program


def _gathered_elsewhere(view: View, program: Program) -> frozenset[str]:
    """The axes that a view gathers where the program does not: sharding those is what makes the two unlike (features
    that text is mixed with, and that text alone would carry on)."""
    known = {(w.module, w.frames, w.operand) for w in program.wraps}
    steps = [s for b, own in view.program.hooks.items() if b not in program.hooks for s in own]
    steps += [s for w in view.program.wraps if (w.module, w.frames, w.operand) not in known for s in w.steps]
    atoms = {a for s in steps if isinstance(s, Gather) for a in atoms_of([s.axes])}
    return frozenset(c.key for c in view.choice.candidates if not atoms.isdisjoint(c.atoms))


def _conflict(view: View, fqn: str, keys: frozenset[str], *places: Barred) -> RewriteError:
    return RewriteError(
        f"{fqn or 'the root module'}: scenario {view.name!r} would need other communication there than the forward",
        fqn,
        keys,
        places=frozenset(places),
    )


class _Translation:
    """Steps of one view in the axes of the main one; axes that are not sharded get numbers of their own."""

    def __init__(self, twins: Mapping[Atom, Atom], number: int) -> None:
        self.twins = dict(twins)
        self.fresh = itertools.count((number + 1) << 32)

    def atom(self, atom: Atom) -> Atom:
        if atom not in self.twins:
            self.twins[atom] = Atom(next(self.fresh), atom.size)
        return self.twins[atom]

    def dim(self, dim: Dim) -> Dim:
        return tuple(
            Cat(tuple(self.dim(part) for part in f.parts)) if isinstance(f, Cat) else self.atom(f)
            for f in dim
        )

    def __call__(self, step: Step) -> Step:
        if isinstance(step, AllReduce):
            return AllReduce(frozenset(map(self.atom, step.common)))
        if isinstance(step, Enter):
            return Enter(frozenset(map(self.atom, step.common)))
        if isinstance(step, Gather):
            return Gather(step.dim, self.dim(step.axes))
        if isinstance(step, Take):
            return Take(step.dim, self.dim(step.axes))
        if isinstance(step, Scale):
            return Scale(tuple(map(self.dim, step.axes)))
        return Mask()
