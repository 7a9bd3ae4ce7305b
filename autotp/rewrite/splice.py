"""Edits of expressions, as insertions into source text.

An edit never moves a line: what is inserted has no line break, what is replaced keeps its own. `Splices`
collects the insertions for one text and applies them at once, the outer ones outside the inner ones.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from autotp.errors import RewriteError
from autotp.rewrite.source import PREFIX, Text

if TYPE_CHECKING:
    from autotp.trace.graph import Call, Path

RECEIVER = LEFT = 0
RIGHT = 1


@dataclass(frozen=True, slots=True)
class Scaled:
    """A size in proportion to what the code says: `B * n_head` becomes `(B * n_head) * 4 // 8`, for any B."""

    local: int
    whole: int

    def of(self, size: int) -> int:
        return size * self.local // self.whole


@dataclass(frozen=True, slots=True)
class SizeAt:
    """Give int leaf `index` of the call's arguments (counted as in `Call.ints`) the value `value`.

    `paths` says where each int leaf sits (`Call.ints`) and `func` which call it was; without them only calls
    can be patched whose source shows the leaf (`y.view(B, T, C)`). Use `SizeAt.of`.
    """

    index: int
    value: int | Scaled
    paths: tuple[Path, ...] | None = None
    func: str = ""

    @classmethod
    def of(cls, call: Call, index: int, value: int | Scaled) -> SizeAt:
        return cls(index, value, tuple(path for path, _ in call.ints), call.func)


@dataclass(frozen=True, slots=True)
class Wrap:
    """Replace the expression E by `fn(E)`; after `x += y`, write `fn(x)` into x in place."""

    fn: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class WrapArg:
    """Replace one argument A by `fn(A)`.

    `where` is the position in the call as torch sees it (`x` of `x.view()` and the left operand are 0, the
    right one is 1), the name of a keyword argument, or the path of the operand of the ATen op that the call
    makes: ("args", 0, 1) is `b` of `torch.cat([a, b])`.
    """

    where: int | str | Path
    fn: Callable[[Any], Any]


Edit = SizeAt | Wrap | WrapArg

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


def apply_edit(splices: Splices, node: ast.AST, edit: Edit, resolve: Callable[[ast.expr], Any]) -> None:
    """Add one edit of the expression `node`. `resolve` gives the object that an expression stands for, or
    raises LookupError where that shows only at run time.
    """
    if isinstance(edit, Wrap):
        _wrap(splices, node, edit.fn)
    elif isinstance(edit, WrapArg):
        _wrap_argument(splices, node, edit, resolve)
    else:
        _size(splices, node, edit, resolve)


def _wrap(splices: Splices, node: ast.AST, fn: Callable[[Any], Any]) -> None:
    if isinstance(node, ast.AugAssign):
        if isinstance(node.target, ast.Subscript):
            raise RewriteError(
                f"cannot wrap {splices.text.segment(node)!r} at {splices.where(node)}: "
                "it writes into part of a tensor"
            )
        name = splices.write_name(fn)
        splices.wrap(node, "", f"; {name}({splices.text.segment(node.target)})", rank=9)
        return
    if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        raise RewriteError(
            f"cannot wrap {splices.text.segment(node)!r} at {splices.where(node)}: "
            "it is assigned to, not a value"
        )
    splices.wrap(node, f"{splices.name(fn)}(", ")", rank=1)


def _wrap_argument(
    splices: Splices, node: ast.AST, edit: WrapArg, resolve: Callable[[ast.expr], Any]
) -> None:
    where: Path
    if isinstance(edit.where, int):
        where = ("args", edit.where)
    elif isinstance(edit.where, str):
        where = ("kwargs", edit.where)
    else:
        where = _from_aten(node, edit.where)
    if isinstance(node, ast.AugAssign) and where == ("args", 0):
        if not isinstance(node.target, ast.Name):
            raise RewriteError(
                f"cannot wrap the target of {splices.text.segment(node)!r} at {splices.where(node)}"
            )
        name = splices.write_name(edit.fn)
        splices.wrap(node, f"{name}({node.target.id}); ", "", rank=9)
        return
    target, rest = _argument(splices, node, where, resolve)
    while rest and isinstance(target, ast.Tuple | ast.List) and isinstance(rest[0], int):
        if any(isinstance(element, ast.Starred) for element in target.elts[: rest[0] + 1]):
            break
        target, rest = target.elts[rest[0]], rest[1:]
    if rest or target is None or isinstance(target, ast.Starred):
        raise RewriteError(
            f"cannot wrap argument {where} of {splices.text.segment(node)!r} at {splices.where(node)}: "
            "no expression of its own stands there"
        )
    splices.wrap(target, f"{splices.name(edit.fn)}(", ")", rank=2)


def _from_aten(node: ast.AST, path: Path) -> Path:
    """The path of an ATen op's operand in the Python call, where the two differ."""
    name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
    if name == "embedding" and path[:1] == ("args",) and path[1] in (0, 1):  # F.embedding(input, weight)
        return ("args", 1 - int(path[1]), *path[2:])
    if name == "einsum" and path[:2] == ("args", 1) and len(path) == 3 and isinstance(node, ast.Call):
        if not isinstance(node.args[1], ast.List | ast.Tuple):
            return ("args", 1 + int(path[2]))
    return path


def _argument(
    splices: Splices, node: ast.AST, path: Path, resolve: Callable[[ast.expr], Any]
) -> tuple[ast.expr | None, Path]:
    """The source of the argument at `path` of a torch call, and the rest of the path inside it; None where
    the argument hides behind a starred one.
    """
    text, kind, rest = splices.text.segment(node), path[0], path[2:]
    problem = RewriteError(f"{text!r} at {splices.where(node)} has no argument {path}")
    if isinstance(node, ast.Call):
        bound, parameters = _callee(node, resolve)
        key = path[1]
        if isinstance(key, str) and all(k.arg != key for k in node.keywords) and key in parameters:
            key = parameters.index(key)  # named by torch's own Python layer, positional in the user's source
        if isinstance(key, str):
            found = next((k.value for k in node.keywords if k.arg == key), None)
            if found is None:
                raise problem
            return found, rest
        if bound and key == 0:
            assert isinstance(node.func, ast.Attribute)
            return node.func.value, rest
        position = key - bound
        if any(isinstance(argument, ast.Starred) for argument in node.args[: position + 1]):
            return None, path
        if position < len(node.args):
            return node.args[position], rest
        name = parameters[key] if key < len(parameters) else ""
        named = [k for k in node.keywords if k.arg is not None and k.arg == name]
        named = named or (
            [k for k in node.keywords if k.arg not in (None, "dim")] if position == len(node.args) else []
        )
        if len(named) != 1:
            raise problem
        return named[0].value, rest
    if kind == "args" and isinstance(node, ast.Subscript):
        return {0: node.value, 1: node.slice}[int(path[1])], rest
    if kind == "args" and (operands := _operands(node, resolve)):
        return operands[int(path[1])], rest
    if kind == "args" and isinstance(node, ast.AugAssign) and path[1] == 1:
        return node.value, rest
    if kind == "args" and isinstance(node, ast.UnaryOp) and path[1] == 0:
        return node.operand, rest
    if kind == "args" and isinstance(node, ast.Attribute) and path[1] == 0:
        return node.value, rest
    raise problem


def _operands(node: ast.AST, resolve: Callable[[ast.expr], Any]) -> tuple[ast.expr, ...]:
    """The operands of a binary operator as torch sees them: in `2 * x` the tensor is the first."""
    if isinstance(node, ast.BinOp):
        left, right = node.left, node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = node.left, node.comparators[0]
    else:
        return ()
    return (right, left) if _is_number(left, resolve) else (left, right)


def _is_number(node: ast.expr, resolve: Callable[[ast.expr], Any]) -> bool:
    """Whether an operand is seen to be a number; one that shows only at run time is not."""
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand, resolve)
    if isinstance(node, ast.BinOp):
        return _is_number(node.left, resolve) and _is_number(node.right, resolve)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float | complex)
    try:
        return isinstance(resolve(node), int | float | complex)
    except LookupError:
        return False


def _callee(node: ast.Call, resolve: Callable[[ast.expr], Any]) -> tuple[bool, list[str]]:
    """Whether a call is a method call, whose receiver is argument 0, and the names of its parameters where
    known.
    """
    function: Any = None
    bound = False
    try:
        function = resolve(node.func)
        bound = isinstance(getattr(function, "__self__", None), torch.Tensor)
    except LookupError:
        if isinstance(node.func, ast.Attribute):
            try:
                bound = not isinstance(resolve(node.func.value), ModuleType | type)
            except LookupError:
                bound = True
            if bound:
                function = getattr(torch.Tensor, node.func.attr, None)
    if isinstance(function, FunctionType):
        return bound, list(inspect.signature(function).parameters)
    name = getattr(function, "__name__", "")
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}") if name else []
    names = [argument.name for argument in schemas[0].arguments] if schemas else []
    return bound, ["input" if name == "self" else name for name in names]


def _size(splices: Splices, node: ast.AST, edit: SizeAt, resolve: Callable[[ast.expr], Any]) -> None:
    where = f"{splices.text.segment(node)!r} at {splices.where(node)}"
    paths = _paths_from_source(node) if edit.paths is None else edit.paths
    if edit.index >= len(paths):
        raise RewriteError(f"{where} has no integer argument number {edit.index}")
    if isinstance(node, ast.Call) and edit.func and not edit.func.startswith("__"):
        shown = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", edit.func)
        )
        if isinstance(node.func, ast.Attribute) and shown != edit.func:
            raise RewriteError(
                f"cannot patch {where}: what was recorded there is {edit.func!r}, called inside it"
            )
    path = paths[edit.index]
    if isinstance(node, ast.AugAssign) and not _is_number(node.value, resolve):
        raise RewriteError(f"cannot patch {where}: it does not show which side is the number")
    operands = _operands(node, resolve)
    if operands and not any(_is_number(operand, resolve) for operand in operands):
        for operand in operands:  # which one is the number shows only at run time: `num_buckets * mask`
            splices.size(*splices.text.span(operand), 0, edit.value)
        return
    target, rest = _argument(splices, node, path, resolve)
    value = str(edit.value)
    if target is None:
        assert isinstance(node, ast.Call)
        _size_among_starred(splices, node, edit, paths, resolve)
        return
    while rest:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(rest[0], int):
            if any(isinstance(element, ast.Starred) for element in target.elts[: rest[0] + 1]):
                break
            target, rest = target.elts[rest[0]], rest[1:]
        elif isinstance(target, ast.Slice) and isinstance(rest[0], str):
            part = {"start": target.lower, "stop": target.upper, "step": target.step}[rest[0]]
            if part is None:
                raise RewriteError(f"{where} has no slice {rest[0]}")
            target, rest = part, rest[1:]
        else:
            break
    if not rest and isinstance(edit.value, Scaled):
        splices.scale(target, edit.value)
        return
    if not rest:
        splices.replace(target, value)
        return
    if any(isinstance(n, ast.Slice) for n in ast.iter_child_nodes(target)) or isinstance(target, ast.Slice):
        raise RewriteError(f"cannot patch size {path} of {where}: a slice hides it")
    prefix = path[: len(path) - len(rest)]
    first = next(i for i, other in enumerate(paths) if other[: len(prefix)] == prefix)
    start, end = splices.text.span(target)
    if isinstance(target, ast.Tuple) and isinstance(node, ast.Subscript) and target is node.slice:
        raise RewriteError(f"cannot patch size {path} of {where}: a starred index hides it")
    splices.size(start, end, edit.index - first, edit.value)


def _size_among_starred(
    splices: Splices,
    node: ast.Call,
    edit: SizeAt,
    paths: tuple[Path, ...],
    resolve: Callable[[ast.expr], Any],
) -> None:
    """A leaf at or after a starred argument: computed arguments are patched as they pass."""
    bound, _ = _callee(node, resolve)
    starred = next(i for i, argument in enumerate(node.args) if isinstance(argument, ast.Starred))

    def position(path: Path) -> int:
        return int(path[1]) - bound if path[0] == "args" else -1

    last = starred == len(node.args) - 1
    begin = starred if last else 0
    first = next(i for i, path in enumerate(paths) if position(path) >= begin)
    argument = node.args[starred]
    if last:
        assert isinstance(argument, ast.Starred)
        start, end = splices.text.span(argument.value)
        splices.size(start, end, edit.index - first, edit.value)
        return
    start, _ = splices.text.span(node.args[0])
    _, end = splices.text.span(node.args[-1])
    splices.size(start, end, edit.index - first, edit.value, arguments=True)


def _paths_from_source(node: ast.AST) -> tuple[Path, ...]:
    """Paths of the int leaves of a method call or subscript, where every argument but literals is taken to be
    one int.
    """

    def leaves(value: ast.expr | None, path: Path) -> list[Path]:
        if value is None or (isinstance(value, ast.Constant) and type(value.value) is not int):
            return []
        if isinstance(value, ast.Tuple | ast.List):
            return [p for i, element in enumerate(value.elts) for p in leaves(element, (*path, i))]
        if isinstance(value, ast.Slice):
            parts = {"start": value.lower, "stop": value.upper, "step": value.step}
            return [p for name, part in parts.items() for p in leaves(part, (*path, name))]
        return [path]

    if isinstance(node, ast.Subscript):
        return tuple(leaves(node.slice, ("args", 1)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if len(node.args) == 1 and not isinstance(node.args[0], ast.Constant | ast.Tuple | ast.List):
            argument = node.args[0]
            many = isinstance(argument, ast.Starred) or node.func.attr in (
                "view",
                "reshape",
                "expand",
                "repeat",
            )
            if many:
                return tuple(
                    ("args", i + 1) if isinstance(argument, ast.Starred) else ("args", 1, i)
                    for i in range(16)
                )
        found = [p for i, value in enumerate(node.args) for p in leaves(value, ("args", i + 1))]
        for keyword in node.keywords:
            found += leaves(keyword.value, ("kwargs", keyword.arg or ""))
        return tuple(found)
    raise RewriteError("the source does not show which argument holds the size: give its path")


def replace_sizes(value: Any, sizes: Mapping[int, int | tuple[int, int]]) -> Any:
    """`value`, an int or a nest of tuples, lists and slices, with int leaf number i made `sizes[i]`, or scaled
    where that is a pair (local, whole).
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
