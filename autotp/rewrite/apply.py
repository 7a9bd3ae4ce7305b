"""Carry out a program on a model, for one rank. A trial gives it a skeleton.

Nothing else changes a model, but `undo` and `recut` one that was sharded and is planned anew.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.layout import slice_tensor
from ..axes.term import Dim
from ..errors import RewriteError
from ..runtime.attention import disable_fast_paths
from ..runtime.boundary import PortSteps, add_hooks
from ..runtime.entry import enter_by
from ..runtime.gradients import sync_gradient
from ..runtime.optimizers import replaced, sharded, watch_optimizers
from ..runtime.rng import DrawGate
from ..runtime.sharded_gradient import share_gradient
from ..trace.attributes import read_attribute
from ..trace.provenance import AttrPath
from .bind import Bound, Rank, group_name
from .patch import Applied, Patch, WrapArg, apply_patches
from .patch import Wrap as WrapEdit
from .program import Program, Wrap
from .steps import Step
from .swap import SharedEnters, swap_leaf

AttrKey = tuple[str, AttrPath]
Place = Callable[[Tensor], Tensor]
Cut = Callable[[nn.Module, Mapping[str, tuple[Dim, ...]], Rank, Place], None]


def _stay(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class LocalConstants:
    """The integers of one rank: attributes that change, and size arguments that are patched in the source."""

    attrs: Mapping[AttrKey, int]
    patches: Mapping[str, tuple[Patch, ...]]  # by module


def apply(
    model: nn.Module,
    program: Program,
    constants: LocalConstants,
    rank: Rank,
    place: Place = _stay,
    cut: Cut | None = None,
) -> list[Applied]:
    """Edit ``model`` in place into this rank's part of it; the patches that were made, for their diffs.

    Args:
        place: moves each slice (to its device) as it is cut.
        cut: slices the parameters (default: `slice_parameters`).
    """
    shared = SharedEnters(program, rank)
    (cut or slice_parameters)(model, program.slices, rank, place)
    for leaf in program.leaves:
        try:
            swap_leaf(model.get_submodule(leaf.fqn), leaf, program, rank, shared)
        except RewriteError as error:
            raise RewriteError(str(error), leaf.fqn) from error
    ports = _ports(program, shared)
    whole = ports.pop("", ([], []))
    for fqn, (inputs, outputs) in ports.items():
        add_hooks(model.get_submodule(fqn), inputs, outputs)
    for (fqn, path), value in constants.attrs.items():
        set_attribute(model.get_submodule(fqn), path, value)
    applied = _patch(model, program, constants, rank, shared)
    for fqn, dims in sorted(program.sync.items()):  # every rank puts them into buckets in this order
        module, name = owner(model, fqn)
        parts, part = rank.gradient_sum(fqn, dims)
        sync_gradient(module, name, group_name(rank.prefix, parts), part)
    for fqn, dims in program.slices.items():
        share = rank.gradient_share(fqn, dims)
        module, name = owner(model, fqn)
        if share is not None and name in module._parameters:
            share_gradient(module, name, share)
    enter_by(model, *whole)
    watch_optimizers()
    disable_fast_paths(model)
    return applied


def owner(model: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """The module that has parameter ``fqn``, and the parameter's own name."""
    module, _, name = fqn.rpartition(".")
    return model.get_submodule(module), name


# ---- parameters ----------------------------------------------------------------------------------


def slice_parameters(
    model: nn.Module,
    slices: Mapping[str, tuple[Dim, ...]],
    rank: Rank,
    place: Place = _stay,
) -> None:
    """Replace each parameter (and buffer that goes with parameters) by this rank's slice of it; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    places = places_of(model)
    for fqn, dims in slices.items():
        module, name = owner(model, fqn)
        whole: Tensor | None = module._parameters.get(name)
        if whole is None:
            whole = module._buffers.get(name)
        if whole is None:
            raise RewriteError(f"{fqn} is no plain parameter or buffer")
        if any(whole is local for local in made.values()):
            continue  # tied to one that has been sliced
        own = slice_tensor(whole.detach(), dims, rank.partition, rank.rank)
        local = place(own.clone(memory_format=torch.contiguous_format))
        if isinstance(whole, nn.Parameter):
            local = nn.Parameter(local, requires_grad=whole.requires_grad)
            local.__dict__.update(whole.__dict__)
            sharded(local, fqn)
            replaced(whole, fqn)
        made[id(whole)] = local
        for holder, own_name in places[id(whole)]:
            holder[own_name] = local


def places_of(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """The dicts of modules, and the names in them, that each parameter and buffer is in, by its id."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is not None:
                    places[id(tensor)].append((holder, name))
    return places


# ---- hooks, attributes, patches ------------------------------------------------------------------


def _ports(program: Program, shared: SharedEnters) -> dict[str, tuple[list[PortSteps], list[PortSteps]]]:
    """The steps on what goes into each module, and on what comes out of it."""
    found: dict[str, tuple[list[PortSteps], list[PortSteps]]] = defaultdict(lambda: ([], []))
    bound: dict[tuple[tuple[Step, ...], int | None], tuple[Bound, ...]] = {}
    for boundary, steps in program.hooks.items():
        key = steps, program.hook_share.get(boundary)
        if key not in bound:
            bound[key] = tuple(shared.bind(step, key[1]) for step in steps)
        found[boundary.fqn][boundary.side == "out"].append(PortSteps(boundary.path, bound[key]))
    return found


def set_attribute(module: nn.Module, path: AttrPath, value: int) -> None:
    """Set an integer attribute; what holds it on the way (a config, a tuple) is replaced by a private copy."""
    setattr(module, str(path[0]), _with(getattr(module, str(path[0])), path[1:], value))


def _with(holder: Any, path: AttrPath, value: int) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(holder, (list, tuple)):
        items = [_with(v, rest, value) if i == key else v for i, v in enumerate(holder)]
        return type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items)
    if isinstance(holder, dict):
        return {**holder, key: _with(holder[key], rest, value)}
    private = copy.copy(holder)
    setattr(private, str(key), _with(getattr(holder, str(key)), rest, value))
    return private


def attribute_of(model: nn.Module) -> Callable[[str, AttrPath], int]:
    """How the equation solver reads an attribute."""
    return lambda fqn, path: int(read_attribute(model.get_submodule(fqn), path))


def _patch(
    model: nn.Module, program: Program, constants: LocalConstants, rank: Rank, shared: SharedEnters
) -> list[Applied]:
    patches: dict[str, list[Patch]] = defaultdict(list)
    for fqn, sizes in constants.patches.items():
        patches[fqn] += sizes
    for wrap in program.wraps:
        fn = _chain(wrap, shared)
        edit = WrapEdit(fn) if wrap.operand is None else WrapArg(wrap.operand, fn)
        patches[wrap.module].append(Patch(wrap.frames, (edit,)))
    for draw in program.draws:
        own = DrawGate(rank.prefix)
        if draw.frames is None:
            own.around(model.get_submodule(draw.module))
        else:
            assert draw.operand is not None
            gates = (WrapArg(draw.operand, own.open), WrapEdit(own.close))
            patches[draw.module].append(Patch(draw.frames, gates))
    applied = []
    for fqn, found in patches.items():
        try:
            applied.append(apply_patches(model.get_submodule(fqn), found))
        except RewriteError as error:
            raise RewriteError(f"{fqn or 'the root module'}: {error}", fqn) from error
    return applied


def _chain(wrap: Wrap, shared: SharedEnters) -> Bound:
    steps = tuple(shared.bind(step, wrap.share) for step in wrap.steps)
    return steps[0] if len(steps) == 1 else Chain(steps)


@dataclass(frozen=True, slots=True)
class Chain:
    """Several steps as one callable."""

    steps: tuple[Bound, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x
