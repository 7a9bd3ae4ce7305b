"""Try a choice of axes on skeletons: solve the local constants of each kind of rank, rewrite, trace again, verify."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from ..axes.analysis import Analysis
from ..axes.term import atoms_of as term_atoms
from ..errors import AutoTPError, RewriteError, VerifyError
from ..plan.planner import Choice
from ..runtime.group import pretend_group
from ..trace.graph import Trace
from ..trace.provenance import AttrPath, Const, Dim, Expr, Op, evaluate, expression
from .anchors import Anchors
from .apply import AttrKey, LocalConstants, apply, attribute_of, sharded_atoms
from .bind import Rank
from .constants import Equation, solve
from ..axes.layout import Partition
from .patch import Patch, SizeAt
from .program import Program, compile_program
from .splice import Scaled
from .steps import AllReduce, Enter
from .verify import Verifier
from .wanted import Wanted, wanted_ints


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A verified rewriting: its program, each rank's constants, and the patches as a diff of the user's source."""

    program: Program
    partition: Partition
    constants: tuple[LocalConstants, ...]
    diff: str

    def unfolded(self, originals: Callable[[str], Sequence[str]]) -> Rewriting:
        """For the whole model, where this was proven on a folded one."""
        constants = tuple(
            LocalConstants(
                {(name, path): v for (fqn, path), v in c.attrs.items() for name in originals(fqn)},
                {name: found for fqn, found in c.patches.items() for name in originals(fqn)},
            )
            for c in self.constants
        )
        return replace(self, program=self.program.unfolded(originals), constants=constants)


def local_constants(
    model: nn.Module, analysis: Analysis, program: Program, anchors: Anchors, rank: Rank, frozen: frozenset[AttrKey]
) -> LocalConstants:
    """The attributes and size arguments of one rank.

    Raises:
        RewriteError: a size that has to be local is hidden where no patch reaches it.
    """
    swapped = {leaf.fqn for leaf in program.leaves}
    skip = frozenset(node for node in analysis.ops if anchors.leaf_of(node) in swapped)
    wanted, lost = wanted_ints(analysis, rank, skip)
    if lost:
        first = lost[0]
        raise RewriteError(
            f"{analysis.trace.where(first.node)}: {first.node.target} needs size {first.local} in place of {first.value} "
            f"on rank {rank.rank}, which no argument in the code says",
            first.node.meta.get("module", ""),
        )
    whole = attribute_of(model)

    def dim(node: fx.Node, d: int) -> int:
        dims = analysis.dims.get(node)
        value = node.meta["val"]
        return rank.size(dims[0][d]) if dims else int(value.shape[d])

    equations = [
        Equation(expression(want.call.ints[want.index][1]), want.local, want.call.site, want) for want in wanted
    ]
    solution = solve([e for e in equations if not isinstance(e.expr, Const)], whole, dim, frozen)
    unsolved: list[Wanted] = [e.tag for e in solution.unsolved if isinstance(e.tag, Wanted)]
    unsolved += [e.tag for e in equations if isinstance(e.expr, Const) and isinstance(e.tag, Wanted) and e.expr.value != e.want]
    patches: dict[str, list[Patch]] = defaultdict(list)
    for want in unsolved:
        if not want.call.frames:
            raise RewriteError(
                f"{want.call.module}: {want.call.func} needs size {want.local} in place of {want.value} on rank {rank.rank}, "
                "but no expression of the source passes it",
                want.call.module,
            )
        value = _patched_size(want, analysis, dim, lambda fqn, path: solution.attrs.get((fqn, path), whole(fqn, path)))
        patches[want.call.module].append(Patch(want.call.frames, (SizeAt.of(want.call, want.index, value),)))
    return LocalConstants(dict(solution.attrs), {fqn: tuple(dict.fromkeys(found)) for fqn, found in patches.items()})


def _patched_size(
    want: Wanted,
    analysis: Analysis,
    dim: Callable[[fx.Node, int], int],
    attr: Callable[[str, AttrPath], int],
) -> int | Scaled:
    """A constant; or, where the size also counts the batch or the sequence, what the code says in proportion."""
    expr = expression(want.call.ints[want.index][1])
    if not any(_varies(analysis, leaf) for leaf in sizes_in(expr)):
        return want.local
    said = evaluate(expr, attr, dim)
    return Scaled(want.local, said)


def _varies(analysis: Analysis, size: Dim) -> bool:
    """Whether a size is the batch's or the sequence's: an axis of an input, which another call may have of another size."""
    dims = analysis.dims.get(size.node)
    return dims is None or any(atom in analysis.frozen for atom in term_atoms(dims[0][size.dim]))


def sizes_in(expr: Expr) -> Iterator[Dim]:
    """The sizes of values in an expression."""
    if isinstance(expr, Dim):
        yield expr
    elif isinstance(expr, Op):
        for arg in expr.args:
            yield from sizes_in(arg)


def rewrite_and_verify(
    make_skeleton: Callable[[], nn.Module],
    retrace: Callable[[nn.Module], Trace],
    analysis: Analysis,
    choice: Choice,
    anchors: Anchors,
    tp: int,
    prefix: str,
    verify: bool = True,
) -> Rewriting:
    """Compile the choice to edits and prove them on skeletons, one for each kind of rank.

    Raises:
        RewriteError: the code cannot be edited so; VerifyError: it can, but does not compute what was planned.
    """
    program = compile_program(analysis, choice, anchors)
    partition = Partition({atom.id: ranges for atom, ranges in choice.ranges.items()})
    verifier = Verifier(analysis, choice, program, anchors)
    constants: list[LocalConstants] = []
    proven: dict[object, LocalConstants] = {}
    diff = ""
    if not verify:
        return Rewriting(program, partition, (), "")
    for r in range(tp):
        rank = Rank(r, tp, partition, prefix)
        kind = tuple(stop - start for ranges in partition.ranges.values() for start, stop in [ranges[r]])
        if kind not in proven:
            proven[kind], patches = _prove(make_skeleton, retrace, analysis, program, anchors, verifier, rank)
            diff = diff or patches
        constants.append(proven[kind])
    return Rewriting(program, partition, tuple(constants), diff)


def _prove(
    make_skeleton: Callable[[], nn.Module],
    retrace: Callable[[nn.Module], Trace],
    analysis: Analysis,
    program: Program,
    anchors: Anchors,
    verifier: Verifier,
    rank: Rank,
) -> tuple[LocalConstants, str]:
    """Solve, rewrite, trace and verify; once more without changed attributes in the module where it failed."""
    frozen: frozenset[AttrKey] = frozenset()
    first: AutoTPError | None = None
    while True:
        model = make_skeleton()
        constants = local_constants(model, analysis, program, anchors, rank, frozen)
        try:
            with pretend_groups(program, rank):
                applied = apply(model, program, constants, rank)
                verifier.verify(retrace(model), rank)
            return constants, "".join(a.diff() for a in applied)
        except AutoTPError as error:
            first = first or error
            if not constants.attrs:
                raise first if isinstance(first, RewriteError) else VerifyError(str(first)) from error
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
    commons += [frozenset(sharded_atoms(dims, rank)) for dims in program.sync.values()]
    for common in commons:
        found[rank.group(common)] = rank.parts(common)
    return found
