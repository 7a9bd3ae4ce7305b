"""The edits of a plan: which steps go to which leaf module, module boundary or expression; the same for every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..axes.term import Dim
from ..trace.graph import Path, Site
from .anchors import Boundary, LeafKind
from .steps import Step

Bias = Literal["local", "after", "masked"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf module that is swapped for its sharded class.

    Attributes:
        before: steps on the inputs at ``ports``; after: steps on its output.
        bias: added locally, once after the reduce, or on one rank only because the output stays Partial.
        share: leaves with the same number enter the same value and share its gradient's all-reduce.
        rows: the first dim of a convolution's weight.
    """

    fqn: str
    kind: LeafKind
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    bias: Bias = "local"
    share: int | None = None
    ports: frozenset[Path] = frozenset()
    rows: Dim | None = None


@dataclass(frozen=True, slots=True)
class Wrap:
    """Steps on an expression of the source: its value (``operand`` None) or one of its operands."""

    module: str
    frames: tuple[Site, ...]
    operand: Path | None
    steps: tuple[Step, ...]
    share: int | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers for a sharded value: each rank draws its own. In all of a module, or (``frames``) in one call."""

    module: str
    frames: tuple[Site, ...] | None = None
    operand: Path | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """All edits but the local constants. ``hooks``: each boundary's steps; ``sync``: the axes a parameter holds;
    ``hook_share``: the share numbers of hooks that enter a value which others enter too, see `Leaf`."""

    slices: Mapping[str, tuple[Dim, ...]]
    leaves: tuple[Leaf, ...]
    hooks: Mapping[Boundary, tuple[Step, ...]]
    wraps: tuple[Wrap, ...]
    sync: Mapping[str, tuple[Dim, ...]]
    draws: tuple[Draw, ...] = ()
    hook_share: Mapping[Boundary, int] = field(default_factory=dict)

    @property
    def shares(self) -> tuple[int, ...]:
        """The share numbers, as often as something takes that shared gradient sum."""
        takers: tuple[Leaf | Wrap, ...] = (*self.leaves, *self.wraps)
        return (*(t.share for t in takers if t.share is not None), *self.hook_share.values())

    def unfolded(self, originals: Callable[[str], Sequence[str]]) -> Program:
        """The same edits for every module that a folded skeleton's module stands for."""
        most = max(self.shares, default=0) + 1

        def share(number: int | None, copy: int) -> int | None:
            return None if number is None else number + copy * most

        return Program(
            {name: dims for fqn, dims in self.slices.items() for name in originals(fqn)},
            tuple(
                replace(leaf, fqn=name, share=share(leaf.share, i))
                for leaf in self.leaves
                for i, name in enumerate(originals(leaf.fqn))
            ),
            {replace(b, fqn=name): steps for b, steps in self.hooks.items() for name in originals(b.fqn)},
            tuple(
                replace(wrap, module=name, share=share(wrap.share, i))
                for wrap in self.wraps
                for i, name in enumerate(originals(wrap.module))
            ),
            {name: dims for fqn, dims in self.sync.items() for name in originals(fqn)},
            tuple(replace(draw, module=name) for draw in self.draws for name in originals(draw.module)),
            {
                replace(b, fqn=name): number + i * most
                for b, number in self.hook_share.items()
                for i, name in enumerate(originals(b.fqn))
            },
        )
