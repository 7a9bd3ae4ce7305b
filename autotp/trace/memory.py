"""Which values of a traced forward share memory."""

from __future__ import annotations

import torch
from torch import fx


def storages(node: fx.Node) -> set[int]:
    """The memory of a value, as the trace's tensors know it."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}
