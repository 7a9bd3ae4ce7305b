"""What a rank does with random models: shard each, and hold it against itself unsharded.

A model is *exact* (every output, gradient, parameter and entry of the state dict, for the traced inputs and for
others), or *refused*: `parallelize` raised an `AutoTPError`, and the model still computes what it did. Anything else is
a bug: a difference is reported as *wrong*, another exception is left to end the job.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite.state import sharding_of
from tests.e2e.compare import Problems, compare_passes, compare_parameters, compare_state, tensors_of
from tests.fuzz.faults import planted
from tests.fuzz.models import FuzzModel, draw_model

# Both compute in float64 (2e-16), in another order: sums over the ranks instead of over the width. The models are up to
# six layers deep, and norms of small values lose two or three digits; on 2,000 models the largest difference that was
# rounding is below 1e-11. What is wrong is so by about the size of the value.
RTOL = 1e-10


@dataclass(frozen=True)
class Found:
    """What one rank, or the sweep, found about one model."""

    seed: int
    tp: int
    kind: str  # exact, refused, wrong, crash
    reason: str = ""
    share: float = 0.0  # of its parameter bytes: sharded
    seconds: float = 0.0


def check_all(seeds: Sequence[int], tp: int, fault: str | None = None) -> list[Found]:
    """On every rank; collective."""
    warnings.filterwarnings("ignore", module=r"torch\.nn\.modules\.transformer")
    with planted(fault) if fault is not None else contextlib.nullcontext():
        return [check(draw_model(seed, tp)) for seed in seeds]


def check(drawn: FuzzModel) -> Found:
    """Shard one model, and compare."""
    start = time.monotonic()
    reference, model = drawn.build(), drawn.build()
    traced, other = drawn.inputs(), drawn.inputs(other=True)
    problems = Problems(rtol=RTOL)
    kind, reason, share = "exact", "", 0.0
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
        share = sharding.plan.sharded_bytes / sharding.plan.weight_bytes
        compare_parameters(problems, model, reference, sharding)
        compare_passes(problems, "inputs as traced", model, reference, traced, sharding)
        compare_passes(problems, "other inputs", model, reference, other, sharding)
        compare_state(problems, model, reference)
    if problems.found:
        kind, reason = "wrong", "; ".join(problems.found[:4])
    return Found(drawn.seed, drawn.tp, kind, reason, share, time.monotonic() - start)
