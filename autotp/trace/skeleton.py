"""A weightless copy of a model, to trace and to rewrite on trial. The original is neither touched nor read.

Parameters become empty tensors on the meta device; ties stay ties. Small buffers keep their values, as CPU
tensors, for code that reads them (index tables).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp.trace.twins import DEFAULT, Switch, make_traceable

LARGEST_BUFFER = 1 << 16  # elements


def skeleton(model: nn.Module, switch: Switch = DEFAULT) -> nn.Module:
    """A structural copy of `model` without its weights, ready to be traced.

    `switch` says which kernels it runs in place of those that a CPU cannot trace.
    """
    bare = weightless_copy(model)
    make_traceable(bare, switch)
    return bare


def weightless_copy(model: nn.Module, known: Mapping[int, torch.Tensor] | None = None) -> nn.Module:
    """A structural copy of `model` without its weights, that calls the kernels that `model` calls.

    `known` has what is to stand for a tensor, by its id, where that is no empty one of the same shape.
    """
    memo: dict[int, Any] = dict(known or {})
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _weightless(parameter)
        for value in (*module._buffers.values(), *module.__dict__.values()):
            for tensor in _tensors(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = _light(tensor)
    try:
        bare: nn.Module = copy.deepcopy(model, dict(memo))
    except Exception:  # something in it does not copy (a lock, a process group): share that
        bare = _copy_module(model, memo)
    return bare


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a parameter or buffer has no shape yet (`nn.LazyLinear` before its first call)."""
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) in (list, tuple):
        return [t for item in value for t in _tensors(item)]
    if type(value) is dict and len(value) < 1000:
        return [t for item in value.values() if isinstance(item, torch.Tensor) for t in _tensors(item)]
    return []


def _weightless(parameter: torch.Tensor) -> torch.Tensor:
    if is_lazy(parameter):
        return parameter
    empty = torch.empty_strided(
        tuple(parameter.shape), parameter.stride(), dtype=parameter.dtype, device="meta"
    )
    made = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


def _light(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):  # a parameter kept in a plain attribute or list
        return _weightless(tensor)
    if tensor.device.type != "meta" and tensor.numel() <= LARGEST_BUFFER and tensor.layout is torch.strided:
        return tensor.detach().to("cpu", copy=True).requires_grad_(tensor.requires_grad)
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy`, but an attribute that cannot be copied is shared."""
    if id(module) in memo:
        made: nn.Module = memo[id(module)]
        return made
    made = module.__new__(type(module))
    memo[id(module)] = made
    for name, value in module.__dict__.items():
        if name == "_modules":
            made.__dict__[name] = {
                n: _copy_module(child, memo) if child is not None else None for n, child in value.items()
            }
            continue
        try:
            made.__dict__[name] = copy.deepcopy(value, memo)
        except Exception:
            made.__dict__[name] = value
    return made
