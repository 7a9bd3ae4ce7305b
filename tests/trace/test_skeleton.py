"""A skeleton has the structure of its model, none of its weights, and never touches it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from autotp.errors import TraceError
from autotp.trace.capture import trace
from autotp.trace.skeleton import skeleton
from tests.models import MODELS


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.lin.bias.requires_grad_(False)
        self.again = self.lin
        self.lock = threading.Lock()  # does not copy
        self.register_buffer("table", torch.arange(6))
        self.register_buffer("large", torch.zeros(300, 300))
        self.scale = torch.tensor(2.0)
        self.hooked = 0
        self.lin.register_forward_hook(self.count)

    def count(self, module: nn.Module, args: object, out: object) -> None:
        self.hooked += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(x[:, self.table]) * self.scale


def test_structure_without_weights() -> None:
    model = Odd()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = skeleton(model)
    assert type(bare) is Odd
    assert bare is not model
    assert bare.again is bare.lin
    assert bare.lock is model.lock
    assert bare.lin.weight.is_meta
    assert isinstance(bare.lin.weight, nn.Parameter)
    assert bare.lin.weight.dtype == torch.bfloat16
    assert not bare.lin.bias.requires_grad
    assert torch.equal(bare.table, model.table)
    assert bare.table is not model.table
    assert bare.large.is_meta
    assert float(bare.scale) == 2.0
    found = trace(bare, (torch.zeros(3, 6, dtype=torch.bfloat16),))
    assert set(found.params) == {"lin.weight", "lin.bias", "table", "large"}
    assert found.is_buffer == {"table", "large"}
    assert found.aliases == {"again.weight": "lin.weight", "again.bias": "lin.bias"}
    assert model.hooked == 0
    assert bare.hooked == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_ties() -> None:
    bare = skeleton(MODELS["gpt2"].build())
    assert bare.lm_head.weight is bare.transformer.wte.weight


def test_model_on_meta_traces_as_on_the_cpu() -> None:
    case = MODELS["nanogpt"]
    with torch.device("meta"):
        model = case.factory()
    found = trace(skeleton(model), (), dict(case.inputs()))
    real = trace(skeleton(case.build(torch.float32)), (), dict(case.inputs()))
    assert [str(n.target) for n in found.graph.nodes] == [str(n.target) for n in real.graph.nodes]
    assert {n.meta["val"].device.type for n in found.graph.nodes if n.op == "placeholder"} == {"cpu"}


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(TraceError, match=r"'0\.weight' has no shape yet: run the model once"):
        trace(skeleton(nn.Sequential(nn.LazyLinear(4))), (torch.zeros(2, 3),))
