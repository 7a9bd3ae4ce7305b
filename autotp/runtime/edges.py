"""What happens on the edges of a sharded module: values that enter it, are sliced for it, or are gathered
after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp.runtime import ops
from autotp.runtime.lazy_gather import gather_when_needed


@dataclass(frozen=True, slots=True)
class Gather:
    """An all-gather of one dim: sizes and permutation as in :func:`autotp.runtime.ops.gather`; if ``lazy`` it
    waits until somebody looks."""

    group: str
    sizes: tuple[int, ...]
    perm_starts: tuple[int, ...] = ()
    perm_lengths: tuple[int, ...] = ()
    lazy: bool = False

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        gather = gather_when_needed if self.lazy else ops.gather
        return gather(x, dim, self.sizes, self.perm_starts, self.perm_lengths, self.group)


@dataclass(frozen=True, slots=True)
class Take:
    """A free slice of one dim: this rank's runs."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @staticmethod
    def runs(runs: Sequence[tuple[int, int]]) -> Take:
        return Take(tuple(start for start, _ in runs), tuple(length for _, length in runs))

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        return ops.take(x, dim, self.starts, self.lengths)


class SharedEnter:
    """One ``enter`` for several consumers of one tensor: q, k and v share one all-reduce in the backward.

    The consumers call it one after the other. The first call with a tensor makes the entered one, and
    further calls with the same object (not written to in between, same grad mode) get it again, until
    ``consumers`` calls are served; then nothing is kept. A call with another tensor starts afresh, so a
    forward that was left by an exception does no harm (what it entered is kept until the next call, or
    ``clear()``). Compiled code does not share: each consumer has an enter of its own there, which is as
    right, with more all-reduces.
    """

    __slots__ = ("_entered", "_grad_mode", "_left", "_version", "_x", "consumers", "group")

    def __init__(self, group: str, consumers: int) -> None:
        self.group = group
        self.consumers = consumers
        self.clear()

    def clear(self) -> None:
        """Keep nothing."""
        self._x: Tensor | None = None
        self._entered: Tensor | None = None
        self._version = -1
        self._grad_mode = False
        self._left = 0

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return ops.enter(x, self.group)
        grad_mode = torch.is_grad_enabled()
        if x is self._x and grad_mode == self._grad_mode and self._version == _version(x):
            entered = self._entered
            assert entered is not None
            self._left -= 1
            if self._left == 0:
                self.clear()
            return entered
        if self._x is not None:
            self.clear()
        entered = ops.enter(x, self.group)
        if entered is not x and self.consumers > 1:  # it is x where no gradient is wanted: nothing to share
            self._x, self._entered = x, entered
            self._version, self._grad_mode, self._left = _version(x), grad_mode, self.consumers - 1
        return entered

    def __getstate__(self) -> tuple[str, int]:  # a copy starts with nothing entered
        return self.group, self.consumers

    def __setstate__(self, state: tuple[str, int]) -> None:
        self.group, self.consumers = state
        self.clear()

    def __repr__(self) -> str:
        return f"SharedEnter({self.group!r}, consumers={self.consumers})"


Enter = str | SharedEnter  # the name of a group, or an enter shared with other modules


def apply_enter(x: Tensor, how: Enter) -> Tensor:
    return ops.enter(x, how) if isinstance(how, str) else how(x)


def _version(x: Tensor) -> Any:
    return 0 if x.is_inference() else x._version
