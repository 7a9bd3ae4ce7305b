"""Sharded convolutions: over output channels, over input channels, or over groups (a depthwise one is
local).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autotp.errors import RewriteError
from autotp.runtime import ops
from autotp.runtime.edges import Enter, Gather, Take, apply_enter
from autotp.runtime.linear import BiasPlace, as_dtype
from autotp.runtime.swap import Sharded, become, check_swappable


@dataclass(frozen=True, slots=True)
class ConvOptions:
    """The edges of a sharded convolution, as for a linear layer, with channels in the place of features.

    ``groups`` is the local number of groups.
    """

    groups: int = 1
    enter: Enter | None = None
    take: Take | None = None
    reduce: str | None = None
    bias: BiasPlace = "local"
    keep: bool = True
    gather: Gather | None = None


class ShardedConv(Sharded):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` on this rank's channels."""

    _tp: ConvOptions
    weight: Tensor
    bias: Tensor | None
    _conv_forward: Any

    @staticmethod
    def swap(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, options: ConvOptions) -> None:
        """Make ``module``, whose parameters are local already, a sharded one. Changes it in place."""
        kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        kind = kinds.get(len(getattr(module, "kernel_size", ())))
        if kind is None or not isinstance(module, kind):
            raise RewriteError(f"{type(module).__qualname__} is not an nn.Conv1d, nn.Conv2d or nn.Conv3d.")
        check_swappable(module, kind.forward, ("weight", "bias"))
        become(module, ShardedConv, options)
        ShardedConv.refresh_sizes(module)  # type: ignore[arg-type]

    def refresh_sizes(self) -> None:
        """Set in_channels, out_channels and groups to the local ones."""
        self.groups = self._tp.groups
        self.out_channels = self.weight.shape[0]
        self.in_channels = self.weight.shape[1] * self.groups

    def forward(self, input: Tensor) -> Tensor:
        tp = self._tp
        channels = 1 - self.weight.dim()  # counted from the end: the batch dim may be missing
        x = input
        if tp.enter is not None:
            x = apply_enter(x, tp.enter)
        if tp.take is not None:
            x = tp.take(x, channels)
        bias = self.bias
        if bias is None or tp.bias == "local":
            y = self._conv_forward(x, self.weight, bias)
        elif tp.bias == "masked":
            y = self._conv_forward(x, self.weight, ops.mask(bias, tp.keep))
        else:
            y = self._conv_forward(x, self.weight, None)
        if tp.reduce is not None:
            y = ops.all_reduce(y, tp.reduce)
        if tp.bias == "after" and bias is not None:
            y = y + as_dtype(bias, y).view(-1, *[1] * (self.weight.dim() - 2))
        if tp.gather is not None:
            y = tp.gather(y, channels)
        return y  # type: ignore[no-any-return]
