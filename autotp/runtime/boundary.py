"""Hooks that do something to single tensors among a module's arguments or results.

A tensor is addressed by its path: ("args", 0), ("kwargs", "mask"), ("out",), ("out", 0), ("out", "logits"). An
argument that was positional when the plan was made is found by its parameter's name too, and the other way round.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autotp.errors import AutoTPError

Path = tuple[str | int, ...]
Bound = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PortSteps:
    """What is done, in order, to the tensor at ``path``."""

    path: Path
    steps: tuple[Bound, ...]


class InputHook:
    """A forward pre-hook (with kwargs). The same tensor at several paths goes through the same steps once."""

    def __init__(self, module: nn.Module, ports: Sequence[PortSteps]) -> None:
        self.ports = tuple(ports)
        self.names = _positional_names(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        done: dict[tuple[int, tuple[Bound, ...]], Tensor] = {}
        for port in self.ports:
            side, key = self._find(port.path[0], port.path[1], args, kwargs)
            if side is None:
                continue

            def apply(x: Any, steps: tuple[Bound, ...] = port.steps) -> Any:
                return _once(x, steps, done)

            rest = port.path[2:]
            if side == "args":
                assert isinstance(key, int)
                args = (*args[:key], replaced(args[key], rest, apply), *args[key + 1 :])
            else:
                assert isinstance(key, str)
                kwargs = {**kwargs, key: replaced(kwargs[key], rest, apply)}
        return args, kwargs

    def _find(
        self, side: str | int, key: str | int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[str | None, str | int]:
        if side == "args":
            assert isinstance(key, int)
            if key < len(args):
                return "args", key
            name = self.names[key] if key < len(self.names) else None
            return ("kwargs", name) if name in kwargs and name is not None else (None, key)
        assert isinstance(key, str)
        if key in kwargs:
            return "kwargs", key
        index = self.names.index(key) if key in self.names else len(args)
        return ("args", index) if index < len(args) else (None, key)


class OutputHook:
    """A forward hook."""

    def __init__(self, ports: Sequence[PortSteps]) -> None:
        self.ports = tuple(ports)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        done: dict[tuple[int, tuple[Bound, ...]], Tensor] = {}
        for port in self.ports:

            def apply(x: Any, steps: tuple[Bound, ...] = port.steps) -> Any:
                return _once(x, steps, done)

            output = replaced(output, port.path[1:], apply)
        return output


def add_hooks(module: nn.Module, inputs: Sequence[PortSteps], outputs: Sequence[PortSteps]) -> None:
    """Register both hooks on a module, outside the hooks that it has."""
    if inputs:
        module.register_forward_pre_hook(InputHook(module, inputs), with_kwargs=True, prepend=True)
    if outputs:
        module.register_forward_hook(OutputHook(outputs))


def replaced(value: Any, path: Path, fn: Callable[[Any], Any]) -> Any:
    """``value`` with the leaf at ``path`` replaced by ``fn(leaf)``; what is None on the way stays so."""
    if value is None:
        return None
    if not path:
        return fn(value)
    key, rest = path[0], path[1:]
    if isinstance(value, list):
        return [replaced(v, rest, fn) if i == key else v for i, v in enumerate(value)]
    if isinstance(value, tuple):
        items = [replaced(v, rest, fn) if i == key else v for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):  # transformers' ModelOutput is one too, and keeps its attributes in step
        if key in value:
            value[key] = replaced(value[key], rest, fn)
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        setattr(value, str(key), replaced(getattr(value, str(key)), rest, fn))
        return value
    raise AutoTPError(
        f"a module passed a {type(value).__name__} where the plan expects something with {key!r} in it: it is used in "
        "another way than in the example inputs. Plan with inputs that cover this use."
    )


def _once(x: Any, steps: tuple[Bound, ...], done: dict[tuple[int, tuple[Bound, ...]], Tensor]) -> Any:
    if not isinstance(x, Tensor):
        return x
    key = (id(x), steps)
    if key not in done:
        y = x
        for step in steps:
            y = step(y)
        done[key] = y
    return done[key]


def _positional_names(module: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
