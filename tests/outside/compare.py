"""Several models in one call of the pool: each sharded, and held against itself unsharded in float64."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import import_module

from torch import Tensor, nn

import autotp
from autotp.rewrite.state import sharding_of
from autotp.runtime.record import record_collectives
from tests.e2e.compare import ATOL, Problems, compare_parameters, compare_passes, compare_state
from tests.models.case import ModelCase


@dataclass
class Measured(Problems):
    """Also knows the largest error, on the scale of its tensor."""

    error: float = 0.0
    errors: list[str] = field(default_factory=list)

    def close(self, what: str, mine: Tensor, theirs: Tensor) -> None:
        super().close(what, mine, theirs)
        if mine.shape == theirs.shape and theirs.is_floating_point() and theirs.numel():
            largest = float(theirs.detach().abs().max()) + ATOL / self.rtol
            self.error = max(self.error, float((mine - theirs).detach().abs().max()) / largest)


@dataclass(frozen=True)
class Outcome:
    """What one rank found out about one model."""

    name: str
    problems: tuple[str, ...]
    share: float  # of the weight bytes, sharded
    forward: int  # collectives that ran
    backward: int
    error: float
    seconds: float
    plan: autotp.Plan

    def __str__(self) -> str:
        return (
            f"{self.name:34} sharded {self.share:6.1%}  collectives {self.forward:2} + {self.backward:2}  "
            f"error {self.error:.1e}  {self.seconds:.1f} s"
        )


def cases(table: str) -> list[tuple[ModelCase, dict[str, object]]]:
    """``"tests.outside.mixers:MIXERS"``: the cases of a table, each in every variant."""
    module, _, name = table.partition(":")
    return [(case, variant) for case in getattr(import_module(module), name) for variant in case.variants]


def compare_all(table: str, names: tuple[str, ...]) -> list[Outcome]:
    """On every rank: these models of a table, one after the other."""
    return [_compare(case, variant) for case, variant in cases(table) if case.id(variant) in names]


def _compare(case: ModelCase, variant: dict[str, object]) -> Outcome:
    start = time.monotonic()
    reference, model = case.build(**variant), case.build(**variant)
    traced, other = case.inputs(0), case.inputs(1, batch=2)
    autotp.parallelize(model, example_inputs=traced)
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Measured()
    compare_parameters(problems, model, reference, sharding)
    with record_collectives() as log:
        compare_passes(problems, "inputs as traced", model, reference, traced, sharding)
    compare_passes(problems, "other inputs", model, reference, other, sharding)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        model.train(), reference.train()
        compare_passes(problems, "train mode", model, reference, traced, sharding)
        _compare_statistics(problems, model, reference)
    else:
        compare_state(problems, model, reference)
    plan = sharding.plan
    return Outcome(
        case.id(variant),
        tuple(problems.found),
        plan.sharded_bytes / plan.weight_bytes if plan.weight_bytes else 0.0,
        sum(log.count(kind, "forward") for kind in ("all_reduce", "all_gather")),
        sum(log.count(kind, "backward") for kind in ("all_reduce", "all_gather")),
        problems.error,
        time.monotonic() - start,
        plan,
    )


def _compare_statistics(problems: Problems, model: nn.Module, reference: nn.Module) -> None:
    """The state dict, running statistics and all, after a step in train mode."""
    mine, theirs = autotp.full_state_dict(model), reference.state_dict()
    problems.equal("names in the state dict", list(mine), list(theirs))
    for name, tensor in theirs.items():
        problems.close(f"{name} in the state dict", mine[name], tensor)
