"""The adapter for transformers: its switches that make a model traceable on a CPU. It is never imported from
here; a model is known to be one of its by what it has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

_TRACEABLE_ATTENTION = {None, "eager", "sdpa"}


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is a transformers model (the library is then loaded already)."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


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


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the library's checks of values (as many image tokens as features), which read what a trace cannot."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def make_traceable(skeleton: nn.Module) -> None:
    """Let a skeleton run code that fake CPU tensors can follow: batched experts (the loop over `nonzero()`
    and the grouped kernels cannot), sdpa in place of attention kernels that need a GPU."""
    configs: dict[int, Any] = {}
    for module in skeleton.modules():
        if not is_transformers(module):
            continue
        model: Any = module
        todo = [model.config]
        while todo:
            config = todo.pop()
            if id(config) not in configs:
                configs[id(config)] = config
                todo += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
        experts = getattr(model.config, "_experts_implementation", None)
        if hasattr(model, "set_experts_implementation") and experts not in ("batched_mm", "eager_batched"):
            with suppress(Exception):  # a model without experts, or one that cannot switch
                model.set_experts_implementation("batched_mm")
    for config in configs.values():
        if config is not None and getattr(config, "_attn_implementation", None) not in _TRACEABLE_ATTENTION:
            config._attn_implementation_internal = "sdpa"
