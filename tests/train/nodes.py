"""A training run on one rank of several, started by torchrun: sharded as unsharded. Says so on stdout."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.testing import assert_close

import autotp
from tests.models import MODELS, call

STEPS = 5


def train(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        out = call(model, MODELS["transformer_layer"].inputs(step))
        loss = out.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    assert os.environ["LOCAL_WORLD_SIZE"] == "1" and os.environ["LOCAL_RANK"] == "0"  # each rank on its own node
    case = MODELS["transformer_layer"]
    reference, model = case.build(), case.build()
    autotp.parallelize(model, example_inputs=case.inputs())
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in reference.parameters())
    wanted, found = train(reference), train(model)
    assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-9, atol=1e-9)
    assert wanted[-1] < wanted[0]
    whole = autotp.full_state_dict(model)
    for name, value in reference.state_dict().items():
        assert_close(whole[name], value, rtol=1e-8, atol=1e-8)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: trained alike", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
