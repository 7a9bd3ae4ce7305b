"""Sharded linear layers.

column-parallel   enter → linear with this rank's rows, bias "local"         (→ gather)
row-parallel      (take →) linear with this rank's columns → all-reduce, bias "after"
row, left Partial (take →) linear with this rank's columns, bias "masked": added on one rank only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import RewriteError
from autotp.runtime import ops
from autotp.runtime.edges import Enter, Gather, Take, apply_enter
from autotp.runtime.swap import Sharded, become, check_swappable

BiasPlace = Literal["local", "after", "masked"]


@dataclass(frozen=True, slots=True)
class LinearOptions:
    """The edges of a sharded linear layer, in the order in which they act.

    ``keep``: with a bias that is "masked", whether this rank is the one that adds it.
    """

    enter: Enter | None = None
    take: Take | None = None
    reduce: str | None = None
    bias: BiasPlace = "local"
    keep: bool = True
    gather: Gather | None = None


class ShardedLinear(Sharded, nn.Linear):
    """``nn.Linear`` on this rank's rows or columns of the weight. ``in_features`` and ``out_features`` go on saying the
    whole: adapters are made by them. The weight may be parametrized: it is made of local parameters then.
    """

    _tp: LinearOptions

    @staticmethod
    def swap(module: nn.Linear, options: LinearOptions) -> None:
        """Make ``module``, whose parameters are local already, a sharded one. Changes it in place."""
        check_swappable(module, nn.Linear.forward, ("bias",))
        become(module, ShardedLinear, options)

    def forward(self, input: Tensor) -> Tensor:
        return _forward(input, self.weight, self.bias, self._tp)


class ShardedTransposedLinear(Sharded):
    """The same for a module with the weight the other way round, [in, out], such as transformers'
    ``Conv1D``.
    """

    _tp: LinearOptions
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def swap(module: nn.Module, options: LinearOptions) -> None:
        """Make ``module``, whose parameters are local already, a sharded one. Changes it in place.

        Told by its parts: a two-dimensional ``weight``, a ``bias`` and the output size ``nf``.
        """
        check_swappable(module, None, ("weight", "bias"))
        weight = module._parameters["weight"]
        if weight is None or weight.dim() != 2 or not isinstance(getattr(module, "nf", None), int):
            raise RewriteError(f"{type(module).__qualname__} is no linear layer with a transposed weight.")
        become(module, ShardedTransposedLinear, options)

    def forward(self, x: Tensor) -> Tensor:
        return _forward(x, self.weight.t(), self.bias, self._tp)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, tp: LinearOptions) -> Tensor:
    if tp.enter is not None:
        x = apply_enter(x, tp.enter)
    if tp.take is not None:
        x = tp.take(x)
    if bias is None or tp.bias == "local":
        y = F.linear(x, weight, bias)
    elif tp.bias == "masked":
        y = F.linear(x, weight, ops.mask(bias, tp.keep))
    else:
        y = F.linear(x, weight)
    if tp.reduce is not None:
        y = ops.all_reduce(y, tp.reduce)
    if tp.bias == "after" and bias is not None:
        y = y + as_dtype(bias, y)
    if tp.gather is not None:
        y = tp.gather(y)
    return y


def as_dtype(bias: Tensor, y: Tensor) -> Tensor:
    """Under autocast the bias is wider than what it is added to, and the sum must not be."""
    return bias if bias.dtype == y.dtype else bias.to(y.dtype)
