"""The public functions: the stages in order, nothing more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .carry import carry_out, prepare_on
from .newcomers import again, take_in_all
from .plan.plan import Plan
from .prepare import prepare
from .rewrite.state import Asked, gather_state_dict
from .runtime.mesh import default_mesh

ExampleInputs = Sequence[Any] | Mapping[str, Any]
PlanLike = Plan | str | os.PathLike[str] | Mapping[str, Any]


def plan(
    model: nn.Module,
    tp: int,
    *,
    example_inputs: ExampleInputs | None = None,
    plan: PlanLike | None = None,
    strict: bool = False,
    verify: bool = True,
) -> Plan:
    """How ``model`` would be sharded over ``tp`` ranks.

    Needs no process group, no weights (the model may be on the meta device) and no GPU, and leaves the model alone.

    Args:
        example_inputs: a tuple of positional or a dict of keyword arguments of the model's forward. Found by
            themselves for transformers models, and guessed for others where the guess is safe.
        plan: overrides, or a whole plan to check against this model: a `Plan`, a YAML file, or a mapping.
        strict: raise instead of replicating what cannot be sharded.
        verify: prove the rewriting too (on weightless copies).

    Raises:
        AutoTPError: with what, where and what to do.
    """
    return prepare(model, tp, example_inputs=example_inputs, given=plan, strict=strict, verify=verify).plan


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    plan: PlanLike | None = None,
    device: torch.device | str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Shard ``model`` in place over a one-dimensional device mesh, and return it: the same object, the same function.

    Call it on every rank, under ``torchrun`` or with an initialised process group. With one rank the model is
    returned as it is. A sharded model into which adapters, say, have been put is planned anew before its next forward.
    Calling this once more, on it or on what wraps it, does so at once; what is not given is as it was the first time.

    Args:
        mesh: the ranks that share the model (default: all of them).
        example_inputs, plan, strict: as for :func:`plan`.
        device: where each slice goes as it is cut, so that the whole model never has to fit there.

    Raises:
        AutoTPError: before anything is changed.
    """
    asked = Asked(example_inputs, plan, strict)
    if again(model, mesh, asked):
        return model if device is None else model.to(device)
    mesh = default_mesh(device) if mesh is None else mesh
    prepared = prepare_on(model, mesh, asked)
    if prepared is None:
        return model if device is None else model.to(device)
    return carry_out(model, mesh, prepared, asked, device)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The ordinary, unsharded state dict (original names, shapes and order of rows), on every rank.

    A collective call: every rank of the model's mesh calls it. The model may be a wrapper of a sharded one (peft's).
    """
    take_in_all(model)
    return gather_state_dict(model)
