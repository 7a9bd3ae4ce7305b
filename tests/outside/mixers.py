"""Models that are neither a language transformer nor a convolution network: mixers, diffusion transformers, LSTMs."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.models.case import Inputs, ModelCase


class MixerBlock(nn.Module):
    """MLP-Mixer: one MLP over the patches, one over the channels."""

    def __init__(self, num_patch, hidden_dim, tokens_mlp_dim, channels_mlp_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.token_mixing = nn.Sequential(
            nn.Linear(num_patch, tokens_mlp_dim), nn.GELU(), nn.Linear(tokens_mlp_dim, num_patch)
        )
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.channel_mixing = nn.Sequential(
            nn.Linear(hidden_dim, channels_mlp_dim), nn.GELU(), nn.Linear(channels_mlp_dim, hidden_dim)
        )

    def forward(self, x):
        y = self.norm1(x).transpose(1, 2)
        x = x + self.token_mixing(y).transpose(1, 2)
        return x + self.channel_mixing(self.norm2(x))


class MLPMixer(nn.Module):
    def __init__(self, image_size=12, patch_size=4, hidden_dim=20, num_classes=11):
        super().__init__()
        num_patch = (image_size // patch_size) ** 2
        self.to_patch_embedding = nn.Conv2d(3, hidden_dim, patch_size, patch_size)
        self.blocks = nn.ModuleList([MixerBlock(num_patch, hidden_dim, 14, 36) for _ in range(2)])
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, num_classes)

    def forward(self, x):
        x = self.to_patch_embedding(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequency_embedding_size=16):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        half = dim // 2
        freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=t.dtype) / half)
        args = t[:, None] * freqs[None]
        return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)

    def forward(self, t):
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size))


class Attention(nn.Module):
    """As timm writes it."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size * mlp_ratio),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden_size * mlp_ratio, hidden_size),
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(
            6, dim=1
        )
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer of Peebles and Xie, conditioned by adaptive layer norms."""

    def __init__(self, input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=8):
        super().__init__()
        self.out_channels = in_channels * 2
        self.patch_size = patch_size
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Embedding(11, hidden_size)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, (input_size // patch_size) ** 2, hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def unpatchify(self, x):
        c, p = self.out_channels, self.patch_size
        h = w = int(x.shape[1] ** 0.5)
        x = x.reshape(shape=(x.shape[0], h, w, p, p, c))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], c, h * p, h * p))

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class RNNModel(nn.Module):
    """The word language model of PyTorch's examples: embedding, recurrent layers, decoder."""

    def __init__(self, rnn_type="LSTM", ntoken=61, ninp=20, nhid=28, nlayers=2):
        super().__init__()
        self.ntoken = ntoken
        self.drop = nn.Dropout(0.1)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = getattr(nn, rnn_type)(ninp, nhid, nlayers, dropout=0.1)
        self.decoder = nn.Linear(nhid, ntoken)

    def forward(self, input):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb)
        decoded = self.decoder(self.drop(output)).view(-1, self.ntoken)
        return nn.functional.log_softmax(decoded, dim=1)


class LSTMCell(nn.Module):
    """An LSTM as tutorials write it out: gates by a matrix product, a loop over time."""

    def __init__(self, vocab=61, ninp=20, nhid=28):
        super().__init__()
        self.embed = nn.Embedding(vocab, ninp)
        self.x2h = nn.Linear(ninp, 4 * nhid)
        self.h2h = nn.Linear(nhid, 4 * nhid)
        self.out = nn.Linear(nhid, vocab)
        self.nhid = nhid

    def forward(self, tokens):
        x = self.embed(tokens)
        h = x.new_zeros(x.size(0), self.nhid)
        c = x.new_zeros(x.size(0), self.nhid)
        outputs = []
        for t in range(x.size(1)):
            i, f, g, o = (self.x2h(x[:, t]) + self.h2h(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return self.out(torch.stack(outputs, 1))


def _mixer_feed(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (torch.randn(batch, 3, 12, 12, generator=generator, dtype=dtype),)


def _dit_feed(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (
        torch.randn(batch, 4, 8, 8, generator=generator, dtype=dtype),
        1000 * torch.rand(batch, generator=generator, dtype=dtype),
        torch.randint(0, 11, (batch,), generator=generator),
    )


def _tokens(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (torch.randint(0, 61, (batch, 5), generator=generator),)


MIXERS = (
    ModelCase("mlp_mixer", MLPMixer, _mixer_feed),
    ModelCase("dit", DiT, _dit_feed),
    ModelCase("lstm_lm", RNNModel, _tokens, variants=({}, {"rnn_type": "GRU"})),
    ModelCase("lstm_written_out", LSTMCell, _tokens),
)
