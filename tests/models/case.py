"""What a model of the tests is: how to build it, what to feed it, and in which variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...] | dict[str, Tensor]

BATCH, SEQ = 3, 5


@dataclass(frozen=True)
class ModelCase:
    name: str
    factory: Callable[..., nn.Module]  # keyword arguments are the variant
    feed: Callable[..., Inputs]  # (generator, dtype, batch, seq, model's variant by name)
    generative: bool = False  # has generate() with a KV cache
    variants: tuple[dict[str, object], ...] = ({},)  # those worth testing; the first is the default

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0, **variant: object) -> nn.Module:
        """The model in eval mode, on the CPU, every parameter random and a function of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.factory(**variant).to(dtype).eval()
            randomize(model, seed)
        return model

    def inputs(
        self,
        seed: int = 0,
        batch: int = BATCH,
        seq: int = SEQ,
        *,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> Inputs:
        """Positional arguments as a tuple, or keyword arguments as a dict."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return self.feed(generator, dtype, batch, seq, **options)

    def id(self, variant: dict[str, object]) -> str:
        words = [str(v) if isinstance(v, str) else k if v is True else f"{k}={v}" for k, v in variant.items()]
        return "-".join([self.name, *words])


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter: matrices of spectral size about one, vectors around what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise.to(parameter.dtype))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model(*inputs)`` or ``model(**inputs)``."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
