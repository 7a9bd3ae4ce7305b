"""Cross-entropy over a vocabulary of which each rank holds a part: the logits are never gathered.

Of each token the ranks need three numbers together: the greatest logit (one all-reduce), and the sum of exponentials
and the target's logit (another, both at once; with label smoothing the sum of logits too). The gradient is local:
softmax minus one-hot, on this rank's classes. Works through the tokens in chunks, so that no second tensor of the size
of the logits is made in the forward, whatever dtype the loss has.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autotp.runtime import lazy_gather, wire
from autotp.runtime.lazy_gather import Layout, handles, part_of

CHUNK_ELEMENTS = 1 << 22
"""How many logits are widened and exponentiated at once."""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    chunk: int | None = None,
) -> Tensor:
    """``F.cross_entropy``; of logits that are sharded over the classes, without gathering them.

    A sharded model returns such logits under `autotp.loss_parallel`, and has them within its forward.

    Args:
        chunk: so many tokens are worked on at a time (default: as many as make about four million logits).
    """
    found = _of_parts(input, target, weight, ignore_index, reduction, label_smoothing, chunk)
    if found is not None:
        return found
    return F.cross_entropy(
        lazy_gather.whole(input), target, weight,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


@handles(F.cross_entropy)
def _handle(
    func: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented
    found = _of_parts(input, target, weight, ignore_index, reduction, label_smoothing, None)
    return NotImplemented if found is None else found


def _of_parts(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    chunk: int | None,
) -> Tensor | None:
    """None where the whole logits are wanted: probabilities as targets, another dim sharded, odd arguments."""
    parts = part_of(input)
    if parts is None or isinstance(target, lazy_gather.LazyGather) or target.is_floating_point():
        return None
    local, dim, layout = parts
    classes = 1 if input.dim() > 1 else 0
    shape = [n for d, n in enumerate(input.shape) if d != classes]
    if dim != classes or list(target.shape) != shape or reduction not in ("none", "mean", "sum"):
        return None
    if target.dtype not in (torch.int64, torch.uint8) or not 0.0 <= label_smoothing <= 1.0:
        return None
    lazy_gather.note_loss()
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32  # as autocast has it for a loss
    rows, wanted = local.movedim(dim, -1).reshape(-1, local.shape[dim]), target.reshape(-1)
    losses: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, wanted, weight, layout, ignore_index, label_smoothing, dtype, chunk
    )
    if reduction == "none":
        return losses.view(target.shape)
    if reduction == "sum":
        return losses.sum()
    counted = wanted != ignore_index
    if weight is None:
        return losses.sum() / counted.sum()
    return losses.sum() / (weight[wanted.masked_fill(~counted, 0)] * counted).sum()


class _CrossEntropy(torch.autograd.Function):
    """The loss of each token. Of ``rows`` [tokens, classes here]; ``target`` and ``weight`` are whole."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        target: Tensor,
        weight: Tensor | None,
        layout: Layout,
        ignore_index: int,
        smoothing: float,
        dtype: torch.dtype,
        chunk: int | None,
    ) -> Tensor:
        tokens, classes = rows.shape
        exact = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        counted = target != ignore_index
        _check(target, counted, layout.whole)
        start = layout.start
        here = counted & (target >= start) & (target < start + classes)
        index = (target - start).masked_fill(~here, 0).long()
        own = None if weight is None else weight.narrow(0, start, classes).to(exact)
        step = chunk or max(1, CHUNK_ELEMENTS // max(1, classes))

        greatest = rows.new_full((tokens,), -torch.inf, dtype=exact)
        if classes:
            greatest = rows.amax(-1).to(exact)
        greatest = wire.reduce_max(greatest, layout.group)
        shift = greatest.masked_fill(~greatest.isfinite(), 0)
        sums = rows.new_zeros((3 if smoothing else 2, tokens), dtype=exact)
        for low in range(0, tokens if classes else 0, step):
            high = min(low + step, tokens)
            shifted = rows[low:high].to(exact) - shift[low:high, None]
            sums[1, low:high] = shifted.gather(1, index[low:high, None])[:, 0] * here[low:high]
            if smoothing:
                sums[2, low:high] = shifted.sum(-1) if own is None else shifted @ own
            sums[0, low:high] = shifted.exp_().sum(-1)
        sums[1].masked_fill_(~here, 0)  # an infinite logit of class 0 times False is no zero
        sums = wire.reduce_sum(sums, layout.group)
        log_sum = sums[0].log()
        each, total = _weights(target, counted, weight, layout, exact)
        losses = (1 - smoothing) * each * (log_sum - sums[1])
        if smoothing:
            losses = losses + smoothing / layout.whole * (total * log_sum - sums[2])
        ctx.save_for_backward(rows, index, here, counted, each, shift + log_sum, own)
        ctx.args = smoothing, total, layout.whole, step
        return losses.masked_fill(~counted, 0).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, index, here, counted, each, log_norm, own = ctx.saved_tensors
        smoothing, total, whole, step = ctx.args
        up = grads[0].to(log_norm.dtype).masked_fill(~counted, 0)
        target = (1 - smoothing) * each * up
        all_ = target + smoothing / whole * total * up
        out = torch.empty_like(rows)
        for low in range(0, rows.shape[0], step):
            high = min(low + step, rows.shape[0])
            grad = (rows[low:high].to(log_norm.dtype) - log_norm[low:high, None]).exp_()
            grad.mul_(all_[low:high, None])
            grad.masked_fill_(~counted[low:high, None], 0)  # the logits of an ignored token may be infinite
            if smoothing:
                evenly = smoothing / whole * up[low:high, None]
                grad.sub_(evenly if own is None else evenly * own)
            if rows.shape[1]:
                grad.scatter_add_(1, index[low:high, None], -(target * here)[low:high, None])
            out[low:high] = grad
        return out, None, None, None, None, None, None, None


def _weights(
    target: Tensor, counted: Tensor, weight: Tensor | None, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, float | Tensor]:
    """(the weight of each token's class, that of all classes)"""
    if weight is None:
        return torch.ones(target.shape, dtype=dtype, device=target.device), float(layout.whole)
    whole = weight.to(dtype)
    return whole[target.masked_fill(~counted, 0).long()], whole.sum()


def _check(target: Tensor, counted: Tensor, classes: int) -> None:
    """A target that no rank has would count as a logit of zero."""
    outside = counted & ((target < 0) | (target >= classes))
    if target.device.type != "cpu":
        torch._assert_async(~outside.any())
    elif outside.any():
        raise IndexError(f"Target {int(target[cast(Any, outside)][0])} is out of bounds.")
