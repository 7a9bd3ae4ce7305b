"""The adapter for transformers: what makes a model traceable on a CPU (`twins` has its kernels). It is never imported
from here; a model is known to be one of its by what it has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (the library is then loaded already)."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the library's checks of values, such as that there are as many image tokens as features of images."""
    before = os.environ.get(_CHECKS)
    os.environ[_CHECKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CHECKS]
        else:
            os.environ[_CHECKS] = before


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
