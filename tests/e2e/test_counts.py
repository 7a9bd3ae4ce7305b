"""How much is communicated: exact numbers of collectives, and their bytes, in a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import autotp
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool
from tests.e2e.compare import loss_of, tensors_of, trainable
from tests.e2e.test_experts import EXPERTS, build
from tests.models import MODELS, call
from tests.models.case import BATCH, SEQ

FLOAT64, FLOAT32 = 8, 4
TOKENS = BATCH * SEQ
Counts = Mapping[tuple[str, str], tuple[int, int]]


def communicated_by_experts() -> Counts:
    """The same for a Mixtral, its experts computed as batched products."""
    model = build("mixtral", "batched_mm", torch.float64)
    ids = MODELS["llama"].inputs()["input_ids"]  # type: ignore[call-overload]
    autotp.parallelize(model, example_inputs={"input_ids": ids})
    with record_collectives() as log:
        loss_of(tensors_of(model(ids))).backward()
    keys = {(c.kind, c.direction) for c in log}
    return {key: (log.count(*key), log.bytes(*key)) for key in keys}


def communicated(name: str, variant: dict[str, object], trained_inputs: bool = True) -> Counts:
    """On each rank: (number, bytes) by (kind, direction)."""
    case = MODELS[name]
    model = autotp.parallelize(case.build(**variant), example_inputs=case.inputs())
    with record_collectives() as log:
        loss_of(
            tensors_of(call(model, trainable(case.inputs()) if trained_inputs else case.inputs()))
        ).backward()
    keys = {(c.kind, c.direction) for c in log}
    return {key: (log.count(*key), log.bytes(*key)) for key in keys}


def evaluated(name: str) -> Counts:
    """The same without gradients, for one more token at the end of a cached prompt."""
    case = MODELS[name]
    model = autotp.parallelize(case.build(), example_inputs=case.inputs())
    ids = case.inputs()["input_ids"]  # type: ignore[call-overload]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with record_collectives() as log:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    keys = {(c.kind, c.direction) for c in log}
    return {key: (log.count(*key), log.bytes(*key)) for key in keys}


def test_a_sequential_block_is_two_and_two(dist: Pool) -> None:
    width = 40
    expected = (2, 2 * TOKENS * width * FLOAT64)
    for counts in dist.run(2, communicated, "transformer_layer", {}):
        assert counts == {("all_reduce", "forward"): expected, ("all_reduce", "backward"): expected}


def test_an_mlp_is_one_and_one(dist: Pool) -> None:
    d_in, d_out = 28, 20
    forward = ("all_reduce", "forward"), (1, TOKENS * d_out * FLOAT64)
    backward = ("all_reduce", "backward"), (1, TOKENS * d_in * FLOAT64)
    for counts in dist.run(2, communicated, "mlp", {}):
        assert counts == dict([forward, backward])
    for counts in dist.run(2, communicated, "mlp", {}, False):  # nothing before it wants a gradient
        assert counts == dict([forward])


@pytest.mark.parametrize("name", ["naive_mha", "fused_mha", "torch_mha"])
def test_an_attention_is_one_and_one(dist: Pool, name: str) -> None:
    expected = (1, TOKENS * 40 * FLOAT64)
    for counts in dist.run(2, communicated, name, {}):
        assert counts == {("all_reduce", "forward"): expected, ("all_reduce", "backward"): expected}


LAYERS = [  # model, name of the number of layers, tokens, width, all-reduces of a layer: forward, backward
    ("llama", "num_hidden_layers", TOKENS, 40, 2, 2),
    ("nanogpt", "n_layer", TOKENS, 40, 2, 2),
    ("gpt2", "n_layer", TOKENS, 48, 2, 2),
    ("simple_vit", "depth", BATCH * (1 + 9), 40, 2, 2),
    ("gptj", "n_layer", TOKENS, 48, 1, 1),  # attention and MLP side by side share both sums
    ("gpt_neox", "num_hidden_layers", TOKENS, 48, 1, 1),  # with a norm for each branch
    ("falcon", "num_hidden_layers", TOKENS, 48, 2, 1),  # `mlp_output += attention_output` wants its operands whole
    ("t5", "num_layers", TOKENS, 40, 2, 2),  # of the encoder
    ("t5", "num_decoder_layers", BATCH * (SEQ + 2), 40, 3, 3),  # cross-attention too
]


@pytest.mark.parametrize(
    ("name", "layers", "tokens", "width", "forward", "backward"), LAYERS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_layer_more(name: str, layers: str, tokens: int, width: int, forward: int, backward: int) -> None:
    """What one layer more costs, by the plan (of which `compare` sees that it is what happens)."""
    case = MODELS[name]
    two, three = (
        autotp.plan(case.build(**{layers: n}), 2, example_inputs=case.inputs(), verify=False) for n in (2, 3)
    )

    def cost(plan: autotp.Plan, phase: str) -> tuple[int, int]:
        found = [c for c in plan.collectives if c.phase == phase]
        assert all(c.kind == "all_reduce" or phase == "forward" for c in found)
        return sum(c.count for c in found), sum(c.count * c.bytes for c in found)

    for phase, count in (("forward", forward), ("backward", backward)):
        (n2, bytes2), (n3, bytes3) = cost(two, phase), cost(three, phase)
        assert (n3 - n2, bytes3 - bytes2) == (count, count * tokens * width * FLOAT64)


def test_embeddings_and_head(dist: Pool) -> None:
    """Llama: a sum after the embedding, two a layer; the logits are gathered; back, a sum before the head."""
    layers, width, vocabulary = 2, 40, 61
    hidden = TOKENS * width * FLOAT64
    logits = (1, TOKENS * vocabulary * FLOAT64)
    for counts in dist.run(2, communicated, "llama", {}):
        assert counts == {
            ("all_reduce", "forward"): (1 + 2 * layers, (1 + 2 * layers) * hidden),
            ("all_gather", "forward"): logits,
            ("all_reduce", "backward"): (2 * layers + 1, (2 * layers + 1) * hidden),
        }


def test_a_mixture_of_experts(dist: Pool) -> None:
    """Mixtral: as Llama. The router is sharded by experts: each token's scores are gathered (in float32, as it computes
    them); back comes a sum for the weights of the chosen two, each of which multiplies a part of a sharded width.
    """
    layers, width, vocabulary, chosen = 2, 40, 61, 2
    hidden = TOKENS * width * FLOAT64
    scores, weights = TOKENS * EXPERTS * FLOAT32, TOKENS * chosen * FLOAT32
    for counts in dist.run(2, communicated_by_experts):
        assert counts == {
            ("all_reduce", "forward"): (1 + 2 * layers, (1 + 2 * layers) * hidden),
            ("all_gather", "forward"): (layers + 1, layers * scores + TOKENS * vocabulary * FLOAT64),
            ("all_reduce", "backward"): (3 * layers + 1, (2 * layers + 1) * hidden + layers * weights),
        }


def test_a_new_token(dist: Pool) -> None:
    """Decoding sends one token's hidden states as often as the forward pass does."""
    layers, width, vocabulary = 2, 40, 61
    hidden = BATCH * width * FLOAT64
    for counts in dist.run(2, evaluated, "llama"):
        assert counts == {
            ("all_reduce", "forward"): (1 + 2 * layers, (1 + 2 * layers) * hidden),
            ("all_gather", "forward"): (1, BATCH * vocabulary * FLOAT64),
        }
