"""The models that the tests shard, written as people write them, with no thought for tensor parallelism.

``MODELS`` is the table. Sizes are tiny and differ from one another wherever the architecture lets them (8
heads of 5 or 6, widths 40, 48 and 52, vocabulary 61, batch 3, sequence 5), so that no two axes can be mixed
up by their size; 8 heads are even on 2 and 4 ranks and uneven (3, 3, 2) on 3. Every parameter is drawn afresh
from the seed, biases and norm weights too: with biases of zero, one added once per rank would go unseen.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.models.case import Inputs, ModelCase, call
from tests.models.hf import HF_MODELS
from tests.models.naive import NAIVE_MODELS
from tests.models.nanogpt import NANOGPT_MODELS
from tests.models.torch_nn import TORCH_MODELS
from tests.models.vit import VIT_MODELS

MODELS: dict[str, ModelCase] = {
    case.name: case for case in (*NAIVE_MODELS, *NANOGPT_MODELS, *VIT_MODELS, *TORCH_MODELS, *HF_MODELS)
}


def variants(*, generative: bool = False) -> Iterator[tuple[str, ModelCase, dict[str, object]]]:
    """Every model in every variant, named for pytest: ``llama``, ``llama-eager``, ``llama-kv_heads=2`` …"""
    for case in MODELS.values():
        if generative and not case.generative:
            continue
        for variant in case.variants:
            yield case.id(variant), case, variant


__all__ = ["MODELS", "Inputs", "ModelCase", "call", "variants"]
