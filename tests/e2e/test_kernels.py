"""Attention kernels that a CPU cannot trace: planned as their twins, called with each rank's own heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite.state import sharding_of
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool
from tests.e2e.compare import Problems, compare_collectives, compare_passes
from tests.models import MODELS

HEADS, KV_HEADS = 8, 4

seen: list[tuple[int, int]] = []  # query and kv heads of each call


def readable(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention in plain torch, as users register it."""
    seen.append((q.shape[1], k.shape[1]))
    assert q.shape[1] % k.shape[1] == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    future = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]) == 0
    weights = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
    return (weights @ v).transpose(1, 2), None


def opaque(module: nn.Module, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The same behind the pointer of its memory, as an extension would take it."""
    if q.data_ptr() == 0:
        raise RuntimeError("this kernel only supports CUDA tensors")
    return readable(module, q, *args, **kwargs)


def talking(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Each head's result takes something from its neighbour's: no attention that goes by heads."""
    out, _ = readable(module, q, k, v, *args, **kwargs)
    return out + 0.5 * out.flip(2), None


def with_sinks(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, s_aux: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention with a learned sink for each head, as the flash kernels take it."""
    if q.data_ptr() == 0:
        raise RuntimeError("this kernel only supports CUDA tensors")
    seen.append((q.shape[1], k.shape[1]))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    future = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]) == 0
    scores = scores.masked_fill(future, float("-inf"))
    sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = F.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]
    return (weights @ v).transpose(1, 2), None


def noisy(module: Any, q: Tensor, *args: Any, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    """Drops parts of its result, and keeps what it drew."""
    out, _ = opaque(module, q, *args, **kwargs)
    kept = torch.rand(out.shape[:2]) >= dropout
    drawn.append(kept)
    return out * kept[..., None, None] / (1 - dropout), None


drawn: list[Tensor] = []


@contextmanager
def registered(**functions: Any) -> Iterator[None]:
    """These attention functions in transformers' table; "flash_attention_2" is then one of them."""
    from transformers import AttentionInterface

    before = dict(AttentionInterface._global_mapping)
    for name, function in functions.items():
        AttentionInterface.register(name, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.clear()
        AttentionInterface._global_mapping.update(before)


def choose(model: Any, name: str) -> None:
    """As loading with attn_implementation=name does, without its check that the package is there."""
    model.config._attn_implementation_internal = name


def compared(name: str, function: Any, model_name: str, **variant: object) -> dict[str, Any]:
    """A model with a kernel of its own against the same unsharded, on one rank."""
    case = MODELS[model_name]
    with registered(**{name: function}):
        reference, model = case.build(**variant), case.build(**variant)
        choose(reference, name)
        choose(model, name)
        inputs, others = case.inputs(0), case.inputs(1, 2, 7)
        autotp.parallelize(model, example_inputs=inputs)
        sharding = sharding_of(model)
        assert sharding is not None
        problems = Problems()
        with record_collectives() as log:
            compare_passes(problems, "inputs as traced", model, reference, inputs, sharding)
        compare_collectives(problems, log, sharding.plan, sharding.rank.rank)
        compare_passes(problems, "other inputs", model, reference, others, sharding)
        seen.clear()
        model(**inputs)
        assert isinstance(inputs, dict)
        tokens = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        mine, theirs = (m.generate(inputs["input_ids"], **tokens) for m in (model, reference))
        problems.check(torch.equal(mine, theirs), "generates other tokens")
        configs = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        problems.equal("implementation", configs, {name})
        layer = model.model.layers[0].self_attn
        return {
            "problems": tuple(problems.found),
            "heads": set(seen[: len(model.model.layers)]),
            "width": layer.q_proj.weight.shape[0],
            "notes": sharding.plan.notes,
        }


def shares(n: int, tp: int) -> list[int]:
    return [n // tp + (rank < n % tp) for rank in range(tp)]


@pytest.mark.parametrize(
    ("tp", "name", "function"),
    [(2, "mine", readable), (3, "mine", opaque), (2, "flash_attention_2", opaque), (3, "flash_attention_2", opaque)],
)
def test_a_kernel_gets_local_heads(dist: Pool, tp: int, name: str, function: Any) -> None:
    found = dist.run(tp, compared, name, function, "llama", one_plans=True)
    assert [f["problems"] for f in found] == [()] * tp
    assert [f["heads"] for f in found] == [{(2 * kv, kv)} for kv in shares(KV_HEADS, tp)]
    said = [[n for n in f["notes"] if "cannot be traced on a CPU" in n and repr(name) in n] for f in found]
    assert [len(n) for n in said] == [function is opaque] * tp


def test_more_ranks_than_kv_heads(dist: Pool) -> None:
    found = dist.run(4, two_kv_heads, one_plans=True)
    assert [f["problems"] for f in found] == [()] * 4
    assert [f["heads"] for f in found] == [{(2, 1)}] * 4


def two_kv_heads() -> dict[str, Any]:
    return compared("mine", opaque, "llama", kv_heads=2)


def test_what_mixes_heads_is_seen(dist: Pool) -> None:
    """A registered function that can be traced is taken at its word, not at the interface's."""
    found = dist.run(2, compared, "mine", talking, "llama")
    assert [f["problems"] for f in found] == [()] * 2


def sinks_compared() -> dict[str, Any]:
    import transformers

    def build() -> Any:
        torch.manual_seed(3)
        config = transformers.GptOssConfig(
            vocab_size=61, hidden_size=40, head_dim=6, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
            intermediate_size=26, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
            max_position_embeddings=64, sliding_window=64, experts_implementation="batched_mm",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        model = transformers.GptOssForCausalLM(config).double().eval()
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.sinks)
        choose(model, "flash_attention_3")
        return model

    with registered(flash_attention_3=with_sinks):
        reference, model = build(), build()
        inputs = MODELS["llama"].inputs(0)
        autotp.parallelize(model, example_inputs=inputs)
        sharding = sharding_of(model)
        assert sharding is not None
        problems = Problems()
        compare_passes(problems, "sinks", model, reference, inputs, sharding)
        return {"problems": tuple(problems.found), "sinks": len(model.model.layers[0].self_attn.sinks)}


@pytest.mark.parametrize("tp", [3])
def test_sinks_go_with_their_heads(dist: Pool, tp: int) -> None:
    """The model has no sdpa: its twin is eager, which uses the sinks."""
    found = dist.run(tp, sinks_compared, one_plans=True)
    assert [f["problems"] for f in found] == [()] * tp
    assert [f["sinks"] for f in found] == [2 * kv for kv in shares(KV_HEADS, tp)]


def flex() -> tuple[tuple[str, ...], str]:
    case = MODELS["llama"]
    torch.compiler.set_stance("force_eager")  # else it is compiled, for each shape
    try:
        reference, model = case.build(), case.build()
        choose(reference, "flex_attention")
        choose(model, "flex_attention")
        inputs = case.inputs(0)
        autotp.parallelize(model, example_inputs=inputs)
        problems = Problems()
        with torch.no_grad():  # on a CPU it has no backward
            problems.close("logits", model(**inputs).logits, reference(**inputs).logits)
        return tuple(problems.found), model.config._attn_implementation
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("tp", [3])
def test_flex_attention(dist: Pool, tp: int) -> None:
    assert dist.run(tp, flex) == [((), "flex_attention")] * tp


def dropped() -> tuple[list[bool], bool]:
    """Whether each pair of ranks draws the same in the kernel, and after it."""
    case = MODELS["llama"]
    with registered(mine=noisy):
        model = case.build(attention_dropout=0.4).train()
        choose(model, "mine")
        autotp.parallelize(model, example_inputs=case.inputs(0))
        drawn.clear()
        torch.manual_seed(7)
        model(**case.inputs(0))
        kernels = torch.stack(drawn).flatten()
        after = torch.rand(5, dtype=torch.float64)
    same = []
    for value in (kernels.double(), after):
        parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, value)
        same.append(all(torch.equal(parts[0], p) for p in parts))
    return same, len(drawn) == len(model.model.layers)


def test_a_kernel_draws_for_its_own_heads(dist: Pool) -> None:
    """Dropout is drawn in the kernel itself, for each rank's heads; the others' generators do not notice."""
    assert dist.run(2, dropped) == [([False, True], True)] * 2


class NoTwin(nn.Module):
    """Calls a kernel by itself, not through anybody's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(40, 120), nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 5)).transpose(1, 2).chunk(3, dim=1)
        return self.o(opaque(self, q, k, v, None, 1.0)[0].flatten(2))


def test_a_kernel_without_a_twin() -> None:
    with pytest.raises(AutoTPError) as caught:
        autotp.plan(NoTwin(), 2, example_inputs=(torch.randn(2, 7, 40),))
    text = str(caught.value)
    for part in ("opaque", "register_fake", "register_rule", "scaled_dot_product_attention"):
        assert part in text, text


def test_a_twin_that_fails_too() -> None:
    """Nothing of the interface can be traced: the error names what was chosen and what was tried."""
    case = MODELS["llama"]
    def neither(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("nor this one")

    with registered(mine=opaque, sdpa=neither):
        from transformers.models.llama import modeling_llama

        model = case.build()
        choose(model, "mine")
        eager = modeling_llama.eager_attention_forward
        modeling_llama.eager_attention_forward = neither
        try:
            with pytest.raises(AutoTPError) as caught:
                autotp.plan(model, 2, example_inputs=case.inputs(0))
        finally:
            modeling_llama.eager_attention_forward = eager
    text = str(caught.value)
    for part in ("'mine'", "'eager'", "nor this one", "only supports CUDA", "register_fake", "register_rule"):
        assert part in text, text
