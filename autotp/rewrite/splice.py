"""Insertions into source text.

An edit never moves a line: what is inserted has no line break, what is replaced keeps its own. `Splices`
collects the insertions for one text and applies them at once, the outer ones outside the inner ones.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autotp.errors import RewriteError
from autotp.rewrite.source import PREFIX, Text


@dataclass(frozen=True, slots=True)
class Scaled:
    """A size in proportion to what the code says: `B * n_head` becomes `(B * n_head) * 4 // 8`, for any B."""

    local: int
    whole: int

    def of(self, size: int) -> int:
        return size * self.local // self.whole


_OPENERS = tuple(c.encode() for c in "([{,=:+-*/%@<>&|^~!") + (
    b" return",
    b" in",
    b" yield",
    b" not",
    b" and",
    b" or",
)


class Splices:
    """Insertions and replacements in one text, and the objects that the inserted names stand for."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.names: dict[str, Any] = {}
        self._ids: dict[int, str] = {}
        self._pairs: list[tuple[int, int, int, str, str]] = []  # start, end, rank, before, after
        self._replaced: dict[tuple[int, int], str] = {}
        self._sizes: dict[tuple[int, int, bool], dict[int, int | Scaled]] = {}
        self._scaled: dict[tuple[int, int], Scaled] = {}
        self._writes: dict[int, Callable[[Any], Any]] = {}
        self._source = text.text.encode()

    def name(self, value: Any, hint: str = "") -> str:
        """A name for `value` that the text does not use yet."""
        if id(value) not in self._ids:
            hint = hint or getattr(value, "__name__", "") or type(value).__name__
            hint = "".join(c if c.isalnum() else "_" for c in hint).strip("_")
            hint = hint.removeprefix(PREFIX.strip("_")).strip("_") or "fn"
            number = 0
            while f"{PREFIX}{hint}_{number}" in self.names or f"{PREFIX}{hint}_{number}" in self.text.text:
                number += 1
            self._ids[id(value)] = f"{PREFIX}{hint}_{number}"
            self.names[f"{PREFIX}{hint}_{number}"] = value
        return self._ids[id(value)]

    def write_name(self, fn: Callable[[Any], Any]) -> str:
        """A name for `fn` writing into its argument."""
        write = self._writes.setdefault(id(fn), in_place(fn))
        return self.name(write, f"{getattr(fn, '__name__', type(fn).__name__)}_")

    def around(self, start: int, end: int, before: str, after: str, rank: int = 0) -> None:
        """Insert text around a span; of equal spans the higher rank goes outside."""
        self._pairs.append((start, end, rank, before, after))

    def wrap(self, node: ast.AST, before: str, after: str, rank: int = 0) -> None:
        start, end = self.text.span(node)
        if isinstance(node, ast.GeneratorExp) and not self._source[:start].rstrip().endswith(_OPENERS):
            start, end = start + 1, end - 1  # the only argument of a call shares the call's parentheses
        self.around(start, end, before, after, rank)

    def first_argument(self, function: ast.expr, text: str) -> None:
        """Insert text before the arguments of the call of `function`."""
        opening = self._source.index(b"(", self.text.span(function)[1]) + 1
        self.around(opening, opening, text, "")

    def replace(self, node: ast.AST, new: str) -> None:
        start, end = self.text.span(node)
        if any(isinstance(n, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom) for n in ast.walk(node)):
            raise RewriteError(
                f"cannot replace {self.text.segment(node)!r} by {new}: it does more than give a value"
            )
        old = self._source[start:end]
        new += "\n" * old.count(b"\n")
        if self._replaced.setdefault((start, end), new) != new:
            raise RewriteError(
                f"{self.text.segment(node)!r} at {self.where(node)} would have to be both "
                f"{self._replaced[start, end].strip()} and {new.strip()}"
            )

    def scale(self, node: ast.AST, by: Scaled) -> None:
        """Scale the int that an expression gives."""
        span = self.text.span(node)
        if self._scaled.setdefault(span, by) != by:
            raise RewriteError(
                f"{self.text.segment(node)!r} at {self.where(node)} would have to be scaled both by "
                f"{self._scaled[span].local}/{self._scaled[span].whole} and by {by.local}/{by.whole}"
            )
        self.wrap(node, "((", f") * {by.local} // {by.whole})")

    def size(self, start: int, end: int, index: int, value: int | Scaled, arguments: bool = False) -> None:
        """Have int leaf `index` of the value of a span (or of the call's arguments that stand there) replaced
        when it is computed.
        """
        sizes = self._sizes.setdefault((start, end, arguments), {})
        if sizes.setdefault(index, value) != value:
            raise RewriteError(
                f"size {index} of one argument would have to be both {sizes[index]} and {value}"
            )

    def where(self, node: ast.AST) -> str:
        assert isinstance(node, ast.expr | ast.stmt)
        return f"{self.text.filename}:{node.lineno}"

    def render(self) -> str:
        """The edited text."""
        pairs = list(dict.fromkeys(self._pairs))
        for (start, end, arguments), sizes in self._sizes.items():
            name = self.name(replace_sizes, "size")
            by_index = {
                i: (v.local, v.whole) if isinstance(v, Scaled) else v for i, v in sorted(sizes.items())
            }
            before, after = (
                (f"*{name}((", f",), {by_index})") if arguments else (f"{name}(", f", {by_index})")
            )
            pairs.append((start, end, 5, before, after))
        spans = sorted(self._replaced)
        if both := [span for span in spans if span in self._scaled]:
            raise RewriteError(
                f"two edits of {self.text.filename!r} at byte {both[0][0]} set and scale one size"
            )
        for (_, end), later in zip(spans, spans[1:], strict=False):
            if later[0] < end:
                raise RewriteError(f"two edits of {self.text.filename!r} overlap at byte {later[0]}")
        for start, end, *_ in pairs:
            for first, last in spans:
                inside = first <= start and end <= last and (start, end) != (first, last)
                if inside or (start < first < end < last) or (first < start < last < end):
                    raise RewriteError(
                        f"two edits of {self.text.filename!r} overlap: one replaces bytes {first} to {last}, "
                        f"another wraps {start} to {end}"
                    )
        # At one offset: what closes comes before what opens; inner spans close first and open last, and of
        # equal spans those added first are the inner ones.
        events: list[tuple[tuple[int, int, int, int, int], int, str]] = []
        for i, (start, end, rank, before, after) in enumerate(pairs):
            if start == end:
                events.append(((start, 0, 1, rank, i), start, before))
                continue
            events.append(((start, 1, -end, -rank, -i), start, before))
            events.append(((end, 0, -start, rank, i), end, after))
        for start, end in spans:
            events.append(((start, 2, 0, 0, 0), end, self._replaced[start, end]))
        source, out, at = self._source, [], 0
        for (offset, *_), stop, new in sorted(events, key=lambda event: event[0]):
            out.append(source[at:offset])
            out.append(new.encode())
            at = max(at, offset, stop)
        out.append(source[at:])
        return b"".join(out).decode()


def replace_sizes(value: Any, sizes: Mapping[int, int | tuple[int, int]]) -> Any:
    """`value`, an int or a nest of tuples, lists and slices, with int leaf number i made `sizes[i]`, or
    scaled where that is a pair (local, whole).
    """
    count = 0

    def visit(leaf: Any) -> Any:
        nonlocal count
        if isinstance(leaf, bool):
            return leaf
        if isinstance(leaf, int):
            count += 1
            new = sizes.get(count - 1, leaf)
            return leaf * new[0] // new[1] if isinstance(new, tuple) else new
        if isinstance(leaf, tuple | list):
            items = [visit(item) for item in leaf]
            return items if isinstance(leaf, list) else tuple(items)
        if isinstance(leaf, slice):
            return slice(visit(leaf.start), visit(leaf.stop), visit(leaf.step))
        return leaf

    return visit(value)


def in_place(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`fn` with its result written into its argument, so that views and other names of the tensor see it."""

    def write(value: torch.Tensor) -> torch.Tensor:
        result = fn(value)
        if result is not value:
            if result.shape != value.shape or result.dtype != value.dtype:
                raise RewriteError(
                    f"cannot write {tuple(result.shape)} into {tuple(value.shape)}, an augmented assignment"
                )
            value.copy_(result)
        return value

    write.__name__ = f"{getattr(fn, '__name__', 'fn')}_"
    return write
