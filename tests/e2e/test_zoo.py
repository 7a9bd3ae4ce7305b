"""Architectures of transformers that span the mechanisms, by the benchmark that runs all of them.

Each is built tiny by `benchmarks.zoo` and held against itself unsharded: outputs, gradients, and tokens where it
generates. `tests/e2e/test_models.py` looks closer, at other ones (GPT-J, T5 and BART among them).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autotp
from benchmarks.zoo.compare import Result, compare, difference
from benchmarks.zoo.configs import architectures, build
from tests.dist.pool import Pool

ROOT = Path(__file__).parents[2]

#: task → what is particular about which architecture
SUBSET: dict[str, dict[str, str]] = {
    "causal-lm": {
        "deepseek_v2": "multi-latent attention whose rotation, in complex numbers, is shared by the heads",
        "olmo2": "norms over all heads together",
        "mamba": "state space: a scan in Python, a fused in-projection",
        "mamba2": "state space with heads, a depthwise convolution over a part of the projection",
        "jamba": "state space and attention layers, experts",
        "mpt": "ALiBi",
        "gemma3_text": "sliding windows, norms before and after",
        "granitemoe": "stacked experts behind a router",
        "fuyu": "images beside text, of which decoding has none; the features are counted",
        "trocr": "a decoder by itself, with states to look at",
        "xlm": "in-place masks, sizes read from the inputs",
    },
    "masked-lm": {
        "albert": "the same layer several times",
        "deberta-v2": "disentangled attention",
        "xmod": "adapters",
    },
    "image": {"convnext": "depthwise convolutions"},
    "audio": {"wav2vec2": "a weight-normed convolution by groups", "whisper": "a tower of convolutions"},
    "multimodal": {
        "clip": "two towers",
        "smolvlm": "hands on the features of images, which a step of decoding has none of; masks written in place",
    },
}


def run_one(task: str, name: str) -> Result:
    reference, inputs = build(name, dict(architectures(task))[name], {})
    model = autotp.parallelize(copy.deepcopy(reference))
    return compare(name, model, reference, inputs, tokens=task in ("causal-lm", "seq2seq"))


@pytest.mark.parametrize(
    ("task", "name"), [pytest.param(task, name, id=name) for task, names in SUBSET.items() for name in names]
)
def test_exact(dist: Pool, task: str, name: str) -> None:
    for result in dist.run(2, run_one, task, name, one_plans=True):
        assert result.kind == "exact", (result.kind, result.weights, result.reason)


class Reckoned(nn.Module):
    """A factor in front of a norm in float32, and a linear layer: ``wrong`` gradients come back through the first."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.linear = nn.Linear(6, 6)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor.view_as(self.factor)
        if self.wrong and factor.requires_grad:
            factor.register_hook(lambda gradient: gradient + self.wrong)
        y = (self.linear(x) * factor).float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def test_gradients_of_nothing_but_rounding() -> None:
    """The factor's gradient is zero but for float32's rounding: it may be another one, but not by more."""

    def made(wrong: float) -> nn.Module:
        torch.manual_seed(5)
        return Reckoned(wrong).double()

    inputs = {"x": torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}

    def found(wrong: float) -> str:
        return difference(made(wrong), made(0.0), inputs, lambda name, mine, whole: (mine, whole))[1]

    assert found(0.0) == "" and found(1e-7) == ""
    assert found(1e-6).startswith("gradient of factor: off by")


def test_the_sweep(tmp_path: Path) -> None:
    """As anyone runs it: a process for each model and rank, a table, a file."""
    out = tmp_path / "zoo.json"
    command = [sys.executable, "-m", "benchmarks.zoo", "--task", "image", "--only", "dinov2", "--json", str(out)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # from a checkout
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert (result["name"], result["kind"]) == ("dinov2", "exact") and result["weights"] > 0.9
    assert "100.0%" in done.stdout
