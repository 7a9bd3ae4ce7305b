"""Plans as data: YAML and back, the folding of names, what a plan says about real models, golden files."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import autotp
from autotp.axes.analysis import analyse
from autotp.errors import PlanError
from autotp.plan.build import build_plan
from autotp.plan.names import fold, unfold
from autotp.plan.plan import Axis, Collective, Entry, Plan
from autotp.plan.planner import choose
from autotp.plan.same import first_difference
from autotp.rewrite.anchors import Anchors
from autotp.target import load_target
from autotp.trace.scenario import scenarios, trace_model
from tests.models import MODELS

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "plans").glob("*.yaml"))


@functools.cache
def planned(name: str, tp: int = 2) -> Plan:
    """The plan of a model of the tests, not yet tried on its code."""
    case = MODELS[name]
    model = case.build(dtype=torch.float32)
    return plan_of(model, case.inputs(0, 2, 7, dtype=torch.float32), tp)


def plan_of(model: nn.Module, inputs: object, tp: int) -> Plan:
    traces, folds = trace_model(model, scenarios(model, inputs)[:1])  # type: ignore[arg-type]
    analysis = analyse(traces[0])
    choice = choose(analysis, tp, places=Anchors(traces[0]).places())
    return build_plan(
        model, tp, analysis, choice, folds, fingerprint="0123", diff="--- a\n+++ b\n-x \n+\ty\n"
    )


# ---- plans of real models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str) -> None:
    plan = planned(name)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert json.loads(plan.to_json()) == yaml.safe_load(plan.to_yaml())
    assert str(plan) == plan.table() and str(plan).startswith("tp=2: ")


@pytest.mark.parametrize("name", MODELS)
def test_entries_are_the_model(name: str) -> None:
    """Each parameter once, with its own shape; what is sharded adds up, what is not is whole on each rank."""
    plan = planned(name)
    model = MODELS[name].build(dtype=torch.float32)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: e.global_shape for e in plan.entries for n in unfold(e.name)} == shapes
    assert sum(e.count for e in plan.entries) == len(shapes)
    assert plan.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert 0.85 * plan.weight_bytes < plan.sharded_bytes <= plan.weight_bytes
    for e in plan.entries:
        assert len(e.local_shapes) == len(e.local_bytes) == plan.tp
        assert (e.placement == "replicate") == all(s == e.global_shape for s in e.local_shapes)
        assert bool(re.search(r"/\d", e.dims)) == (e.placement != "replicate")
        assert sum(e.local_bytes) >= e.global_bytes
        assert e.note or e.placement != "replicate"


@pytest.mark.parametrize(
    ("name", "placements"),
    [
        ("mlp", "column column row replicate"),
        (
            "llama",
            "vocab column column column row column column row replicate replicate replicate column",
        ),
        (  # Conv1D: the input dim comes first
            "gpt2",
            f"vocab vocab {'replicate replicate column column row replicate ' * 2} replicate replicate",
        ),
        ("fused_mha", "column column row replicate"),
    ],
)
def test_placements(name: str, placements: str) -> None:
    assert [e.placement for e in planned(name).entries] == placements.split()


@pytest.mark.parametrize(
    ("name", "layers", "forward", "backward"),
    [
        ("mlp", 1, 1, 1),
        ("naive_mha", 1, 1, 1),
        ("transformer_layer", 1, 2, 2),
        ("llama", 2, 2, 2),
        ("gpt2", 2, 2, 2),
        ("gptj", 2, 1, 1),  # attention and MLP side by side share one sum
    ],
)
def test_collectives_of_a_block(name: str, layers: int, forward: int, backward: int) -> None:
    """A sequential block takes two all-reduces forward and two backward; GPT-J's one and one."""
    plan = planned(name)
    inside = [c for c in plan.collectives if "{0-1}" in c.where or layers == 1]
    assert {c.kind for c in inside} == {"all_reduce"}
    counts = {p: sum(c.count for c in inside if c.phase == p) for p in ("forward", "backward")}
    assert counts == {"forward": forward * layers, "backward": backward * layers}


def test_layers_that_were_folded_are_counted() -> None:
    """Twelve layers, of which three were traced."""
    config = MODELS["llama"].build(dtype=torch.float32).config
    config.num_hidden_layers = 12
    model = type(MODELS["llama"].build())(config)
    plan = plan_of(model, {"input_ids": torch.zeros(2, 7, dtype=torch.long)}, 4)
    (up,) = [e for e in plan.entries if "up_proj" in e.name]
    assert (up.name, up.count) == ("model.layers.{0-11}.mlp.up_proj.weight", 12)
    assert up.dims == "F52/4 , M40"
    (axis,) = [a for a in plan.axes if a.name == "F"]
    assert axis == Axis("model.layers.*.mlp.gate_proj.weight[0].0", "F", (52,), ((13, 13, 13, 13),), 12)
    where = [(c.phase, c.where, c.count) for c in plan.collectives if "mlp" in c.where]
    assert where == [("forward", "model.layers.{0-11}.mlp.down_proj", 12)]
    assert plan.weight_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_uneven_and_nested_axes() -> None:
    """Three heads on two ranks; two kv heads on four ranks, of which two share each."""
    case = MODELS["llama"]
    uneven = planned("llama", 3)
    q = next(e for e in uneven.entries if "q_proj" in e.name)
    assert [s[0] for s in q.local_shapes] == [24, 12, 12]
    model = case.build(dtype=torch.float32, kv_heads=2)
    nested = plan_of(model, case.inputs(0, 2, 7, dtype=torch.float32), 4)
    q, k = (next(e for e in nested.entries if f"{letter}_proj" in e.name) for letter in "qk")
    assert q.dims == "K2/2·G4/2·(D3 | D3) , M40" and q.local_shapes == ((12, 40),) * 4
    assert k.dims == "K2/2·(D3 | D3) , M40" and k.local_shapes == ((6, 40),) * 4
    (axis,) = [a for a in nested.axes if len(a.sizes) == 2]
    assert (axis.name, axis.sizes, axis.counts) == ("K·G", (2, 4), ((1, 1, 1, 1), (2, 2, 2, 2)))
    assert nested.count("step") == 1  # the gradients of k and v, summed over two ranks in one bucket


# ---- the data --------------------------------------------------------------------------------------------


SMALL = Plan(
    tp=2,
    model="Net",
    fingerprint="00e1",  # not a number
    proven=True,
    weight_bytes=96,
    sharded_bytes=64,
    axes=(Axis("up.weight[0].0", "F", (8,), ((4, 4),)),),
    entries=(
        Entry("up.weight", 1, "column", "F8/2 , M2", (8, 2), ((4, 2), (4, 2)), 64, (32, 32)),
        Entry("h.{0,2}.bias", 2, "replicate", "M2", (2,), ((2,), (2,)), 16, (16, 16), "yes: 'a' #b"),
    ),
    collectives=(Collective("forward", "all_reduce", "down", "linear", 48, 1),),
    notes=("null", "two\nlines"),
    patches="--- model.py\n+++ model.py (patched)\n@@ -1 +1 @@\n-a \n+\tb\n",
)

YAML = """\
autotp: 1
tp: 2
model: Net
fingerprint: 00e1
proven: true
weight_bytes: 96
sharded_bytes: 64
axes:
- key: up.weight[0].0
  name: F
  sizes: [8]
  counts:
  - [4, 4]
  layers: 1
entries:
- name: up.weight
  count: 1
  placement: column
  dims: F8/2 , M2
  global_shape: [8, 2]
  local_shapes:
  - [4, 2]
  global_bytes: 64
  local_bytes: [32]
  note: ''
- name: h.{0,2}.bias
  count: 2
  placement: replicate
  dims: M2
  global_shape: [2]
  local_shapes:
  - [2]
  global_bytes: 16
  local_bytes: [16]
  note: 'yes: ''a'' #b'
collectives:
- {phase: forward, kind: all_reduce, where: down, op: linear, bytes: 48, count: 1}
notes:
- 'null'
- |-
  two
  lines
patches: "--- model.py\\n+++ model.py (patched)\\n@@ -1 +1 @@\\n-a \\n+\\tb\\n"
"""


def test_yaml() -> None:
    assert SMALL.to_yaml() == YAML
    assert Plan.from_yaml(YAML) == SMALL


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(YAML)
    assert Plan.from_yaml(path) == Plan.from_yaml(str(path)) == SMALL


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "weight_bytes: 96",
            "weigth_bytes: 96",
            "my.yaml:6: unknown key 'weigth_bytes' (did you mean 'weight_bytes'?)",
        ),
        ("tp: 2", "tp: two", "my.yaml:2: tp should be a whole number, not 'two'"),
        ("tp: 2", "tp: true", "my.yaml:2: tp should be a whole number, not True"),
        ("tp: 2", "tp: 0", "my.yaml:2: tp should be at least 1, not 0"),
        ("tp: 2\n", "", "my.yaml: the plan lacks the key 'tp'"),
        ("autotp: 1", "autotp: 7", "my.yaml:1: this is a plan of format 7, and this autotp reads 1"),
        ("autotp: 1\n", "", "my.yaml: this is no plan: it lacks the key 'autotp'"),
        (
            "placement: column",
            "placement: colum",
            "my.yaml:18: 'colum' is no placement, which are column, row, vocab, shard, replicate",
        ),
        (
            "  local_bytes: [32]",
            "  local_bytes: [1, 2, 3]",
            "my.yaml:24: entries[0].local_bytes has 3 items for 2 ranks",
        ),
        ("  count: 2", "  cuont: 2", "my.yaml:27: unknown key 'cuont' (did you mean 'count'?)"),
        (
            "  global_shape: [2]",
            "  global_shape: 2",
            "my.yaml:30: entries[1].global_shape should be a list, not 2",
        ),
        ("tp: 2", "tp: 2\ntp: 3", "my.yaml:3: the key 'tp' is there twice"),
        ("tp: 2", "tp: [2", "my.yaml:3: not YAML: expected ',' or ']', but got ':'"),
        ("tp: 2", "tp: &a 2\nnotes: *a", "my.yaml:3: aliases are not read, write the value out"),
        ("tp: 2", "tp: !!python/object/apply:os.getcwd []", None),
    ],
)
def test_a_wrong_plan_names_line_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert old in YAML
    Path("my.yaml").write_text(YAML.replace(old, new, 1))
    with pytest.raises(PlanError) as caught:
        Plan.from_yaml("my.yaml")
    assert str(caught.value) == said or said is None


def test_no_plan_at_all(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nowhere.yaml: no such file"):
        Plan.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(PlanError, match="the given text: expected a mapping of keys to values"):
        Plan.from_yaml("- 1\n- 2\n")


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.w", "a.1.w", "a.2.w", "a.5.w"], [("a.{0-2,5}.w", 4)]),
        (["a.0", "b", "a.1"], [("a.{0-1}", 2), ("b", 1)]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], [("a.{0-1}.b.{0-1}", 4)]),
        (["a.0.b.0", "a.1.b.1"], [("a.0.b.0", 1), ("a.1.b.1", 1)]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], [("a.0.b.{0-1}", 2), ("a.1.b.0", 1)]),
        (
            ["conv1d.w", "conv2d.w"],
            [("conv1d.w", 1), ("conv2d.w", 1)],
        ),  # digits inside a word are part of the name
        (["a.0", "a.0", "a.1", "a.1"], [("a.{0-1}", 4)]),  # the same module twice
        ([], []),
    ],
)
def test_fold(names: Sequence[str], folded: list[tuple[str, int]]) -> None:
    found = fold((name, "same") for name in names)
    assert [(pattern, n) for pattern, _, n in found] == folded
    assert sorted(n for pattern, _ in folded for n in unfold(pattern)) == sorted(set(names))


def test_fold_keeps_different_keys_apart() -> None:
    assert fold([("a.0", "x"), ("a.1", "y"), ("a.2", "x")]) == [("a.{0,2}", "x", 2), ("a.1", "y", 1)]


def test_first_difference() -> None:
    assert first_difference(SMALL, dataclasses.replace(SMALL, notes=(), patches="", proven=False)) is None
    entry = dataclasses.replace(SMALL.entries[0], placement="row")
    other = dataclasses.replace(SMALL, entries=(entry, SMALL.entries[1]))
    assert first_difference(SMALL, other) == "placement of up.weight is column in it and row here"
    assert (
        first_difference(SMALL, dataclasses.replace(SMALL, axes=())) == "axes: up.weight[0].0 is missing here"
    )
    assert first_difference(SMALL, dataclasses.replace(SMALL, tp=4)) == "tp is 2 in it and 4 here"


# ---- golden files ----------------------------------------------------------------------------------------


def test_there_are_golden_plans() -> None:
    assert len(GOLDEN) >= 3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    """The plans that are shipped are those that `autotp plan` makes today (plans/README.md says how)."""
    config, tp = path.stem.rsplit(".tp", 1)
    model, inputs = load_target(str(ROOT / "examples" / "configs" / f"{config}.json"))
    found = autotp.plan(model, tp=int(tp), example_inputs=inputs)
    given = Plan.from_yaml(path)
    assert path.read_text() == given.to_yaml()
    # the fingerprint is made of names that torch gives to ops, too
    assert dataclasses.replace(given, fingerprint="") == dataclasses.replace(found, fingerprint="")
