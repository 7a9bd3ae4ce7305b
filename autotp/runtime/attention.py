"""``nn.MultiheadAttention`` with its heads over the ranks, and torch's fast paths that would not see it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import AutoTPError, RewriteError
from autotp.runtime import ops
from autotp.runtime.edges import Enter, apply_enter
from autotp.runtime.linear import as_dtype
from autotp.runtime.rng import sharded_rng
from autotp.runtime.swap import Sharded, become, check_swappable

_torch: Any = F  # its private parts: how torch checks and converts masks
_PARAMETERS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """``heads``: how many heads each rank of ``group`` has, in order; ``rank``: this one's place among them.

    ``enter``: how those of query, key and value that are in ``enters`` come in (the others are entered elsewhere).
    ``reduce``: whether the output is summed here; if not it is Partial, and out_proj's bias is added on the rank with
    ``keep`` only.
    """

    group: str
    heads: tuple[int, ...]
    rank: int
    enter: Enter | None
    reduce: bool = True
    keep: bool = True
    enters: frozenset[str] = frozenset({"query", "key", "value"})

    @property
    def first(self) -> int:
        return sum(self.heads[: self.rank])

    @property
    def local(self) -> int:
        return self.heads[self.rank]


def attention_slices(
    module: nn.MultiheadAttention, first: int, count: int
) -> dict[str, tuple[int, list[tuple[int, int]]]]:
    """For each parameter that is sharded by heads: its dim, and the (start, length) runs of heads
    first..first+count.
    """
    width, start, length = module.embed_dim, first * module.head_dim, count * module.head_dim
    one = [(start, length)]
    three = [(part * width + start, length) for part in range(3)]
    slices: dict[str, tuple[int, list[tuple[int, int]]]] = {"out_proj.weight": (1, one)}
    if module._parameters["in_proj_weight"] is not None:
        slices["in_proj_weight"] = (0, three)
    else:
        slices |= {f"{x}_proj_weight": (0, one) for x in "qkv"}
    if module.in_proj_bias is not None:
        slices["in_proj_bias"] = (0, three)
    if module.bias_k is not None:
        slices |= {"bias_k": (2, one), "bias_v": (2, one)}
    return slices


class ShardedMultiheadAttention(Sharded, nn.MultiheadAttention):
    """Self- and cross-attention on this rank's heads. ``num_heads`` and ``embed_dim`` go on saying the
    whole.
    """

    _tp: AttentionOptions

    @staticmethod
    def swap(module: nn.MultiheadAttention, options: AttentionOptions) -> None:
        """Make ``module``, whose parameters are local already, a sharded one. Changes it in place."""
        check_swappable(module, nn.MultiheadAttention.forward, _PARAMETERS)
        check_swappable(module.out_proj, nn.Linear.forward, ("weight", "bias"))
        if sum(options.heads) != module.num_heads:
            raise RewriteError(f"heads {options.heads} over the ranks are not {module.num_heads} together.")
        local = options.local * module.head_dim
        if module.out_proj.weight.shape[1] != local:
            raise RewriteError(
                f"rank {options.rank} has {options.local} heads of {module.head_dim}, so out_proj.weight "
                f"should have {local} columns, not {module.out_proj.weight.shape[1]}."
            )
        become(module, ShardedMultiheadAttention, options)
        # torch's fast paths (here and in TransformerEncoderLayer) run only where this is True.
        module._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        tp = self._tp
        if query.is_nested or key.is_nested or value.is_nested:
            raise AutoTPError(
                "sharded nn.MultiheadAttention takes no nested tensors: pass padded ones and a mask."
            )
        batched = _torch._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        key_padding_mask, attn_mask, is_causal = self._masks(
            query, key_padding_mask, attn_mask, need_weights, is_causal
        )
        batch_first = self.batch_first or not batched
        q, k, v = self._project(*self._enter(query, key, value))
        q, k, v = (
            self._heads_apart(x if batched else x.unsqueeze(0), batch_first) for x in (q, k, v)
        )  # [b, h, t, d]
        batch = q.shape[0]
        mask = self._merge(attn_mask, key_padding_mask, batch)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self._heads_apart(self.bias_k, True).expand(batch, -1, -1, -1)], 2)
            v = torch.cat([v, self._heads_apart(self.bias_v, True).expand(batch, -1, -1, -1)], 2)
        if self.add_zero_attn:
            zeros = k.new_zeros(batch, tp.local, 1, self.head_dim)
            k, v = torch.cat([k, zeros], 2), torch.cat([v, zeros], 2)
        dropout = self.dropout if self.training else 0.0
        with sharded_rng(tp.group, q.device) if dropout else contextlib.nullcontext():
            if need_weights or not tp.local:  # fused kernels want at least one head
                out, weights = _explicit(q, k, v, mask, dropout)
            else:
                out, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        out = out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
        out = self._project_out(out)
        if not need_weights:
            weights = None
        elif average_attn_weights:
            assert weights is not None
            weights = ops.all_reduce(weights.sum(1) / self.num_heads, tp.group)
        else:
            assert weights is not None
            weights = ops.gather(weights, 1, tp.heads, (), (), tp.group)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _masks(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """The masks as floats to add, as F.multi_head_attention_forward makes them."""
        dtype = query.dtype
        key_padding_mask = _torch._canonical_mask(
            key_padding_mask, "key_padding_mask", _torch._none_or_dtype(attn_mask), "attn_mask", dtype
        )
        attn_mask = _torch._canonical_mask(attn_mask, "attn_mask", None, "", dtype, False)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's own words
        if is_causal and key_padding_mask is None and not need_weights:
            return None, None, True
        return key_padding_mask, attn_mask, False

    def _enter(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One enter for each distinct tensor, and what was the same stays the same."""
        how, names = self._tp.enter, self._tp.enters
        if how is None:
            return query, key, value
        done: dict[int, Tensor] = {}
        for name, x in (("query", query), ("key", key), ("value", value)):
            if name in names and id(x) not in done:
                done[id(x)] = apply_enter(x, how)
        return (
            done[id(query)] if "query" in names else query,
            done[id(key)] if "key" in names else key,
            done[id(value)] if "value" in names else value,
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self._tp.local * self.head_dim
        fused: Any = self.in_proj_weight  # None where query, key and value differ in width
        bias = self.in_proj_bias
        if fused is not None and query is key and key is value:
            q, k, v = F.linear(query, fused, bias).chunk(3, -1)
            return q, k, v
        if fused is not None:
            weights = [fused.narrow(0, part * width, width) for part in range(3)]
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None if bias is None else bias.narrow(0, part * width, width) for part in range(3)]
        inputs = (query, key, value)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        return q, k, v

    def _heads_apart(self, x: Tensor, batch_first: bool) -> Tensor:
        """[b, t, h·d] or [t, b, h·d] to [b, h, t, d]."""
        x = x.view(*x.shape[:2], self._tp.local, self.head_dim)
        return x.permute(0, 2, 1, 3) if batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int) -> Tensor | None:
        """Both masks as one that can be added to [b, h, t, s], for this rank's heads."""
        tp = self._tp
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)  # keys that no mask hides
        merged = None
        if attn_mask is not None:
            attn_mask = _entered_if_trained(attn_mask, tp.group)
            if attn_mask.dim() == 3:  # [b·h, t, s]
                attn_mask = attn_mask.view(batch, self.num_heads, *attn_mask.shape[1:])
                attn_mask = attn_mask.narrow(1, tp.first, tp.local)
            merged = F.pad(attn_mask, (0, extra)) if extra else attn_mask
        if key_padding_mask is not None:
            key_padding_mask = _entered_if_trained(key_padding_mask, tp.group)
            padding = F.pad(key_padding_mask, (0, extra)) if extra else key_padding_mask
            padding = padding.view(batch, 1, 1, -1)
            merged = padding if merged is None else merged + padding
        return merged

    def _project_out(self, out: Tensor) -> Tensor:
        tp, weight, bias = self._tp, self.out_proj.weight, self.out_proj.bias
        if not tp.reduce:
            return F.linear(out, weight, None if bias is None else ops.mask(bias, tp.keep))
        out = ops.all_reduce(F.linear(out, weight), tp.group)
        return out if bias is None else out + as_dtype(bias, out)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention that has its weights to show."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


def _entered_if_trained(mask: Tensor, group: str) -> Tensor:
    """A mask that is trained (a learned bias) enters the sharded region as any other value does."""
    return ops.enter(mask, group) if mask.requires_grad else mask


def disable_fast_paths(model: nn.Module) -> None:
    """Keep torch's fused inference kernels away from sharded modules.

    nn.TransformerEncoderLayer and nn.TransformerEncoder read the weights of their parts and hand them to one
    kernel, past the forwards of the parts. Changes flags that nothing else reads.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            if not any(isinstance(part, Sharded) for part in module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False
