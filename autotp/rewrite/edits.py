"""What can be edited at an expression, and which piece of its source that is.

An edit names an argument as torch saw it. Here it is found among the arguments as they are written: after a
method's receiver, behind a keyword, in a slice, in a list display, behind a star.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from autotp.errors import RewriteError
from autotp.rewrite.splice import Scaled, Splices

if TYPE_CHECKING:
    from autotp.trace.graph import Call, Path


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
        if rest[0] >= len(target.elts):  # the op counts other operands than the code writes: `x[..., i]`
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
