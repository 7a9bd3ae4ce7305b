"""Sharded convolutions, transposed ones too: over output channels, over input channels, or over groups (a
depthwise one is local).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import RewriteError
from autotp.runtime import ops
from autotp.runtime.edges import Enter, Gather, Take, apply_enter
from autotp.runtime.linear import BiasPlace, as_dtype
from autotp.runtime.swap import Sharded, become, check_swappable

Convolve: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` on this rank's channels. It goes on saying how many there are in
    all; ``groups`` is local.
    """

    _tp: ConvOptions
    weight: Tensor
    bias: Tensor | None
    _conv_forward: Any

    #: What it stands in for, by the number of spatial dims.
    _kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @classmethod
    def swap(cls, module: nn.Module, options: ConvOptions) -> None:
        """Make ``module``, whose parameters are local already, a sharded one. Changes it in place."""
        kind = next((kind for kind in cls._kinds if isinstance(module, kind)), None)
        if kind is None:
            names = ", ".join(f"nn.{kind.__name__}" for kind in cls._kinds)
            raise RewriteError(f"{type(module).__qualname__} is none of {names}.")
        check_swappable(module, kind.forward, ("bias",))
        become(module, cls, options)
        module.groups = options.groups  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return self._between_edges(input, self._conv_forward)

    def _between_edges(self, input: Tensor, convolve: Convolve) -> Tensor:
        """``convolve(x, weight, bias)`` of what enters, and what becomes of its result."""
        tp = self._tp
        weight = self.weight  # once: where it is parametrized, this computes it
        channels = 1 - weight.dim()  # counted from the end: the batch dim may be missing
        x = input
        if tp.enter is not None:
            x = apply_enter(x, tp.enter)
        if tp.take is not None:
            x = tp.take(x, channels)
        bias = self.bias
        if bias is None or tp.bias == "local":
            y = convolve(x, weight, bias)
        elif tp.bias == "masked":
            y = convolve(x, weight, ops.mask(bias, tp.keep))
        else:
            y = convolve(x, weight, None)
        if tp.reduce is not None:
            y = ops.all_reduce(y, tp.reduce)
        if tp.bias == "after" and bias is not None:
            y = y + as_dtype(bias, y).view(-1, *[1] * (weight.dim() - 2))
        if tp.gather is not None:
            y = tp.gather(y, channels)
        return y


class ShardedTransposedConv(ShardedConv):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` or ``nn.ConvTranspose3d``, whose weight is ``[in, out, ...]``."""

    _output_padding: Any
    stride: Any
    padding: Any
    kernel_size: Any
    dilation: Any

    _kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        spatial = len(self.kernel_size)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return self._between_edges(
            input,
            lambda x, weight, bias: convolve(
                x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
            ),
        )
