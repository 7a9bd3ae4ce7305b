"""Fold runs of repeated layers, so that a model of 126 layers is traced and planned at the cost of three.

A run is a stretch of the children of a `ModuleList` or `Sequential` that repeat with some period (1 in Llama,
2 in Gemma 2 with its alternating windows, 6 in Gemma 3). The first two periods and the last one stay, the
second stands for all between: the first and the last may differ from them in what surrounds them, the others
cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from autotp.trace.alike import Alike
from autotp.trace.attributes import int_attributes
from autotp.trace.provenance import Attr

LONGEST_PERIOD = 8


@dataclass(frozen=True, slots=True)
class Folds:
    """What a folded skeleton's modules stand for in the model, by the prefix of their names."""

    stands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    watched: frozenset[Attr] = frozenset()
    """Integers that may differ within a run, because each is its layer's own index."""
    suspect: set[Attr] = field(default_factory=set)
    """Those of them that the forward branched on, as `trace` finds: then layers differ, and folding was
    wrong."""

    def originals(self, fqn: str) -> tuple[str, ...]:
        """The names in the model of the module or parameter that the skeleton calls `fqn`."""
        prefix = fqn
        while prefix and prefix not in self.stands:
            prefix = prefix.rpartition(".")[0]
        return tuple(name + fqn[len(prefix) :] for name in self.stands[prefix]) if prefix else (fqn,)

    def __bool__(self) -> bool:
        return bool(self.stands)


@dataclass(frozen=True, slots=True)
class _Run:
    start: int
    period: int
    periods: int


def fold(skeleton: nn.Module) -> Folds:
    """Shorten the runs of repeated children in `skeleton` (in place) and say what the remaining ones stand
    for."""
    uses = Counter(id(m) for _, m in skeleton.named_modules(remove_duplicate=False))
    tied = Counter(id(p) for _, p in skeleton.named_parameters(remove_duplicate=False))
    alike = Alike(frozenset(i for i, n in tied.items() if n > 1))
    stands: dict[str, tuple[str, ...]] = {}
    _fold_children(skeleton, "", ("",), alike, uses, stands)
    watched = frozenset(
        Attr(fqn, path)
        for fqn, m in skeleton.named_modules()
        for path, value in int_attributes(m)
        if (type(m), path) in alike.indices and _has_index(fqn, value, stands)
    )
    return Folds(stands, watched)


def _fold_children(
    module: nn.Module,
    prefix: str,
    originals: tuple[str, ...],
    alike: Alike,
    uses: Counter[int],
    stands: dict[str, tuple[str, ...]],
) -> None:
    """Fold below `module`, which is `prefix` in the skeleton and stands for `originals` in the model."""
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in module._modules}
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        names = _fold_list(module, alike, uses)
    for name, stood in names.items():
        fqn = f"{prefix}.{name}" if prefix else name
        wholes = tuple(f"{o}.{s}" if o else s for o in originals for s in stood)
        if stood != (name,):
            stands[fqn] = wholes
        child = module._modules[name]
        if child is not None:
            _fold_children(child, fqn, wholes, alike, uses, stands)


def _fold_list(module: nn.Module, alike: Alike, uses: Counter[int]) -> dict[str, tuple[str, ...]]:
    """Shorten one list; the names of its new children and the old names that each stands for."""
    children = list(module._modules.items())
    present = [child for _, child in children if child is not None]
    unchanged: dict[str, tuple[str, ...]] = {name: (name,) for name, _ in children}
    if len(present) < len(children) or any(uses[id(child)] > 1 for child in present):
        return unchanged
    kept: list[list[int]] = []
    at = 0
    for run in _runs(present, alike):
        kept += [[i] for i in range(at, run.start)]
        p, end = run.period, run.start + run.period * run.periods
        kept += [[run.start + i] for i in range(p)]
        kept += [list(range(run.start + p + i, end - p, p)) for i in range(p)]
        kept += [[end - p + i] for i in range(p)]
        at = end
    kept += [[i] for i in range(at, len(present))]
    if len(kept) == len(children):
        return unchanged
    numbered = all(name == str(i) for i, (name, _) in enumerate(children))
    made: dict[str, tuple[str, ...]] = {}
    module._modules.clear()
    for position, group in enumerate(kept):
        name = str(position) if numbered else children[group[0]][0]
        made[name] = tuple(children[i][0] for i in group)
        module._modules[name] = present[group[0]]
    return made


def _runs(children: list[nn.Module], alike: Alike) -> Iterator[_Run]:
    """The repeating stretches worth folding, from left to right. The period that reaches furthest wins: five
    alike layers within a pattern of six are no run of their own."""
    start = 0
    while start < len(children):
        best = _Run(start, 1, 1)
        for period in range(1, LONGEST_PERIOD + 1):
            periods = (_reach(children, alike, start, period) - start) // period
            if periods >= (5 if period == 1 else 4) and period * periods > best.period * best.periods:
                best = _Run(start, period, periods)
            if start + best.period * best.periods == len(children):
                break
        if best.periods > 1:
            yield best
        start += best.period * best.periods


def _reach(children: list[nn.Module], alike: Alike, start: int, period: int) -> int:
    """Where the children from `start` on cease to repeat with `period`."""
    end = start + period
    while end < len(children) and alike.layers(children[end - period], children[end], end - period, end):
        end += 1
    return end


def _has_index(fqn: str, value: int, stands: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether `value` is an index in the name that the model has for `fqn`."""
    return str(value) in Folds(stands).originals(fqn)[0].split(".")
