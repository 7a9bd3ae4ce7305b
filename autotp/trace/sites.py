"""From Python frames to `Site`s: which expression of the user's source made a call."""

from __future__ import annotations

import dis
import inspect
import os
import sysconfig
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from autotp.trace.graph import Site

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_AUTOTP = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STDLIB = os.path.abspath(sysconfig.get_path("stdlib")) + os.sep
_PACKAGES = tuple(os.path.abspath(sysconfig.get_path(name)) + os.sep for name in ("purelib", "platlib"))


@cache
def is_user_file(filename: str) -> bool:
    """Whether code in `filename` belongs to the model's author: not torch, not autotp, not the standard
    library."""
    if filename.startswith(("<frozen", "<string>", "<__array")):
        return False
    path = os.path.abspath(filename)
    if path.startswith((_TORCH, _AUTOTP)):
        return False
    return path.startswith(_PACKAGES) or not path.startswith(_STDLIB)


@cache  # code objects are compared by value: equal ones in two files have the same positions, but not the same name
def _positions(code: CodeType) -> list[tuple[int | None, int | None, int | None, int | None]]:
    return list(code.co_positions())


def site_at(code: CodeType, lasti: int) -> Site:
    """The expression that `code` was at."""
    positions = _positions(code)
    line, end_line, col, end_col = positions[lasti // 2] if lasti >= 0 else (None, None, None, None)
    line = line or code.co_firstlineno
    return Site(code.co_filename, code.co_qualname, code, line, end_line or line, col or 0, end_col or 0)


def is_statement(site: Site) -> bool:
    """Whether the expression is a statement by itself: what it gives, Python drops."""
    where = dis.Positions(site.line, site.end_line, site.col, site.end_col)
    return any(
        one.positions == where and after.opname == "POP_TOP"
        for one, after in pairwise(dis.get_instructions(site.code))
    )


def forward_code(module: nn.Module) -> CodeType | None:
    """The code of the module's forward, inside its decorators."""
    method: Any = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    code = getattr(method, "__code__", None)
    return code if isinstance(code, CodeType) else None


def frames_to(frame: FrameType | None, stop: CodeType | None, boundary: CodeType) -> tuple[Site, ...]:
    """The sites of the user's frames from `frame` up to the one that runs `stop` (the forward of the
    innermost module), or up to the call of that module (`boundary`) where the forward itself is not Python of
    the user."""
    sites: list[Site] = []
    while frame is not None and frame.f_code is not boundary:
        if is_user_file(frame.f_code.co_filename):
            sites.append(site_at(frame.f_code, frame.f_lasti))
        if frame.f_code is stop:
            break
        frame = frame.f_back
    return tuple(sites)
