"""A user's function as source text: find it, make sure that it is what runs, and compile an edited copy of
it.

`locate` goes from a function to its `Text`, the whole file it stands in, and refuses where the text is not
there (a REPL) or is not what runs: it compiles the text again and compares bytecode, constants and columns.

`recompile` compiles an edited text of the same number of lines under a name of its own, which `linecache`
knows, so that tracebacks show the patched line under its number. It compiles the definition alone, not the
whole file, inside an artificial function whose parameters are the injected names:

    def _autotp_scope(_autotp_all_reduce_0):
        global Attention
        class Attention:
            def forward(self, x): return _autotp_all_reduce_0(self.proj(x))

So injected names are free variables of the copy. That leaves the signature as it is (`inspect.signature` is
read by `generate`) and the module's globals untouched and live; `torch.compile` guards closures as it does
any other, and `copy.deepcopy` shares functions. A hidden default would show in the signature, a global would
outlive the model, a callable among the code's constants is something dynamo refuses. `global` keeps the
qualified name, and `class` keeps the `__class__` cell of `super()` and the mangling of private names.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import linecache
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from autotp.errors import RewriteError

if TYPE_CHECKING:
    from autotp.trace.graph import Site

PREFIX = "_autotp_"
CO_NESTED = 0x10
_FUTURE = importlib.import_module("__future__")
FUTURE_FLAGS = sum({getattr(_FUTURE, name).compiler_flag for name in _FUTURE.all_feature_names} - {CO_NESTED})

_TYPE_PARAMS: dict[str, Any] = {"type_params": []} if sys.version_info >= (3, 12) else {}

Span = tuple[int, int, int, int]
"""Line, column, end line, end column."""

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A source file: its text and its syntax tree."""

    filename: str
    text: str
    tree: ast.Module = field(repr=False)
    line_starts: tuple[int, ...] = field(repr=False)
    """Offset of each line in the UTF-8 bytes."""

    def offset(self, line: int, col: int) -> int:
        return self.line_starts[line - 1] + col

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First and last byte of a node."""
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword)
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def segment(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text.encode()[start:end].decode()


@functools.lru_cache(maxsize=256)
def parse(filename: str, text: str) -> Text:
    """The `Text` of a file with this content."""
    tree = ast.parse(text)
    starts = [0]
    for line in text.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    return Text(filename, text, tree, tuple(starts))


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Where a function's code stands: the text, the chain of classes down to the outermost function around
    it, and which of the equally named code objects on its first line it is.
    """

    text: Text
    classes: tuple[ast.ClassDef, ...]
    outermost: Function
    code: CodeType
    ordinal: int
    spans: dict[Span, ast.AST] = field(repr=False)

    def node(self, site: Site) -> ast.AST:
        """The expression at a site."""
        found = self.spans.get((site.line, site.col, site.end_line, site.end_col))
        if found is None:
            raise RewriteError(
                f"cannot patch {site.qualname}: no expression of {self.text.filename!r} spans "
                f"line {site.line}, columns {site.col} to {site.end_col}"
            )
        return found


def _spans(root: ast.AST) -> dict[Span, ast.AST]:
    """The expressions and augmented assignments in `root`, by where bytecode records them."""
    spans: dict[Span, ast.AST] = {}
    stack: list[ast.AST] = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.JoinedStr):  # columns inside f-strings are not to be relied on
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.expr | ast.AugAssign):
            assert node.end_lineno is not None and node.end_col_offset is not None
            spans.setdefault((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset), node)
    for node in list(spans.values()):
        # A method call whose name stands on a later line than its receiver is recorded from the name on.
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.end_lineno != node.lineno
        ):
            func, name = node.func, node.func.attr
            assert func.end_lineno is not None and func.end_col_offset is not None
            assert node.end_lineno is not None and node.end_col_offset is not None
            for length in {len(name), len(name.encode())}:
                start = (func.end_lineno, func.end_col_offset - length)
                spans.setdefault((*start, node.end_lineno, node.end_col_offset), node)
    return spans


def locate(function: FunctionType) -> Located:
    """Find the source of a function, or say why it cannot be used."""
    code, filename = function.__code__, function.__code__.co_filename
    name = f"{code.co_qualname} of {filename!r}"
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, function.__globals__))
    if not text:
        raise RewriteError(
            f"cannot patch {name}: its source is not available (typed into a shell, or compiled from "
            "a string?). Put the code into a file."
        )
    try:
        return _located(code, filename, text)
    except SyntaxError as error:
        raise RewriteError(f"cannot patch {name}: the file no longer parses ({error})") from error


@functools.lru_cache(maxsize=1024)
def _located(code: CodeType, filename: str, text: str) -> Located:
    parsed = parse(filename, text)
    near = False
    for classes, outermost in _outermost(parsed.tree, code):
        injected = [name for name in code.co_freevars if name.startswith(PREFIX)]
        found = _compile(parsed.tree, classes, outermost, code, injected, filename)
        for ordinal, candidate in enumerate(found):
            if same_code(candidate, code) or same_but_for_asserts(candidate, code):
                return Located(parsed, classes, outermost, code, ordinal, _spans(outermost))
            near = True
    what = (
        "is not what is running: the file was edited since, or an import hook changed the code"
        if near
        else ("does not hold it: the file was edited since")
    )
    raise RewriteError(
        f"cannot patch {code.co_qualname}: the source in {filename!r}, line {code.co_firstlineno}, {what}. "
        "Start a new process."
    )


def _outermost(tree: ast.Module, code: CodeType) -> Iterator[tuple[tuple[ast.ClassDef, ...], Function]]:
    """The outermost function definitions that may hold `code`, each with the classes around it."""
    names = code.co_qualname.split(".<locals>.")[0].split(".")
    line = code.co_firstlineno

    def walk(
        node: ast.AST, classes: tuple[ast.ClassDef, ...]
    ) -> Iterator[tuple[tuple[ast.ClassDef, ...], Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                if [*(c.name for c in classes), child.name] == names and first <= line <= (
                    child.end_lineno or first
                ):
                    yield classes, child
                if names[-1] == "<lambda>":  # in a default or a decorator
                    yield from walk(child, classes)
            elif isinstance(child, ast.Lambda):
                if names[-1] == "<lambda>" and child.lineno == line:
                    yield classes, child
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, (*classes, child))
            else:
                yield from walk(child, classes)

    yield from walk(tree, ())


def _compile(
    tree: ast.Module,
    classes: Sequence[ast.ClassDef],
    outermost: Function,
    code: CodeType,
    names: Sequence[str],
    filename: str,
) -> list[CodeType]:
    """Compile the definition; the code objects in it that have the name and first line of `code`, in order.

    The file's imports come along because CPython compiles `torch.cat(x)` otherwise where `torch` is imported.
    """
    body: ast.stmt = ast.Expr(outermost) if isinstance(outermost, ast.Lambda) else outermost
    top = None if isinstance(outermost, ast.Lambda) else outermost.name
    for cls in reversed(classes):
        top = cls.name
        body = ast.copy_location(
            ast.ClassDef(
                name=cls.name, bases=[], keywords=[], body=[body], decorator_list=[], **_TYPE_PARAMS
            ),
            cls,
        )
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(arg=name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    statements = [body] if top is None else [ast.Global(names=[top]), body]
    scope = ast.FunctionDef(
        name=f"{PREFIX}scope",
        args=arguments,
        body=statements,
        decorator_list=[],
        **_TYPE_PARAMS,
        lineno=1,
        col_offset=0,
    )
    module = ast.fix_missing_locations(ast.Module(body=[*_imports(tree), scope], type_ignores=[]))
    flags = code.co_flags & FUTURE_FLAGS
    compiled: CodeType = compile(module, filename, "exec", flags=flags, dont_inherit=True)
    found = []
    for candidate in nested(compiled):
        if candidate.co_name == code.co_name and candidate.co_firstlineno == code.co_firstlineno:
            found.append(candidate)
    return found


def _imports(tree: ast.Module) -> list[ast.stmt]:
    """The import statements at module level, wherever they stand."""
    found: list[ast.stmt] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
            stack.extend(ast.iter_child_nodes(node))
    return found


def nested(code: CodeType) -> Iterator[CodeType]:
    """`code` and all code objects in it, in order of appearance."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from nested(const)


def same_code(a: CodeType, b: CodeType) -> bool:
    """Whether two code objects do the same at the same columns."""
    if (
        a.co_code != b.co_code
        or a.co_names != b.co_names
        or a.co_varnames != b.co_varnames
        or a.co_freevars != b.co_freevars
        or a.co_cellvars != b.co_cellvars
        or (a.co_argcount, a.co_posonlyargcount, a.co_kwonlyargcount)
        != (b.co_argcount, b.co_posonlyargcount, b.co_kwonlyargcount)
        or (a.co_flags ^ b.co_flags) & ~CO_NESTED
        or a.co_exceptiontable != b.co_exceptiontable
        or len(a.co_consts) != len(b.co_consts)
    ):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, CodeType) and isinstance(y, CodeType):
            if not same_code(x, y):
                return False
        elif type(x) is not type(y) or (repr(x) != repr(y) and not (x == y and "frozenset" in repr(x))):
            return False  # (`repr` tells -0.0 from 0.0; the order in which a frozenset prints varies)
    return all(p == q for p, q in zip(a.co_positions(), b.co_positions(), strict=True))


def same_but_for_asserts(compiled: CodeType, running: CodeType) -> bool:
    """Whether `running` is `compiled` with pytest's rewriting of asserts: same arguments, names, constants
    and columns, but for what pytest adds.
    """

    def plain(names: tuple[str, ...]) -> set[str]:
        return {name for name in names if not name.startswith("@py")}

    rewritten = [c for c in nested(running) if any(n.startswith("@py") for n in c.co_varnames + c.co_names)]
    if not rewritten:
        return False
    arguments = running.co_argcount + running.co_kwonlyargcount
    return (
        compiled.co_varnames[:arguments] == running.co_varnames[:arguments]
        and plain(running.co_varnames) == plain(compiled.co_varnames)
        and plain(compiled.co_names) - {"AssertionError"} <= plain(running.co_names) | {"AssertionError"}
        and compiled.co_freevars == running.co_freevars
    )


def _only(located: Located, text: str) -> str:
    """The top-level statement of `text` that holds the function, under its line numbers."""
    line = located.outermost.lineno
    tops = [n for n in located.text.tree.body if n.lineno <= line <= (n.end_lineno or n.lineno)]
    first: int = min(n.lineno for top in tops for n in [top, *getattr(top, "decorator_list", ())])
    last = max(top.end_lineno or top.lineno for top in tops)
    return "\n" * (first - 1) + "\n".join(text.split("\n")[first - 1 : last])


def recompile(located: Located, text: str, names: Sequence[str]) -> CodeType:
    """The function's code, compiled from an edited text in which the free names `names` may occur."""
    return _recompiled(located, text, tuple(names))


@functools.lru_cache(maxsize=4096)
def _recompiled(located: Located, text: str, names: tuple[str, ...]) -> CodeType:
    old = located.code
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    base = os.path.basename(located.text.filename.strip("<>").split(" #")[0]).removeprefix("autotp ")
    filename = f"<autotp {base} #{digest}>"
    try:
        tree = ast.parse(_only(located, text))
    except SyntaxError as error:
        line = text.split("\n")[(error.lineno or 1) - 1].strip()
        raise RewriteError(
            f"patching {old.co_qualname} of {located.text.filename!r} gave source that does not parse: "
            f"line {error.lineno}: {line!r}"
        ) from error
    linecache.cache[filename] = (len(text), None, [line + "\n" for line in text.split("\n")], filename)
    wanted = [*names, *(n for n in old.co_freevars if n.startswith(PREFIX) and n not in names)]
    index = [node for _, node in _outermost(located.text.tree, old)].index(located.outermost)
    classes, outermost = list(_outermost(tree, old))[index]
    code = _compile(located.text.tree, classes, outermost, old, wanted, filename)[located.ordinal]
    return code.replace(co_flags=old.co_flags, co_qualname=old.co_qualname)
