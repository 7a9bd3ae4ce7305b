"""Small networks at random, to compare the planner with brute force on: real modules, traced by the real tracer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autotp.axes.analysis import Analysis, analyse
from autotp.trace.capture import trace
from autotp.trace.skeleton import skeleton

MODEL = 6
WIDTHS = (8, 10, 14)
BATCH = 3
VOCAB = 22

Choose = Callable[[int], int]  # a number below the given one
Step = tuple[Any, ...]


class Net(nn.Module):
    """Runs a list of steps; each names an op and the earlier values that it takes."""

    def __init__(self, steps: list[Step], outputs: tuple[int, ...], tokens: bool) -> None:
        super().__init__()
        self.steps, self.outputs, self.tokens = steps, outputs, tokens
        for i, (op, *args) in enumerate(steps):
            if op == "embed":
                setattr(self, f"embed{i}", nn.Embedding(VOCAB, MODEL))
            elif op == "linear":
                _, n, m, bias = args
                setattr(self, f"linear{i}", nn.Linear(n, m, bias=bias))
            elif op == "norm":
                setattr(self, f"norm{i}", nn.LayerNorm(args[1]))
            elif op in ("gain", "shift"):
                setattr(self, f"{op}{i}", nn.Parameter(torch.ones(args[1])))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor] = [x]
        for i, (op, *args) in enumerate(self.steps):
            a = values[args[0]]
            if op in ("embed", "linear", "norm"):
                values.append(getattr(self, f"{op}{i}")(a))
            elif op == "gain":
                values.append(a * getattr(self, f"{op}{i}"))
            elif op == "shift":
                values.append(a + getattr(self, f"{op}{i}"))
            elif op == "add":
                values.append(a + values[args[1]])
            elif op == "mul":
                values.append(a * values[args[1]])
            elif op == "relu":
                values.append(torch.relu(a))
            elif op == "half":
                values.append(a * 0.5)
            elif op == "wide":
                values.append(a.double())
            elif op == "chunk":
                values.extend(a.chunk(2, dim=-1))
        return tuple(values[k] for k in self.outputs)


def draw(choose: Choose, length: int, products: bool = True) -> Net:
    """A network of about ``length`` steps; ``choose`` decides. ``products``: also of two activations."""
    tokens = choose(3) == 0
    steps: list[Step] = []
    widths: list[int] = []  # of the values so far
    used: set[int] = set()

    def step(*what: Any, makes: tuple[int, ...]) -> None:
        steps.append(what)
        used.update(what[1:3] if what[0] in ("add", "mul") else what[1:2])
        widths.extend(makes)

    widths.append(0 if tokens else MODEL)
    if tokens:
        step("embed", 0, makes=(MODEL,))
    while len(steps) < length:
        live = [k for k, width in enumerate(widths) if width]
        a = live[-1 - min(choose(len(live)), choose(len(live)))]  # a recent one rather than an old one
        same = [k for k in live if widths[k] == widths[a] and k != a]
        kind = choose(16)
        if kind < 6:
            m = MODEL if widths[a] != MODEL and choose(4) else WIDTHS[choose(len(WIDTHS))]
            step("linear", a, widths[a], m, bool(choose(2)), makes=(m,))
        elif kind < 10 and same:
            step("add", a, same[choose(len(same))], makes=(widths[a],))
        elif kind < 12 and same and products:
            step("mul", a, same[choose(len(same))], makes=(widths[a],))
        elif kind == 12 and widths[a] == MODEL:
            step("norm", a, MODEL, makes=(MODEL,))
        elif kind == 13:
            step(("relu", "half")[choose(2)], a, makes=(widths[a],))
        elif kind == 14:
            step(("gain", "shift")[choose(2)], a, widths[a], makes=(widths[a],))
        elif kind == 15 and widths[a] != MODEL and widths[a] % 2 == 0:
            step("chunk", a, makes=(widths[a] // 2, widths[a] // 2))
    ends = [k for k, width in enumerate(widths) if width and k not in used]
    return Net(steps, tuple(ends[-3:]), tokens)


def seeded(seed: int, length: int, products: bool = True) -> Net:
    return draw(random.Random(seed).randrange, length, products)


def sums(seed: int) -> Net:
    """The outputs of one sharded layer's consumers, some scaled, added up in any order; some are needed whole too."""
    choose = random.Random(seed).randrange
    wide = WIDTHS[choose(len(WIDTHS))]
    steps: list[Step] = [("linear", 0, MODEL, wide, False), ("relu", 1)]
    terms = [3, 4, 5]
    steps += [("linear", 2, wide, MODEL, bool(choose(2))) for _ in terms]
    whole = terms[: 1 + choose(2)]

    def step(*what: Any) -> int:
        steps.append(what)
        return len(steps)

    terms = [step("half", k) if choose(2) else k for k in terms]
    while len(terms) > 1:
        a, b = (terms.pop(choose(len(terms))) for _ in range(2))
        terms.append(step("add", a, b))
    return Net(steps, tuple([step("norm", k, MODEL) for k in (*terms, *whole)]), tokens=False)


def analysed(model: nn.Module, *inputs: Tensor, seq: int = 5) -> Analysis:
    """The analysis of a model (of a `Net` with its own inputs)."""
    if isinstance(model, Net):
        shape = (BATCH, seq)
        inputs = (torch.zeros(shape, dtype=torch.long),) if model.tokens else (torch.zeros(*shape, MODEL),)
    return analyse(trace(skeleton(model), inputs, {}))
