"""Patches in the source of one module instance's methods.

A `Patch` names one expression that was recorded while tracing, with the frames that led to it, and what to
change there. The module's method gets a private copy, compiled from the edited source (`source`, `splice`),
and so does every function on the way (`copies`); the copy is bound to this instance, and other instances of
the class run what they ran before.

The copies are bound as plain methods in the instance's `__dict__`, where `nn.Module.__call__` and
`torch.compile` look first. `copy.deepcopy` binds a method to the copy of its instance, as wanted. Pickle
would write such a method as the class's one, the patch silently gone, so a patched module carries a mark that
refuses to be pickled.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from autotp.errors import RewriteError
from autotp.rewrite.callees import callee_at
from autotp.rewrite.copies import Callee, Copy, leading_to
from autotp.rewrite.edits import Edit, SizeAt, Wrap, WrapArg
from autotp.rewrite.splice import Scaled

if TYPE_CHECKING:
    from autotp.trace.graph import Site

__all__ = ["Applied", "Edit", "Patch", "Scaled", "SizeAt", "Wrap", "WrapArg", "apply_patches"]

MARK = "_autotp_patched"
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Patch:
    """Edits of the expression at `frames[0]`, on the way given by its callers (innermost first, as in
    `Call.frames`).
    """

    frames: tuple[Site, ...]
    edits: tuple[Edit, ...]


class Unpicklable:
    """In a patched module's `__dict__`: lets it be copied, and refuses to let it be pickled."""

    def __copy__(self) -> Unpicklable:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpicklable:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RewriteError(
            "cannot pickle a module whose methods autotp has patched: it would come back without the "
            "patches. Save its state dict, and shard the model again where it is loaded."
        )


class Applied:
    """Patches that are in place on one module."""

    def __init__(self, module: nn.Module, copies: dict[str, Copy], values: dict[str, Any]) -> None:
        self.module = module
        self.names = tuple(values)
        self._copies = copies
        self._values: dict[str, Any] = {**values, MARK: Unpicklable()} if values else {}
        self._before = {name: module.__dict__.get(name, _MISSING) for name in self._values}
        module.__dict__.update(self._values)

    def undo(self) -> None:
        """Give the module back the methods it had. Of several, the last one applied is undone first."""
        present = self.module.__dict__
        if any(present.get(name, _MISSING) is not value for name, value in self._values.items()):
            raise RewriteError(
                f"cannot undo the patches of {type(self.module).__name__}: they were patched over since"
            )
        for name, value in self._before.items():
            if value is _MISSING:
                del present[name]
            else:
                present[name] = value
        self._values, self._before = {}, {}

    def diff(self) -> str:
        """The patches as a unified diff of the user's source."""
        parts: dict[str, None] = {}
        for root in self._copies.values():
            for copy in root.tree():
                if copy.rendered is not None:
                    text = copy.located.text
                    parts[unified_diff(text.filename, text.text, copy.rendered)] = None
        return "".join(parts)


def apply_patches(module: nn.Module, patches: Sequence[Patch]) -> Applied:
    """Patch this instance's methods. Where one cannot be patched: RewriteError, and nothing is changed."""
    roots: dict[str, Copy] = {}
    plain: set[str] = set()
    for patch in patches:
        if not patch.frames:
            raise RewriteError(
                f"cannot patch {type(module).__name__}: the call was made by no Python code of its author"
            )
        for edit in patch.edits:
            if not isinstance(edit, SizeAt | Wrap | WrapArg):
                raise TypeError(f"not an edit: {edit!r}")
        _add(module, patch, roots, plain)
    bound = _bind_helpers(module, roots)
    copies = {**roots, **bound}
    values: dict[str, Any] = {}
    for name, copy in copies.items():
        if copy.touched:
            made = copy.make()
            values[name] = made if name in plain else MethodType(made, module)
    return Applied(module, {name: copy for name, copy in copies.items() if name in values}, values)


def _add(module: nn.Module, patch: Patch, roots: dict[str, Copy], plain: set[str]) -> None:
    """Put the edits of one patch into the tree of copies under the method that its outermost frame belongs
    to.
    """
    way = [_root(module, patch.frames[-1].code, roots, plain)]
    for caller, site in zip(reversed(patch.frames), reversed(patch.frames[:-1]), strict=False):
        # A comprehension or lambda is part of the function it is written in, whoever calls it.
        home = next((i for i in range(len(way) - 1, -1, -1) if site.code in way[i].codes), None)
        if home is not None and not (home == len(way) - 1 and site.code == way[home].function.__code__):
            del way[home + 1 :]
        else:
            way.append(callee_at(way[-1], caller, site.code))
    way[-1].edit(patch.frames[0], patch.edits)


def _root(module: nn.Module, code: CodeType, roots: dict[str, Copy], plain: set[str]) -> Copy:
    """The copy of the module's method that runs `code`, within its decorators."""
    cls = type(module)
    names = ["forward", code.co_name, *vars(cls)]
    names += [name for base in cls.__mro__[1:] if base is not nn.Module for name in vars(base)]
    for name in dict.fromkeys(names):
        value = module.__dict__.get(name, inspect.getattr_static(cls, name, None))
        if isinstance(value, MethodType) and value.__self__ is module:
            value = value.__func__
        elif isinstance(value, staticmethod):
            value = value.__func__
            plain.add(name)
        elif isinstance(value, FunctionType) and name in module.__dict__:
            plain.add(name)
        function = leading_to(value, code)
        if function is None:
            plain.discard(name)
            continue
        root = roots.setdefault(name, Copy(value, None if name in plain else module))
        found = root.within(function)
        if found is not None:
            return found
    if (inherited := _overridden(module, code, roots)) is not None:
        return inherited
    value = getattr(module, code.co_name, None)
    value = getattr(value, "__func__", value)
    wrapper = (
        ""
        if value is None or isinstance(value, FunctionType)
        else f", wrapped in a {type(value).__name__} object"
    )
    raise RewriteError(
        f"cannot patch {code.co_qualname} ({code.co_filename}:{code.co_firstlineno}): it is no method of the "
        f"{cls.__name__} instance{wrapper}"
    )


def _overridden(module: nn.Module, code: CodeType, roots: dict[str, Copy]) -> Copy | None:
    """A method that the module's class overrides and calls by `super()`."""
    name = code.co_name
    way: list[Copy] = []
    for cls in type(module).__mro__:
        value = vars(cls).get(name)
        if not isinstance(value, FunctionType):
            continue
        if not way:
            way = [roots.setdefault(name, Copy(value, module))]
        else:
            calls = [
                node
                for node in ast.walk(way[-1].located.outermost)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == f"super().{name}"
            ]
            if len(calls) != 1:
                return None
            known = way[-1].callees.get(calls[0].func)
            callee = known or Callee(calls[0].func, calls[0], Copy(value, module), "method")
            way[-1].callees[calls[0].func] = callee
            way.append(callee.copy)
        function = leading_to(value, code)
        if function is not None:
            return way[-1].within(function)
    return None


def _bind_helpers(module: nn.Module, roots: dict[str, Copy]) -> dict[str, Copy]:
    """Helper methods that are patched the same way wherever the patched code calls them: bound to the
    instance under their name, so that the calls stay as they are written. The others stay named at each call.
    """
    users: dict[str, list[tuple[Copy, Callee]]] = {}
    for root in roots.values():
        for copy in root.tree():
            for callee in copy.callees.values():
                if callee.style == "method" and callee.copy.owner is module and callee.copy.touched:
                    if isinstance(callee.node, ast.Attribute) and isinstance(callee.node.value, ast.Name):
                        users.setdefault(callee.node.attr, []).append((copy, callee))
    bound: dict[str, Copy] = {}
    for name, found in users.items():
        first = found[0][1].copy
        mine = {id(callee.node) for _, callee in found}
        everywhere = all(
            id(node) in mine
            for copy, _ in found
            for node in _loads(copy.located.outermost, copy.owner_name, name)
        )
        alike = all(callee.copy.content() == first.content() for _, callee in found)
        if name not in roots and everywhere and alike and getattr(type(module), name, None) is first.function:
            for _, callee in found:
                callee.style = "bound"
            bound[name] = first
    return bound


def _loads(function: ast.AST, owner: str, name: str) -> Iterator[ast.Attribute]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == name:
            if isinstance(node.value, ast.Name) and node.value.id == owner:
                yield node


def unified_diff(filename: str, before: str, after: str, context: int = 3) -> str:
    """A unified diff of two texts with the same number of lines."""
    old, new = before.split("\n"), after.split("\n")
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if not changed:
        return ""
    out = [f"--- {filename}", f"+++ {filename} (patched)"]
    hunks: list[list[int]] = []
    for line in changed:
        if hunks and line - hunks[-1][-1] <= 2 * context:
            hunks[-1].append(line)
        else:
            hunks.append([line])
    for lines in hunks:
        start, stop = max(lines[0] - context, 0), min(lines[-1] + context + 1, len(old))
        out.append(f"@@ -{start + 1},{stop - start} +{start + 1},{stop - start} @@")
        line = start
        while line < stop:
            end = line
            while end < stop and old[end] != new[end]:
                end += 1
            out += [f"-{text}" for text in old[line:end]] + [f"+{text}" for text in new[line:end]]
            if end == line:
                out.append(f" {old[line]}")
                end += 1
            line = end
    return "\n".join(out) + "\n"
