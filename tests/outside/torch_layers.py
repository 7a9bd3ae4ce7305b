"""torch.nn's own larger layers, in the forms that `tests/models/torch_nn.py` leaves out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.case import Inputs, ModelCase

WIDTH = 40


class Translator(nn.Module):
    """nn.Transformer as the tutorial on translation uses it: embeddings before it, a generator behind."""

    def __init__(self) -> None:
        super().__init__()
        self.src = nn.Embedding(61, WIDTH)
        self.tgt = nn.Embedding(53, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 8, 1, 1, 52, batch_first=True)
        self.generator = nn.Linear(WIDTH, 53)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(tgt.shape[1], dtype=self.generator.weight.dtype)
        return self.generator(self.transformer(self.src(src), self.tgt(tgt), tgt_mask=mask))


class BagOfWords(nn.Module):
    """nn.EmbeddingBag, nn.Bilinear, and an MLP with a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(61, WIDTH, mode="mean")
        self.pair = nn.Bilinear(WIDTH, WIDTH, 20)
        self.gate = nn.Sequential(nn.Linear(20, 52), nn.GLU(), nn.Linear(26, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bag(tokens)
        return self.gate(self.pair(x, x.roll(1, 0)))


def _two(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (
        torch.randint(0, 61, (batch, seq), generator=generator),
        torch.randint(0, 53, (batch, seq + 2), generator=generator),
    )


def _tokens(generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int) -> Inputs:
    return (torch.randint(0, 61, (batch, seq), generator=generator),)


LAYERS = (
    ModelCase("torch_transformer", Translator, _two),
    ModelCase("torch_bag_of_words", BagOfWords, _tokens),
)
