"""Verification finds faults: each edit of a proven plan is dropped, changed, moved or done twice, and refused.

What is accepted nevertheless has to be right, and is run to see that: a bias that is not there in another
place, or two sums of gradients where one was shared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from unittest import mock

import pytest
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import autotp.prepare
from autotp.errors import AutoTPError
from autotp.plan.plan import Plan
from autotp.rewrite.apply import LocalConstants, apply
from autotp.rewrite.bind import Rank
from autotp.rewrite.program import Program
from autotp.rewrite.state import Sharding
from autotp.rewrite.trial import groups_of, local_constants, pretend_groups
from autotp.rewrite.verify import Verifier
from autotp.rewrite.views import View
from autotp.runtime.mesh import connect
from tests.dist.pool import Pool
from tests.e2e.compare import OTHER_BATCH, OTHER_SEQ, Problems, compare_passes
from tests.models import MODELS
from tests.rewrite.faults import Fault, faults, with_other_ranges

MOST = 12  # faults of one model that are tried, chosen at random
FEWER = {"t5": 6}  # each takes seconds

# The models: name, variant (one layer each, to be quick), number of ranks.
CASES: Mapping[str, tuple[str, dict[str, object], int]] = {
    "mlp": ("mlp", {}, 2),
    "weight_norm": ("weight_norm", {}, 2),
    "naive_mha": ("naive_mha", {}, 3),
    "fused_mha": ("fused_mha", {}, 2),
    "transformer_layer": ("transformer_layer", {}, 2),
    "nanogpt": ("nanogpt", {"n_layer": 1}, 2),
    "simple_vit": ("simple_vit", {"depth": 1}, 2),
    "torch_encoder": ("torch_encoder", {"layers": 1}, 2),
    "torch_decoder": ("torch_decoder", {"layers": 1}, 2),
    "llama-kv_heads=2": ("llama", {"kv_heads": 2, "num_hidden_layers": 1}, 4),
    "qwen3": ("qwen3", {"num_hidden_layers": 1}, 2),
    "phi3": ("phi3", {"num_hidden_layers": 1}, 2),
    "gptj": ("gptj", {"n_layer": 1}, 2),
    "gpt2": ("gpt2", {"n_layer": 1}, 2),
    "bloom": ("bloom", {"n_layer": 1}, 2),
    "falcon": ("falcon", {"num_hidden_layers": 1}, 2),
    "t5": ("t5", {"num_layers": 1, "num_decoder_layers": 1}, 2),
}


@dataclass(frozen=True)
class Proven:
    """A proven plan, and what proved it: how to make a skeleton, and the view of the forward pass."""

    plan: Plan
    make_skeleton: Callable[[], nn.Module]
    view: View

    def rank(self, rank: int, prefix: str = "") -> Rank:
        return with_other_ranges(self.view.rank(rank, self.plan.tp, prefix))

    def constants(self, rank: int) -> LocalConstants:
        return local_constants(self.make_skeleton(), [self.view], rank, self.plan.tp, "", frozenset())

    def faults(self, rank: int) -> dict[str, Fault]:
        return faults(self.view.program, self.constants(rank), self.rank(rank))

    def prove(self, program: Program, constants: LocalConstants, rank: int) -> None:
        """As `trial` does, with a program that a faulty compiler gave to the verifier and to what applies it.

        Raises:
            AutoTPError: it is refused.
        """
        model, own = self.make_skeleton(), self.rank(rank)
        verifier = Verifier(self.view.analysis, self.view.choice, program, self.view.anchors)
        with pretend_groups(program, own):
            apply(model, program, constants, own)
            verifier.verify(self.view.retrace(model), own)


@cache
def proven(case: str, verify: bool = True) -> Proven:
    """The plan of a case; the ranks that run it need not prove it again."""
    name, variant, tp = CASES[case]
    model, inputs = MODELS[name].build(**variant), MODELS[name].inputs()
    prove = autotp.prepare.rewrite_and_verify
    with mock.patch.object(autotp.prepare, "rewrite_and_verify", wraps=prove) as spy:
        plan = autotp.plan(model, tp, example_inputs=inputs, verify=verify)
    make_skeleton, view, *_ = spy.call_args.args
    return Proven(plan, make_skeleton, view)


@pytest.mark.parametrize("case", CASES)
def test_faults_are_found(case: str, dist: Pool) -> None:
    known = proven(case)
    rank = known.plan.tp - 1  # on rank 0 offsets are zero, with or without a fault
    known.prove(known.view.program, known.constants(rank), rank)
    found = known.faults(rank)
    tried = random.Random(0).sample(sorted(found), min(FEWER.get(case, MOST), len(found)))
    accepted = [what for what in tried if is_accepted(known, found[what], rank)]
    assert len(accepted) < len(tried) / 2
    if accepted:
        assert dist.run(known.plan.tp, run_with_faults, case, accepted)[0] == []


def is_accepted(known: Proven, fault: Fault, rank: int) -> bool:
    try:
        known.prove(fault.program, fault.constants, rank)
    except AutoTPError:
        return False
    except Exception as error:
        raise AssertionError(f"{fault.what}: {type(error).__name__}: {error}") from error
    return True


def run_with_faults(case: str, chosen: Sequence[str]) -> list[str]:
    """On each rank: those of these faults with which outputs or gradients are wrong."""
    name, variant, tp = CASES[case]
    known, mesh = proven(case, verify=False), init_device_mesh("cpu", (tp,))
    rank = torch.distributed.get_rank()
    build, inputs = MODELS[name].build, MODELS[name].inputs
    reference = build(**variant)
    found = known.faults(rank)
    wrong = []
    for fault in (found[what] for what in chosen):
        own = known.rank(rank, connect(mesh, groups_of(fault.program, known.rank(rank))))
        model = build(**variant)
        apply(model, fault.program, fault.constants, own)
        sharding = Sharding(known.plan, own, dict(fault.program.slices))
        problems = Problems()
        for given in (inputs(0), inputs(1, OTHER_BATCH, OTHER_SEQ)):
            compare_passes(problems, "", model, reference, given, sharding)
        wrong += [f"{fault.what}: {problem}" for problem in problems.found[:1]]
    return wrong
