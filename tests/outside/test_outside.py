"""Models from outside transformers, unmodified: sharded over real ranks, each is what it was, outputs and gradients.

Those of packages run where the package is installed. ``LEAST`` is the share of the weight bytes that has to be sharded;
what stays whole, and why, is said beside those that are far from one.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

import autotp
from tests.dist.pool import Pool
from tests.outside.compare import Outcome, cases, compare_all
from tests.outside.convolutional import CONVOLUTIONAL
from tests.outside.mixers import MIXERS

LEAST = {
    "unet": 0.86,  # the transposed convolutions between skips of 6 groups; on 3 ranks 4 groups are no even split
    "unet-bilinear": 0.92,
    "dcgan_generator": 0.99,
    "dcgan_discriminator": 0.93,
    "resnet": 0.79,  # convolutions between two residual streams share their channels with only one of them
    "mobilenet": 0.9,
    "convnext": 0.95,
    "mlp_mixer": 0.83,
    "dit": 0.96,
    "lstm_lm*": 0.19,  # nn.LSTM and nn.GRU have no rule: they stay whole
    "lstm_written_out": 0.6,  # the hidden state is both the width and the input of its recurrent matrix
    "x_*": 0.95,
    "diffusers_*": 0.8,
    "lora*": 0.95,
    "torch_*": 0.9,
}
TABLES = {
    "convolutional": "tests.outside.convolutional:CONVOLUTIONAL",
    "mixers": "tests.outside.mixers:MIXERS",
    "layers": "tests.outside.torch_layers:LAYERS",
    "x_transformers": "tests.outside.packages:X_TRANSFORMERS",
    "diffusers": "tests.outside.packages:DIFFUSERS",
    "peft": "tests.outside.packages:PEFT",
}


def check(outcomes: list[list[Outcome]], names: list[str]) -> None:
    """Every rank found every model right, and enough of it sharded."""
    for own in outcomes:
        assert [outcome.name for outcome in own] == names
        for outcome in own:
            assert outcome.problems == (), outcome.name
            least = next(share for pattern, share in LEAST.items() if fnmatchcase(outcome.name, pattern))
            assert outcome.share >= least, f"{outcome.name}: {outcome.share:.3f}"


def run(dist: Pool, tp: int, table: str, *patterns: str) -> list[Outcome]:
    """The models of a table whose names match, in one job of the pool."""
    names = [
        case.id(variant)
        for case, variant in cases(TABLES[table])
        if not patterns or any(fnmatchcase(case.id(variant), p) for p in patterns)
    ]
    assert names
    found = dist.run(tp, compare_all, TABLES[table], tuple(names), one_plans=True)
    check(found, names)
    for outcome in found[0]:
        print(f"tp={tp} {outcome}")
    return found[0]


def test_convolution_networks_on_two_ranks(dist: Pool) -> None:
    """Channels are the axis; a batch norm's statistics are sliced with them, in train mode too."""
    found = run(dist, 2, "convolutional")
    assert len(found) == sum(len(case.variants) for case in CONVOLUTIONAL)
    generator = next(outcome for outcome in found if outcome.name == "dcgan_generator")
    assert (generator.forward, generator.backward) == (2, 2)  # four transposed convolutions, in pairs


def test_convolution_networks_on_three_ranks(dist: Pool) -> None:
    run(dist, 3, "convolutional", "unet", "dcgan_generator", "mobilenet")


def test_mixers_and_diffusion_transformers_on_two_ranks(dist: Pool) -> None:
    assert len(run(dist, 2, "mixers")) == sum(len(case.variants) for case in MIXERS)


def test_mixers_and_diffusion_transformers_on_three_ranks(dist: Pool) -> None:
    run(dist, 3, "mixers", "mlp_mixer", "dit", "lstm_*")


def test_layers_of_torch_on_two_ranks(dist: Pool) -> None:
    run(dist, 2, "layers")


@pytest.mark.parametrize(("rnn", "op"), [("LSTM", "aten.lstm.input"), ("GRU", "aten.gru.input")])
def test_a_recurrent_layer_stays_whole_and_the_plan_says_so(rnn: str, op: str) -> None:
    case = next(case for case in MIXERS if case.name == "lstm_lm")
    model = case.build(rnn_type=rnn)
    plan = autotp.plan(model, 2, example_inputs=case.inputs(0))
    whole = {entry.name: entry for entry in plan.entries if entry.name.startswith("rnn.")}
    assert whole and all(entry.placement == "replicate" for entry in whole.values())
    assert f"{op.split('.')[1]} needs it whole" in whole["rnn.weight_ih_l0"].note
    assert any(f"{op} in 'rnn': no sharding rule is known for this op" in note for note in plan.notes)
    with pytest.raises(autotp.PlanError, match=f"strict: at tp=2, gathered for {op}"):
        autotp.plan(model, 2, example_inputs=case.inputs(0), strict=True)


# ---- packages


def test_x_transformers(dist: Pool) -> None:
    pytest.importorskip("x_transformers")
    run(dist, 2, "x_transformers", "x_decoder-rotary*", "x_decoder-attn_flash*", "x_encoder_decoder")
    run(dist, 3, "x_transformers", "x_decoder-rel_pos*")


def test_diffusers(dist: Pool) -> None:
    pytest.importorskip("diffusers")
    run(dist, 2, "diffusers", "diffusers_dit")


def test_lora(dist: Pool) -> None:
    """Adapters are sharded with the weights that they adapt: 6 forward all-reduces, as without them."""
    pytest.importorskip("peft")
    for outcome in run(dist, 2, "peft", "lora-llama", "lora-gpt2"):
        assert outcome.forward == 6
    run(dist, 3, "peft", "lora-gpt2")
