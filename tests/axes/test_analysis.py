"""What the analysis says of real models' weights: the table of the design."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autotp.axes.analysis import Analysis, analyse
from autotp.axes.rules.custom import register_rule, unregister_rule
from autotp.axes.rules.registry import find_rule, rule
from autotp.axes.term import Atom, Dim, show
from autotp.errors import RuleError
from autotp.trace.capture import trace

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 60, "intermediate_size": 70, "num_hidden_layers": 1, "num_attention_heads": 6,
    "vocab_size": 101,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 3}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 60, "n_head": 6, "n_layer": 1, "vocab_size": 101, "n_positions": 64} | TOKENS
BLOOM = {"hidden_size": 60, "n_head": 6, "n_layer": 1, "vocab_size": 101}


def text(dims: tuple[Dim, ...]) -> str:
    """Sizes only: ``6·10 , 60``; the same size twice is not to be the same axis, unless the test says so."""
    return " , ".join(show(dim, lambda atom: str(atom.size)) for dim in dims)


def analysis_of(config: Any, impl: str = "eager") -> Analysis:
    config._attn_implementation = impl
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(2, 7, dtype=torch.long)
    return analyse(trace(model, (), {"input_ids": ids, "use_cache": False}))


def params(analysis: Analysis, suffix: str) -> tuple[Dim, ...]:
    (fqn,) = [name for name in analysis.trace.params if name.endswith(suffix)]
    return analysis.param_dims(fqn)


CASES: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    (
        "llama", "LlamaConfig", GROUPED,
        {
            "q_proj.weight": "3·2·(5 | 5) , 60",
            "k_proj.weight": "3·(5 | 5) , 60", "v_proj.weight": "3·10 , 60",
            "o_proj.weight": "60 , 3·2·10", "gate_proj.weight": "70 , 60", "down_proj.weight": "60 , 70",
        },
    ),
    (
        "gpt2", "GPT2Config", GPT2,
        {
            "c_attn.weight": "60 , (6·10 | 6·10 | 6·10)", "c_attn.bias": "(6·10 | 6·10 | 6·10)",
            "attn.c_proj.weight": "6·10 , 60",
        },
    ),
    (
        "bloom", "BloomConfig", BLOOM,
        {"query_key_value.weight": "6·3·10 , 60", "self_attention.dense.weight": "60 , 6·10"},
    ),
    (
        "phi3", "Phi3Config", GROUPED | TOKENS,
        {"qkv_proj.weight": "(3·2·(5 | 5) | 3·(5 | 5) | 3·10) , 60", "gate_up_proj.weight": "(70 | 70) , 60"},
    ),
    (
        "falcon", "FalconConfig", SMALL | {"multi_query": True, "alibi": True},
        {"query_key_value.weight": "(6 | 1 | 1)·10 , 60", "self_attention.dense.weight": "60 , 6·10"},
    ),
    (
        "neox", "GPTNeoXConfig", SMALL | {"rotary_pct": 1.0},
        {"query_key_value.weight": "6·(5 | 5 | 5 | 5 | 10) , 60", "attention.dense.weight": "60 , 6·10"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "options", "expected"), CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_weights(
    name: str, config: str, options: dict[str, Any], expected: dict[str, str], impl: str
) -> None:
    if name == "bloom" and impl == "sdpa":
        pytest.skip("BLOOM has no sdpa attention")
    analysis = analysis_of(getattr(transformers, config)(**options), impl)
    assert {suffix: text(params(analysis, suffix)) for suffix in expected} == expected
    assert not analysis.notes


def test_which_weights_share_an_axis() -> None:
    analysis = analysis_of(transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 2}))
    k_heads = params(analysis, "layers.0.self_attn.k_proj.weight")[0][0]
    for name in ("q_proj", "v_proj"):
        assert params(analysis, f"layers.0.self_attn.{name}.weight")[0][0] is k_heads
    assert params(analysis, "layers.0.self_attn.o_proj.weight")[1][0] is k_heads
    assert params(analysis, "layers.1.self_attn.k_proj.weight")[0][0] is not k_heads
    width = params(analysis, "embed_tokens.weight")[1]
    assert params(analysis, "layers.1.mlp.down_proj.weight")[0] == width
    assert params(analysis, "model.norm.weight")[0] == width
    gate, up = (params(analysis, f"layers.0.mlp.{n}_proj.weight")[0] for n in ("gate", "up"))
    assert gate == up == params(analysis, "layers.0.mlp.down_proj.weight")[1]
    assert not analysis.is_frozen(width)


class Attention(nn.Module):
    """nanoGPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head, self.n_embd = nn.Linear(60, 180), nn.Linear(60, 60), 6, 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        mask = torch.tril(torch.ones(T, T)).view(1, 1, T, T)
        scores = (q @ k.transpose(-2, -1) * 0.3).masked_fill(mask[:, :, :T, :T] == 0, float("-inf"))
        y = scores.softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


def test_nanogpt() -> None:
    analysis = analyse(trace(Attention(), (torch.zeros(2, 7, 60),)))
    assert text(analysis.param_dims("c_attn.weight")) == "(6·10 | 6·10 | 6·10) , 60"
    assert text(analysis.param_dims("c_proj.weight")) == "60 , 6·10"
    (heads, *_) = analysis.param_dims("c_proj.weight")[1]
    assert isinstance(heads, Atom)
    batch, length, out = analysis.dims[analysis.trace.outputs[0].node][0]
    assert analysis.is_frozen(batch)
    assert analysis.is_frozen(length)
    assert out == analysis.param_dims("c_proj.weight")[0]


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(60, 180), nn.Linear(60, 60), 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


def test_a_view_of_three() -> None:
    analysis = analyse(trace(Vit(), (torch.zeros(2, 7, 60),)))
    assert text(analysis.param_dims("qkv.weight")) == "3·6·10 , 60"
    assert analysis.param_dims("qkv.weight")[0][1] is analysis.param_dims("proj.weight")[1][0]


class Crossed(nn.Module):
    """Two views of one projection that do not nest: 4 heads of 9, and 6 of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 36), nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down((y.view(-1, 4, 9) * 2).view(-1, 6, 6).relu().view(-1, 36))


def test_what_does_not_nest_is_blocked_there_and_noted() -> None:
    analysis = analyse(trace(Crossed(), (torch.zeros(7, 5),)))
    assert text(analysis.param_dims("up.weight")) == "4·9 , 5"
    assert text(analysis.param_dims("down.weight")) == "5 , 6·6"
    assert any(".view(-1, 6, 6)" in str(note) for note in analysis.notes)


def test_a_rule_of_ones_own() -> None:
    with pytest.raises(RuleError, match="is not the name of an op"):
        register_rule("attn", "ab -> ab")
    with pytest.raises(RuleError, match="exactly one '->'"):
        register_rule("mylib::attn", "ab")
    with pytest.raises(RuleError, match="on the right but not on the left"):
        register_rule("mylib::attn", "ab -> ac")
    with pytest.raises(RuleError, match="do not occur"):
        register_rule("mylib::attn", "ab -> ab", blocked="c")
    with pytest.raises(RuleError, match="two sharding rules for aten.linear"):
        rule("aten.linear")(lambda op: None)


def test_a_custom_op() -> None:
    @torch.library.custom_op("autotp_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale

    scaled.register_fake(lambda x, scale: torch.empty_like(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = nn.Linear(5, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.autotp_test.scaled(self.up(x), self.scale)

    unknown = analyse(trace(Model(), (torch.zeros(3, 5),)))
    assert unknown.param_dims("up.weight")[0] != unknown.param_dims("scale")[0]
    assert "no sharding rule is known" in str(unknown.notes[0])
    register_rule("autotp_test::scaled", "...d, d -> ...d")
    assert find_rule(torch.ops.autotp_test.scaled.default) is not None
    known = analyse(trace(Model(), (torch.zeros(3, 5),)))
    unregister_rule(scaled)
    assert known.param_dims("up.weight")[0] == known.param_dims("scale")[0]
