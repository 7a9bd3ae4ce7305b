"""Faults: each is one small change to the edits of a proven plan, as a compiler with a bug might have made it.

`faults` gives each a name that is the same in every process, so that the ranks of a test can be told which.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autotp.axes.layout import Partition
from autotp.axes.term import Atom, Cat, Dim
from autotp.rewrite.apply import LocalConstants
from autotp.rewrite.bind import Rank
from autotp.rewrite.edits import SizeAt
from autotp.rewrite.patch import Patch
from autotp.rewrite.program import Program
from autotp.rewrite.splice import Scaled
from autotp.rewrite.steps import AllReduce, Enter, Gather, Mask, Step, Take

Steps = tuple[Step, ...]
_OTHER = 1 << 40  # added to the id of an axis: the same axis, with each rank given the next one's range


@dataclass(frozen=True)
class Fault:
    what: str
    program: Program
    constants: LocalConstants


def with_other_ranges(rank: Rank) -> Rank:
    """The rank, in a partition that also has the axes that `faults` puts in the place of others."""
    ranges = dict(rank.partition.ranges)
    ranges.update({i + _OTHER: (*r[1:], r[0]) for i, r in rank.partition.ranges.items()})
    return replace(rank, partition=Partition(ranges))


def faults(program: Program, constants: LocalConstants, rank: Rank) -> dict[str, Fault]:
    """Every fault, by what it is."""
    found = {what: Fault(what, changed, constants) for what, changed in _programs(program, rank)}
    return found | {what: Fault(what, program, other) for what, other in _constants(constants)}


def _programs(program: Program, rank: Rank) -> Iterator[tuple[str, Program]]:
    for i, leaf in enumerate(program.leaves):
        others = (*program.leaves[:i], *program.leaves[i + 1 :])

        def changed(others: Any = others, leaf: Any = leaf, **fields: Any) -> Program:
            return replace(program, leaves=(*others, replace(leaf, **fields)))

        yield f"{leaf.fqn}: not swapped", replace(program, leaves=others)
        for what, steps in _steps(leaf.before, rank):
            yield f"{leaf.fqn}: before, {what}", changed(before=steps)
        for what, steps in _steps(leaf.after, rank):
            yield f"{leaf.fqn}: after, {what}", changed(after=steps)
        for bias in sorted({"local", "after", "masked"} - {leaf.bias}):
            yield f"{leaf.fqn}: bias {bias}, not {leaf.bias}", changed(bias=bias)
        if leaf.share is not None:
            yield f"{leaf.fqn}: enters alone", changed(share=None)
        for port in sorted(leaf.ports, key=str):
            yield f"{leaf.fqn}: not at {port}", changed(ports=leaf.ports - {port})
        if leaf.kind == "attention":
            for name in ("query", "key", "value"):
                yield f"{leaf.fqn}: at {name} too", changed(ports=leaf.ports | {("kwargs", name)})
    for boundary, steps in program.hooks.items():
        for what, other in _steps(steps, rank):
            yield f"hook {boundary}: {what}", replace(program, hooks={**program.hooks, boundary: other})
    for (a, mine), (b, theirs) in itertools.combinations(program.hooks.items(), 2):
        if mine != theirs:
            yield f"hooks {a} and {b} swapped", replace(program, hooks={**program.hooks, a: theirs, b: mine})
    for i, wrap in enumerate(program.wraps):
        for what, steps in _steps(wrap.steps, rank):
            wraps = (
                *program.wraps[:i],
                *([replace(wrap, steps=steps)] if steps else []),
                *program.wraps[i + 1 :],
            )
            yield f"wrap {wrap.frames[0]}: {what}", replace(program, wraps=wraps)
        if wrap.share is not None:
            wraps = (*program.wraps[:i], replace(wrap, share=None), *program.wraps[i + 1 :])
            yield f"wrap {wrap.frames[0]}: enters alone", replace(program, wraps=wraps)
    for fqn in program.sync:
        yield f"{fqn}: gradient not summed", replace(program, sync=_without(program.sync, fqn))
    for fqn, dims in program.slices.items():
        yield f"{fqn}: whole", replace(program, slices=_without(program.slices, fqn))
        if fqn not in program.sync:
            yield f"{fqn}: gradient summed", replace(program, sync={**program.sync, fqn: dims})
        others = tuple(_renumbered(dim, rank) for dim in dims)
        yield f"{fqn}: the slice of another rank", replace(program, slices={**program.slices, fqn: others})


def _steps(steps: Steps, rank: Rank) -> Iterator[tuple[str, Steps]]:
    """The steps with one dropped, changed or added."""
    for i, step in enumerate(steps):

        def with_step(other: Step, i: int = i) -> Steps:
            return (*steps[:i], other, *steps[i + 1 :])

        name = type(step).__name__
        yield f"{name} dropped", (*steps[:i], *steps[i + 1 :])
        if isinstance(step, AllReduce | Enter):
            yield f"{name} done twice", (*steps[: i + 1], *steps[i:])
            other = Enter if isinstance(step, AllReduce) else AllReduce
            yield f"{other.__name__}, not {name}", with_step(other(step.common))
            if step.common:
                yield f"{name} over all ranks", with_step(type(step)())
        elif isinstance(step, Take | Gather):
            yield f"{name} along another dim", with_step(replace(step, dim=step.dim - 1))
            yield (
                f"{name} of another rank's part",
                with_step(replace(step, axes=_renumbered(step.axes, rank))),
            )
        elif isinstance(step, Mask):
            yield "summed, not masked", with_step(AllReduce())
    for extra in (AllReduce(), Enter(), Mask()):
        if not steps or type(extra) is not type(steps[-1]):
            yield f"{type(extra).__name__} added", (*steps, extra)
    for a, b in itertools.combinations(range(len(steps)), 2):
        if type(steps[a]) is not type(steps[b]):
            swapped = list(steps)
            swapped[a], swapped[b] = steps[b], steps[a]
            yield f"{a} and {b} in the other order", tuple(swapped)


def _constants(constants: LocalConstants) -> Iterator[tuple[str, LocalConstants]]:
    for key, value in constants.attrs.items():
        where = f"{key[0]}.{'.'.join(map(str, key[1]))}"
        yield f"{where} not set", replace(constants, attrs=_without(constants.attrs, key))
        for other in (value + 1, value - 1, 2 * value):
            yield f"{where} = {other}, not {value}", replace(constants, attrs={**constants.attrs, key: other})
    for fqn, patches in constants.patches.items():
        for i, patch in enumerate(patches):

            def changed(
                new: tuple[Patch, ...], fqn: str = fqn, patches: Any = patches, i: int = i
            ) -> LocalConstants:
                found = (*patches[:i], *new, *patches[i + 1 :])
                return replace(constants, patches={**constants.patches, fqn: found})

            yield f"{patch.frames[0]} not patched", changed(())
            (edit,) = patch.edits
            assert isinstance(edit, SizeAt)
            for size in _other_sizes(edit.value):
                yield (
                    f"{patch.frames[0]}: size {size}",
                    changed((replace(patch, edits=(replace(edit, value=size),)),)),
                )


def _other_sizes(value: int | Scaled) -> list[int | Scaled]:
    if isinstance(value, Scaled):
        return [Scaled(value.local + 1, value.whole), Scaled(2 * value.local, value.whole)]
    return [value + 1, value - 1, 2 * value]


def _without(mapping: Mapping[Any, Any], key: Any) -> dict[Any, Any]:
    return {k: v for k, v in mapping.items() if k != key}


def _renumbered(dim: Dim, rank: Rank) -> Dim:
    """The same dim, with sharded axes whose ranges are those of the next rank."""
    return tuple(
        Cat(tuple(_renumbered(part, rank) for part in factor.parts))
        if isinstance(factor, Cat)
        else Atom(factor.id + _OTHER, factor.size)
        if factor.id in rank.partition.ranges
        else factor
        for factor in dim
    )
