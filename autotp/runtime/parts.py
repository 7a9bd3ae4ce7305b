"""Which modules are parts of a sharded model, and whether something was put among them since it was planned.

Every part has the model's `Parts` in its ``__dict__``, where a deep copy and a pickle of the model keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._compile import _disable_dynamo

from autotp.errors import AutoTPError

PARTS = "_autotp_parts"
_take_in: Callable[[nn.Module], None] | None = None


class Parts:
    """What the parts of one sharded model have in common.

    Attributes:
        plan: a name of the plan, which deep copies of the model share.
        sharded: the ids of the axes that it shards.
        changed: what was put in or taken out since the model was planned, and where; "" for nothing.
    """

    def __init__(self, plan: str, sharded: frozenset[int]) -> None:
        self.plan = plan
        self.sharded = sharded
        self.changed = ""


def parts_of(module: nn.Module) -> Parts | None:
    """Those that a module is one of."""
    found: Parts | None = module.__dict__.get(PARTS)
    return found


def take_in_with(take_in: Callable[[nn.Module], None]) -> None:
    """Say what plans a model anew, with all that is in it. Within torch.compile that is a break in the graph."""
    global _take_in
    _take_in = _disable_dynamo(take_in)


def take_in_newcomers(model: nn.Module) -> bool:
    """Plan a sharded model anew if something was put into it; whether that was so."""
    parts = parts_of(model)
    if parts is None or not parts.changed:
        return False
    assert _take_in is not None
    _take_in(model)
    return True


class Unplanned:
    """A forward pre-hook on a module that no plan speaks of: it must not run."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, module: nn.Module, args: Any) -> None:
        raise AutoTPError(self.why)


def bar(module: nn.Module, why: str) -> None:
    """Let no forward of ``module`` run until the model is planned anew."""
    module.register_forward_pre_hook(Unplanned(why), prepend=True)


def let_run(model: nn.Module) -> None:
    """Everything in ``model`` may run again."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Unplanned):
                del module._forward_pre_hooks[key]
