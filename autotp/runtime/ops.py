"""The six moves of a sharded forward, each with its conjugate backward.

    op          forward                          backward                   Megatron's name
    all_reduce  Partial   -> Replicate  sum      identity                   g
    enter       Replicate -> used sharded        all-reduce                 f
    gather      Shard     -> Replicate  cat      this rank's slice
    take        Replicate -> Shard      slice    zeros around (a Partial gradient: put an enter before it)
    mask        Replicate -> Partial    x or 0   identity, on every rank
    scale       mean -> Partial         x * s    x * s: a local mean counts by its share of the elements

The gradient of a replicated value is whole on each rank; the gradient of what an ``enter`` gave out is
Partial.

Each is a ``torch.library`` op, ``torch.ops.autotp.<name>.default``, with a fake implementation, so that a
graph that is traced or compiled has one node for it and tracing needs no process group. Plain eager calls do
not go through the dispatcher (about 30 µs an op with a Python kernel): they use the autograd functions below
directly.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch

from autotp.errors import AutoTPError
from autotp.runtime import record, wire
from autotp.runtime.group import get_group
from autotp.runtime.wire import Ints

_library: Any = torch.library.Library("autotp", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "all_reduce(Tensor x, str group) -> Tensor",
    "enter(Tensor x, str group) -> Tensor",
    "gather(Tensor x, int dim, int[] sizes, int[] perm_starts, int[] perm_lengths, str group) -> Tensor",
    "take(Tensor x, int dim, int[] starts, int[] lengths) -> Tensor",
    "mask(Tensor x, bool keep) -> Tensor",
    "scale(Tensor x, int part, int whole) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops: Any = torch.ops.autotp


# --- what users call
# ---------------------------------------------------------------------------------------------


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Partial to Replicate: the sum over the ranks. The caller's tensor is left alone."""
    if not is_eager(x):
        return cast(Tensor, _ops.all_reduce.default(x, group))
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _AllReduce.apply(x, group))  # type: ignore[no-untyped-call]
    return wire.reduce_sum(x, group)


def enter(x: Tensor, group: str) -> Tensor:
    """Replicate, used by sharded ops from here on: the gradients of the ranks are summed on the way back.

    In eager mode a view (or x itself, where no gradient is wanted).
    """
    if not is_eager(x):
        return cast(Tensor, _ops.enter.default(x, group))
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Enter.apply(x, group))  # type: ignore[no-untyped-call]
    return x


def gather(
    x: Tensor,
    dim: int,
    sizes: Ints,
    perm_starts: Ints,
    perm_lengths: Ints,
    group: str,
) -> Tensor:
    """Shard to Replicate. Rank r holds ``sizes[r]`` elements of dim.

    The shards in the order of the ranks, cut into runs (start, length), one run after the other, are the
    result; no runs is the order of the ranks as it is. Runs need not cover everything: with an axis that is
    replicated in subgroups they take one copy, and the other copies get a zero gradient (the sum over the
    subgroup is then right).
    """
    if not is_eager(x):
        runs = list(perm_starts), list(perm_lengths)
        return cast(Tensor, _ops.gather.default(x, dim, list(sizes), *runs, group))
    if x.requires_grad and torch.is_grad_enabled():
        args = (dim, sizes, perm_starts, perm_lengths, group)
        return cast(Tensor, _Gather.apply(x, *args))  # type: ignore[no-untyped-call]
    return wire.gather_cat(x, dim, sizes, perm_starts, perm_lengths, group)


def take(x: Tensor, dim: int, starts: Ints, lengths: Ints) -> Tensor:
    """Replicate to Shard: this rank's runs of dim, contiguous, as code that takes views of it expects."""
    if not is_eager(x):
        return cast(Tensor, _ops.take.default(x, dim, list(starts), list(lengths)))
    return wire.narrow_runs(x, dim, starts, lengths).contiguous()


def mask(x: Tensor, keep: bool) -> Tensor:
    """Replicate to Partial: x where ``keep`` (on one rank), zeros elsewhere. Eagerly a view of x where kept."""
    if not is_eager(x):
        return cast(Tensor, _ops.mask.default(x, keep))
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Mask.apply(x, keep))  # type: ignore[no-untyped-call]
    return x if keep else torch.zeros_like(x)


def scale(x: Tensor, part: int, whole: int) -> Tensor:
    """The mean of ``part`` elements as an addend of the mean of all ``whole``: x · part / whole."""
    if not is_eager(x):
        return cast(Tensor, _ops.scale.default(x, part, whole))
    return x * (part / whole)


def is_eager(x: Tensor) -> bool:
    """True where nobody watches the dispatcher: no tracing, no compiler, no mode, no tensor subclass."""
    if torch.compiler.is_compiling():
        return False
    kind = type(x)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and not _len_torch_dispatch_stack_pre_dispatch()  # type: ignore[no-untyped-call]
    )


# --- autograd. Each backward calls the differentiable function, so that second derivatives are right too.


class _AllReduce(torch.autograd.Function):
    """Megatron's g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return wire.reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return enter(grads[0], ctx.group), None


class _Enter(torch.autograd.Function):
    """Megatron's f."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group, ctx.where = group, record.where
        # A view: changing it in place raises, where with a detached alias the gradient of x would go wrong
        # in silence.
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        record.where = ctx.where
        found = all_reduce(grads[0], ctx.group)
        record.where = ""
        return found, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dim: int,
        sizes: Ints,
        perm_starts: Ints,
        perm_lengths: Ints,
        group: str,
    ) -> Tensor:
        ctx.args = (dim, sizes, perm_starts, perm_lengths, group)
        return wire.gather_cat(x, dim, sizes, perm_starts, perm_lengths, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ungather(grads[0], *ctx.args), None, None, None, None, None


def ungather(
    grad: Tensor, dim: int, sizes: Ints, perm_starts: Ints, perm_lengths: Ints, group: str
) -> Tensor:
    """The backward of gather: this rank's part of a whole gradient. Differentiable."""
    args = (dim, sizes, perm_starts, perm_lengths, group)
    if grad.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Ungather.apply(grad, *args))  # type: ignore[no-untyped-call]
    return _ungather(grad, *args)


class _Ungather(torch.autograd.Function):
    """The backward of gather, for second derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dim: int,
        sizes: Ints,
        perm_starts: Ints,
        perm_lengths: Ints,
        group: str,
    ) -> Tensor:
        ctx.args = (dim, sizes, perm_starts, perm_lengths, group)
        return _ungather(x, dim, sizes, perm_starts, perm_lengths, group).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grads[0], *ctx.args), None, None, None, None, None


def _ungather(
    grad: Tensor, dim: int, sizes: Ints, perm_starts: Ints, perm_lengths: Ints, group: str
) -> Tensor:
    return wire.shard_of_gathered(grad, dim, sizes, perm_starts, perm_lengths, get_group(group).index)


class _Mask(torch.autograd.Function):
    """What it feeds is whole only with the other ranks' parts, so the gradient is x's, on every rank.

    A node of the backward graph where x is kept, too: three uses of x have their gradients added in the order of the
    graph, and ranks with another order would end with other last bits in what they all hold.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool) -> Tensor:
        return x.view_as(x) if keep else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


# --- the torch.library side: real, fake and autograd kernels
# ------------------------------------------------------


def _real_all_reduce(x: Tensor, group: str) -> Tensor:
    return wire.reduce_sum(x, group)


def _real_enter(x: Tensor, group: str) -> Tensor:
    return x.clone()  # an op may not return an alias of its input


def _real_gather(
    x: Tensor, dim: int, sizes: Ints, perm_starts: Ints, perm_lengths: Ints, group: str
) -> Tensor:
    return wire.gather_cat(x, dim, sizes, perm_starts, perm_lengths, group).contiguous()


def _real_take(x: Tensor, dim: int, starts: Ints, lengths: Ints) -> Tensor:
    out = wire.narrow_runs(x, dim, starts, lengths)
    return out.clone(memory_format=torch.contiguous_format) if len(starts) <= 1 else out.contiguous()


def _real_mask(x: Tensor, keep: bool) -> Tensor:
    return x.clone() if keep else torch.zeros_like(x)


def _real_scale(x: Tensor, part: int, whole: int) -> Tensor:
    return x * (part / whole)


def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_enter(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _fake_gather(
    x: Tensor, dim: int, sizes: Ints, perm_starts: Ints, perm_lengths: Ints, group: str
) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(perm_lengths) if perm_starts else sum(sizes)
    return x.new_empty(shape)


def _fake_take(x: Tensor, dim: int, starts: Ints, lengths: Ints) -> Tensor:
    for start, length in zip(starts, lengths, strict=True):
        if start < 0 or start + length > x.shape[dim]:
            raise AutoTPError(f"take: run {start}:{start + length} is outside dim {dim} of {tuple(x.shape)}.")
    shape = list(x.shape)
    shape[dim] = sum(lengths)
    return x.new_empty(shape)


def _fake_mask(x: Tensor, keep: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_scale(x: Tensor, part: int, whole: int) -> Tensor:
    return torch.empty_like(x)


def _setup_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _setup_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.share = inputs[1:]


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.args = inputs[1:]


def _setup_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.args = inputs
    ctx.size = x.shape[ctx.args[0]]


def _backward_take(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dim, starts, lengths = ctx.args
    return wire.scatter_runs(grad, dim, starts, lengths, ctx.size), None, None, None


for _name, _real, _fake, _setup, _backward in (
    (
        "all_reduce",
        _real_all_reduce,
        _fake_all_reduce,
        _setup_group,
        lambda ctx, g: (enter(g, ctx.group), None),
    ),
    ("enter", _real_enter, _fake_enter, _setup_group, lambda ctx, g: (all_reduce(g, ctx.group), None)),
    (
        "gather",
        _real_gather,
        _fake_gather,
        _setup_gather,
        lambda ctx, g: (_ungather(g, *ctx.args), *[None] * 5),
    ),
    ("take", _real_take, _fake_take, _setup_take, _backward_take),
    ("mask", _real_mask, _fake_mask, None, lambda ctx, g: (g, None)),
    ("scale", _real_scale, _fake_scale, _setup_scale, lambda ctx, g: (scale(g, *ctx.share), None, None)),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autotp::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"autotp::{_name}", _backward, setup_context=_setup, lib=_library)
