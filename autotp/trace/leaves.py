"""The tensor leaves of arguments and results: nested tuples, lists, dicts, dataclasses and model outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from autotp.trace.graph import Path


def tensor_leaves(value: Any, path: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    """Each tensor in `value` with its path, in order."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, (str, int)):
                yield from tensor_leaves(item, (*path, key))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from tensor_leaves(getattr(value, key), (*path, key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensor_leaves(item, (*path, i))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensor_leaves(getattr(value, field.name, None), (*path, field.name))


def int_leaves(value: Any, path: Path) -> Iterator[tuple[Path, int]]:
    """Each int in the arguments of a torch call with its path, in order; a slice gives start, stop and
    step."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from int_leaves(item, (*path, i))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from int_leaves(getattr(value, name), (*path, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from int_leaves(item, (*path, key))


def map_tensors(value: Any, f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `f` applied to each of its tensor leaves; what holds none is returned as it is."""
    if isinstance(value, torch.Tensor):
        return f(value)
    if not any(True for _ in tensor_leaves(value, ())):
        return value
    if isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
        return type(value)((key, map_tensors(item, f)) for key, item in value.items())  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, f) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, f) for item in value)
    given = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
    return type(value)(**{name: map_tensors(item, f) for name, item in given.items()})
