"""Building a model without its weights: parameters on the meta device, everything else as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` is what layers make their weights of; the values of `arange`, `ones` and the like are wanted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def weightless() -> Iterator[None]:
    """Modules built in here have their parameters on the meta device and real buffers.

    Under ``torch.device("meta")`` the buffers that a constructor computes (rotary tables, masks, position ids) are
    lost as well, and no checkpoint brings back those that are not persistent.
    """
    made: dict[
        int, tuple[nn.Parameter, nn.Parameter]
    ] = {}  # the real one is kept, so that its id stays its own

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        if id(parameter) not in made:
            bare = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
            )
            bare.__dict__.update(parameter.__dict__)
            made[id(parameter)] = (parameter, bare)
        return made[id(parameter)][1]

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        handle.remove()


def lost_tensors(model: nn.Module) -> list[str]:
    """What no checkpoint can bring back: buffers that are not persistent, and plain tensors, on the meta device."""
    lost = []
    for fqn, module in model.named_modules():
        prefix = f"{fqn}." if fqn else ""
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set:
                lost.append(prefix + name)
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.is_meta and not isinstance(value, nn.Parameter):
                lost.append(prefix + name)
    return lost


def materialize(model: nn.Module, device: torch.device, skip: Mapping[int, object]) -> None:
    """Memory for every parameter and persistent buffer on the meta device, and the rest moved to ``device``.

    Nothing is written yet. Ties stay ties; parameters whose id is in ``skip`` stay as they are.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in skip:
                continue
            if id(parameter) not in made:
                local = nn.Parameter(room(parameter.detach(), device), requires_grad=parameter.requires_grad)
                local.__dict__.update(parameter.__dict__)
                made[id(parameter)] = local
            module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = room(buffer, device)
                module._buffers[name] = made[id(buffer)]
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor) and not value.is_meta and value.device != device:
                module.__dict__[name] = value.to(device)


def room(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; one on the meta device becomes uninitialised memory there."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
