"""Noting what is put into a sharded model.

What comes (adapters, parametrizations, another head) is whole, and what is there are slices: the plan does not hold any
more. The model is told so, and is planned anew before its next forward (`autotp.newcomers`). Containers without
parameters of their own (checkpoint wrappers) change nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..axes.term import atoms_of
from ..errors import AutoTPError
from ..runtime.parts import PARTS, Parts, bar, parts_of
from .bind import Rank
from .undo import record_of

_watching = False


def watch(model: nn.Module, rank: Rank) -> None:
    """From now on note what is put into ``model``, which is sharded for this rank."""
    global _watching
    parts = Parts(rank.prefix, frozenset(rank.partition.ranges))
    for module in model.modules():
        module.__dict__[PARTS] = parts
    if not _watching:
        register_module_module_registration_hook(_note_module)
        register_module_parameter_registration_hook(_note_parameter)
        _watching = True


def _note_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Before a module is put into another one."""
    parts = parts_of(parent)
    if parts is None or child is None:
        return
    present = parent._modules.get(name)
    inside = dict(child.named_modules(prefix=name))
    newcomer = next((fqn for fqn, module in inside.items() if _is_newcomer(module, parts)), None)
    if newcomer is not None:
        _note(parts, child, f"{newcomer!r}, with parameters of its own, was put into a {_name(parent)}")
    elif present is not None and all(module is not present for module in inside.values()):
        _refuse_partial(parts, present, child, name)
        _note(parts, child, f"{name!r} of a {_name(parent)} was replaced by a {_name(child)}")
    else:
        for module in inside.values():  # a container, which may be filled later
            module.__dict__.setdefault(PARTS, parts)


def _note_parameter(parent: nn.Module, name: str, parameter: Any) -> None:
    """Before a parameter is put into a module; one that takes another's place is loaded, moved or gathered."""
    parts = parts_of(parent)
    if parts is not None and parameter is not None and parent._parameters.get(name) is None:
        _note(parts, parent, f"parameter {name!r} was put into a {_name(parent)}")


def _note(parts: Parts, module: nn.Module, what: str) -> None:
    parts.changed = f"{what} of a sharded model"
    bar(
        module,
        f"{parts.changed}, which has to be planned anew before this {_name(module)} runs. Call the whole model that "
        "was given to autotp.parallelize; what was inside of it cannot run by itself.",
    )


def _is_newcomer(module: nn.Module, parts: Parts) -> bool:
    return parts_of(module) is not parts and any(p is not None for p in module._parameters.values())


def _refuse_partial(parts: Parts, present: nn.Module, child: nn.Module, name: str) -> None:
    """A layer may be put in the place of the wrapper that it was in when what the wrapper added has been merged into
    its weight: right only if each rank could compute all that belongs to its slice."""
    kept = {id(module) for module in child.modules()}
    if not kept & {id(module) for module in present.modules()}:
        return
    gone = [module for module in present.modules() if id(module) not in kept]
    if _axes(gone, parts) - _axes(list(child.modules()), parts):
        raise AutoTPError(
            f"cannot take {name!r} out of its {_name(present)}: that is sharded over an axis that {name!r} has not, so "
            "what has been merged into its weight, if it was, is one rank's part. Undo it; merge into the unsharded "
            "model (autotp.full_state_dict), or replicate the adapter in the plan."
        )


def _axes(modules: list[nn.Module], parts: Parts) -> set[int]:
    records = [record for module in modules if (record := record_of(module)) is not None]
    found = {atom.id for r in records for dims in r.dims.values() for dim in dims for atom in atoms_of(dim)}
    return found & parts.sharded


def _name(module: nn.Module) -> str:
    return type(module).__name__
