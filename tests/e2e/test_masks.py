"""Attention runs other code with a mask than without one: both are right, whichever the example call takes."""

from __future__ import annotations

import pytest
import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

import autotp
from autotp.rewrite.state import sharding_of
from tests.dist.pool import Pool
from tests.e2e.compare import Problems, compare_passes
from tests.models.case import randomize

# The norm of queries and keys is over all heads, and experts work in float32 (eps 1.2e-7) in part.
RTOL = 1e-6


def build() -> FlexOlmoForCausalLM:
    config = FlexOlmoConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, num_experts=4, num_experts_per_tok=2, pad_token_id=0, use_cache=False,
        experts_implementation="batched_mm",
    )  # fmt: skip
    model = FlexOlmoForCausalLM(config).double().eval()
    randomize(model, 0)
    return model


def with_and_without(masked_example: bool) -> list[str]:
    reference, model = build(), build()
    ids = torch.randint(3, 101, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    plain, masked = {"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}
    autotp.parallelize(model, example_inputs=masked if masked_example else plain)
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems(rtol=RTOL)
    compare_passes(problems, "without a mask", model, reference, plain, sharding)
    compare_passes(problems, "with padding", model, reference, masked, sharding)
    return problems.found


@pytest.mark.parametrize("masked_example", [False, True])
def test_both_branches(dist: Pool, masked_example: bool) -> None:
    assert dist.run(2, with_and_without, masked_example) == [[]] * 2
