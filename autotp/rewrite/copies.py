"""Private copies of functions: a method of one module instance, and what it calls, with edits in their
source.

Frames say how a call was reached, `model.forward → self._split_heads → view`. A `Copy` stands for one
function on such a way. The edits of a helper show only on the ways that were given: the caller's copy names
the helper's copy at that very expression, so a free function that other modules share, or that the same
method calls twice with other sizes, is left alone.

Decorators are Python functions around the function: each is made again with its closure cell pointing to the
copy. An object in place of a function is refused. How a callee is found: see `callees`.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

from autotp.errors import RewriteError
from autotp.rewrite.edits import Edit, Wrap, WrapArg, apply_edit
from autotp.rewrite.source import Located, locate, nested, recompile
from autotp.rewrite.splice import Splices

if TYPE_CHECKING:
    from autotp.trace.graph import Site

_MISSING = object()
Style = Literal["function", "method", "partial", "property", "bound"]


@dataclass(eq=False)
class Callee:
    """A copy to call in place of what the expression `node` of the caller stands for."""

    node: ast.expr
    call: ast.Call | None
    copy: Copy
    style: Style
    wrapped: Any = None
    """A partial or class method around the function, to be made again around the copy."""


@dataclass(eq=False)
class Copy:
    """One function on the way to an edit. It is made again only where it, or what it calls, has edits."""

    function: FunctionType
    owner: Any = None
    """What the first parameter is known to be: the module instance, usually."""
    edits: dict[ast.AST, list[Edit]] = field(default_factory=dict)
    cells: dict[str, Copy] = field(default_factory=dict)
    callees: dict[ast.expr, Callee] = field(default_factory=dict)
    rendered: str | None = None

    @functools.cached_property
    def located(self) -> Located:
        return locate(self.function)

    @functools.cached_property
    def codes(self) -> frozenset[CodeType]:
        return frozenset(nested(self.function.__code__))

    @property
    def touched(self) -> bool:
        """Whether the source or a closure cell of this function changes."""
        return bool(self.edits or self.renamed or any(copy.touched for copy in self.cells.values()))

    @property
    def renamed(self) -> list[Callee]:
        """The calls at which a copy is named. A helper that is bound to the instance is called as it was."""
        return [c for c in self.callees.values() if c.style != "bound" and c.copy.touched]

    def edit(self, site: Site, edits: Sequence[Edit]) -> None:
        node = self.node(site)
        known = self.edits.setdefault(node, [])
        known.extend(e for e in edits if e not in known)

    def node(self, site: Site) -> ast.AST:
        return self.located.node(site)

    def within(self, function: FunctionType) -> Copy | None:
        """The copy of `function`, which this one (a decorator's wrapper) calls through a closure cell."""
        if function is self.function:
            return self
        for name, inner in _inner_functions(self.function):
            known = self.cells.get(name) or Copy(inner, self.owner)
            if (found := known.within(function)) is not None:
                self.cells[name] = known
                return found
        return None

    def content(self) -> tuple[Any, ...]:
        """What is to be changed: copies of one function with equal content are interchangeable."""
        edits = {_position(node): tuple(map(_key, edits)) for node, edits in self.edits.items()}
        callees = {
            _position(node): callee.copy.content()
            for node, callee in self.callees.items()
            if callee.copy.touched
        }
        cells = {name: copy.content() for name, copy in self.cells.items() if copy.touched}
        return (self.function, edits, callees, cells)

    def make(self) -> FunctionType:
        """The patched function; the original one where nothing changes."""
        if not self.touched:
            return self.function
        old = self.function
        code = old.__code__
        cells = dict(zip(code.co_freevars, old.__closure__ or (), strict=True))
        made = {name: copy.make() for name, copy in self.cells.items()}
        cells |= {name: CellType(function) for name, function in made.items()}
        if self.edits or self.renamed:
            splices = self._splices()
            self.rendered = splices.render()
            if self.rendered != self.located.text.text:
                code = recompile(self.located, self.rendered, tuple(splices.names))
                cells |= {name: CellType(value) for name, value in splices.names.items()}
        missing = [name for name in code.co_freevars if name not in cells]
        if missing:
            raise RewriteError(
                f"patching {code.co_qualname} would need the local variables {missing} of its definition"
            )
        closure = tuple(cells[name] for name in code.co_freevars)
        new = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
        new.__kwdefaults__ = old.__kwdefaults__
        new.__annotations__, new.__doc__ = old.__annotations__, old.__doc__
        new.__module__, new.__qualname__ = old.__module__, old.__qualname__
        new.__dict__.update(old.__dict__)
        for name, copy in self.cells.items():
            if old.__dict__.get("__wrapped__") is copy.function:
                new.__dict__["__wrapped__"] = made[name]
        return new

    def tree(self) -> Iterator[Copy]:
        """This copy and those under it that change."""
        if self.touched:
            yield self
            for copy in [*self.cells.values(), *(c.copy for c in self.callees.values())]:
                yield from copy.tree()

    def _splices(self) -> Splices:
        text = self.located.text
        splices = Splices(text)
        for node, edits in self.edits.items():
            for edit in edits:
                apply_edit(splices, node, edit, functools.partial(self.resolve, code=None))
        for callee in self.renamed:
            self._call(splices, callee)
        return splices

    def _call(self, splices: Splices, callee: Callee) -> None:
        """Name the copy at the caller's expression."""
        function: Any = callee.copy.make()
        if isinstance(callee.wrapped, functools.partial):
            function = functools.partial(function, *callee.wrapped.args, **callee.wrapped.keywords)
        elif isinstance(callee.wrapped, type):
            function = MethodType(function, callee.wrapped)
        name = splices.name(function, callee.copy.function.__name__)
        node = callee.node
        if callee.style == "function":
            splices.replace(node, name)
            return
        receiver = node.value if isinstance(node, ast.Attribute) and callee.wrapped is not CALL else node
        text = splices.text.segment(receiver)
        if "\n" in text or any(
            isinstance(n, ast.NamedExpr | ast.Await | ast.Yield) for n in ast.walk(receiver)
        ):
            raise RewriteError(
                f"cannot patch the call at {splices.where(node)}: its receiver is more than a name"
            )
        if text.startswith("super()"):
            text = self.owner_name
        if callee.style == "property":
            splices.replace(node, f"{name}({text})")
        elif callee.style == "partial":
            splices.replace(node, f"{splices.name(functools.partial)}({name}, {text})")
        else:
            assert callee.call is not None
            splices.replace(node, name)
            more = bool(callee.call.args or callee.call.keywords)
            splices.first_argument(node, f"{text}, " if more else text)

    @property
    def owner_name(self) -> str:
        code = self.function.__code__
        return code.co_varnames[0] if code.co_argcount else ""

    def resolve(self, node: ast.expr, code: CodeType | None) -> Any:
        """The object an expression of this function stands for, where that needs no running; LookupError
        otherwise.
        """
        function = self.function
        if isinstance(node, ast.Name):
            name = node.id
            scopes = [code] if code is not None else list(self.codes)
            inner = any(
                name in c.co_varnames or name in c.co_cellvars for c in scopes if c is not function.__code__
            )
            if inner:
                raise LookupError(name)
            if name in function.__code__.co_varnames or name in function.__code__.co_cellvars:
                if name == self.owner_name and self.owner is not None:
                    return self.owner
                raise LookupError(name)
            if name in function.__code__.co_freevars:
                cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
                try:
                    return cell.cell_contents
                except ValueError:
                    raise LookupError(name) from None
            if name in function.__globals__:
                return function.__globals__[name]
            builtins = function.__globals__.get("__builtins__", {})
            found = (builtins if isinstance(builtins, dict) else vars(builtins)).get(name, _MISSING)
            if found is _MISSING:
                raise LookupError(name)
            return found
        if isinstance(node, ast.Attribute):
            name = _mangled(node.attr, self.function.__qualname__)
            if _is_super(node.value) and self.owner is not None:
                cls = self.resolve(ast.Name(id="__class__", ctx=ast.Load()), None)
                return getattr(super(cls, self.owner), name)
            base = self.resolve(node.value, code)
            raw = inspect.getattr_static(base, name, _MISSING)
            if isinstance(raw, property) and not isinstance(base, ModuleType | type):
                return raw
            try:
                return getattr(base, name)
            except AttributeError:
                raise LookupError(name) from None
        raise LookupError(ast.dump(node))


class _Call:
    """Marks a callee that is an object with `__call__`."""


CALL = _Call()


def _position(node: ast.AST) -> tuple[int, int, int, int]:
    assert isinstance(node, ast.expr | ast.stmt)
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def _key(edit: Edit) -> tuple[Any, ...]:
    if isinstance(edit, Wrap):
        return ("wrap", id(edit.fn))
    if isinstance(edit, WrapArg):
        return ("arg", str(edit.where), id(edit.fn))
    return ("size", edit.index, edit.value)


def _mangled(name: str, qualname: str) -> str:
    """`__name` as it is called inside a class."""
    scopes = qualname.split(".")
    if not name.startswith("__") or name.endswith("__") or len(scopes) < 2 or scopes[-2] == "<locals>":
        return name
    return f"_{scopes[-2].lstrip('_')}{name}"


def _is_super(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "super"
        and not node.args
    )


def _inner_functions(function: FunctionType) -> Iterator[tuple[str, FunctionType]]:
    """The functions in a function's closure, the one it says it wraps first."""
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if isinstance(value, FunctionType) and value is not function:
            found.append((name, value))
    wrapped = function.__dict__.get("__wrapped__")
    yield from sorted(found, key=lambda item: item[1] is not wrapped)


def leading_to(function: Any, code: CodeType, depth: int = 8) -> FunctionType | None:
    """The function with this code, which `function` is or wraps. (Equal code has equal columns.)"""
    if not isinstance(function, FunctionType) or depth == 0:
        return None
    if any(c == code for c in nested(function.__code__)):
        return function
    for _, inner in _inner_functions(function):
        if (found := leading_to(inner, code, depth - 1)) is not None:
            return found
    return None
