"""The transformer modules that PyTorch itself ships, used as its tutorials use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.case import Inputs, ModelCase

WIDTH, HEADS, FEED_FORWARD = 40, 8, 52


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on its own, causal or not, with or without the weights that it can return."""

    def __init__(self, causal: bool = False, need_weights: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.causal = causal
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        out, _ = self.mha(x, x, x, attn_mask=mask, need_weights=self.need_weights)
        return out


class CrossAttention(nn.Module):
    """Other widths for key and value, so that the three projections are separate parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, kdim=28, vdim=36, batch_first=True)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.mha(x, key, value, need_weights=False)[0]


def _encoder(norm_first: bool = False, batch_first: bool = True, layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, FEED_FORWARD, dropout=0.1, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def _decoder(norm_first: bool = False, layers: int = 2) -> nn.Module:
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, FEED_FORWARD, dropout=0.1, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerDecoder(layer, layers)


def _randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _one(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (_randn(generator, dtype, batch, seq, WIDTH),)


def _target_and_memory(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return {
        "tgt": _randn(generator, dtype, batch, seq, WIDTH),
        "memory": _randn(generator, dtype, batch, seq + 2, WIDTH),
    }


def _query_key_value(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (
        _randn(generator, dtype, batch, seq, WIDTH),
        _randn(generator, dtype, batch, seq + 2, 28),
        _randn(generator, dtype, batch, seq + 2, 36),
    )


TORCH_MODELS = (
    ModelCase("torch_encoder", _encoder, _one, variants=({}, {"norm_first": True}, {"batch_first": False})),
    ModelCase("torch_decoder", _decoder, _target_and_memory, variants=({}, {"norm_first": True})),
    ModelCase("torch_mha", SelfAttention, _one, variants=({}, {"causal": True}, {"need_weights": True})),
    ModelCase("torch_cross_attention", CrossAttention, _query_key_value),
)
