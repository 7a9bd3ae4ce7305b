"""Twenty steps of training, sharded and unsharded, held against each other on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import autotp
from autotp.rewrite.state import sharding_of
from tests.models import MODELS

STEPS = 20
Run = Callable[[nn.Module, list[Tensor]], list[float]]


def batches(steps: int = STEPS, vocabulary: int = 61, batch: int = 3, seq: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocabulary, (batch, seq), generator=generator) for _ in range(steps)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Predict the next token."""
    out = model(ids)
    logits = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.logits
    return next_token_loss(logits, ids)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Pair:
    """A model of the table, unsharded and sharded; each run starts from copies of both."""

    def __init__(
        self, name: str = "llama", dtype: torch.dtype = torch.float64, mesh: Any = None, **variant: Any
    ) -> None:
        case = MODELS[name]
        self.reference = case.build(dtype=dtype, **variant)
        self.model = autotp.parallelize(
            case.build(dtype=dtype, **variant), mesh, example_inputs={"input_ids": batches()[0]}
        )
        assert sharding_of(self.model) is not None

    def copies(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.reference), copy.deepcopy(self.model)

    def same_training(self, run: Run, rtol: float = 1e-9) -> None:
        """Losses (and whatever else ``run`` returns) and trained weights of the sharded and the unsharded run."""
        reference, model = self.copies()
        wanted, found = run(reference, batches()), run(model, batches())
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=rtol, atol=rtol)
        assert wanted[STEPS - 1] != wanted[0]
        whole = autotp.full_state_dict(model)
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(
                whole[key], value, rtol=10 * rtol, atol=10 * rtol, msg=lambda m, k=key: f"{k}: {m}"
            )
