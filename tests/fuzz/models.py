"""Random models, as source code: one seed is one model, its inputs and its degree.

The text is a whole file with a `Model` class, as somebody could have written it; `build` makes the module from it.
autotp reads that source as it reads any other: `linecache` knows it.
"""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.fuzz.attention import LONGEST, attention
from tests.fuzz.code import Code, Draw
from tests.fuzz.feedforward import convolution, experts, library, mlp, scan, summed
from tests.fuzz.soup import soup
from tests.models.case import randomize

HEADER = """\
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate_half(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_pairs(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def rotate_stacked(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return x * torch.cat((cos, cos), dim=-1) + turned * torch.cat((sin, sin), dim=-1)


def repeat_kv(x, n_rep):
    if n_rep == 1:
        return x
    b, heads, s, dim = x.shape
    return x[:, :, None, :, :].expand(b, heads, n_rep, s, dim).reshape(b, heads * n_rep, s, dim)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))
"""

TRACED = (3, 5)  # batch and sequence of the example inputs
OTHER = (2, 7)

DEGREES = {2: 5.0, 3: 3.0, 4: 1.5, 5: 1.0}


@dataclass(frozen=True)
class FuzzModel:
    """One model: its source, the degree to shard it over, and what its forward takes."""

    seed: int
    tp: int
    text: str
    takes: tuple[tuple[str, int], ...]  # ("tokens", vocabulary), ("x" or "memory", width)
    fixed: bool  # in the length of the sequence
    training: bool

    def build(self) -> nn.Module:
        """The model in float64, every parameter a function of the seed."""
        module = _module(f"autotp_fuzz_{self.seed}", self.text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = module.Model().to(torch.float64)
            randomize(model, self.seed)
        return model.train(self.training)

    def inputs(self, other: bool = False) -> tuple[Tensor, ...]:
        batch, seq = OTHER if other else TRACED
        seq = TRACED[1] if self.fixed else seq
        generator = torch.Generator().manual_seed(2 * self.seed + other)
        made = []
        for name, size in self.takes:
            if name == "tokens":
                made.append(torch.randint(0, size, (batch, seq), generator=generator))
            else:
                length = 4 if name == "memory" else seq
                made.append(torch.randn(batch, length, size, generator=generator, dtype=torch.float64))
        return tuple(made)


def _module(name: str, text: str) -> types.ModuleType:
    filename = f"<{name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = types.ModuleType(name)
    module.__file__ = filename
    sys.modules[name] = module
    exec(compile(text, filename, "exec"), module.__dict__)
    return module


Part = Callable[[Code, int], None]

PARTS: dict[Part, float] = {
    attention: 6.0, mlp: 4.0, soup: 3.0, experts: 1.0, convolution: 1.0, scan: 1.0, summed: 0.8, library: 0.8,
}  # fmt: skip


def draw_model(seed: int, tp: int | None = None) -> FuzzModel:
    """The model of this seed; its degree too, unless ``tp`` says one."""
    draw = Draw(seed)
    drawn = draw.weighted(DEGREES)
    return _Writer(draw).model(seed, tp or drawn)


class _Writer:
    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.width = draw.pick(6, 8, 9, 10, 12, 14, 15)
        self.classes: list[str] = []
        self.config: dict[str, int] = {}
        self.takes: list[tuple[str, int]] = []
        self.memory: int | None = None

    def model(self, seed: int, tp: int) -> FuzzModel:
        draw = self.draw
        c = Code("Model", draw, self.config)
        c.arguments = []
        vocab = draw.number(7, 23)
        tokens = draw.chance(0.5)
        x = self._entry(c, tokens, vocab)
        if draw.chance(0.12):
            self.memory = draw.pick(5, 7, 11)
            c.arguments.append("memory")
            self.takes.append(("memory", self.memory))
        x = self._positions(c, x)
        x = self._blocks(c, x)
        if draw.chance(0.5):
            x = c.let(f"{self._norm(c, 'final_norm')}({x})", "x")
        fixed = self._exit(c, x, tokens, vocab)
        dropout = any("Dropout" in text for text in (*self.classes, *c.init))
        training = not dropout and draw.chance(0.3)
        config = ", ".join(f"{key}={value}" for key, value in self.config.items())
        made = c.text().replace("def __init__(self, config):", "def __init__(self):")
        first = "super().__init__()\n"
        made = made.replace(first, f"{first}        config = SimpleNamespace({config})\n", 1)
        about = f'"""Model {seed}, to be sharded over tp={tp}."""'
        text = "\n\n".join([f"{about}\n\n{HEADER}", *(f"{text}\n" for text in self.classes), made]) + "\n"
        return FuzzModel(seed, tp, text, tuple(self.takes), fixed, training)

    # ---- ends

    def _entry(self, c: Code, tokens: bool, vocab: int) -> str:
        draw, width = self.draw, self.width
        if tokens:
            c.arguments.append("tokens")
            self.takes.append(("tokens", vocab))
            c.attr("embed", f"nn.Embedding({vocab}, {width})")
            scale = draw.pick("", "", f" * {width**0.5:.3f}", f" * math.sqrt({c.size('width', width)})")
            return c.let(
                draw.pick(f"self.embed(tokens){scale}", f"F.embedding(tokens, self.embed.weight){scale}"), "x"
            )
        c.arguments.append("x")
        c.fresh("x")
        if draw.chance(0.5):
            self.takes.append(("x", width))
            return "x"
        given = draw.pick(4, 7, 11, 13)
        self.takes.append(("x", given))
        return c.let(f"{c.linear('inward', given, width)}(x)", "x")

    def _positions(self, c: Code, x: str) -> str:
        kind = self.draw.weighted({"none": 4, "table": 2, "parameter": 1, "sinusoid": 1})
        if kind == "table":
            table = c.attr("positions", f"nn.Embedding({LONGEST}, {self.width})")
            return c.let(f"{x} + {table}(torch.arange({x}.shape[1]))", "x")
        if kind == "parameter":
            return c.let(f"{x} + {c.param('positions', LONGEST, self.width)}[: {x}.shape[1]]", "x")
        if kind == "sinusoid":
            c.init.append(
                f"angles = torch.arange({LONGEST}.0)[:, None] * 0.3 ** torch.arange(0.0, {self.width})"
            )
            c.init.append("self.register_buffer('sinusoid', angles.sin())")
            return c.let(f"{x} + self.sinusoid[: {x}.size(1)]", "x")
        return x

    def _exit(self, c: Code, x: str, tokens: bool, vocab: int) -> bool:
        draw, width = self.draw, self.width
        kinds = {"hidden": 2.0, "head": 3.0, "pooled": 1.0, "flat": 0.5, "last": 1.0}
        kinds |= {"tied": 3.0, "functional": 1.5} if tokens else {}
        kind = draw.weighted(kinds)
        classes = draw.number(5, 17)
        if kind == "hidden":
            c.do(
                draw.pick(
                    f"return {x}",
                    f"return {{'hidden': {x}, 'pooled': {x}.mean(1)}}",
                    f"return {x}, {x}[:, 0]",
                )
            )
        elif kind == "head":
            head = c.linear("head", width, classes)
            c.do(
                draw.pick(
                    f"return {head}({x})", f"return {head}({x}), {x}", f"return {head}({x}).log_softmax(-1)"
                )
            )
        elif kind == "pooled":
            pooled = draw.pick(f"{x}.mean(1)", f"{x}[:, 0]", f"{x}.amax(dim=1)", f"{x}[:, -1]")
            c.do(f"return {c.linear('classifier', width, classes)}({pooled})")
        elif kind == "flat":
            c.do(f"return {c.linear('head', TRACED[1] * width, classes)}({x}.flatten(1))")
            return True
        elif kind == "last":
            c.do(f"return {c.linear('head', width, classes)}({x}[:, -1:])")
        elif kind == "tied":
            head = c.attr("head", f"nn.Linear({width}, {vocab}, bias=False)")
            c.init.append(f"{head}.weight = self.embed.weight")
            c.do(f"return {head}({x})")
        else:
            c.do(draw.pick(f"return F.linear({x}, self.embed.weight)", f"return {x} @ self.embed.weight.t()",
                           f"return torch.einsum('btd,vd->btv', {x}, self.embed.weight)"))  # fmt: skip
        return False

    # ---- blocks

    def _norm(self, c: Code, hint: str) -> str:
        width = self.width
        kinds = [f"nn.LayerNorm({width})", f"RMSNorm({width})", f"nn.RMSNorm({width})",
                 f"nn.LayerNorm({width}, elementwise_affine=False)"]  # fmt: skip
        return c.attr(hint, self.draw.pick(*kinds))

    def _part(self) -> tuple[str, bool]:
        """A new class; its name, and whether it wants the memory."""
        write = self.draw.weighted(PARTS)
        name = f"{write.__name__.capitalize()}{len(self.classes)}"
        c = Code(name, self.draw, self.config)
        if write is attention and self.memory is not None and self.draw.chance(0.6):
            attention(c, self.width, self.memory)
        else:
            write(c, self.width)
        self.classes.append(c.text())
        return name, "memory" in c.arguments

    def _blocks(self, c: Code, x: str) -> str:
        draw = self.draw
        used: list[tuple[str, bool]] = []  # modules, to run twice
        for _ in range(draw.weighted({1: 6, 2: 3})):
            form = draw.weighted(
                {"pre": 5, "post": 2, "bare": 2, "parallel": 2, "twice": 1 if used else 0, "scaled": 1, "into": 1,
                 "listed": 1, "branch": 1, "shared": 1}
            )  # fmt: skip
            x = getattr(self, f"_{form}")(c, x, used)
        return x

    def _called(self, c: Code, x: str, used: list[tuple[str, bool]], norm: bool = True) -> str:
        """A new part of the model, applied to x."""
        name, memory = self._part()
        module = c.attr("part", f"{name}(config)")
        used.append((module, memory))
        inner = f"{self._norm(c, 'norm')}({x})" if norm else x
        return f"{module}({inner}{', memory' if memory else ''})"

    def _pre(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        if self.draw.chance(0.2):  # with a name for what is kept, in several lines
            kept = c.let(x, "residual")
            h = c.let(self._called(c, x, used))
            ways = (f"{kept} + {h}", f"{h}.add_({kept})", f"torch.add({kept}, {h}, alpha=0.5)")
            return c.let(self.draw.pick(*ways), "x")
        return c.let(f"{x} + {self._called(c, x, used)}", "x")

    def _post(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        added = f"{x} + {self._called(c, x, used, norm=False)}"
        return c.let(f"{self._norm(c, 'norm')}({added})", "x")

    def _bare(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        return c.let(self._called(c, x, used, norm=self.draw.chance(0.5)), "x")

    def _parallel(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        h = c.let(f"{self._norm(c, 'norm')}({x})") if self.draw.chance(0.7) else x
        first, second = (self._called(c, h, used, norm=False) for _ in range(2))
        return c.let(self.draw.pick(f"{x} + {first} + {second}", f"{x} + ({first} + {second}) * 0.5"), "x")

    def _twice(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        module, memory = self.draw.pick(*used)
        return c.let(f"{x} + {module}({x}{', memory' if memory else ''})", "x")

    def _scaled(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        gamma = c.param("gamma", self.width) if self.draw.chance(0.7) else "0.7"
        return c.let(f"{x} + {gamma} * {self._called(c, x, used)}", "x")

    def _into(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        h = c.let(self._called(c, x, used))
        y = c.let(f"{x} * 1.0" if self.draw.chance(0.5) else f"{x}.clone()", "x")
        ways = (f"{y} += {h}", f"{y}.add_({h})", f"{y}[:, 1:] += {h}[:, :-1]", f"{y}[:, ::2] = {h}[:, ::2]")
        c.do(self.draw.pick(*ways))
        return y

    def _listed(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        """A ModuleList of equal layers."""
        name, memory = self._part()
        layers = c.attr("layers", f"nn.ModuleList({name}(config) for _ in range({self.draw.number(2, 3)}))")
        y = c.let(f"{x} * 1", "x")
        call = f"layer({y}{', memory' if memory else ''})"
        loop = f"    {y} = {y} + {call}" if self.draw.chance(0.7) else f"    {y} = ({y} + {call}) / (i + 1)"
        c.do(f"for i, layer in enumerate({layers}):", loop)
        return y

    def _branch(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        """Python decides, on a flag or on a shape that all traced and later calls agree on."""
        y = c.fresh("x")
        test = self.draw.pick("self.deep", "{}.dim() == 3", "{}.shape[-1] > 3", "not self.deep").format(x)
        if "self.deep" in test:
            c.init.append(f"self.deep = {self.draw.chance(0.5)}")
        first = self._called(c, x, used)
        second = self._called(c, x, used, norm=False)
        c.do(f"if {test}:", f"    {y} = {x} + {first}", "else:", f"    {y} = {x} - {second}")
        return y

    def _shared(self, c: Code, x: str, used: list[tuple[str, bool]]) -> str:
        """Two modules of one class that share a weight."""
        name, memory = self._part()
        a, b = c.attr("part", f"{name}(config)"), c.attr("part", f"{name}(config)")
        c.init += [
            f"first = dict({a}.named_parameters())",
            f"shared = sorted(first)[{self.draw.number(0, 3)} % len(first)]",
            f"owner = {b}.get_submodule(shared.rpartition('.')[0])",
            "setattr(owner, shared.rpartition('.')[2], first[shared])",
        ]
        more = ", memory" if memory else ""
        y = c.let(f"{x} + {a}({x}{more})", "x")
        return c.let(f"{y} + {b}({y}{more})", "x")
