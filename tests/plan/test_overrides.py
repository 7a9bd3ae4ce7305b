"""Overrides: what they do, and the exact text of each refusal."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autotp.axes.analysis import Analysis, analyse
from autotp.errors import PlanError
from autotp.plan.build import build_plan
from autotp.plan.overrides import Overrides
from autotp.plan.plan import Plan
from autotp.plan.planner import choose
from autotp.rewrite.anchors import Anchors
from autotp.trace.fold import Folds
from autotp.trace.scenario import scenarios, trace_model
from tests.models import MODELS

Case = tuple[nn.Module, Analysis, Folds]


@functools.cache
def case(name: str) -> Case:
    model = MODELS[name].build(dtype=torch.float32)
    inputs = MODELS[name].inputs(0, 2, 7, dtype=torch.float32)
    return analysed(model, inputs)


def analysed(model: nn.Module, inputs: Any) -> Case:
    traces, folds = trace_model(model, scenarios(model, inputs)[:1])
    return model, analyse(traces[0]), folds


def plan(given: Any, of: str | Case = "llama", tp: int = 4) -> Plan:
    """What `autotp.plan` does with overrides, but for trying it on the code."""
    model, analysis, folds = case(of) if isinstance(of, str) else of
    overrides = Overrides.load(given)
    allow, require = overrides.apply(analysis, folds, model, tp)
    choice = choose(analysis, tp, places=Anchors(analysis.trace).places(), allow=allow, require=require)
    found = build_plan(model, tp, analysis, choice, folds, fingerprint="")
    overrides.check(found)
    return found


def placements(given: Mapping[str, str], of: str | Case = "llama", tp: int = 4) -> dict[str, str]:
    entries = plan({"modules": given}, of, tp).entries
    return {e.name.removesuffix(".weight").removeprefix("model."): e.placement for e in entries}


def refusal(given: Any, of: str | Case = "llama", tp: int = 4) -> str:
    with pytest.raises(PlanError) as caught:
        plan(given, of, tp)
    return str(caught.value)


# ---- what they do ----------------------------------------------------------------------------------------

LLAMA = {
    "embed_tokens": "vocab",
    "layers.{0-1}.self_attn.q_proj": "column",
    "layers.{0-1}.self_attn.k_proj": "column",
    "layers.{0-1}.self_attn.v_proj": "column",
    "layers.{0-1}.self_attn.o_proj": "row",
    "layers.{0-1}.mlp.gate_proj": "column",
    "layers.{0-1}.mlp.up_proj": "column",
    "layers.{0-1}.mlp.down_proj": "row",
    "layers.{0-1}.input_layernorm": "replicate",
    "layers.{0-1}.post_attention_layernorm": "replicate",
    "norm": "replicate",
    "lm_head": "column",
}
MLP = ("layers.{0-1}.mlp.gate_proj", "layers.{0-1}.mlp.up_proj", "layers.{0-1}.mlp.down_proj")


@pytest.mark.parametrize(
    "given", [{}, {"lm_head": "column"}, {"*.q_proj": "column", "*.o_proj": "row"}, {"*.mlp": "shard"}]
)
def test_what_holds_anyway_changes_nothing(given: dict[str, str]) -> None:
    assert placements(given) == LLAMA


def test_replicate() -> None:
    assert placements({"lm_head": "replicate"}) == LLAMA | {"lm_head": "replicate"}


def test_an_axis_is_whole_everywhere_or_nowhere() -> None:
    """The MLP's width is one axis of three weights."""
    whole = LLAMA | dict.fromkeys(MLP, "replicate")
    assert placements({"*.mlp.up_proj": "replicate"}) == whole
    assert placements({"model.layers.{0-1}.mlp": "replicate"}) == whole  # as the table prints the name
    assert placements({"*.mlp.up_proj.weight": "replicate"}) == whole  # a parameter


def test_one_layer() -> None:
    found = placements({"model.layers.1.mlp": "replicate"})
    assert found["layers.0.mlp.down_proj"] == "row"
    assert found["layers.1.mlp.down_proj"] == "replicate"


def test_tied_weights() -> None:
    """The head of GPT-2 is its embedding."""
    found = placements({"lm_head": "replicate"}, "gpt2")
    assert found["transformer.wte"] == "replicate"
    assert placements({"lm_head": "column"}, "gpt2")["transformer.wte"] == "vocab"


def test_weights_that_have_their_input_dim_first() -> None:
    """transformers' Conv1D: the op says which dim is the output's."""
    found = placements({"*.c_attn": "column", "*.c_proj": "row"}, "gpt2")
    assert found["transformer.h.{0-1}.attn.c_attn"] == "column"


def test_the_other_way_round() -> None:
    """One row-parallel head shards the model dim, which is one axis through the whole model."""
    found = placements({"lm_head": "row"})
    assert found["lm_head"] == "row"
    assert found["layers.{0-1}.mlp.up_proj"] == "row"
    assert found["layers.{0-1}.mlp.down_proj"] == "column"


# ---- what cannot be read ---------------------------------------------------------------------------------

THERE = "the given overrides: "
KNOWN = "; there are column, row, vocab, shard, replicate, and shard(0) for one dim"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modles": {}}, "unknown key 'modles' (did you mean 'modules'?)"),
        ({"modules": {"lm_head": "colum"}}, "'lm_head': 'colum' is no placement (did you mean 'column'?)" + KNOWN),
        ({"modules": {"lm_head": None}}, "'lm_head': None is no placement" + KNOWN),
        ({"modules": ["lm_head"]}, "modules should map patterns to placements, and is ['lm_head']"),
        ({"lm_head": "row"}, "placements go under 'modules:', and 'lm_head': row does not"),
        ({}, "modules should map patterns to placements, and is None"),
    ],
)  # fmt: skip
def test_misspelt(given: Mapping[str, Any], said: str) -> None:
    assert refusal(given) == THERE + said


def test_a_file_says_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("# mine\nmodules:\n  '*.mlp': replicate\n  lm_hed: replicate\n")
    assert refusal("my.yaml") == (
        "my.yaml:4: 'lm_hed' matches no module or parameter (did you mean 'lm_head'?)"
    )
    assert refusal(Path("your.yaml")) == "your.yaml: no such file"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("lm_hed", "'lm_hed' matches no module or parameter (did you mean 'lm_head'?)"),
        (
            "model.layer.*.mlp",
            "'model.layer.*.mlp' matches no module or parameter (did you mean 'model.layers.*.mlp'?)",
        ),
        ("xyzzy", "'xyzzy' matches no module or parameter"),
        (
            "*.act_fn",
            "'*.act_fn' matches only modules without parameters, 'model.layers.0.mlp.act_fn' for one",
        ),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, said: str) -> None:
    assert refusal({"modules": {pattern: "replicate"}}) == THERE + said


# ---- what cannot hold ------------------------------------------------------------------------------------


def test_no_product() -> None:
    assert refusal({"modules": {"model.norm": "row"}}) == THERE + (
        "'model.norm': row cannot hold: model.norm.weight is not multiplied with, it is used by mul in 'model.norm' "
        "at modeling_llama.py:66 'self.weight * hidden_states.to(input_dtype)'"
    )
    assert refusal({"modules": {"lm_head": "vocab"}}) == THERE + (
        "'lm_head': vocab cannot hold: lm_head.weight is not looked up in, it is used by linear in 'lm_head'"
    )


def test_an_op_needs_the_axis_whole() -> None:
    assert refusal({"modules": {"*.ln_1": "shard"}}, "gpt2") == THERE + (
        "transformer.h.0.ln_1.weight cannot be sharded: "
        "layer_norm in 'transformer.h.0.ln_1' needs the axis (of 48) whole"
    )


def test_too_few_elements() -> None:
    assert refusal({"modules": {"*.self_attn.*": "replicate", "*.mlp.up_proj": "column"}}, tp=53) == THERE + (
        "model.layers.0.mlp.up_proj.weight cannot be column-parallel: the axis has 52 elements, fewer than tp=53"
    )


def test_kept_whole_by_another() -> None:
    given = {"*.mlp.down_proj": "replicate", "*.mlp.up_proj": "column"}
    assert refusal({"modules": given}) == THERE + (
        "model.layers.0.mlp.up_proj.weight cannot be column-parallel: "
        "model.layers.0.mlp.down_proj.weight also holds its output axis, "
        "and '*.mlp.down_proj': replicate keeps it whole"
    )


def test_both_cannot_be() -> None:
    assert refusal({"modules": {"*.q_proj": "row", "*.k_proj": "column"}}) == THERE + (
        "model.layers.0.self_attn.k_proj.weight column ('*.k_proj') and model.layers.0.self_attn.q_proj.weight row "
        "('*.q_proj') exclude each other: linear in 'model.layers.0.self_attn.q_proj' has both axes on one tensor, "
        "of which one can be sharded"
    )


class Square(nn.Module):
    """Adds what a linear layer makes to what it takes: its two dims are one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(10, 12)
        self.inner = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.outer(x)
        return self.inner(x) + x


def test_an_axis_on_two_dims() -> None:
    square = analysed(Square(), (torch.zeros(3, 10),))
    assert refusal({"modules": {"inner": "row"}}, square, tp=2) == THERE + (
        "inner.weight cannot be row-parallel: linear in 'inner' has the axis (of 12) on two dims of one tensor"
    )


# ---- whole plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp", "falcon"])
def test_a_whole_plan(name: str, tmp_path: Path) -> None:
    found = plan(None, name, 3)
    (tmp_path / "plan.yaml").write_text(found.to_yaml())
    assert (
        plan(found, name, 3)
        == plan(found.to_yaml(), name, 3)
        == plan(tmp_path / "plan.yaml", name, 3)
        == found
    )


def test_a_whole_plan_with_overrides_in_it() -> None:
    """A plan that the planner would not have found by itself is taken as it is."""
    found = plan({"modules": {"lm_head": "row"}})
    assert found != plan(None)
    assert plan(found) == found


def test_a_plan_of_another_model() -> None:
    given = plan(None, "llama")
    assert (
        refusal(given, "gpt2")
        == "the given plan is a plan of LlamaForCausalLM, and this is a GPT2LMHeadModel"
    )
    assert refusal(given, tp=2) == "the given plan is a plan for tp=4, and tp=2 is asked for"
    text = given.to_yaml()
    assert refusal(text.replace("key: lm_head.weight", "key: lm_haed.weight")) == (
        "the given text:9: this model has no axis 'lm_haed.weight[0].0' to shard "
        "(did you mean 'lm_head.weight[0].0'?)"
    )
    assert refusal(text.replace("placement: row", "placement: shard", 1)) == (
        "the given text is not the plan of this model: "
        "placement of model.layers.{0-1}.self_attn.o_proj.weight is shard in it and row here. "
        "Was it made for another model, other inputs, or by another version of autotp?"
    )


def test_layers_that_are_folded_into_one() -> None:
    """An override for some of them has them traced one by one."""
    config = MODELS["llama"].build(dtype=torch.float32).config
    config.num_hidden_layers = 7
    model = type(MODELS["llama"].build())(config)
    traces, folds = trace_model(
        model, scenarios(model, {"input_ids": torch.zeros(2, 7, dtype=torch.long)})[:1]
    )
    some, all_of_them = ({"modules": {p: "replicate"}} for p in ("model.layers.3.mlp", "model.layers.*.mlp"))
    assert Overrides.load(some).splits(model, folds)
    assert not Overrides.load(all_of_them).splits(model, folds)
    with pytest.raises(
        PlanError, match=r"'model.layers.3.mlp' matches 1 of 5 layers that are planned as one"
    ):
        Overrides.load(some).apply(analyse(traces[0]), folds, model, 2)


def test_one_dim() -> None:
    """``shard(0)`` is the output dim of a Linear, ``shard(1)`` its input dim."""
    found = placements({"model.layers.*.mlp.up_proj": "shard(0)", "model.layers.*.mlp.down_proj": "shard(1)"})
    assert found == placements({})
    said = refusal({"modules": {"model.layers.*.mlp.up_proj": "shard(1)", "model.layers.*.mlp.down_proj": "row"}})
    assert "model.layers.0.mlp.up_proj.weight" in said and "shard(1)" in said and "exclude each other" in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("shard(2)", "shard(2) cannot hold: model.layers.0.mlp.up_proj.weight has 2 dims"),
        ("shard(-1)", "'shard(-1)' is no placement (did you mean 'shard'?); there are column, row, vocab, shard, "),
    ],
)
def test_no_such_dim(word: str, said: str) -> None:
    assert said in refusal({"modules": {"model.layers.*.mlp.up_proj": word}})
