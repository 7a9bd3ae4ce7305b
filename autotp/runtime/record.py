"""Which collectives ran, and how many bytes they made whole: for tests, benchmarks and debugging.

with record_collectives() as log:
    model(x).sum().backward()
assert log.count("all_reduce", "forward") == 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that this rank took part in.

    ``kind`` is what moves on the wire: ``all_reduce`` or ``all_gather``. ``bytes`` is the size of the whole
    result on one rank (an all-reduce's tensor; an all-gather's output without padding). ``direction`` is
    ``backward`` for whatever runs inside the autograd engine, so an activation that is checkpointed counts
    its recomputation there.
    """

    kind: str
    bytes: int
    group: str
    direction: str
    shape: tuple[int, ...]


class CollectiveLog(list[Collective]):
    """The collectives in the order in which they ran."""

    def select(
        self, kind: str | None = None, direction: str | None = None, group: str | None = None
    ) -> list[Collective]:
        return [
            c
            for c in self
            if kind in (None, c.kind) and direction in (None, c.direction) and group in (None, c.group)
        ]

    def count(  # type: ignore[override]
        self, kind: str | None = None, direction: str | None = None, group: str | None = None
    ) -> int:
        return len(self.select(kind, direction, group))

    def bytes(self, kind: str | None = None, direction: str | None = None, group: str | None = None) -> int:
        return sum(c.bytes for c in self.select(kind, direction, group))


active: list[CollectiveLog] = []  # the ops look at it; empty outside record_collectives
watcher: Callable[[Collective, Callable[[], Any]], None] | None = None
"""Carries out collectives in place of the ops (`autotp.debug`): it starts one, and waits for it."""
where = ""
"""The module whose forward is running, or whose backward is; set while somebody watches."""


@contextmanager
def record_collectives() -> Iterator[CollectiveLog]:
    """Record each collective that goes through autotp's ops in this process while the context lasts."""
    log = CollectiveLog()
    active.append(log)
    try:
        yield log
    finally:
        # by identity: two empty logs are equal lists
        active[:] = [other for other in active if other is not log]


def note(kind: str, shape: tuple[int, ...], nbytes: int, group: str) -> None:
    """Called by the ops, and only while someone records."""
    entry = _collective(kind, shape, nbytes, group)
    for log in active:
        log.append(entry)


def watched(kind: str, shape: tuple[int, ...], nbytes: int, group: str, start: Callable[[], Any]) -> None:
    """Called by the ops in place of a collective, and only while someone watches."""
    assert watcher is not None
    watcher(_collective(kind, shape, nbytes, group), start)


def _collective(kind: str, shape: tuple[int, ...], nbytes: int, group: str) -> Collective:
    in_backward = torch._C._current_graph_task_id() != -1
    return Collective(kind, nbytes, group, "backward" if in_backward else "forward", tuple(shape))
