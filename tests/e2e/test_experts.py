"""Mixtures of experts as transformers runs them: loops, batched and grouped products; shared experts; the router.

Grouped products have no float64, and a kernel that takes widths in units of 16 bytes: they are compared in float32,
to 2e-4 of each tensor's largest element. Some routers compute in float32 whatever the model's dtype: to 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autotp
from autotp.plan.names import unfold
from autotp.rewrite.state import sharding_of
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool
from tests.e2e.compare import Problems, compare_collectives, compare_parameters, compare_passes

LAYERS, EXPERTS, WIDTH = 2, 5, 52
SHAPE = {
    "vocab_size": 61, "hidden_size": 40, "head_dim": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": WIDTH, "num_local_experts": EXPERTS}),
    "qwen3": ("Qwen3Moe", {"intermediate_size": 28, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS}),
    "gpt_oss": (  # biases, gate and up interleaved, weights transposed
        "GptOss", {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "rope_parameters": PLAIN_ROPE},
    ),
    "qwen2": (  # a shared expert, with a gate of its own
        "Qwen2Moe",
        {
            "intermediate_size": 28, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 44,
        },
    ),
    "deepseek": (  # a dense layer first, then routed and shared experts side by side
        "DeepseekV3",
        {
            "intermediate_size": 28, "moe_intermediate_size": WIDTH, "n_routed_experts": 6, "n_shared_experts": 1,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8,
            "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6, "num_key_value_heads": 8, "head_dim": 4,
        },
    ),
}  # fmt: skip

FLOAT32_ROUTER = ("mixtral", "deepseek")


def build(kind: str, implementation: str, dtype: torch.dtype, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(2)
    name, arguments = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **arguments, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and routers start as zeros
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


def compared(
    kind: str, implementation: str, dtype: torch.dtype, **changes: Any
) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is wrong on one rank, and the placement of each parameter."""
    reference, model = (build(kind, implementation, dtype, **changes) for _ in range(2))
    tokens = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs, others = {"input_ids": tokens[:2]}, {"input_ids": tokens[:, :5]}
    autotp.parallelize(model, example_inputs=inputs)
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems(rtol=2e-4 if dtype is torch.float32 else 1e-6 if kind in FLOAT32_ROUTER else 1e-9)
    compare_parameters(problems, model, reference, sharding)
    with record_collectives() as log:
        compare_passes(problems, "inputs as traced", model, reference, inputs, sharding)
    if kind != "deepseek":  # through the choice of groups no gradient comes back, which the plan does not know
        compare_collectives(problems, log, sharding.plan, sharding.rank.rank)
    compare_passes(problems, "other inputs", model, reference, others, sharding)
    problems.equal("implementation", model.config._experts_implementation, implementation)
    placements = {name: e.placement for e in sharding.plan.entries for name in unfold(e.name)}
    return tuple(problems.found), placements


def experts_of(placements: dict[str, str]) -> set[str]:
    return {p for name, p in placements.items() if ".experts." in name and not name.endswith("down_proj_bias")}


@pytest.mark.parametrize(("kind", "tp"), [("mixtral", 3), ("qwen3", 2)])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_each_implementation(dist: Pool, kind: str, implementation: str, tp: int) -> None:
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    for problems, placements in dist.run(tp, compared, kind, implementation, dtype, one_plans=True):
        assert problems == ()
        assert "replicate" not in experts_of(placements)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("gpt_oss", "batched_mm"), ("gpt_oss", "grouped_mm"), ("qwen2", "grouped_mm"), ("deepseek", "batched_mm")],
)
def test_biases_and_shared_experts(dist: Pool, kind: str, implementation: str) -> None:
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    for problems, placements in dist.run(2, compared, kind, implementation, dtype, one_plans=True):
        assert problems == ()
        assert "replicate" not in experts_of(placements)
        shared = {p for name, p in placements.items() if "shared_expert" in name and "expert_gate" not in name}
        assert shared == (set() if kind == "gpt_oss" else {"column", "row"})


def test_a_loop_with_biases_stays_whole(dist: Pool) -> None:
    """The loop is traced as batched products, where a bias is added once: the loop's own code has no such place."""
    for problems, placements in dist.run(2, compared, "gpt_oss", "eager", torch.float64, one_plans=True):
        assert problems == ()
        assert experts_of(placements) == {"replicate"}
        assert placements["model.layers.0.self_attn.q_proj.weight"] == "column"


def test_widths_that_the_kernel_takes(dist: Pool) -> None:
    """Of 52 floats, 13 units of 16 bytes, four ranks get 16, 12, 12 and 12; three ranks cannot share 8."""
    for problems, placements in dist.run(4, compared, "mixtral", "grouped_mm", torch.float32, one_plans=True):
        assert problems == ()
        assert "replicate" not in experts_of(placements)
    model = build("mixtral", "grouped_mm", torch.float32)
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    plan = autotp.plan(model, 4, example_inputs=inputs, verify=False)  # the ranks above have proven it
    (down,) = (e for e in plan.entries if e.name.endswith("down_proj"))
    assert [shape[-1] for shape in down.local_shapes] == [16, 12, 12, 12]
    narrow = build("mixtral", "grouped_mm", torch.float32, intermediate_size=8)
    plan = autotp.plan(narrow, 3, example_inputs=inputs)
    (down,) = (e for e in plan.entries if e.name.endswith("down_proj"))
    assert [shape[-1] for shape in down.local_shapes] == [8, 8, 8]


REAL = {  # as published, with fewer layers
    "mixtral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 3,
    },
    "deepseek": {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "head_dim": 64, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
def test_the_router_is_replicated(kind: str) -> None:
    """At real sizes: what sharding it would save is less than a thousandth, and it would be gathered for each token."""
    import transformers

    name, arguments = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **arguments, **REAL[kind]})
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    plan = autotp.plan(model, 4)
    placements = {name: e.placement for e in plan.entries for name in unfold(e.name)}
    assert {p for name, p in placements.items() if name.endswith("mlp.gate.weight")} == {"replicate"}
    assert "replicate" not in experts_of(placements)
    per_layer = [c for c in plan.collectives if c.phase == "forward" and ".mlp" in c.where]
    assert {(c.kind, c.count) for c in per_layer} <= {("all_reduce", n) for n in (1, 2, 3)}
    assert sum(c.count for c in per_layer) == 3  # one for each layer, shared by routed and shared experts


# ---- expert parallelism, by an override ----------------------------------------------------------


class DenseExperts(nn.Module):
    """Every expert sees every token; those that were not chosen count zero."""

    def __init__(self, width: int = 14, inner: int = 10, experts: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.up_bias = nn.Parameter(torch.randn(experts, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        chosen = shares >= shares.topk(2, dim=-1).values[..., -1:]
        h = F.silu(torch.einsum("btm, emh -> bteh", x, self.up) + self.up_bias)
        return torch.einsum("bteh, ehm, bte -> btm", h, self.down, shares * chosen)


class DispatchedExperts(nn.Module):
    """Tokens are sent to places of experts and back by one-hot tensors, as in GShard and Switch."""

    def __init__(self, width: int = 14, inner: int = 10, experts: int = 5, places: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))
        self.experts, self.places = experts, places

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        shares = self.router(x).softmax(-1)
        best = shares.argmax(-1)
        hit = F.one_hot(best, self.experts)
        place = (hit.cumsum(0) * hit).sum(-1) - 1  # the first come in
        there = F.one_hot(place.clamp(max=self.places), self.places + 1)[:, : self.places]
        sent = (hit[:, :, None] * there[:, None, :]).to(x.dtype)  # [t, e, c]
        h = torch.bmm(torch.einsum("tec, tm -> ecm", sent, x), self.up)
        y = torch.bmm(F.gelu(h), self.down)
        return torch.einsum("tec, ecm -> tm", sent * shares[:, :, None], y)


EXPERT_PARALLEL = {
    DenseExperts: {"up*": "shard(0)", "down": "shard(0)", "router": "replicate"},
    DispatchedExperts: {"up": "shard(0)", "down": "shard(0)", "router": "replicate"},
}


def expert_parallel(kind: type[nn.Module]) -> tuple[tuple[str, ...], dict[str, list[int]], list[int]]:
    """What is wrong on one rank; its shapes; its collectives forward and backward."""
    reference, model = (_seeded(kind) for _ in range(2))
    x = torch.randn(2, 7, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    autotp.parallelize(model, example_inputs=(x,), plan={"modules": EXPERT_PARALLEL[kind]})
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems()
    compare_parameters(problems, model, reference, sharding)
    with record_collectives() as log:
        compare_passes(problems, "experts", model, reference, (x,), sharding)
    compare_collectives(problems, log, sharding.plan, sharding.rank.rank)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return tuple(problems.found), shapes, [log.count("all_reduce", d) for d in ("forward", "backward")]


def _seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return kind().double()


@pytest.mark.parametrize(("kind", "forward"), [(DenseExperts, 1), (DispatchedExperts, 2)])
def test_experts_over_ranks(dist: Pool, kind: type[nn.Module], forward: int) -> None:
    """Five experts on two ranks are three and two: one sum of their results (and one of the places that tokens have
    in them), one of what they give back to each token."""
    for rank, (problems, shapes, counts) in enumerate(dist.run(2, expert_parallel, kind)):
        assert problems == ()
        own = 3 - rank
        assert shapes["up"] == [own, 14, 10] and shapes["down"] == [own, 10, 14] and shapes["router.weight"] == [5, 14]
        assert counts == [forward, 2]  # backward: the tokens' gradient, and the router's once a step


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_that_are_looked_up(implementation: str) -> None:
    """Which experts a rank would need is in the data: refused, with the line, and with what can be sharded."""
    model = build("mixtral", implementation, torch.float32)
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    with pytest.raises(autotp.AutoTPError) as caught:
        autotp.plan(
            model, 2, example_inputs=inputs, plan={"modules": {"model.layers.*.mlp.experts.*_proj": "shard(0)"}}
        )
    text = str(caught.value)
    op = "grouped_mm" if implementation == "grouped_mm" else "self.gate_up_proj[expert_ids]"
    for part in ("gate_up_proj cannot be sharded along dim 0", op, "the axis (of 5) whole", "shard(1) or shard(2)"):
        assert part in text, text
