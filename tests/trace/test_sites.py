"""Which expression of the source made a value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autotp.trace.capture import trace
from autotp.trace.sites import is_statement


class Written(nn.Module):
    """In place: once as a statement, on two lines, and where the value is taken."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(1)
        y.sub_(
            2,
        )
        y = y.mul_(3)
        y /= 4
        [y.exp_()]
        return y.tanh_() if y.sin_() is y else y.cos_()


def test_statements() -> None:
    calls = [node.meta["call"] for node in trace(Written(), (torch.rand(5),)).graph.nodes if "call" in node.meta]
    found = {call.func: is_statement(call.frames[0]) for call in calls if call is not None}
    alone = {func for func, stands_alone in found.items() if stands_alone}
    assert alone == {"add_", "sub_"}
    assert len(found) == 8
