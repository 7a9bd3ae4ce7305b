"""Changing the class of a module in place.

A sharded module is the user's own module with another class, so its hooks, its name, its parameters' names,
what points at it and ``isinstance(m, nn.Linear)`` all stay. The new class derives from a ``Sharded…`` class
of this package and from the module's own class, and differs in ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import RewriteError
from autotp.runtime.wire import narrow_runs


class Sharded(nn.Module):
    """What all sharded modules have in common. ``_tp`` holds the options, one frozen dataclass a kind."""

    _tp: Any
    _sharded_from: type[nn.Module]
    _sharded_as: tuple[type[nn.Module], bool]

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}tp={self._tp}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the fly, so it has no name by which pickle would find it.
        return _blank, (*self._sharded_as, self._sharded_from), self.__getstate__()  # type: ignore[no-untyped-call]


def become(module: nn.Module, mixin: type[Sharded], options: Any, inner: bool = False) -> None:
    """Change the class of ``module`` to a sharded one; it must be unsharded, and its parameters plain.

    With ``inner`` the module's own forward runs, and what it reaches by ``super()`` is the sharded one.
    """
    module.__class__ = _class_of(mixin, type(module), inner)
    module._tp = options


def check_swappable(module: nn.Module, forward: Any, parameters: Sequence[str]) -> None:
    """Refuse a module whose forward is not the one that the sharded module replaces, or of which one of these
    parameters is parametrized.
    """
    kind = type(module).__qualname__
    if isinstance(module, Sharded):
        raise RewriteError(f"cannot shard a {kind} twice.")
    if forward is not None and type(module).forward is not forward:
        raise RewriteError(
            f"cannot swap a {kind}: its forward is its own, not {forward.__qualname__}. "
            "Shard it by its inner ops."
        )
    if "forward" in module.__dict__:
        raise RewriteError(f"cannot swap a {kind}: this instance has a forward of its own.")
    for name in parameters:
        if name not in module._parameters:
            raise RewriteError(
                f"cannot swap a {kind}: its {name!r} is not a plain parameter (is it parametrized?). "
                "Remove the parametrization, or replicate the module in the plan."
            )


def slice_parameter(module: nn.Module, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> None:
    """Replace a parameter by this rank's runs of its dim. Works on fake and meta tensors too."""
    whole = module._parameters[name]
    if whole is None:
        return
    set_parameter(module, name, take_runs(whole.detach(), dim, runs))


def set_parameter(module: nn.Module, name: str, local: Tensor) -> None:
    """Put a local tensor in the place of a parameter, which keeps whether it is trained."""
    old = module._parameters[name]
    assert old is not None
    new = nn.Parameter(local, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # marks that libraries leave on parameters, such as _is_hf_initialized
    module._parameters[name] = new


def take_runs(tensor: Tensor, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
    """The runs of a dim, in memory of their own, so that the whole tensor can be freed."""
    out = narrow_runs(tensor, dim, [start for start, _ in runs], [length for _, length in runs])
    return out.clone(memory_format=torch.contiguous_format)


_classes: dict[tuple[type, type, bool], Any] = {}


def _class_of(mixin: type[Sharded], base: type[nn.Module], inner: bool) -> Any:
    key = (mixin, base, inner)
    if key not in _classes:
        name = mixin.__name__ if base.__module__.startswith("torch.nn") else f"Sharded{base.__name__}"
        marks = {"_sharded_from": base, "_sharded_as": (mixin, inner), "__module__": mixin.__module__}
        _classes[key] = type(name, (base, mixin) if inner else (mixin, base), marks)
    return _classes[key]


def _blank(mixin: type[Sharded], inner: bool, base: type[nn.Module]) -> Any:
    made = _class_of(mixin, base, inner)
    return made.__new__(made)
