"""Faults to plant in autotp, each of which the fuzzer has to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Within this context autotp has the fault of this name."""
    with FAULTS[fault]():
        yield
