"""What is looked at before and after each step of any torch optimizer, once a model has been sharded.

Before the first step: an optimizer that was made before sharding holds the whole parameters, which are no longer
the model's; and one that works on rows, columns or norms of a parameter would work on this rank's part of it.
After a step: state that was copied from a gradient (SGD's momentum) becomes a plain tensor again.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autotp.errors import AutoTPError
from autotp.runtime.sharded_gradient import ShardedGradient

#: Optimizers that mix the elements of a parameter, by their names (DistributedShampoo and GaLoreAdamW too).
MIXING = re.compile(r"adafactor|adam_?mini|came$|galore|lamb(?!da)|lars|muon|shampoo|soap", re.IGNORECASE)

_REPLACED, _SHARDED = "_tp_replaced", "_tp_sharded"
_checked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # optimizer: number of parameters
_watching = False


def replaced(whole: Tensor, fqn: str) -> None:
    """``whole`` is no longer parameter ``fqn``; an optimizer that holds it trains nothing."""
    setattr(whole, _REPLACED, fqn)


def sharded(local: Tensor, fqn: str) -> None:
    """``local`` is this rank's part of parameter ``fqn``."""
    setattr(local, _SHARDED, fqn)


def unsharded(parameter: Tensor) -> None:
    """``parameter`` is whole again."""
    parameter.__dict__.pop(_SHARDED, None)


def watch_optimizers() -> None:
    """Look at every optimizer's steps from now on (again: no change)."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_check)
        register_optimizer_step_post_hook(_make_plain)
        _watching = True


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _checked.get(optimizer) == count:
        return
    name = type(optimizer).__name__
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        fqn = getattr(parameter, _REPLACED, None)
        if fqn is not None:
            raise AutoTPError(
                f"this {name} was made before the model was sharded: it holds the whole {fqn!r}, which is no longer "
                "the model's. Make the optimizer after autotp.parallelize."
            )
        fqn = getattr(parameter, _SHARDED, None)
        if fqn is not None and MIXING.search(name):
            raise AutoTPError(
                f"{name} cannot train {fqn!r}, of which each rank has a part: it mixes the elements of a parameter "
                "(its rows, columns or norm), and would see the part only. Use an elementwise optimizer (AdamW, SGD, "
                "Lion), or replicate the parameter in the plan."
            )
    _checked[optimizer] = count


def _make_plain(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if type(value) is ShardedGradient:
                state[key] = value._tp_local
            elif type(getattr(value, "_local_tensor", None)) is ShardedGradient:  # a DTensor of FSDP2
                value._local_tensor = value._local_tensor._tp_local
