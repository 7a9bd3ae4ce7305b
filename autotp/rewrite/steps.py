"""What can be done to one value on its way: the vocabulary in which edits are written, the same for every rank.

A step becomes a callable for one rank by `bind.bind`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..axes.term import Atom, Dim


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Partial → Replicate, over the ranks that hold the same ranges of the axes in ``common``."""

    common: frozenset[Atom] = frozenset()


@dataclass(frozen=True, slots=True)
class Enter:
    """Replicate → used by sharded ops: the gradient is all-reduced over the ranks that hold the same ``common``."""

    common: frozenset[Atom] = frozenset()


@dataclass(frozen=True, slots=True)
class Gather:
    """Shard → Replicate along ``dim``, whose logical axes are ``axes``; if ``lazy``, when somebody looks at it."""

    dim: int
    axes: Dim
    lazy: bool = False


@dataclass(frozen=True, slots=True)
class Take:
    """Replicate → Shard along ``dim``: this rank's slice, no communication."""

    dim: int
    axes: Dim


@dataclass(frozen=True, slots=True)
class Mask:
    """Replicate → Partial: the value counts on one rank."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The local mean over dims of these ``axes`` → Partial: it counts by this rank's share of their elements."""

    axes: tuple[Dim, ...]


Step = AllReduce | Enter | Gather | Take | Mask | Scale
