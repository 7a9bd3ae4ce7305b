"""The models of the tests themselves: each runs, follows its seed, and uses all its parameters."""

from __future__ import annotations

import pytest
import torch

from tests.models import MODELS, ModelCase, call, variants

CASES = [pytest.param(case, variant, id=name) for name, case, variant in variants()]


def outputs(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("case", "variant"), CASES)
def test_runs_and_every_parameter_has_a_gradient(case: ModelCase, variant: dict[str, object]) -> None:
    model = case.build(**variant)
    found = outputs(call(model, case.inputs()))
    assert found
    assert all(torch.isfinite(tensor).all() for tensor in found)
    sum(tensor.sin().sum() for tensor in found if tensor.is_floating_point()).backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not idle

    again = outputs(call(case.build(**variant), case.inputs()))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_seeds_differ() -> None:
    case = MODELS["llama"]
    assert not torch.equal(case.build(seed=0).lm_head.weight, case.build(seed=1).lm_head.weight)
    assert not torch.equal(case.inputs(seed=0)["input_ids"], case.inputs(seed=1)["input_ids"])


@pytest.mark.parametrize("name", [name for name, case in MODELS.items() if case.generative])
def test_generates(name: str) -> None:
    case = MODELS[name]
    prompt = case.inputs()["input_ids"]
    tokens = case.build().generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (prompt.shape[0], 4 + (1 if name in {"t5", "bart"} else prompt.shape[1]))


def test_labels_give_a_loss() -> None:
    for name in ("llama", "bert", "t5", "vit"):
        case = MODELS[name]
        assert call(case.build(), case.inputs(labels=True)).loss.ndim == 0
