"""Which ops of the whole model make one value together, for verification: equal ones, if nothing tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autotp.axes.analysis import analyse
from autotp.plan.planner import choose
from autotp.rewrite.anchors import Anchors
from autotp.rewrite.numbering import Numbering
from autotp.rewrite.values import op_name
from autotp.rewrite.verify import Verifier
from autotp.rewrite.views import first_view
from autotp.trace.capture import trace

#: Ops that the model below runs twice on the same operands, or twice without any: are the two one value?
ONE_VALUE = {
    "arange": True,  # as positions are, for each kind of layer
    "cos": True,
    "rand": False,  # two draws
    "zeros": False,  # one is written to
    "sin": False,  # the sum of its gradients is a place of its own
    "sinh": False,  # of a value that ranks have parts of
    "linear": False,  # a sum that is still in parts
}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 12)
        self.down = nn.Linear(12, 5, bias=False)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        parts = hidden.detach()
        counts = [torch.zeros(5, dtype=x.dtype) for _ in range(2)]
        counts[0] += 1
        found = self.down(hidden) + F.linear(parts, self.down.weight.detach())
        found = found + F.linear(parts, self.down.weight.detach())
        found = found + sum(torch.arange(5).cos() + self.scale.sin() + torch.rand(5) for _ in range(2))
        return found + (parts.sinh() - parts.sinh()).sum(-1, keepdim=True) + counts[0] + counts[1]


def test_equal_ops() -> None:
    model = Twice()
    analysis = analyse(trace(model, (torch.randn(3, 7),)))
    anchors = Anchors(analysis.trace)
    choice = choose(analysis, 2, places=anchors.places())
    assert [a.size for c in choice.candidates for a in c.atoms] == [12]
    view = first_view(analysis, choice, anchors, trace)
    verifier = Verifier(analysis, choice, view.program, anchors)
    numbered = Numbering(verifier, view.rank(0, 2, ""))
    nodes: dict[str, list[fx.Node]] = {name: [] for name in ONE_VALUE}
    for node in analysis.trace.graph.nodes:
        if (name := op_name(node)) in nodes and anchors.leaf_of(node) is None:
            nodes[name].append(node)
    assert {name: len(found) for name, found in nodes.items()} == dict.fromkeys(ONE_VALUE, 2)
    assert {name: numbered.roots[a] == numbered.roots[b] for name, (a, b) in nodes.items()} == ONE_VALUE
