"""Random models are exact or refused; and a fault in autotp does not get past them.

`python -m tests.fuzz --models 2000` runs more of them.
"""

from __future__ import annotations

import re

import pytest
from torch import nn

from tests.dist.pool import Pool
from tests.fuzz.__main__ import command, summary
from tests.fuzz.attention import attention
from tests.fuzz.check import Found, is_stable, unusable
from tests.fuzz.code import Code, Draw
from tests.fuzz.feedforward import convolution, experts, library, mlp, scan
from tests.fuzz.models import DEGREES, PARTS, draw_model
from tests.fuzz.soup import STEPS
from tests.fuzz.sweep import batches, run_batch

MODELS = 100
BATCHES = batches(range(MODELS), size=10)


def told(found: list[Found], fault: str | None = None) -> str:
    """What to read and to run where models are wrong or crash."""
    return "\n\n".join(f"{f.kind}: {f.reason}\n    {command(f, fault)}" for f in found)


@pytest.mark.parametrize(("tp", "seeds"), BATCHES, ids=[f"tp{tp}-{seeds[0]}" for tp, seeds in BATCHES])
def test_exact_or_refused(dist: Pool, tp: int, seeds: list[int]) -> None:
    found = run_batch(dist, tp, seeds, one_plans=tp > 2)
    bad = [f for f in found if f.kind in ("wrong", "crash")]
    assert not bad, told(bad)
    exact = [f for f in found if f.kind == "exact"]
    # Refusing everything, or replicating it, would be right as well, and check nothing.
    assert len(exact) >= 0.7 * len(found), [f.reason for f in found]
    assert sum(f.share > 0.5 for f in exact) >= 0.7 * len(exact), [(f.seed, f.share) for f in exact]


# ---- the fuzzer itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "seeds"),
    [
        ("softmax-is-elementwise", range(5002, 5006)),
        ("mean-is-a-sum", range(5000, 5004)),
        ("lost-all-reduce", range(5000, 5002)),
        ("lost-gradient-all-reduce", range(5000, 5002)),
        ("turned-all-gather", range(5000, 5004)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_fault_is_found(dist: Pool, fault: str, seeds: range) -> None:
    found = run_batch(dist, 2, seeds, fault)
    assert "wrong" in {f.kind for f in found}, found
    assert "crash" not in {f.kind for f in found}, told(found, fault)


def test_a_model_that_is_wrong_is_told_with_its_command(dist: Pool) -> None:
    (found,) = run_batch(dist, 2, [5000], "lost-all-reduce")
    assert found.kind == "wrong" and "output 0: off by" in found.reason
    assert command(found, "lost-all-reduce") == (
        "python -m tests.fuzz --models 1 --seed 5000 --tp 2 --fault lost-all-reduce"
    )
    assert summary([found], 1.0).row_count == 2


def test_one_seed_is_one_model() -> None:
    first, again, other = draw_model(3), draw_model(3), draw_model(4)
    assert first == again and first != other
    assert all(a.equal(b) for a, b in zip(first.inputs(), again.inputs(), strict=True))
    pairs = zip(first.build().parameters(), again.build().parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    assert (
        draw_model(3, tp=5).tp == 5
        and draw_model(3, tp=5).text.split("\n", 1)[1] == first.text.split("\n", 1)[1]
    )


def test_every_part_and_every_step_is_drawn() -> None:
    models = [draw_model(seed) for seed in range(400)]
    text = "\n".join(model.text for model in models)
    for part in PARTS:
        assert f"class {part.__name__.capitalize()}" in text
    for piece in (
        "nn.MultiheadAttention", "nn.GroupNorm", "enable_gqa=True", "relative_bias", "rotate_half(", "slopes",
        "torch.baddbmm", "nn.ModuleList", ".topk(", "groups=", "for i in range(x.shape[1])", "self.embed.weight",
        "setattr(owner", "+=", "chunk(3", "unflatten", "einsum", "cumsum", "torch.no_grad()", "if ", "sinusoid",
        "SimpleNamespace(", "groups2.flatten(2)",
    ):  # fmt: skip
        assert piece in text, piece
    assert {model.tp for model in models} == set(DEGREES)
    widths = {int(n) for n in re.findall(r"nn\.Linear\((\d+)", text)}
    assert len(widths) > 20 and any(n % 2 for n in widths) and any(n % 2 == 0 for n in widths)


def test_every_step_writes_code_that_runs() -> None:
    writers = (attention, mlp, experts, convolution, scan, library)
    for writer in writers:
        c = Code("Part", Draw(1), {})
        writer(c, 12)
        compile(c.text(), writer.__name__, "exec")
    assert len(STEPS) >= 20


def test_models_that_amplify_rounding_are_told_apart() -> None:
    assert is_stable(draw_model(0)) and unusable(draw_model(0)) == ""


def test_models_are_modules() -> None:
    assert all(isinstance(draw_model(seed).build(), nn.Module) for seed in range(10))
