"""Which function a recorded call reached, and so what to name there in its place.

Names and attributes are looked up where that needs no running (globals, closure, `self`); where the callee is
a local variable (`attention_interface(...)`), it is found by the code object that ran.
"""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import sys
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from autotp.errors import RewriteError
from autotp.rewrite.copies import CALL, Callee, Copy, Style, leading_to

if TYPE_CHECKING:
    from autotp.trace.graph import Site


def callee_at(caller: Copy, site: Site, code: CodeType) -> Copy:
    """The copy of the function with `code`, which `caller` called by the expression at `site`."""
    node = caller.node(site)
    if isinstance(node, ast.Attribute):
        return _property(caller, node, site, code)
    if not isinstance(node, ast.Call):
        raise RewriteError(
            f"cannot patch {code.co_qualname}: {site} calls it by an operator or a loop, not by name"
        )
    if (known := caller.callees.get(node.func)) is not None:
        return _inside(known.copy, code, site)
    if (found := _known_callee(caller, node, node.func, site, code)) is not None:
        return found
    for argument in [*node.args, *(k.value for k in node.keywords)]:  # checkpoint(self._block, x)
        expr = argument.value if isinstance(argument, ast.Starred) else argument
        if (known := caller.callees.get(expr)) is not None and leading_to(known.copy.function, code):
            return _inside(known.copy, code, site)
        if isinstance(expr, ast.Name | ast.Attribute):
            found = _known_callee(caller, None, expr, site, code)
            if found is not None:
                return found
    return _unknown_callee(caller, node, site, code)


def _inside(copy: Copy, code: CodeType, site: Site) -> Copy:
    function = leading_to(copy.function, code)
    found = copy.within(function) if function is not None else None
    if found is None:
        raise RewriteError(
            f"cannot patch {code.co_qualname}: {site} calls now it, now {copy.function.__qualname__}"
        )
    return found


def _known_callee(
    caller: Copy, call: ast.Call | None, node: ast.expr, site: Site, code: CodeType
) -> Copy | None:
    """Where the expression can be looked up and leads to `code`. `call` is None where it is passed, not
    called.
    """
    try:
        value = caller.resolve(node, site.code)
    except LookupError:
        return None
    style: Style = "function"
    owner: Any = None
    wrapped: Any = None
    function = value
    if isinstance(value, functools.partial):
        function, wrapped = value.func, value
    elif isinstance(value, MethodType):
        function, owner = value.__func__, value.__self__
        if isinstance(owner, type):
            wrapped = owner
        elif not isinstance(node, ast.Attribute):
            return None
        else:
            style = "method" if call is not None else "partial"
    elif not isinstance(value, FunctionType | type) and callable(value) and not isinstance(value, nn.Module):
        method = type(value).__dict__.get("__call__")
        if isinstance(method, FunctionType) and call is not None:
            function, owner, style, wrapped = method, value, "method", CALL
    inner = leading_to(function, code)
    if inner is None:
        return None
    if owner is None and call is not None and call.args and wrapped is None:
        try:
            first = caller.resolve(call.args[0], site.code)
            owner = first if isinstance(first, nn.Module) else None
        except LookupError:
            pass
    copy = Copy(function, owner)
    caller.callees[node] = Callee(node, call, copy, style, wrapped)
    return _inside(copy, code, site)


def _property(caller: Copy, node: ast.Attribute, site: Site, code: CodeType) -> Copy:
    if (known := caller.callees.get(node)) is not None:
        return _inside(known.copy, code, site)
    try:
        owner, value = caller.resolve(node.value, site.code), caller.resolve(node, site.code)
    except LookupError:
        owner, value = None, None
    if not isinstance(value, property) or leading_to(value.fget, code) is None:
        raise RewriteError(
            f"cannot patch {code.co_qualname}: {site} is an attribute whose getter cannot be told"
        )
    assert isinstance(value.fget, FunctionType)
    copy = Copy(value.fget, owner)
    caller.callees[node] = Callee(node, None, copy, "property")
    return _inside(copy, code, site)


def _unknown_callee(caller: Copy, node: ast.Call, site: Site, code: CodeType) -> Copy:
    """The callee is a local variable, or a method of one: take the function whose code ran."""
    function = function_of(code, caller.function)
    style: Style = "function"
    cls = _class_of(function)
    raw = inspect.getattr_static(cls, function.__name__, None) if cls is not None else None
    if isinstance(raw, FunctionType) and isinstance(node.func, ast.Attribute):
        style = "method"
    elif cls is not None and not isinstance(raw, staticmethod):
        raise RewriteError(f"cannot patch {code.co_qualname}: it cannot be told how {site} calls it")
    if not isinstance(node.func, ast.Name | ast.Attribute):
        raise RewriteError(f"cannot patch {code.co_qualname}: {site} does not call it by a name")
    try:
        value = caller.resolve(node.func, site.code)
    except LookupError:
        pass
    else:
        raise RewriteError(
            f"cannot patch {code.co_qualname}: {site} calls it through {type(value).__name__} {value!r:.80}"
        )
    owner = None
    if node.args and style == "function":
        try:
            first = caller.resolve(node.args[0], site.code)
            owner = first if isinstance(first, nn.Module) else None
        except LookupError:
            pass
    copy = Copy(function, owner)
    caller.callees[node.func] = Callee(node.func, node, copy, style)
    return copy


def _class_of(function: FunctionType) -> type | None:
    """The class that a function is a method of, by its qualified name."""
    value: Any = sys.modules.get(function.__module__)
    *scopes, _ = function.__qualname__.split(".")
    for name in scopes:
        value = getattr(value, name, None)
    return value if isinstance(value, type) and scopes else None


def function_of(code: CodeType, caller: FunctionType) -> FunctionType:
    """The one function with this code: by name where the caller stands, in its own module, or else among all
    functions alive."""
    here = leading_to(caller.__globals__.get(code.co_name), code)
    return here if here is not None and here.__code__ == code else _function_of(code, code.co_filename)


@functools.lru_cache(maxsize=256)
def _function_of(code: CodeType, filename: str) -> FunctionType:  # code objects are equal across files
    if "<locals>" not in code.co_qualname:
        for module in list(sys.modules.values()):
            if getattr(module, "__file__", None) != filename:
                continue
            value: Any = module
            for name in code.co_qualname.split("."):
                value = inspect.getattr_static(value, name, None)
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            found = leading_to(value, code)
            if found is not None and found.__code__ == code:
                return found
    alive = [f for f in gc.get_referrers(code) if isinstance(f, FunctionType)]
    if len(alive) != 1:
        raise RewriteError(
            f"cannot patch {code.co_qualname} of {code.co_filename!r}: {len(alive)} functions have its code, "
            "and the call does not show which"
        )
    return alive[0]
