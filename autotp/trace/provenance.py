"""Provenance integers: an `int` that remembers the expression over attributes and sizes that made it.

While tracing, each integer attribute of each module is a `ProvInt`, and so are the sizes that `.shape` and
`.size()` return. A view's size argument then arrives as a tree: `view(B, T, self.n_head, C // self.n_head)`
is known to be `view(Dim(x,0), Dim(x,1), Attr(n_head), Op("//", Dim(x,2), Attr(n_head)))`, which the rewriter
solves as equations.

The expression is lost (never wrong) through `int()`, `/`, `math.sqrt` and `range`.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import fx

AttrPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Const:
    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Attr:
    """An integer read from a module: `path` is ("n_head",), ("kernel_size", 0) or ("config",
    "num_attention_heads")."""

    module: str
    path: AttrPath

    def __str__(self) -> str:
        return ".".join(map(str, (self.module, *self.path) if self.module else self.path))


@dataclass(frozen=True, slots=True)
class Dim:
    """The size of dim `dim` (never negative) of the value of `node`."""

    node: fx.Node
    dim: int

    def __str__(self) -> str:
        return f"dim({self.node.name}, {self.dim})"


@dataclass(frozen=True, slots=True)
class Op:
    """`symbol` applied to `args`: a binary operator as Python writes it, or "neg", "abs"."""

    symbol: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        if len(self.args) == 1:
            return f"{self.symbol}({self.args[0]})"
        return f"({self.args[0]} {self.symbol} {self.args[1]})"


Expr = Const | Attr | Dim | Op

OPERATORS: Mapping[str, Callable[..., int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "neg": operator.neg,
    "abs": operator.abs,
}


def evaluate(expr: Expr, attr: Callable[[str, AttrPath], int], dim: Callable[[fx.Node, int], int]) -> int:
    """The value of `expr` when attributes and sizes have the values that `attr` and `dim` say."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Attr):
        return attr(expr.module, expr.path)
    if isinstance(expr, Dim):
        return dim(expr.node, expr.dim)
    return OPERATORS[expr.symbol](*(evaluate(arg, attr, dim) for arg in expr.args))


def attributes(expr: Expr) -> frozenset[Attr]:
    """The attributes that `expr` reads."""
    if isinstance(expr, Attr):
        return frozenset((expr,))
    if isinstance(expr, Op):
        return frozenset().union(*map(attributes, expr.args))
    return frozenset()


def sizes_in(expr: Expr) -> Iterator[Dim]:
    """The sizes of values in an expression."""
    if isinstance(expr, Dim):
        yield expr
    elif isinstance(expr, Op):
        for arg in expr.args:
            yield from sizes_in(arg)


def rewired(expr: Expr, replaced: Mapping[fx.Node, fx.Node]) -> Expr:
    """`expr` with the sizes of replaced nodes read from what replaced them."""
    if isinstance(expr, Dim):
        return Dim(replaced[expr.node], expr.dim) if expr.node in replaced else expr
    if isinstance(expr, Op):
        args = tuple(rewired(arg, replaced) for arg in expr.args)
        return expr if all(a is b for a, b in zip(args, expr.args, strict=True)) else Op(expr.symbol, args)
    return expr


def expression(value: int) -> Expr:
    """How `value` was made; a plain int is a constant."""
    return value.expr if isinstance(value, ProvInt) else Const(int(value))


class Session:
    """One tracing run. When it ends, integers that leaked out of it (into a cache, say) act as plain ones."""

    __slots__ = ("compared", "hashed", "open", "watched")

    def __init__(self, watched: frozenset[Attr] = frozenset()) -> None:
        self.open = True
        self.hashed = False
        self.watched = watched
        self.compared: set[Attr] = set()


class ProvInt(int):
    """An int that carries its expression. Comparisons and hashing are those of the int."""

    expr: Expr
    session: Session

    def __new__(cls, value: int, expr: Expr, session: Session) -> ProvInt:
        self = super().__new__(cls, value)
        self.expr = expr
        self.session = session
        return self

    def __copy__(self) -> ProvInt:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ProvInt:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[type[int], tuple[str]]:
        return (int, (int.__repr__(self),))

    def __hash__(self) -> int:
        self.session.hashed = True
        return int.__hash__(self)

    def __pos__(self) -> int:
        return self

    def __neg__(self) -> int:
        return _unary("neg", self, int.__neg__(self))

    def __abs__(self) -> int:
        return _unary("abs", self, int.__abs__(self))

    def __round__(self, ndigits: Any = None) -> int:
        return self if ndigits is None else int.__round__(self, ndigits)

    def __floor__(self) -> int:
        return self

    def __ceil__(self) -> int:
        return self

    def __trunc__(self) -> int:
        return self

    def __divmod__(self, other: int) -> tuple[int, int]:
        if not isinstance(other, int):
            return NotImplemented
        return self // other, self % other

    def __rdivmod__(self, other: int) -> tuple[int, int]:
        if not isinstance(other, int):
            return NotImplemented
        return other // self, other % self

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        value = int.__pow__(self, other, mod) if mod is not None else int.__pow__(self, other)
        return value if mod is not None else _binary("**", self, other, value)


class WatchedInt(ProvInt):
    """An int whose expression reads a watched attribute: the attributes it reads are noted when it is
    compared."""

    def _note(self) -> None:
        """A cache that looks whether it has this layer yet does not branch on the layer."""
        if self.session.open and not _in_cache(sys._getframe(2)):
            self.session.compared |= attributes(self.expr) & self.session.watched

    __hash__ = ProvInt.__hash__

    def __eq__(self, other: object) -> bool:
        if not _looks_up(sys._getframe(1)):
            self._note()
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self._note()
        return int.__ne__(self, other)

    def __lt__(self, other: int) -> bool:
        self._note()
        return int.__lt__(self, other)

    def __le__(self, other: int) -> bool:
        self._note()
        return int.__le__(self, other)

    def __gt__(self, other: int) -> bool:
        self._note()
        return int.__gt__(self, other)

    def __ge__(self, other: int) -> bool:
        self._note()
        return int.__ge__(self, other)

    def __bool__(self) -> bool:
        self._note()
        return int.__bool__(self)


def make(value: int, expr: Expr, session: Session) -> int:
    """`value` with its expression."""
    if session.watched and attributes(expr) & session.watched:
        return WatchedInt(value, expr, session)
    return ProvInt(value, expr, session)


def _in_cache(frame: FrameType) -> bool:
    return "Cache" in type(frame.f_locals.get("self")).__name__


def _looks_up(frame: FrameType) -> bool:
    """Whether the int is compared inside `table[i]` or `table.get(i)`, where the code writes no
    comparison."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] not in ("COMPARE_OP", "CONTAINS_OP")


def _unary(symbol: str, operand: ProvInt, value: int) -> int:
    return make(value, Op(symbol, (operand.expr,)), operand.session) if operand.session.open else value


def _binary(symbol: str, left: int, right: int, value: Any) -> Any:
    """The result of an operator, where it is an int (it may be NotImplemented, or a float for a negative
    power)."""
    if value is NotImplemented or not isinstance(value, int):
        return value
    operand = left if isinstance(left, ProvInt) and left.session.open else right
    if not isinstance(operand, ProvInt) or not operand.session.open:
        return value
    return make(value, Op(symbol, (_part(left, operand), _part(right, operand))), operand.session)


def _part(value: int, operand: ProvInt) -> Expr:
    """The expression of one operand; that of an int from an earlier run (it came out of a cache) is not to be
    trusted."""
    return (
        value.expr if isinstance(value, ProvInt) and value.session is operand.session else Const(int(value))
    )


def _overload(symbol: str, name: str) -> None:
    """Give `ProvInt` the operator `__name__` and its reflection, each as int has it."""
    plain: Callable[[int, Any], Any] = getattr(int, f"__{name}__")
    reflected: Callable[[int, Any], Any] = getattr(int, f"__r{name}__")

    def forward(self: ProvInt, other: Any) -> Any:
        return _binary(symbol, self, other, plain(self, other))

    def backward(self: ProvInt, other: Any) -> Any:
        return _binary(symbol, other, self, reflected(self, other))

    if name != "pow":
        setattr(ProvInt, f"__{name}__", forward)
    setattr(ProvInt, f"__r{name}__", backward)


for _symbol, _name in (
    ("+", "add"),
    ("-", "sub"),
    ("*", "mul"),
    ("//", "floordiv"),
    ("%", "mod"),
    ("**", "pow"),
    ("<<", "lshift"),
    (">>", "rshift"),
):
    _overload(_symbol, _name)
