"""What collectives cost: units of bytes × (tp−1)/tp that a ring moves per rank.

An all-reduce of *n* bytes counts 2·n, an all-gather n (Patarasuk and Yuan 2009), each `START_BYTES` more for its
latency.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

#: Costs are counted in 1/FINE bytes, so that among equals a hook goes before a patch of the user's source.
FINE = 64
#: The traced batch stands for so many times as many tokens: a sum once a step weighs that much less than
#: activations do.
TOKENS = 128
#: What it costs to start a collective, as bytes at the traced batch: about 10 µs at 100 GB/s, 14 tokens standing
#: for 2,048.
START_BYTES = 8192


def all_reduce_cost(node: fx.Node, groups: int = 1) -> int:
    """Of all ranks; or of each of several groups, that has its own part of the value."""
    return FINE * (2 * nbytes(node) // groups + START_BYTES)


def all_gather_cost(node: fx.Node) -> int:
    return FINE * (nbytes(node) + START_BYTES)


def nbytes(node: fx.Node) -> int:
    """Bytes of the (unsharded) value that ``node`` makes."""
    value: Any = node.meta.get("val")
    values: Iterable[Any] = value if isinstance(value, (tuple, list)) else [value]
    return sum(v.numel() * v.element_size() for v in values if hasattr(v, "numel"))
