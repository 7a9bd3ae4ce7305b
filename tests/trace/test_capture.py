"""A captured graph computes what the model computes, and leaves the model as it was."""

from __future__ import annotations

import random
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import autotp
from autotp.errors import TraceError
from autotp.trace.attributes import int_attributes
from autotp.trace.capture import trace
from autotp.trace.graph import Trace
from autotp.trace.leaves import tensor_leaves
from autotp.trace.provenance import ProvInt
from autotp.trace.replay import replay, state_of
from autotp.trace.skeleton import skeleton
from tests.models import ModelCase, variants
from tests.models.case import Inputs

CASES = [
    pytest.param(case, variant, id=name)
    for name, case, variant in variants()
    if not {"kv_heads", "attn"} <= variant.keys()
]


def arguments(inputs: Inputs) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    return ((), dict(inputs)) if isinstance(inputs, dict) else (inputs, {})


def captured(model: nn.Module, inputs: Inputs, scenario: str = "forward") -> Trace:
    args, kwargs = arguments(inputs)
    if "input_ids" in kwargs and hasattr(model.config, "use_cache"):
        kwargs["use_cache"] = False
    return trace(skeleton(model), args, kwargs, scenario)


@pytest.mark.parametrize(("case", "variant"), CASES)
def test_replay_equals_eager(case: ModelCase, variant: dict[str, object]) -> None:
    model = case.build(**variant)
    inputs = case.inputs()
    found = captured(model, inputs)
    assert found.notes == ()
    args, kwargs = arguments(case.inputs(seed=1))
    outputs = replay(found, state_of(model, found), args, kwargs)
    if "input_ids" in kwargs and hasattr(model.config, "use_cache"):
        kwargs["use_cache"] = False
    expected = [t for _, t in tensor_leaves(model(*args, **kwargs), ())]
    assert len(outputs) == len(expected)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    plain = [type(v) for m in found.module.modules() for _, v in int_attributes(m)]
    assert ProvInt not in plain


class Hooks(nn.Module):
    """Registers a hook at its first call, and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            self.lin.register_forward_hook(lambda module, args, out: out * 2)
            self.hooked = True
        return self.lin(x)


def test_hooks_that_a_forward_registers_are_gone_after_the_trace() -> None:
    bare = skeleton(Hooks())
    first, second = (trace(bare, (torch.zeros(2, 4),)) for _ in range(2))
    assert [n.name for n in first.graph.nodes] == [n.name for n in second.graph.nodes]
    assert not hasattr(bare, "hooked")
    assert not bare.get_submodule("lin")._forward_hooks


class Sized(nn.Module):
    """It splits rows by lengths that come as a tensor, and may branch on them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.how == "bool" and (lengths > 1).all():
            x = x + 1
        if self.how == "equal" and torch.equal(lengths, lengths.flip(0)):
            x = x + 1
        if self.how == "float" and (lengths.double() / 2).sum().item() > 1:
            x = x + 1
        first, *_ = x.split(lengths.tolist())
        first = first.reshape(lengths[0], -1)
        return self.linear(torch.cat([first[: lengths[0]], x[:2].repeat_interleave(lengths, 0)]))


def test_sizes_that_the_inputs_give_are_read() -> None:
    model, args = Sized("sizes").double(), (torch.randn(5, 4, dtype=torch.float64), torch.tensor([2, 3]))
    found = trace(skeleton(model), args)
    torch.testing.assert_close(replay(found, state_of(model, found), args)[0], model(*args))
    assert any("lengths.tolist()" in note for note in found.notes)
    assert any("first[: lengths[0]]" in note for note in found.notes)


@pytest.mark.parametrize("how", ["bool", "equal", "float"])
def test_no_branch_on_what_the_inputs_give(how: str) -> None:
    with pytest.raises(TraceError, match="depends on values"):
        trace(skeleton(Sized(how)), (torch.zeros(5, 4), torch.tensor([2, 3])))


class Blocks(nn.Module):
    """A mask from a function of two places, vmapped, as transformers makes those of images in a text; or a bias."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.slope = nn.Parameter(torch.rand(5)) if learnt else None

    def forward(self, x: Tensor, blocks: Tensor) -> Tensor:
        def same(q: Tensor, k: Tensor) -> Tensor:
            mask = (blocks[q] == blocks[k]) | (q >= k)
            return mask if self.slope is None else mask * self.slope[q]

        places = torch.arange(x.shape[0])
        with TransformGetItemToIndex():
            mask = torch.vmap(torch.vmap(same, (None, 0)), (0, None))(places, places)
        return self.linear(x) * mask.double().mean(1, keepdim=True) + x[blocks == 1].sum(0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch hides by itself
def test_masks_of_vmapped_functions() -> None:
    args = (torch.zeros(5, 4), torch.tensor([0, 1, 1, 2, 3]))
    found = trace(skeleton(Blocks(learnt=False)), args)
    assert found.outputs[0].node.meta["val"].shape == (5, 4)
    with pytest.raises(TraceError, match="a transformed function computed"):
        trace(skeleton(Blocks(learnt=True)), args)


class Writes(nn.Module):
    """Computes in place how many columns it keeps."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.register_buffer("kept", torch.tensor([1, 2]))
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept if self.own else torch.zeros(2, dtype=torch.long)
        before = self.up(x)[:, kept]
        kept[1] += 3
        return torch.cat([before, self.up(x)[:, kept], x[:, : int(kept[1])]], 1)


def test_known_values_that_are_written_to() -> None:
    model, x = Writes(own=False), torch.randn(3, 6)
    found = trace(skeleton(model), (x,))
    (replayed,) = replay(found, state_of(model, found), (x,), {})
    assert torch.equal(replayed, model(x)) and replayed.shape == (3, 7)
    indexes = [n for n in found.graph.nodes if n.target is torch.ops.aten.index.Tensor]
    assert len(indexes) == 2
    assert all(n.args[1][1] not in found.constants for n in indexes)  # it has two values, one after the other


def test_values_of_the_models_own_tensors_are_left_and_forgotten() -> None:
    model, x = Writes(own=True), torch.randn(3, 6)
    with pytest.raises(TraceError, match="depends on values of a tensor"):
        trace(skeleton(model), (x,))
    with pytest.raises(TraceError, match="depends on values of a tensor"):
        trace(model, (x,))
    assert model.kept.tolist() == [1, 2]


class Drawing(nn.Module):
    """Drops what it draws outside of torch, as SpecAugment does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 12)
        self.down = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        dropped = torch.tensor(np.random.rand(len(x)) < 0.5)
        scale = torch.tensor([random.random() for _ in range(5)])
        return torch.where(dropped[:, None], 0.0, self.down(self.up(x))) * scale


def test_draws_outside_of_torch_are_the_same_in_every_trace() -> None:
    model, x = Drawing(), torch.randn(40, 7)
    before = random.getstate(), str(np.random.get_state())
    first, again = ([c.tolist() for c in trace(model, (x,)).constants.values()] for _ in range(2))
    assert first == again and {len(values) for values in first} == {40, 5}
    assert (random.getstate(), str(np.random.get_state())) == before
    plan = autotp.plan(model, 2, example_inputs=(x,))  # a rank's own trace is held against that of the whole model
    assert {e.placement for e in plan.entries if e.name.endswith("weight")} == {"column", "row"}


class Table:
    """Computed at first use."""

    @cached_property
    def steps(self) -> Tensor:
        return torch.arange(3, dtype=torch.float32)


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 3)
        self.tables = {"first": [Table()]}
        self.again = self.tables

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.tables["first"][0].steps


def test_what_helpers_keep_is_forgotten() -> None:
    """A tensor of one trace, kept where a copy of the model takes it along, would be freed twice."""
    model = Helped()
    x = torch.randn(2, 6)
    for _ in range(2):
        trace(model, (x,))
        assert vars(model.tables["first"][0]) == {}
    expected = model.up(x) * torch.arange(3)
    assert torch.equal(model(x), expected)
    table = model.tables["first"][0].steps
    trace(model, (x,))
    assert model.tables["first"][0].steps is table
