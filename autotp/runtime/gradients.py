"""Sums of gradients of replicated parameters that sharded regions use.

The weight of a q-norm, say, is whole on every rank, but each rank applies it to its own heads: its gradients
are Partial and must be summed. Kv weights that are replicated in a subgroup are the same case with the
subgroup.

All sums of one backward pass travel together, one all-reduce per group (`_Bucket`): a hook on each leaf takes
the pass's gradient out and leaves zeros, which are accumulated in its place or handed out by
``torch.autograd.grad``; when the pass is over, the sums are added to where the zeros went. So what was
accumulated before stays as it is, and ranks that hold the same parameter get the same bits.

Whoever looks at a gradient before the pass is over would see the zeros. Where that can be (DDP, FSDP2, other
hooks on the parameter, a backward that is itself differentiated) the gradient is summed on the spot.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.nn.parallel import DistributedDataParallel

from autotp.errors import AutoTPError
from autotp.runtime import wire
from autotp.runtime.group import get_group
from autotp.runtime.ops import all_reduce
from autotp.runtime.sharded_gradient import ATTRIBUTE as SHARES
from autotp.runtime.sharded_gradient import GradientShare, share_gradient
from autotp.runtime.wire import narrow_runs

Part = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(dim, starts, lengths) of runs in the local gradient."""

_ATTRIBUTE = "_tp_gradient_sums"
_FOLLOWED = "_tp_gradient_modules"
_numbers = itertools.count()


class _Bucket:
    """The gradients that one backward pass has left to sum."""

    def __init__(self) -> None:
        self.pending: list[
            tuple[GradSync, Tensor, Tensor]
        ] = []  # (whose, what to sum, the zeros left for it)

    def sum(self) -> None:
        """One all-reduce for each group, dtype and device; called when the backward pass is over."""
        buckets: dict[tuple[str, torch.dtype, torch.device], list[tuple[GradSync, Tensor, Tensor]]] = {}
        for item in sorted(self.pending, key=lambda item: item[0].number):  # the same order on every rank
            buckets.setdefault((item[0].group, item[1].dtype, item[1].device), []).append(item)
        self.pending = []
        with torch.no_grad():
            for (group, _, _), items in sorted(buckets.items(), key=lambda item: item[1][0][0].number):
                summed = wire.reduce_sum(torch.cat([grad.flatten() for _, grad, _ in items]), group)
                pieces = torch.split(summed, [grad.numel() for _, grad, _ in items])
                for (sync, grad, zeros), piece in zip(items, pieces, strict=True):
                    sync.put(zeros, piece.view(grad.shape))


_buckets: weakref.WeakValueDictionary[int, _Bucket] = weakref.WeakValueDictionary()
"""By backward pass; what keeps a bucket alive is the pass, which has it as a callback."""


def _bucket() -> _Bucket:
    """That of the backward pass that is running."""
    number = torch._C._current_graph_task_id()
    bucket = _buckets.get(number)
    if bucket is None:
        bucket = _buckets[number] = _Bucket()
        torch.autograd.Variable._execution_engine.queue_callback(bucket.sum)
    return bucket


class GradSync:
    """Sums the gradient of ``parameter`` over ``group``, once a backward pass.

    A hook on the leaf: it sees the gradient of the whole pass, however often the parameter is used, and
    neither gradient accumulation nor ``zero_grad`` matter. Works with ``torch.autograd.grad`` too. A deep
    copy sums the copy's gradient.

    Attributes:
        number: its place in a bucket, the same on every rank.
        at_once: do not wait for the end of the pass, somebody looks at the gradient before.
    """

    def __init__(self, parameter: Tensor, group: str, part: Part | None = None) -> None:
        if not parameter.is_leaf:
            raise AutoTPError("GradSync wants a parameter (a leaf), not something computed.")
        self.parameter = parameter
        self.group = group
        self.part = part
        self.number = next(_numbers)
        self.at_once = False
        self._accumulated = False
        self._handles: list[Any] = []
        if parameter.requires_grad:
            self._handles = [
                parameter.register_hook(self._sum),  # type: ignore[no-untyped-call]
                parameter.register_post_accumulate_grad_hook(self._note),  # type: ignore[no-untyped-call]
            ]

    @property
    def active(self) -> bool:
        return bool(self._handles)

    def _sum(self, grad: Tensor) -> Tensor:
        partial = grad if self.part is None else narrow_runs(grad, *self.part)
        if self.at_once or torch.is_grad_enabled() or self._watched():
            summed = all_reduce(partial, self.group)
            return summed if self.part is None else self._with(grad, summed)
        zeros = torch.zeros_like(grad) if self.part is None else self._with(grad, None)
        self._accumulated = False
        _bucket().pending.append((self, partial.detach(), zeros))
        return zeros

    def _note(self, parameter: Tensor) -> None:
        self._accumulated = True

    def _watched(self) -> bool:
        """Whether others have hooks on the parameter."""
        hooks: Any = self.parameter._backward_hooks or ()
        after: Any = getattr(self.parameter, "_post_accumulate_grad_hooks", None) or {}
        return len(hooks) > 1 or any(
            not isinstance(getattr(hook, "__self__", None), GradSync | GradientShare)
            for hook in after.values()
        )

    def _with(self, grad: Tensor, summed: Tensor | None) -> Tensor:
        """A copy of ``grad`` with ``summed``, or zeros, in this part."""
        assert self.part is not None
        dim, starts, lengths = self.part
        out = grad.clone()
        offset = 0
        for start, length in zip(starts, lengths, strict=True):
            place = out.narrow(dim, start, length)
            place.zero_() if summed is None else place.copy_(summed.narrow(dim, offset, length))
            offset += length
        return out

    def put(self, zeros: Tensor, summed: Tensor) -> None:
        """Add what was summed to the gradient in which ``zeros`` have been accumulated, or else to the zeros."""
        target = self.parameter.grad if self._accumulated else zeros
        if target is None:  # somebody has taken it away within the pass
            return
        target = getattr(target, "_tp_local", target)
        if self.part is None:
            target.add_(summed)
            return
        dim, starts, lengths = self.part
        offset = 0
        for start, length in zip(starts, lengths, strict=True):
            target.narrow(dim, start, length).add_(summed.narrow(dim, offset, length))
            offset += length

    def remove(self) -> None:
        """Sum no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> GradSync:
        made = GradSync(copy.deepcopy(self.parameter, memo), self.group, self.part)
        made.number = self.number
        return made

    def __reduce__(self) -> Any:
        return GradSync, (self.parameter, self.group, self.part)


def sync_gradient(module: nn.Module, name: str, group: str, part: Part | None = None) -> None:
    """Sum the gradient of ``module``'s own parameter ``name`` over ``group`` from now on (again: no
    change).

    Before each forward of the module that may be trained, the sum moves to the parameter object that is there
    then: one that was frozen, or made by ``to_empty`` or ``load_state_dict(assign=True)``.
    """
    sums = module.__dict__.setdefault(_ATTRIBUTE, {})
    parameter = module._parameters[name]
    assert parameter is not None
    old: GradSync | None = sums.get(name)
    if old is not None:
        if old.parameter is parameter and old.group == group and old.part == part and old.active:
            return
        old.remove()
    if not any(hook is _follow for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_follow)
    sums[name] = GradSync(parameter, group, part)
    if old is not None:
        sums[name].number = old.number


def _follow(module: nn.Module, args: Any) -> None:
    """Before a forward: is each sum still on the parameter that is used, and may it wait?"""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    in_ddp = DistributedDataParallel._active_ddp_module is not None
    for name, sync in module.__dict__.get(_ATTRIBUTE, {}).items():
        parameter = module._parameters.get(name)
        if parameter is None or hasattr(
            parameter, "_local_tensor"
        ):  # a DTensor: FSDP2 has not gathered it yet
            continue
        if parameter is not sync.parameter:
            # FSDP2 puts in the gathered parameter, and reduces its gradient within the pass
            if not parameter.is_leaf:
                continue
            sync_gradient(module, name, sync.group, sync.part)
            module.__dict__[_ATTRIBUTE][name].at_once = True
        elif parameter.requires_grad and not sync.active:
            sync_gradient(module, name, sync.group, sync.part)
        elif in_ddp:
            sync.at_once = True


def follow_gradients(model: nn.Module) -> None:
    """Before a forward of the whole ``model`` that may be trained: see to it that its sums and shares of gradients are
    on the parameters that are there then.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and ddp.gradient_as_bucket_view:
        raise AutoTPError(
            "DistributedDataParallel(gradient_as_bucket_view=True) replaces the gradients of sharded parameters "
            "by views that do not know it, and a norm of theirs would differ from rank to rank. "
            "Pass gradient_as_bucket_view=False."
        )
    followed: list[nn.Module] | None = model.__dict__.get(_FOLLOWED)
    if followed is None:
        followed = [m for m in model.modules() if _ATTRIBUTE in m.__dict__ or SHARES in m.__dict__]
        model.__dict__[_FOLLOWED] = followed
    if ddp is not None:
        _check_other_ranks(followed, ddp)
    fully_sharded: dict[tuple[int, str], Tensor] | None = None
    for module in followed:
        if _ATTRIBUTE in module.__dict__:
            _follow(module, ())
        for name, share in module.__dict__.get(SHARES, {}).items():
            parameter = module._parameters.get(name)
            if share.moved and share.handle is None and share.parameter.requires_grad:  # it was frozen
                share.move(share.parameter)
            if (
                parameter is None
                or share.moved
                or (parameter is share.parameter and share.handle is not None)
            ):
                continue
            if parameter is not share.parameter:
                if fully_sharded is None:
                    fully_sharded = fully_sharded_parameters(model)
                at = fully_sharded.get((id(module), name))
                if at is not None:
                    share.move(at)
                    continue
            if parameter.requires_grad and parameter.is_leaf:
                share_gradient(module, name, share.share)


def fully_sharded_parameters(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    """What FSDP2 trains in place of each parameter, by the id of its module and its own name.

    FSDP2 may have been given the model, parts of it, or what the model is in.
    """
    inside = {id(module) for module in model.modules()}
    found: dict[tuple[int, str], Tensor] = {}
    for module in list(_module_state_mapping):
        state: Any = getattr(module, "_get_fsdp_state", None)
        for group in state()._fsdp_param_groups if state is not None else ():
            for parameter in group.fsdp_params:
                at = parameter._module_info
                for owner, name in (
                    (at.module, at.param_name),
                    *zip(at.shared_modules, at.shared_param_names, strict=True),
                ):
                    if id(owner) in inside:
                        found[id(owner), name] = parameter.sharded_param
    return found


def _check_other_ranks(modules: list[nn.Module], ddp: DistributedDataParallel) -> None:
    """Data parallelism is over other ranks than those that share the model."""
    shares = (share for m in modules for share in m.__dict__.get(SHARES, {}).values())
    group = next((share.share.group for share in shares), None)
    if group is None:
        return
    replicas = set(dist.get_process_group_ranks(ddp.process_group))
    if len(replicas & set(get_group(group).ranks)) > 1:
        raise AutoTPError(
            f"DistributedDataParallel treats ranks {sorted(replicas)} as replicas, but some of them hold different "
            "parts of this model: it has overwritten the parts by those of one rank. Give it the data-parallel mesh "
            "dim (process_group=mesh['dp'].get_group()); where all ranks share one model nothing is to be wrapped "
            "(accelerate has to be told: ParallelismConfig(tp_size=...))."
        )


def forget_gradients(module: nn.Module) -> None:
    """Undo what was done about the gradients of a module's own parameters."""
    for name in (_ATTRIBUTE, SHARES):
        for followed in module.__dict__.pop(name, {}).values():
            followed.remove()
    module.__dict__.pop(_FOLLOWED, None)


def gradient_syncs(model: nn.Module) -> dict[str, tuple[str, Part | None]]:
    """The parameters whose gradients are summed, with group and part."""
    found = {}
    for fqn, module in model.named_modules():
        for name, sync in module.__dict__.get(_ATTRIBUTE, {}).items():
            found[f"{fqn}.{name}" if fqn else name] = (sync.group, sync.part)
    return found
