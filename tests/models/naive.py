"""The teaching models of this field: attention, a transformer layer, an MLP, a Linear, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.models.case import ModelCase


class MultiHeadAttention(nn.Module):
    """Separate projections; every size written out."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_heads = n_heads
        self.d_k = d_model // n_heads
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, d_model)
        self.W_v = nn.Linear(d_model, d_model)
        self.W_o = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.W_q(x).reshape(b, s, self.n_heads, self.d_k).transpose(1, 2)
        k = self.W_k(x).reshape(b, s, self.n_heads, self.d_k).transpose(1, 2)
        v = self.W_v(x).reshape(b, s, self.n_heads, self.d_k).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_k)
        attn = F.softmax(scores, dim=-1)
        out = (attn @ v).transpose(1, 2).reshape(b, s, self.d_model)
        return self.W_o(out)


class FusedMultiHeadAttention(nn.Module):
    """One projection for q, k and v, taken apart by ``chunk(3)``."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_heads = n_heads
        self.d_k = d_model // n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        q = q.reshape(b, s, self.n_heads, self.d_k).transpose(1, 2)
        k = k.reshape(b, s, self.n_heads, self.d_k).transpose(1, 2)
        v = v.reshape(b, s, self.n_heads, self.d_k).transpose(1, 2)
        mask = torch.triu(torch.ones(s, s, dtype=torch.bool, device=x.device), diagonal=1)
        scores = (q @ k.transpose(-2, -1)) * self.d_k**-0.5
        scores = scores.masked_fill(mask, float("-inf"))
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, s, self.d_model)
        return self.out_proj(out)


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class TransformerLayer(nn.Module):
    """Pre-norm, residual, ReLU feed-forward."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attn = MultiHeadAttention(d_model, n_heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.ff = FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.ff(self.norm2(x)))
        return x


class MLP(nn.Module):
    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, d_hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(d_hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class WeightNormed(nn.Module):
    """Weights of a direction and a length: of each output, of each input, of each channel in groups."""

    def __init__(self, norm: Callable[..., Any] = weight_norm) -> None:
        super().__init__()
        self.up = norm(nn.Linear(10, 36))
        self.mix = norm(nn.Conv1d(36, 36, 3, padding=1, groups=12))
        self.down = norm(nn.Linear(36, 10), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.mix(F.silu(self.up(x)).mT)).mT
        return x + self.down(h)


def _hidden_states(width: int):
    def feed(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, seq, width, generator=generator, dtype=dtype),)

    return feed


NAIVE_MODELS = (
    ModelCase(
        "naive_mha", lambda d_model=40, n_heads=8: MultiHeadAttention(d_model, n_heads), _hidden_states(40)
    ),
    ModelCase(
        "fused_mha",
        lambda d_model=40, n_heads=8: FusedMultiHeadAttention(d_model, n_heads),
        _hidden_states(40),
    ),
    ModelCase(
        "transformer_layer",
        lambda d_model=40, n_heads=8, d_ff=52, dropout=0.1: TransformerLayer(d_model, n_heads, d_ff, dropout),
        _hidden_states(40),
    ),
    ModelCase("mlp", lambda d_in=28, d_hidden=52, d_out=20: MLP(d_in, d_hidden, d_out), _hidden_states(28)),
    ModelCase("weight_norm", WeightNormed, _hidden_states(10)),
    ModelCase("linear", lambda d_in=28, d_out=44: nn.Linear(d_in, d_out), _hidden_states(28)),
)
