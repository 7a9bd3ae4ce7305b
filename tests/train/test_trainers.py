"""The ecosystem's tools on a sharded model."""

from __future__ import annotations

from typing import Any

import torch
from torch.testing import assert_close

import autotp
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import STEPS, batches
from tests.train.test_toolbox import train


def lora() -> None:
    """Adapters that were added before sharding train as unsharded, and load into an unsharded model."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    def build() -> Any:
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(MODELS["llama"].build(), config).double()

    ids = batches()
    reference, model, restored = build(), build(), build()
    autotp.parallelize(model, example_inputs={"input_ids": ids[0]})
    wanted, found = train(reference, ids), train(model, ids)
    assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-9, atol=1e-9)
    assert wanted[STEPS - 1] != wanted[0]
    autotp.debug.check_sync(model)
    whole = autotp.full_state_dict(model)
    adapter = get_peft_model_state_dict(restored, state_dict=whole)
    assert adapter and all("lora" in name for name in adapter)
    set_peft_model_state_dict(restored, adapter)
    mine, theirs = (dict(m.named_parameters()) for m in (restored, reference))
    trained = [name for name in theirs if "lora" in name]
    assert trained
    for name in trained:
        assert_close(mine[name], theirs[name], rtol=1e-8, atol=1e-9)


def test_lora(dist: Pool) -> None:
    dist.run(2, lora)
