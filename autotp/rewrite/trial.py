"""Try a choice of axes on skeletons: solve the local constants of each kind of rank, rewrite, trace again, verify."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from ..axes.analysis import Analysis
from ..axes.layout import Partition
from ..axes.term import Atom
from ..axes.term import atoms_of as term_atoms
from ..errors import AutoTPError, RewriteError, VerifyError
from ..plan.proof import prove
from ..runtime.group import pretend_group
from ..trace.provenance import AttrPath, Const, Dim, evaluate, expression, sizes_in
from .apply import AttrKey, LocalConstants, apply, attribute_of
from .bind import Rank, group_name
from .constants import Equation, solve
from .patch import Patch, SizeAt
from .program import Program
from .splice import Scaled
from .steps import AllReduce, Enter
from .verify import Verifier
from .views import View, merged
from .wanted import Wanted, wanted_ints


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A verified rewriting: its program, the constants of each proven rank, and the patches as a diff of the source."""

    program: Program
    partition: Partition
    constants: Mapping[int, LocalConstants]
    diff: str

    def unfolded(self, originals: Callable[[str], Sequence[str]]) -> Rewriting:
        """For the whole model, where this was proven on a folded one."""
        constants = {
            rank: LocalConstants(
                {(name, path): v for (fqn, path), v in c.attrs.items() for name in originals(fqn)},
                {name: found for fqn, found in c.patches.items() for name in originals(fqn)},
            )
            for rank, c in self.constants.items()
        }
        return replace(self, program=self.program.unfolded(originals), constants=constants)


def local_constants(
    model: nn.Module, views: Sequence[View], rank: int, tp: int, prefix: str, frozen: frozenset[AttrKey]
) -> LocalConstants:
    """The attributes and size arguments of one rank, right in every scenario.

    Raises:
        RewriteError: a size that has to be local is hidden where no patch reaches it.
    """
    whole = attribute_of(model)
    sizes: dict[fx.Node, Callable[[int], int]] = {}
    equations: list[Equation] = []
    home: dict[int, tuple[Analysis, frozenset[Atom]]] = {}
    for view in views:
        own = view.rank(rank, tp, prefix)
        found_in = view.analysis, _widths(view.analysis)
        sizes.update(_local_sizes(view.analysis, own))
        for want in _wanted(view, own):
            home[id(want)] = found_in
            equations.append(
                Equation(expression(want.call.ints[want.index][1]), want.local, want.call.site, want)
            )

    def dim(node: fx.Node, d: int) -> int:
        return sizes[node](d)

    solution = solve([e for e in equations if not isinstance(e.expr, Const)], whole, dim, frozen)
    unsolved = [
        *solution.unsolved,
        *(e for e in equations if isinstance(e.expr, Const) and e.expr.value != e.want),
    ]
    patches: dict[str, list[Patch]] = defaultdict(list)
    for equation in unsolved:
        assert isinstance(equation.tag, Wanted)
        want = equation.tag
        if not want.call.frames:
            raise RewriteError(
                f"{want.call.module}: {want.call.func} needs size {want.local} in place of {want.value} on rank "
                f"{rank}, but no expression of the source passes it",
                want.call.module,
            )
        if want.call.twin_of:
            raise RewriteError(
                f"{want.call}: size {want.local} is needed in place of {want.value} on rank {rank}, in code that only "
                f"stands in for {want.call.twin_of!r}; whether that needs it too is not known",
                want.call.module,
            )
        value = _patched_size(
            want,
            *home[id(want)],
            dim,
            lambda fqn, path: solution.attrs.get((fqn, path), whole(fqn, path)),
        )
        patches[want.call.module].append(Patch(want.call.frames, (SizeAt.of(want.call, want.index, value),)))
    return LocalConstants(
        dict(solution.attrs), {fqn: tuple(dict.fromkeys(found)) for fqn, found in patches.items()}
    )


def _local_sizes(analysis: Analysis, rank: Rank) -> Mapping[fx.Node, Callable[[int], int]]:
    def of(node: fx.Node) -> Callable[[int], int]:
        dims = analysis.dims.get(node)
        return lambda d: rank.size(dims[0][d]) if dims else int(node.meta["val"].shape[d])

    return {node: of(node) for node in analysis.trace.graph.nodes}


def _wanted(view: View, rank: Rank) -> list[Wanted]:
    swapped = {leaf.fqn for leaf in view.program.leaves}
    skip = frozenset(node for node in view.analysis.ops if view.anchors.leaf_of(node) in swapped)
    wanted, lost = wanted_ints(view.analysis, rank, skip)
    if lost:
        first = lost[0]
        raise RewriteError(
            f"{view.analysis.trace.where(first.node)}: {first.node.target} needs size {first.local} in place of "
            f"{first.value} on rank {rank.rank}, which no argument in the code says",
            first.node.meta.get("module", ""),
        )
    return wanted


def _patched_size(
    want: Wanted,
    analysis: Analysis,
    widths: frozenset[Atom],
    dim: Callable[[fx.Node, int], int],
    attr: Callable[[str, AttrPath], int],
) -> int | Scaled:
    """A constant; or, where the size also counts the batch or the sequence, what the code says in proportion."""
    expr = expression(want.call.ints[want.index][1])
    if not any(_varies(analysis, widths, leaf) for leaf in sizes_in(expr)):
        return want.local
    said = evaluate(expr, attr, dim)
    return Scaled(want.local, said)


def _widths(analysis: Analysis) -> frozenset[Atom]:
    """The axes of parameters and buffers: those whose sizes are the model's, whatever it is given."""
    tensors = analysis.trace.params.values()
    return frozenset(a for node in tensors for dim in analysis.dims[node][0] for a in term_atoms(dim))


def _varies(analysis: Analysis, widths: frozenset[Atom], size: Dim) -> bool:
    """Whether a size may be another one in another call: an input's, or one that values decide (what a mask picks)."""
    dims = analysis.dims.get(size.node)
    atoms = frozenset(term_atoms(dims[0][size.dim])) if dims else frozenset()
    return not dims or not analysis.frozen.isdisjoint(atoms) or not atoms <= widths


def rewrite_and_verify(
    make_skeleton: Callable[[], nn.Module],
    main: View,
    others: Sequence[tuple[View, Mapping[Atom, Atom]]],
    tp: int,
    ranks: Sequence[int],
    prefix: str = "",
    verify: bool = True,
) -> Rewriting:
    """Prove the choice, compile it to edits and prove them on skeletons, in every scenario, for each kind of the
    ``ranks``.

    Raises:
        RewriteError: the code cannot be edited so; VerifyError: it can, but does not compute what was planned, or what
            was planned is not what the model computes.
    """
    program = merged(main, others, tp)
    views = [main, *(view for view, _ in others)]
    partition = main.rank(0, tp, prefix).partition
    if not verify:
        return Rewriting(program, partition, {}, "")
    for view in views:
        prove(view.analysis, view.choice.communication, view.choice.ranges, view.gradients)
    verifiers = [Verifier(v.analysis, v.choice, v.program, v.anchors, v.gradients) for v in views]
    constants: dict[int, LocalConstants] = {}
    proven: dict[object, LocalConstants] = {}
    diff = ""
    for r in ranks:
        kind = tuple(stop - start for ranges in partition.ranges.values() for start, stop in [ranges[r]])
        if kind not in proven:
            proven[kind], patches = _prove(make_skeleton, program, views, verifiers, main.rank(r, tp, prefix))
            diff = diff or patches
        constants[r] = proven[kind]
    return Rewriting(program, partition, constants, diff)


def _prove(
    make_skeleton: Callable[[], nn.Module],
    program: Program,
    views: Sequence[View],
    verifiers: Sequence[Verifier],
    rank: Rank,
) -> tuple[LocalConstants, str]:
    """Solve, rewrite, trace and verify; once more without changed attributes where that failed."""
    frozen: frozenset[AttrKey] = frozenset()
    first: AutoTPError | None = None
    while True:
        model = make_skeleton()
        constants = local_constants(model, views, rank.rank, rank.tp, rank.prefix, frozen)
        try:
            with pretend_groups(program, rank):
                applied = apply(model, program, constants, rank)
                for view, verifier in zip(views, verifiers, strict=True):
                    verifier.verify(view.retrace(model), view.rank(rank.rank, rank.tp, rank.prefix))
            return constants, "".join(a.diff() for a in applied)
        except AutoTPError as error:
            first = first or error
            if not constants.attrs:
                if isinstance(first, RewriteError):
                    raise first from error
                raise VerifyError(
                    f"the rewritten model does not run: {first}", getattr(first, "module", None)
                ) from error
            frozen |= frozenset(constants.attrs)


def pretend_groups(program: Program, rank: Rank) -> contextlib.ExitStack:
    """The groups that this rank's program names, without communication."""
    stack = contextlib.ExitStack()
    for name, parts in groups_of(program, rank).items():
        part = next(p for p in parts if rank.rank in p)
        stack.enter_context(pretend_group(name, part.index(rank.rank), len(part)))
    return stack


def groups_of(program: Program, rank: Rank) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Every group of the program: name → the ranks of each of its parts."""
    everyone: tuple[tuple[int, ...], ...] = (tuple(range(rank.tp)),)
    found = {rank.prefix: everyone}
    steps = [s for leaf in program.leaves for s in (*leaf.before, *leaf.after)]
    steps += [s for hook in program.hooks.values() for s in hook]
    steps += [s for wrap in program.wraps for s in wrap.steps]
    commons = [s.common for s in steps if isinstance(s, (AllReduce, Enter))]
    for common in commons:
        found[rank.group(common)] = rank.parts(common)
    for fqn, dims in program.sync.items():
        parts, _ = rank.gradient_sum(fqn, dims)
        found[group_name(rank.prefix, parts)] = parts
    return found
