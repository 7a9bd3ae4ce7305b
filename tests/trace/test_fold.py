"""Runs of repeated layers are folded where they are alike, and only there."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from autotp.trace.fold import fold
from autotp.trace.scenario import scenarios, trace_model
from autotp.trace.skeleton import skeleton


class Layer(nn.Module):
    def __init__(self, index: int, width: int = 8, kind: str = "full") -> None:
        super().__init__()
        self.index = index
        self.kind = kind
        self.fc = nn.Linear(8, width)
        self.out = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.fc(x).relu())


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Branching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.index % 3 else x + self.fc(x)


class Counting(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(7):
            x = self.layers[i](x)
        return x


def kept(model: nn.Module) -> list[str]:
    """What each remaining layer stands for, shortened."""
    bare = skeleton(model)
    folds = fold(bare)
    return [
        "+".join(n.split(".")[1] for n in folds.originals(f"layers.{i}")) for i in range(len(bare.layers))
    ]


SLIDING = ["sliding", "full"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([Layer(i) for i in range(4)], "0 1 2 3"),
        ([Layer(i) for i in range(5)], "0 1+2+3 4"),
        ([Layer(i) for i in range(7)], "0 1+2+3+4+5 6"),
        ([Layer(7) for _ in range(5)], "0 1+2+3 4"),
        ([Layer(i + 1) for i in range(6)], "0 1 2 3 4 5"),  # not its own index
        ([Layer(0, 16), *(Layer(i) for i in range(1, 7)), Layer(7, 16)], "0 1 2+3+4+5 6 7"),
        ([Layer(i, kind=SLIDING[i % 2]) for i in range(8)], "0 1 2+4 3+5 6 7"),
        ([Layer(i, kind=SLIDING[i % 2]) for i in range(9)], "0 1 2+4 3+5 6 7 8"),
        (
            [Layer(i, kind=SLIDING[i % 6 == 5]) for i in range(24)],
            "0 1 2 3 4 5 6+12 7+13 8+14 9+15 10+16 11+17 18 19 20 21 22 23",
        ),
        ([*[Layer(i) for i in range(3)], nn.Identity(), *[Layer(i) for i in range(4, 7)]], "0 1 2 3 4 5 6"),
    ],
)
def test_runs(layers: list[nn.Module], expected: str) -> None:
    assert kept(Stack(*layers)) == expected.split()


def test_tied_or_shared_layers_stay() -> None:
    layers = [Layer(i) for i in range(6)]
    layers[3].fc.weight = layers[1].fc.weight
    assert len(kept(Stack(*layers))) == 6
    one = Layer(0)
    assert len(kept(Stack(*[one] * 6))) == 6
    tables = [Layer(i) for i in range(6)]
    for i, layer in enumerate(tables):
        layer.register_buffer("rows", torch.tensor([i]))
    assert len(kept(Stack(*tables))) == 6


def test_names_of_nested_runs() -> None:
    model = Stack(*(Stack(*(Layer(i) for i in range(5))) for _ in range(6)))
    bare = skeleton(model)
    folds = fold(bare)
    assert [name for name, _ in bare.named_modules() if name.endswith("fc")] == [
        f"layers.{i}.layers.{j}.fc" for i in range(3) for j in range(3)
    ]
    middle = folds.originals("layers.1.layers.1.fc.weight")
    assert middle == tuple(f"layers.{i}.layers.{j}.fc.weight" for i in range(1, 5) for j in range(1, 4))
    assert folds.originals("layers.2.layers.2") == ("layers.5.layers.4",)
    assert folds.originals("head.weight") == ("head.weight",)
    every = [o for name, _ in bare.named_parameters() for o in folds.originals(name)]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())


def test_folded_trace() -> None:
    model = Stack(*(Layer(i) for i in range(9)))
    (found,), folds = trace_model(model, scenarios(model))
    assert folds
    assert len(found.params) == 12
    (whole,), none = trace_model(model, scenarios(model), folded=False)
    assert not none
    assert len(whole.params) == 36


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Stack(*(Branching(i) for i in range(7))), id="branches-on-its-index"),
        pytest.param(Counting(*(Layer(i) for i in range(7))), id="loops-over-a-range"),
    ],
)
def test_what_must_not_be_folded_is_traced_whole(model: nn.Module) -> None:
    assert fold(skeleton(model))
    (found,), folds = trace_model(model, scenarios(model))
    assert not folds
    assert len(found.params) == 28


def test_405b() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    start = time.monotonic()
    traces, folds = trace_model(model, scenarios(model))
    assert [t.scenario for t in traces] == ["forward", "decode"]
    assert len(folds.originals("model.layers.1.mlp")) == 124
    assert time.monotonic() - start < 30  # about 2 on an idle machine
