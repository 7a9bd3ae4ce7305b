"""The torch calls that one module's forward makes, as the tracer records them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autotp.trace.graph import Call
from autotp.trace.leaves import int_leaves
from autotp.trace.sites import forward_code, frames_to


class Calls(TorchFunctionMode):
    def __init__(self, module: nn.Module, stop: CodeType | None = None) -> None:
        super().__init__()
        self.stop = stop or forward_code(module)
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        frames = frames_to(sys._getframe(1), self.stop, Calls.record.__code__)
        if frames and frames[-1].code is self.stop:
            ints = (*int_leaves(args, ("args",)), *int_leaves(kwargs, ("kwargs",)))
            name = getattr(func, "__name__", str(func))
            self.calls.append(Call(name, frames[0], frames, "", ints, len(self.calls)))
        return func(*args, **kwargs)

    def record(self, run: Callable[[], Any]) -> list[Call]:
        with torch.no_grad(), self:
            run()
        return self.calls


def calls_of(module: nn.Module, run: Callable[[], Any], stop: CodeType | None = None) -> list[Call]:
    """The calls of `module`'s forward (or of the function with code `stop`) while `run()` runs."""
    return Calls(module, stop).record(run)


def find(calls: list[Call], text: str, nth: int = 0) -> Call:
    """The nth call whose source contains `text`."""
    found = [c for c in calls if c.site is not None and text in c.site.text]
    assert len(found) > nth, [c.site.text for c in calls if c.site is not None]
    return found[nth]
