"""The adapter for transformers: what makes a model traceable on a CPU (`twins` has its kernels). It is never imported
from here; a model is known to be one of its by what it has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (the library is then loaded already)."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


@contextmanager
def unchecked() -> Iterator[list[torch.Tensor]]:
    """Without checks of tensors' values, which a trace does not have; what they would look at is collected, as edits
    may not break it (the count of placeholder tokens against the sizes of what goes in their place). Checks of sizes
    alone stay."""
    conditions: list[torch.Tensor] = []

    def later(condition: Any, message: Any = None) -> None:
        if isinstance(condition, torch.Tensor):
            conditions.append(condition)

    def later_with(error_type: Any, condition: Any, message: Any = None) -> None:
        later(condition)

    with patch.multiple(torch, _check_tensor_all=later, _check_tensor_all_with=later_with):
        yield conditions


@contextmanager
def unmasked() -> Iterator[None]:
    """Trace attention as it runs where no mask is needed: one sequence in each row, no padding.

    Whether several sequences are packed in a row is read from position ids, which a trace cannot: it then gets a mask.
    Without one, other code runs (attention that repeats kv heads by itself).
    """
    masking = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    find = getattr(masking, name, None)
    if find is None:
        yield
        return
    setattr(masking, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking, name, find)
