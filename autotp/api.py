"""The public functions: the stages in order, nothing more."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .errors import AutoTPError, PlanError, RankMismatchError
from .plan.plan import Plan
from .prepare import Prepared, prepare
from .rewrite.announce import announce
from .rewrite.apply import apply
from .rewrite.state import Sharding, gather_state_dict, remember, sharding_of
from .runtime.mesh import Verdict, agree, connect, default_mesh

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
    returned as it is.

    Args:
        mesh: the ranks that share the model (default: all of them).
        example_inputs, plan, strict: as for :func:`plan`.
        device: where each slice goes as it is cut, so that the whole model never has to fit there.

    Raises:
        AutoTPError: before anything is changed.
    """
    mesh = default_mesh(device) if mesh is None else mesh
    prepared = prepare_on(model, mesh, example_inputs, plan, strict)
    if prepared is None:
        return model if device is None else model.to(device)
    return carry_out(model, mesh, prepared, device)


def prepare_on(
    model: nn.Module,
    mesh: DeviceMesh,
    example_inputs: ExampleInputs | None,
    plan: PlanLike | None,
    strict: bool,
) -> Prepared | None:
    """Plan and prove on every rank of ``mesh``: what all agreed on; None for one rank, which has nothing to share."""
    tp = mesh.size()
    if mesh.ndim != 1:
        raise PlanError(
            f"parallelize takes one dim of a device mesh, this one has {mesh.ndim} ({mesh.mesh_dim_names}): "
            "pass mesh['tp'], say."
        )
    if sharding_of(model) is not None:
        raise AutoTPError(
            "this model is sharded already: parallelize a model once, before anything else shards it."
        )
    if tp == 1:
        return None
    prepared: Prepared | None = None
    failure: AutoTPError | None = None
    try:
        prepared = prepare(
            model, tp, example_inputs=example_inputs, given=plan, strict=strict, verify=True, mesh=mesh
        )
    except RankMismatchError:
        raise
    except AutoTPError as error:
        failure = error
    fingerprint = None if prepared is None else prepared.fingerprint
    agree(mesh, Verdict("end", fingerprint, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    return prepared


def carry_out(
    model: nn.Module,
    mesh: DeviceMesh,
    prepared: Prepared,
    device: torch.device | str | None = None,
    place: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> nn.Module:
    """Shard ``model`` as it was prepared, for this rank of ``mesh``; every rank has to carry out the same.

    Args:
        place: brings each slice to where it stays as it is cut (default: to ``device``).
    """
    prefix = connect(mesh, prepared.groups())
    rank = prepared.rank(mesh.get_local_rank(), prefix)
    target = None if device is None else torch.device(device)

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if target is None else tensor.to(target)

    # a local constant may put a private copy in the place of the config
    config = model.__dict__.get("config")
    apply(model, prepared.rewriting.program, prepared.constants(rank.rank), rank, place or to_device)
    if target is not None:
        model.to(target)
    remember(model, Sharding(prepared.plan, rank, dict(prepared.rewriting.program.slices), config))
    announce(model)
    return model


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The ordinary, unsharded state dict (original names, shapes and order of rows), on every rank.

    A collective call: every rank of the model's mesh calls it.
    """
    sharding = sharding_of(model)
    if sharding is None:
        return dict(model.state_dict())
    return gather_state_dict(model, sharding)
