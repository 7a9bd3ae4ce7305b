"""Faults to plant in autotp, each of which the fuzzer has to find.

`parallelize` proves that the rewritten model does what was planned. A rule that is wrong makes a wrong plan, which is
carried out and proven; a collective that is lost at run time is none of the proof's business. So neither is refused:
both compute other numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor

from autotp.axes.rules import elementwise, reduce, registry
from autotp.axes.rules.registry import Rule
from autotp.runtime import ops, wire

SKIP = 3  # of so many collectives one is lost


@contextmanager
def _rules(wrong: Mapping[str, Rule]) -> Iterator[None]:
    """Other sharding rules for these ops."""
    with patch.dict(registry._RULES, wrong):
        yield


@contextmanager
def _lost(name: str, attribute: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Every third time, ``instead`` runs in place of the method; on all ranks alike, so that none waits."""
    owner = getattr(ops, name)
    right = getattr(owner, attribute)
    count = itertools.count(1)

    def sometimes(ctx: Any, *args: Any) -> Any:
        return (right if next(count) % SKIP else instead)(ctx, *args)

    with patch.object(owner, attribute, staticmethod(sometimes)):
        yield


def _own_part(ctx: Any, x: Tensor, group: str) -> Tensor:
    ctx.group = group
    return x.clone()


def _own_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return grads[0], None


@contextmanager
def _rows_of_the_next_rank() -> Iterator[None]:
    """A gather in another order than that of the ranks, where all hold equally many elements."""
    right = wire.gather_cat

    def turned(x: Tensor, dim: int, *rest: Any) -> Tensor:
        whole = right(x, dim, *rest)
        return whole.roll(x.shape[dim], dim)

    with patch.object(wire, "gather_cat", turned):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    # a normalisation over a dim, claimed to treat each element by itself
    "softmax-is-elementwise": partial(_rules, {"aten.softmax.int": elementwise.pointwise}),
    # a mean over a dim, claimed to be a sum: each rank divides by its own count
    "mean-is-a-sum": partial(_rules, {"aten.mean.dim": reduce.summation}),
    "lost-all-reduce": partial(_lost, "_AllReduce", "forward", _own_part),
    "lost-gradient-all-reduce": partial(_lost, "_Enter", "backward", _own_gradient),
    "turned-all-gather": _rows_of_the_next_rank,
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Within this context autotp has the fault of this name."""
    with FAULTS[fault]():
        yield
