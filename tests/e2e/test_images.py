"""A language model that sees is sharded whole: its tower as well, for texts with an image and for texts without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.rewrite.state import sharding_of
from autotp.trace.inputs import example_inputs
from autotp.trace.scenario import scenarios
from tests.dist.pool import Pool
from tests.e2e.compare import Problems

pytest.importorskip("transformers")


def build() -> nn.Module:
    import transformers

    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 6}
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama", **sizes, "vocab_size": 61, "num_key_value_heads": 3, "intermediate_size": 40,
        },
        vision_config={
            "model_type": "clip_vision_model", **sizes, "intermediate_size": 52, "image_size": 12, "patch_size": 4,
        },
        image_token_index=59,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).double().eval()


def sees() -> list[str]:
    """What differs from the unsharded model; on every rank."""
    reference = build()
    plain = example_inputs(reference)[1]
    seen = dict(scenarios(reference)[0].kwargs)
    torch.manual_seed(1)
    seen["pixel_values"] = torch.randn_like(seen["pixel_values"])
    model = copy.deepcopy(reference)
    autotp.parallelize(model)
    problems = Problems(rtol=1e-6)  # norms in float32
    sharding = sharding_of(model)
    assert sharding is not None
    for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
        fqn = f"model.vision_tower.encoder.layers.1.{name}.weight"
        problems.check(model.get_parameter(fqn).numel() < reference.get_parameter(fqn).numel(), f"{fqn} is whole")
    for what, inputs in (("with an image", seen), ("without", plain)):
        problems.close(what, model(**inputs).logits, reference(**inputs).logits)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    seen.pop("use_cache")
    problems.close("tokens", model.generate(**seen, **options), reference.generate(**seen, **options))
    return problems.found


def test_the_tower_is_sharded_too(dist: Pool) -> None:
    assert dist.run(2, sees, one_plans=True) == [[], []]
