"""Sums of gradients of replicated parameters that sharded regions use.

The weight of a q-norm, say, is whole on every rank, but each rank applies it to its own heads: its gradients
are Partial and must be summed. Kv weights that are replicated in a subgroup are the same case with the
subgroup.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.runtime.ops import all_reduce
from autotp.runtime.wire import narrow_runs

Part = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(dim, starts, lengths) of runs in the local gradient."""

_ATTRIBUTE = "_tp_gradient_sums"


class GradSync:
    """Sums the gradient of ``parameter`` over ``group``, once a backward pass, before it is accumulated.

    A hook on the leaf: it sees the gradient of the whole pass, however often the parameter is used, and
    neither gradient accumulation nor ``zero_grad`` matter. Works with ``torch.autograd.grad`` too. A deep
    copy sums the copy's gradient.
    """

    def __init__(self, parameter: Tensor, group: str, part: Part | None = None) -> None:
        if not parameter.is_leaf:
            raise AutoTPError("GradSync wants a parameter (a leaf), not something computed.")
        self.parameter = parameter
        self.group = group
        self.part = part
        self._handle: Any = None
        if parameter.requires_grad:
            self._handle = parameter.register_hook(self._sum)  # type: ignore[no-untyped-call]

    def _sum(self, grad: Tensor) -> Tensor:
        if self.part is None:
            return all_reduce(grad, self.group)
        dim, starts, lengths = self.part
        summed = all_reduce(narrow_runs(grad, dim, starts, lengths), self.group)
        out = grad.clone()
        offset = 0
        for start, length in zip(starts, lengths, strict=True):
            out.narrow(dim, start, length).copy_(summed.narrow(dim, offset, length))
            offset += length
        return out

    def remove(self) -> None:
        """Sum no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GradSync:
        return GradSync(copy.deepcopy(self.parameter, memo), self.group, self.part)

    def __reduce__(self) -> Any:
        return GradSync, (self.parameter, self.group, self.part)


def sync_gradient(module: nn.Module, name: str, group: str, part: Part | None = None) -> None:
    """Sum the gradient of ``module``'s own parameter ``name`` over ``group`` from now on (again: no
    change).
    """
    sums = module.__dict__.setdefault(_ATTRIBUTE, {})
    parameter = module._parameters[name]
    assert parameter is not None
    old: GradSync | None = sums.get(name)
    if old is not None:
        if old.parameter is parameter and old.group == group and old.part == part and old._handle is not None:
            return
        old.remove()
    sums[name] = GradSync(parameter, group, part)


def stop_gradient_sync(module: nn.Module, name: str) -> None:
    """Undo ``sync_gradient``."""
    sums = module.__dict__.get(_ATTRIBUTE, {})
    if name in sums:
        sums.pop(name).remove()


def gradient_syncs(model: nn.Module) -> dict[str, tuple[str, Part | None]]:
    """The parameters whose gradients are summed, with group and part."""
    found = {}
    for fqn, module in model.named_modules():
        for name, sync in module.__dict__.get(_ATTRIBUTE, {}).items():
            found[f"{fqn}.{name}" if fqn else name] = (sync.group, sync.part)
    return found


def refresh_gradient_syncs(model: nn.Module) -> int:
    """Move each sum to the parameter that is there now; the number of those that had lost theirs.

    For after a parameter object was replaced (``to_empty`` from the meta device,
    ``load_state_dict(assign=True)``) or ``requires_grad`` was switched on.
    """
    moved = 0
    for module in model.modules():
        for name, sync in list(module.__dict__.get(_ATTRIBUTE, {}).items()):
            parameter = module._parameters[name]
            stale = parameter is not sync.parameter or (parameter.requires_grad and sync._handle is None)
            if stale:
                sync_gradient(module, name, sync.group, sync.part)
                moved += 1
    return moved
