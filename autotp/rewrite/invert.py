"""Solving one equation over integers for one attribute.

An expression is an int, ("attr", number) or (symbol, operands). `solutions` inverts `+ - * //` and negation
where the attribute occurs once: what a subexpression must be is an interval, `x // 4 = 3` gives x in 12..15.
Otherwise it searches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from autotp.trace.provenance import OPERATORS

Lowered = Any
"""int | ("attr", key) | (symbol, (Lowered, ...))"""

Interval = tuple["int | None", "int | None"]
"""Lowest and highest value; None is unbounded."""


def evaluate(expr: Lowered, values: Mapping[Any, int]) -> int | None:
    """The value of an expression; None where it has none (a division by zero, an unknown attribute)."""
    if isinstance(expr, int):
        return expr
    symbol, args = expr
    if symbol == "attr":
        return values.get(args)
    operands = [evaluate(arg, values) for arg in args]
    if any(operand is None for operand in operands):
        return None
    try:
        if symbol in ("**", "<<") and (abs(operands[1] or 0) > 64 or abs(operands[0] or 0) > 1 << 32):
            return None
        value = OPERATORS[symbol](*operands)
    except (ArithmeticError, ValueError, KeyError):
        return None
    return value if isinstance(value, int) else None


@functools.lru_cache(maxsize=65536)
def positions(expr: Lowered) -> Mapping[Any, tuple[int, int]]:
    """The attributes of an expression, in order, each with the depth and the rank from the left where it
    stands highest.
    """
    found: dict[Any, tuple[int, int]] = {}

    def visit(part: Lowered, depth: int, rank: int) -> None:
        if isinstance(part, int):
            return
        symbol, args = part
        if symbol == "attr":
            found[args] = min(found.get(args, (depth, rank)), (depth, rank))
            return
        for i, arg in enumerate(args):
            visit(arg, depth + 1, rank + i)

    visit(expr, 0, 0)
    return found


def _occurrences(expr: Lowered, attr: Any) -> int:
    if isinstance(expr, int):
        return 0
    symbol, args = expr
    return int(args == attr) if symbol == "attr" else sum(_occurrences(arg, attr) for arg in args)


def solutions(
    equations: Sequence[tuple[Lowered, int]], attr: Any, values: Mapping[Any, int], present: int, most: int
) -> Iterator[int]:
    """Values of `attr` that satisfy all equations, all others being known: the likeliest first, at most
    `most` tried.
    """
    low: int | None = 0 if present >= 0 else None
    high: int | None = None
    for expr, want in equations:
        if _occurrences(expr, attr) == 1:
            interval = _invert(expr, attr, values, (want, want))
            if interval is None:
                continue  # an operator that is not inverted
            low = interval[0] if low is None else max(low, interval[0]) if interval[0] is not None else low
            high = (
                interval[1] if high is None else min(high, interval[1]) if interval[1] is not None else high
            )
    if low is None:
        low = high - most if high is not None else -most
    if high is None:
        high = max(present, low + 1)
    if high < low:
        return
    tried = [n for n in _likely(equations, attr, values, present) if low <= n <= high]
    rest: Iterable[int] = range(low, high + 1)
    if high - low >= most:
        divisors = range(min(high, present, 1 << 16), max(low, 1) - 1, -1)
        rest = [*(n for n in divisors if present % n == 0), *range(low, low + most)]
    for value in dict.fromkeys([*tried, *rest]):
        if all(evaluate(expr, {**values, attr: value}) == want for expr, want in equations):
            yield value


def _likely(
    equations: Sequence[tuple[Lowered, int]], attr: Any, values: Mapping[Any, int], present: int
) -> Iterator[int]:
    """The present value scaled as an equation's value is: 14 // 2 = 7 that is to be 3 makes 14 into 6."""
    for expr, want in equations:
        before = evaluate(expr, {**values, attr: present})
        if before and present * want % before == 0:
            yield present * want // before


def _invert(expr: Lowered, attr: Any, values: Mapping[Any, int], target: Interval) -> Interval | None:
    """The interval of values of `attr` for which `expr`, in which it occurs once, lies in `target`; (1, 0) is
    the empty one and None says that the operator is not inverted.
    """
    symbol, args = expr
    if symbol == "attr":
        return target
    low, high = target
    side = next(i for i, arg in enumerate(args) if _occurrences(arg, attr))
    inner = args[side]
    if symbol == "neg":
        return _invert(inner, attr, values, (None if high is None else -high, None if low is None else -low))
    if len(args) != 2:
        return None
    other = evaluate(args[1 - side], values)
    if other is None:
        return (1, 0)
    if symbol == "+":
        return _invert(inner, attr, values, _shift(target, -other))
    if symbol == "-" and side == 0:
        return _invert(inner, attr, values, _shift(target, other))
    if symbol == "-":
        return _invert(
            inner,
            attr,
            values,
            (None if high is None else other - high, None if low is None else other - low),
        )
    if symbol == "*" and other != 0:
        bounds = (
            (_ceil(low, other), _floor(high, other))
            if other > 0
            else (_ceil(high, other), _floor(low, other))
        )
        return _invert(inner, attr, values, bounds)
    if symbol == "//" and side == 0 and other > 0:
        bounds = (None if low is None else low * other, None if high is None else high * other + other - 1)
        return _invert(inner, attr, values, bounds)
    if symbol == "//" and side == 1 and other >= 0 and low is not None and low >= 0:
        # other // x ≥ low where x ≤ other // low; other // x ≤ high where x > other // (high + 1)
        return _invert(
            inner,
            attr,
            values,
            (1 if high is None else other // (high + 1) + 1, other // low if low else None),
        )
    return None


def _shift(interval: Interval, by: int) -> Interval:
    return tuple(None if end is None else end + by for end in interval)  # type: ignore[return-value]


def _ceil(value: int | None, by: int) -> int | None:
    return None if value is None else -(-value // by)


def _floor(value: int | None, by: int) -> int | None:
    return None if value is None else value // by
