"""Which places in a model are the same code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autotp.rewrite.anchors import Anchors, Boundary
from autotp.trace.capture import trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.up(x).relu() * scale


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.other = nn.Sequential(nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.other(x)
        return found


def test_places_that_are_the_same_code() -> None:
    """Other layers are, other results and other modules are not: they may do where the first one does not."""
    traced = trace(Blocks(), (torch.randn(2, 5),))
    anchors = Anchors(traced)
    results = [Boundary(name, "out", ("out",)) for name in ("blocks.0", "blocks.1", "blocks.2", "other")]
    argument = Boundary("blocks.1", "in", ("args", 0))
    assert anchors.alike(results[0], [*results, argument]) == frozenset(results[:3])
    assert anchors.alike(results[3], results) == {results[3]}
    calls = [c for node in traced.graph.nodes if (c := anchors.site_of(node)) and c.module.startswith("blocks.")]
    relu, times = ([(c.module, c.frames) for c in calls if c.func == name] for name in ("relu", "mul"))
    assert len(relu) == len(times) == 3
    operand = (*relu[1], "operand")
    assert anchors.alike(relu[0], [*relu, *times, operand, argument]) == frozenset(relu)


def test_weights_that_leaves_compute() -> None:
    """A normed weight is one; a slice or a transpose of a plain weight is none, in attention neither."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    x = torch.randn(2, 3, 6)
    assert Anchors(trace(attention, (x, x, x))).weights == frozenset()
    assert Anchors(trace(nn.Linear(6, 5), (x,))).weights == frozenset()
    normed = Anchors(trace(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (x,))).weights
    assert torch.ops.aten._weight_norm.default in {node.target for node in normed}
