"""Soundness: every value of every model, on simulated ranks, for each logical axis that its weights hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from autotp.axes.analysis import Analysis, Operand, OpInfo, analyse
from autotp.axes.term import Atom, repeated_atoms
from autotp.plan.candidates import candidates
from autotp.plan.planner import choose
from autotp.trace.capture import trace
from autotp.trace.leaves import tensor_leaves
from autotp.trace.replay import state_of
from autotp.trace.skeleton import skeleton
from tests.axes.replay import Replay, ReplayError, atoms_in, even_ranges
from tests.models import ModelCase, variants

CASES = {name: (case, variant) for name, case, variant in variants()}


@cache
def replay_of(name: str) -> Replay:
    """The analysed model, run whole."""
    case: ModelCase
    case, variant = CASES[name]
    inputs = case.inputs()
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (inputs, {})
    return replay_model(case.build(**variant), args, kwargs)


def replay_model(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Replay:
    if "input_ids" in kwargs and hasattr(model.config, "use_cache"):
        kwargs["use_cache"] = False
    traced = trace(skeleton(model), args, kwargs, "forward")
    leaves = dict((*tensor_leaves(args, ("args",)), *tensor_leaves(kwargs, ("kwargs",))))
    inputs = {port.node: leaves[port.path] for port in traced.inputs}
    return Replay.of(analyse(traced), inputs, state_of(model, traced))


def single_axes(analysis: Analysis, tp: int) -> list[Atom]:
    """The axes that parameters hold and that can be sharded alone."""
    values = [dims for outputs in analysis.dims.values() for dims in outputs]
    values += [operand.dims for info in analysis.ops.values() for operand in info.operands]
    twice = {atom for dims in values for atom in repeated_atoms(dims)}
    held = atoms_in(
        dim
        for name, node in analysis.trace.params.items()
        if name not in analysis.trace.is_buffer
        for dim in analysis.dims[node][0]
    )
    return [a for a in held if a.size >= tp and a not in analysis.frozen and a not in twice]


# What the models of `tests.models` lack: experts, latent attention, state spaces, linear attention.
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "num_attention_heads": 4,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
WIDER: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", GROUPED),
    "deepseek_v3": (
        "DeepseekV3",
        SMALL
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
        }
        | {"v_head_dim": 7, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 20, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "mamba": ("Mamba", {"vocab_size": 61, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": 61,
            "hidden_size": 24,
            "state_size": 5,
            "num_hidden_layers": 2,
            "num_heads": 6,
            "head_dim": 8,
        }
        | {"expand": 2, "n_groups": 2, "chunk_size": 4},
    ),
    "qwen3_next": (
        "Qwen3Next",
        GROUPED
        | {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6}
        | {
            "linear_value_head_dim": 7,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
        }
        | {"shared_expert_intermediate_size": 20, "layer_types": ["linear_attention", "full_attention"]},
    ),
}


def build_wider(name: str) -> nn.Module:
    family, options = WIDER[name]
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("batched_mm")
    return model.double()


def axes_alone(replay: Replay, degrees: tuple[int, ...]) -> None:
    problems = []
    for tp in degrees:
        for atom in single_axes(replay.analysis, tp):
            try:
                replay.check({atom.id: even_ranges(atom.size, tp)}, tp)
            except AssertionError as error:
                problems.append(f"{atom!r} over {tp}: {error}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", CASES)
def test_each_axis_alone(name: str) -> None:
    axes_alone(replay_of(name), (2, 3))


@pytest.mark.parametrize("name", WIDER)
def test_each_axis_of_other_families(name: str) -> None:
    model = build_wider(name)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    axes_alone(replay_model(model, (), {"input_ids": ids}), (3,))


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("bart")])
def test_the_plan(name: str, tp: int) -> None:
    """All axes of a plan together, summed where the plan says and nowhere else."""
    replay = replay_of(name)
    choice = choose(replay.analysis, tp)
    assert choice.candidates
    ranges = {atom.id: split for atom, split in choice.ranges.items()}
    replay.check(ranges, tp, choice.communication)


NESTED = ["llama-kv_heads=2", "llama-kv_heads=2-eager", "phi3-kv_heads=2", "gemma2-kv_heads=2"]


@pytest.mark.parametrize("name", [name for name in NESTED if name in CASES])
def test_kv_heads_shared_by_ranks(name: str) -> None:
    """2 kv heads over 4 ranks: K first, then the group; k and v are held twice."""
    replay = replay_of(name)
    pairs = [c for c in candidates(replay.analysis, 4) if len(c.atoms) == 2 and c.atoms[0].size == 2]
    assert pairs
    for pair in pairs:
        ranges = {atom.id: split for atom, split in zip(pair.atoms, pair.ranges, strict=True)}
        replay.check(ranges, 4)


def unsliced(operand: Operand) -> Operand:
    return replace(operand, dims=tuple(() for _ in operand.dims)) if operand.path == ("args", 0) else operand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: replace(info, contracted=()), "off by"),
        (lambda info: replace(info, added=frozenset()), "off by"),
        (lambda info: replace(info, operands=tuple(map(unsliced, info.operands))), "on rank 0"),
    ],
)
def test_a_wrong_analysis_is_found(change: Callable[[OpInfo], OpInfo], message: str) -> None:
    """The replay can fail: a sum forgotten, a bias that every rank adds, an operand that is not sliced."""
    replay = replay_of("mlp")
    analysis = replay.analysis
    last = [n for n, info in analysis.ops.items() if info.contracted][-1]
    spoilt = {n: change(info) if n is last else info for n, info in analysis.ops.items()}
    dims = {n: spoilt[n].out if n is last else d for n, d in analysis.dims.items()}
    wrong = Replay(replace(analysis, ops=spoilt, dims=dims), replay.reference)
    (hidden,) = atoms_in(analysis.ops[last].contracted)
    with pytest.raises(ReplayError, match=message):
        wrong.check({hidden.id: even_ranges(hidden.size, 2)}, 2)
