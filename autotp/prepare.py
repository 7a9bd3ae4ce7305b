"""From a model to a proven rewriting: trace, analyse, plan, rewrite on trial, verify. Changes nothing in the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .axes.analysis import Analysis, analyse
from .axes.term import Atom, show
from .errors import PlanError, RewriteError
from .plan.build import build_plan
from .plan.candidates import Candidate, atoms_of
from .plan.overrides import Overrides
from .plan.plan import Plan
from .plan.planner import Choice, choose
from .rewrite.anchors import Anchors
from .rewrite.apply import LocalConstants
from .rewrite.bind import Rank
from .rewrite.folding import unlike
from .rewrite.steps import Enter
from .rewrite.trial import Rewriting, groups_of, rewrite_and_verify
from .rewrite.views import another_view, first_view
from .runtime.mesh import Verdict, agree
from .trace.capture import trace
from .trace.fold import Folds
from .trace.graph import Trace
from .trace.library import is_transformers
from .trace.scenario import Scenario, scenarios, trace_model
from .trace.skeleton import skeleton

#: How often the planner may be asked again after leaving out axes whose code could not be rewritten.
MOST_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and the edits that carry it out, in the model's own names.

    Attributes:
        used: the parameters that were used in a trace.
    """

    plan: Plan
    rewriting: Rewriting
    tp: int
    used: frozenset[str]

    @property
    def fingerprint(self) -> str:
        return self.plan.fingerprint

    def rank(self, rank: int, prefix: str) -> Rank:
        return Rank(rank, self.tp, self.rewriting.partition, prefix)

    def constants(self, rank: int) -> LocalConstants:
        return self.rewriting.constants[rank]

    def groups(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """The groups that the edits name, under the prefix ''."""
        return groups_of(self.rewriting.program, self.rank(0, ""))


def prepare(
    model: nn.Module,
    tp: int,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    given: Any = None,
    strict: bool = False,
    verify: bool = True,
    mesh: DeviceMesh | None = None,
) -> Prepared:
    """Plan ``model`` over ``tp`` ranks, and prove that it can be rewritten so.

    On a ``mesh`` each rank proves its own part only, and they agree on the outcome; without one, all are proven here.

    Raises:
        AutoTPError: with what, where and what to do.
    """
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise PlanError(f"the tensor-parallel degree has to be a whole number of at least 1, not {tp!r}")
    overrides = Overrides.load(given)
    wanted = scenarios(model, example_inputs)
    traces, folds = trace_model(model, wanted)
    if not overrides.splits(model, folds):
        try:
            return _prepared(model, tp, wanted, traces, folds, overrides, strict, verify, mesh)
        except _UnlikeError:
            pass
    # some of the layers that were folded into one are placed otherwise, or come by their inputs in another way
    traces, folds = trace_model(model, wanted, folded=False)
    return _prepared(model, tp, wanted, traces, folds, overrides, strict, verify, mesh)


class _UnlikeError(Exception):
    """One layer cannot stand for those that it was folded with."""


def _prepared(
    model: nn.Module,
    tp: int,
    wanted: Sequence[Scenario],
    traces: Sequence[Trace],
    folds: Folds,
    overrides: Overrides,
    strict: bool,
    verify: bool,
    mesh: DeviceMesh | None,
) -> Prepared:
    analyses = [analyse(t) for t in traces]
    analysis = analyses[0]
    anchors = Anchors(traces[0])
    allow, require = overrides.apply(analysis, folds, model, tp)
    runs = {scenario.name: scenario for scenario in wanted}
    runs["unmasked"] = replace(runs[analysis.trace.scenario], name="unmasked")

    @cache
    def unmasked() -> Analysis:
        """No choice of axes changes it."""
        return analyse(_retrace(analysis.trace.module, runs["unmasked"]))

    excluded: dict[str, str] = {}
    attempts = 0
    while True:
        choice = choose(
            analysis,
            tp,
            places=anchors.places(),
            allow=lambda c: c.key not in excluded and allow(c),
            require=require,
        )
        fingerprint = _fingerprint(model, analysis, choice, tp)
        ranks = range(tp) if mesh is None else (mesh.get_local_rank(),)
        rewriting: Rewriting | None = None
        failure: RewriteError | None = None
        try:
            rewriting = _rewrite(analyses, choice, anchors, runs, unmasked, folds, tp, ranks, verify)
        except RewriteError as error:
            failure = error
        diff = rewriting.diff if rewriting is not None else ""
        if mesh is not None:
            failure, diff = _agree(mesh, fingerprint, failure, diff)
        if failure is None:
            assert rewriting is not None
            break
        if failure.places - anchors.barred:
            anchors = Anchors(traces[0], anchors.barred | failure.places)
            continue
        culprits = _culprits(analysis, choice, failure)
        if strict or not culprits:
            raise failure
        attempts += 1
        excluded.update((candidate.key, str(failure)) for candidate in culprits)
        if attempts == MOST_ATTEMPTS:
            raise RewriteError("the model could not be rewritten: " + "; ".join(dict.fromkeys(excluded.values())))
    gathers = _gathers(analysis, choice)
    if strict:
        _refuse_replicated(analysis, choice, gathers, tp)
    notes = [*traces[0].notes, *(f"{key} stays whole: {why}" for key, why in excluded.items()), *gathers]
    plan = build_plan(
        model,
        tp,
        analysis,
        choice,
        folds,
        fingerprint=fingerprint,
        diff=diff,
        notes=notes,
    )
    overrides.check(plan)
    ran = {fqn for t in traces for fqn, node in t.params.items() if node.users}
    ran |= {alias for t in traces for alias, fqn in t.aliases.items() if fqn in ran}
    used = frozenset(name for fqn in ran for name in folds.originals(fqn))
    return Prepared(plan, rewriting.unfolded(folds.originals), tp, used)


def _agree(
    mesh: DeviceMesh, fingerprint: str, failure: RewriteError | None, diff: str
) -> tuple[RewriteError | None, str]:
    """One rank's failure is everyone's: the first of them, and the patches of rank 0."""
    error = None if failure is None else (str(failure), failure.module, tuple(sorted(failure.keys)))
    verdicts = agree(mesh, Verdict("attempt", fingerprint, error=error, diff=diff))
    failures = [verdict.error for verdict in verdicts]
    if any(other != error for other in failures):  # its places mean nothing to a rank that did not meet it
        text, module, keys = next(found for found in failures if found is not None)
        failure = RewriteError(text, module, frozenset(keys))
    return failure, verdicts[0].diff


def _rewrite(
    analyses: Sequence[Analysis],
    choice: Choice,
    anchors: Anchors,
    runs: Mapping[str, Scenario],
    unmasked: Callable[[], Analysis],
    folds: Folds,
    tp: int,
    ranks: Sequence[int],
    verify: bool,
) -> Rewriting:
    base = analyses[0].trace.module

    def retrace(name: str) -> Callable[[nn.Module], Trace]:
        return lambda rewritten: _retrace(rewritten, runs[name])

    main = first_view(analyses[0], choice, anchors, retrace(analyses[0].trace.scenario))
    others = [
        another_view(main, a, retrace(a.trace.scenario), gradients=a.trace.scenario != "decode")
        for a in analyses[1:]
    ]
    enters = any(isinstance(step, Enter) for wrap in main.program.wraps for step in wrap.steps)
    if enters and is_transformers(base):  # a patch that runs only where there is a mask would be missed without one
        others.append(another_view(main, unmasked(), retrace("unmasked"), gradients=True))
    if any(unlike(view, folds, tp) for view in (main, *(view for view, _ in others))):
        raise _UnlikeError
    return rewrite_and_verify(lambda: skeleton(base), main, others, tp, ranks, verify=verify)


def _retrace(module: nn.Module, run: Scenario) -> Trace:
    return trace(module, run.args, run.kwargs, run.name, training=run.training, run=run.run)


def _culprits(analysis: Analysis, choice: Choice, error: RewriteError) -> list[Candidate]:
    """The sharded axes in the error's way: those that it names, else those that ops of its module touch, else of the
    modules inside that one, else of the module around it (a ReLU works on a whole value, which others shard)."""
    if error.keys:
        return [c for c in choice.candidates if c.key in error.keys]
    module = error.module
    while module is not None:
        own: set[Atom] = set()
        inner: set[Atom] = set()
        for node, info in analysis.ops.items():
            where = node.meta.get("module", "")
            found = own if where == module else inner if where.startswith(f"{module}." if module else "") else None
            if found is not None:
                for dims in (*info.out, *(operand.dims for operand in info.operands)):
                    found |= set(atoms_of(dims))
        for atoms in (own, inner):
            culprits = [c for c in choice.candidates if atoms & set(c.atoms)]
            if culprits:
                return culprits
        module = module.rpartition(".")[0] if module else None
    return []


def _gathers(analysis: Analysis, choice: Choice) -> list[str]:
    """Ops that what is sharded had to be gathered for, because autotp does not know them or cannot split them."""
    gathered = {c.consumer for c in choice.communication.conversions if c.kind == "gather"}
    return [f"gathered for {n}" for n in analysis.notes if n.node in gathered]


def _refuse_replicated(analysis: Analysis, choice: Choice, gathers: Sequence[str], tp: int) -> None:
    """With ``strict``: every weight matrix has to be sharded, and no op may force a gather."""
    hint = "Leave strict out, or choose another degree."
    if gathers:
        raise PlanError(f"strict: at tp={tp}, {'; '.join(gathers)}. {hint}")
    sharded = {a for c in choice.candidates for a in c.atoms}
    for fqn, node in analysis.trace.params.items():
        dims = analysis.dims[node][0]
        if fqn not in analysis.trace.is_buffer and len(dims) > 1 and not sharded & set(atoms_of(dims)):
            reasons = [str(note) for note in analysis.notes][:3]
            raise PlanError(
                f"strict: {fqn} ({', '.join(show(d) for d in dims)}) stays whole at tp={tp}. "
                + (f"Ops that need an axis whole: {'; '.join(reasons)}. " if reasons else "")
                + hint
            )


def _fingerprint(model: nn.Module, analysis: Analysis, choice: Choice, tp: int) -> str:
    """A hash of the model's parameters and of the plan: ranks whose fingerprints differ must not run together."""
    lines = [f"tp {tp}"]
    lines += [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters()]
    lines += [f"{c.key} {c.ranges}" for c in choice.candidates]
    comm = choice.communication
    lines += sorted(f"reduce {n.name}" for n in comm.reduce) + sorted(f"enter {n.name}" for n in comm.enter)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
