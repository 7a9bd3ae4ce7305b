"""What all ranks do together: agree on a plan that each has proven, and carry it out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .errors import AutoTPError, PlanError, RankMismatchError
from .prepare import Prepared, prepare
from .rewrite.announce import announce
from .rewrite.apply import Cut, apply
from .rewrite.state import Asked, Sharding, remember, sharded_in
from .rewrite.undo import record, snapshot
from .runtime.mesh import Verdict, agree, connect


def prepare_on(model: nn.Module, mesh: DeviceMesh, asked: Asked) -> Prepared | None:
    """Plan and prove on every rank of ``mesh``: what all agreed on; None for one rank, which has nothing to share."""
    tp = mesh.size()
    if mesh.ndim != 1:
        raise PlanError(
            f"parallelize takes one dim of a device mesh, this one has {mesh.ndim} ({mesh.mesh_dim_names}): "
            "pass mesh['tp'], say."
        )
    if sharded_in(model):
        raise AutoTPError("this model is sharded already.")
    if tp == 1:
        return None
    prepared: Prepared | None = None
    failure: AutoTPError | None = None
    try:
        prepared = prepare(
            model,
            tp,
            example_inputs=asked.example_inputs,
            given=asked.plan,
            strict=asked.strict,
            verify=True,
            mesh=mesh,
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
    asked: Asked,
    device: torch.device | str | None = None,
    place: Callable[[torch.Tensor], torch.Tensor] | None = None,
    cut: Cut | None = None,
) -> nn.Module:
    """Shard ``model`` as it was prepared, for this rank of ``mesh``; every rank has to carry out the same.

    Args:
        place: brings each slice to where it stays as it is cut (default: to ``device``).
        cut: slices the parameters, where they are not whole.
    """
    prefix = connect(mesh, prepared.groups())
    rank = prepared.rank(mesh.get_local_rank(), prefix)
    target = None if device is None else torch.device(device)

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if target is None else tensor.to(target)

    # a local constant may put a private copy in the place of the config
    config = model.__dict__.get("config")
    before = snapshot(model)
    program = prepared.rewriting.program
    apply(model, program, prepared.constants(rank.rank), rank, place or to_device, cut)
    if target is not None:
        model.to(target)
    remember(model, Sharding(prepared.plan, rank, dict(program.slices), config, asked))
    announce(model)
    record(model, before, program.slices)
    return model
