"""What a rank does with random models: shard each, and hold it against itself unsharded.

A model is *exact* (every output, gradient, parameter and entry of the state dict, for the traced inputs and for
others), or *refused*: `parallelize` raised an `AutoTPError`, and the model still computes what it did. Anything else is
a bug: a difference is reported as *wrong*, another exception is left to end the job.

Some random models are no models: they do not train unsharded either (an in-place op on what a backward needs), or
amplify rounding into other numbers (the mean of what a norm has centred, divided by its own size). They are *void*.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError
from autotp.plan.build import UNUSED
from autotp.rewrite.state import sharding_of
from tests.e2e.compare import (
    Problems,
    compare_parameters,
    compare_passes,
    compare_state,
    loss_of,
    tensors_of,
    trainable,
)
from tests.fuzz.faults import planted
from tests.fuzz.models import FuzzModel, draw_model
from tests.models.case import call

# Both compute in float64 (2e-16), in another order: sums over the ranks instead of over the width. The models are a few
# layers deep, and norms of small values lose two or three digits. What is wrong is so by about the size of the value.
RTOL = 1e-10
NUDGE = 1e-14  # relative, of each weight: what this changes by more than RTOL, rounding may change too


@dataclass(frozen=True)
class Found:
    """What one rank, or the sweep, found about one model."""

    seed: int
    tp: int
    kind: str  # exact, refused, void, wrong, crash
    reason: str = ""
    share: float = 0.0  # of the bytes of the parameters that it uses: sharded
    seconds: float = 0.0
    cpu: float = 0.0  # seconds of all ranks together


def check_all(seeds: Sequence[int], tp: int, fault: str | None = None) -> list[Found]:
    """On every rank; collective."""
    warnings.filterwarnings("ignore", module=r"torch\.nn\.modules\.transformer")
    with planted(fault) if fault is not None else contextlib.nullcontext():
        return [check(draw_model(seed, tp)) for seed in seeds]


def check(drawn: FuzzModel) -> Found:
    """Shard one model, and compare."""
    start, worked = time.monotonic(), time.process_time()
    reference, model = drawn.build(), drawn.build()
    traced, other = drawn.inputs(), drawn.inputs(other=True)
    problems = Problems(rtol=RTOL)
    kind, reason, share = "exact", "", 0.0
    if fault := unusable(drawn):
        return Found(drawn.seed, drawn.tp, "void", fault)
    try:
        autotp.parallelize(model, example_inputs=traced)
    except AutoTPError as error:
        kind, reason = "refused", f"{type(error).__name__}: {error}"
        problems.equal("names after the refusal", list(model.state_dict()), list(reference.state_dict()))
        with torch.no_grad():
            mine, theirs = tensors_of(model(*other)), tensors_of(reference(*other))
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            problems.check(torch.equal(a, b), f"after the refusal output {i} is another one")
    else:
        sharding = sharding_of(model)
        assert sharding is not None
        # weights of a branch that is not taken
        unused = sum(e.global_bytes * e.count for e in sharding.plan.entries if e.note == UNUSED)
        share = sharding.plan.sharded_bytes / (sharding.plan.weight_bytes - unused)
        compare_parameters(problems, model, reference, sharding)
        compare_passes(problems, "inputs as traced", model, reference, traced, sharding)
        compare_passes(problems, "other inputs", model, reference, other, sharding)
        compare_state(problems, model, reference)
    if problems.found:
        kind, reason = "wrong" if is_stable(drawn) else "void", "; ".join(problems.found[:4])
    return Found(
        drawn.seed, drawn.tp, kind, reason, share, time.monotonic() - start, time.process_time() - worked
    )


def unusable(drawn: FuzzModel) -> str:
    """Why the unsharded model cannot be trained; '' if it can."""
    try:
        passed(drawn.build(), drawn.inputs())
    except RuntimeError as error:
        return str(error)
    return ""


def is_stable(drawn: FuzzModel) -> bool:
    """Whether the unsharded model, its weights changed by next to nothing, computes the same."""
    generator = torch.Generator().manual_seed(drawn.seed)
    nudged = drawn.build()
    with torch.no_grad():
        for parameter in nudged.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + NUDGE * noise)
    problems = Problems(rtol=RTOL)
    for inputs in (drawn.inputs(), drawn.inputs(other=True)):
        for a, b in zip(passed(nudged, inputs), passed(drawn.build(), inputs), strict=True):
            problems.close("", a, b)
    return not problems.found


def passed(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters."""
    given = trainable(inputs)
    model.zero_grad()
    outputs = tensors_of(call(model, given))
    loss_of(outputs).backward()
    leaves = [*tensors_of(given), *model.parameters()]
    return [t.detach() for t in outputs] + [t.grad.clone() for t in leaves if t.grad is not None]
