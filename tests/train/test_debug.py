"""Debugging aids: tensors that drifted apart, different batches, who communicates what, and who waits for whom."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import HangError, RankMismatchError
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import batches, loss_of


def in_sync(model: nn.Module) -> None:
    rank, ids = torch.distributed.get_rank(), batches(1)[0]
    autotp.debug.check_sync(model)
    loss_of(model, ids).backward()
    autotp.debug.check_sync(model)

    def differs(name: str, message: str, gradient: bool = False) -> None:
        parameter = model.get_parameter(name)
        tensor = parameter.grad if gradient else parameter.detach()
        assert tensor is not None
        local = getattr(tensor, "_tp_local", tensor)
        before = local.clone()
        if rank == 1:
            local.view(-1)[1] += 0.25
        with pytest.raises(RankMismatchError, match=message):
            autotp.debug.check_sync(model)
        local.copy_(before)

    differs("model.norm.weight", r"'model.norm.weight' differs between ranks 0 and 1.*difference is 2.5e-01 \(1 of")
    differs("model.norm.weight", r"the gradient of 'model.norm.weight' differs between ranks 0 and 1", True)
    if rank == 1:
        model.get_parameter("model.norm.weight").grad = None
    with pytest.raises(RankMismatchError, match=r"the gradient of 'model.norm.weight' .*: only rank 0 has one"):
        autotp.debug.check_sync(model)
    own = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        own += rank  # nobody else has it
    model.zero_grad()
    autotp.debug.check_sync(model)

    handle = autotp.debug.check_inputs(model)
    model(ids)
    with pytest.raises(RankMismatchError, match=r"ranks 0 and 1 were given different tensors as argument \[0\]"):
        model(ids + (rank == 1))
    with pytest.raises(RankMismatchError, match=r"input_ids.* \(shapes \[3, 6\] and \[3, 5\]\)"):
        model(input_ids=ids[:, : 5 if rank == 1 else 6])
    handle.remove()
    with pytest.raises(autotp.AutoTPError, match="is not sharded"):
        autotp.debug.check_sync(nn.Linear(2, 2))


def aids() -> None:
    case = MODELS["llama"]
    model = autotp.parallelize(case.build(), example_inputs={"input_ids": batches(1)[0]})
    in_sync(copy.deepcopy(model))
    traced_and_hanging(model)


def traced_and_hanging(model: nn.Module) -> None:
    rank, ids = torch.distributed.get_rank(), batches(1)[0]
    with record_collectives() as log, autotp.debug.trace_collectives(model) as trace:
        loss_of(model, ids).backward()
    assert [(c.kind, c.phase, c.shape) for c in trace] == [(c.kind, c.direction, c.shape) for c in log]
    assert [c.bytes for c in trace] == [c.bytes for c in log]
    forward = [(c.kind, c.module) for c in trace if c.phase == "forward"]
    layers = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.o_proj", "mlp.down_proj")]
    assert forward[:-1] == [("all_reduce", m) for m in ("model.embed_tokens", *layers)]
    assert forward[-1] == ("all_gather", "LlamaForCausalLM")  # the logits, as they are returned
    backward = [c.module for c in trace if c.phase == "backward"]
    norms = [f"model.layers.{i}.{m}_layernorm" for i in (1, 0) for m in ("post_attention", "input")]
    assert backward == ["model.norm", *norms]  # whose results the sharded layers take
    assert all(c.seconds > 0 for c in trace)
    assert "all_gather" in str(trace) and f"{len(log)} collectives, " in str(trace)
    with record_collectives() as log:
        loss_of(model, ids).backward()  # nothing is left behind
    assert len(log) == len(trace)

    autotp.debug.check_sync(model)
    with autotp.debug.report_hangs(model, timeout_s=1.0):
        model(ids)
        if rank == 0:
            with pytest.raises(HangError) as caught:
                model(ids)
            message = str(caught.value)
            assert "rank 0 has waited 1." in message
            assert "rank 0 waits in all_reduce number 7 (forward of 'model.embed_tokens'" in message
            assert "rank 1 has left all_gather number 6 (forward of 'LlamaForCausalLM'" in message
        else:
            time.sleep(1.5)
    x = torch.zeros(3, 6, 40, dtype=torch.float64)
    if rank == 1:  # what rank 0 has begun
        torch.distributed.all_reduce(x)


def test_aids(dist: Pool) -> None:
    dist.run(2, aids, one_plans=True)
