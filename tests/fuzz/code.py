"""Writing random Python: draws, and the source of one module class under construction."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random decisions, all of them functions of one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, *options: T) -> T:
        return self._random.choice(options)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def number(self, low: int, high: int) -> int:
        """Between both, each included."""
        return self._random.randint(low, high)

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Different ones."""
        return self._random.sample(list(options), count)

    def weighted(self, options: dict[T, float]) -> T:
        return self._random.choices(list(options), list(options.values()))[0]


class Code:
    """A class of a generated file: the lines of its ``__init__`` and of its ``forward``.

    A size is said as people say it: as a number, as an attribute of the module, or of the model's config.
    """

    def __init__(self, name: str, draw: Draw, config: dict[str, int]) -> None:
        self.name, self.draw, self.config = name, draw, config
        self.arguments = ["x"]
        self.init: list[str] = []
        self.body: list[str] = []
        self._names: dict[str, int] = {}
        self._said: dict[tuple[str, int], str] = {}
        self._style = draw.weighted({"attribute": 4, "number": 2, "config": 2, "mixed": 2})

    def fresh(self, hint: str) -> str:
        """A name that this class has not used."""
        self._names[hint] = self._names.get(hint, 0) + 1
        return hint if self._names[hint] == 1 else f"{hint}{self._names[hint]}"

    def attr(self, hint: str, value: str) -> str:
        """``self.hint = value``; how forward reads it."""
        name = self.fresh(hint)
        self.init.append(f"self.{name} = {value}")
        return f"self.{name}"

    def linear(self, hint: str, n: int, m: int, bias: bool | None = None) -> str:
        """A layer, of which a few are weight-normed."""
        bias = self.draw.chance(0.5) if bias is None else bias
        made = f"nn.Linear({n}, {m})" if bias else f"nn.Linear({n}, {m}, bias=False)"
        if self.draw.chance(0.06):
            made = f"nn.utils.parametrizations.weight_norm({made}, dim={self.draw.pick(0, 1, None)})"
        return self.attr(hint, made)

    def param(self, hint: str, *shape: int) -> str:
        make = "ones" if len(shape) < 2 else "randn"
        return self.attr(hint, f"nn.Parameter(torch.{make}({', '.join(map(str, shape))}))")

    def size(self, hint: str, value: int) -> str:
        """How forward says this size: one size is said in one way, in most classes."""
        if (hint, value) in self._said and not self.draw.chance(0.1):
            return self._said[hint, value]
        style = self._style if self._style != "mixed" else self.draw.pick("attribute", "number", "config")
        if style == "attribute":
            said = self.attr(hint, str(value))
        elif style == "config":
            key = f"{self.fresh(hint)}_{self.name.lower()}"
            self.config[key] = value
            if "self.config = config" not in self.init:
                self.init.append("self.config = config")
            said = f"self.config.{key}"
        else:
            said = str(value)
        self._said[hint, value] = said
        return said

    def let(self, value: str, hint: str = "h") -> str:
        """``h = value`` under a new name."""
        name = self.fresh(hint)
        self.body.append(f"{name} = {value}")
        return name

    def do(self, *lines: str) -> None:
        self.body.extend(lines)

    def batch_and_sequence(self) -> tuple[str, str]:
        """Names of the two leading sizes of x."""
        ways = (
            "b, t = x.shape[:2]",
            "b, t, _ = x.shape",
            "b, t, width = x.size()",
            "b = x.size(0); t = x.size(1)",
        )
        self.do(self.draw.pick(*ways))
        return "b", "t"

    def text(self) -> str:
        """The class as source."""
        init = [f"        {line}" for line in self.init]
        body = [f"        {line}" for line in self.body]
        head = [
            f"class {self.name}(nn.Module):",
            "    def __init__(self, config):",
            "        super().__init__()",
        ]
        return "\n".join([*head, *init, "", f"    def forward(self, {', '.join(self.arguments)}):", *body])
