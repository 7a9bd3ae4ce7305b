"""From a device mesh to named groups, and the check at the start that all ranks are about to do the same."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autotp.errors import AutoTPError, RankMismatchError
from autotp.runtime.group import register_group, register_subgroups

_count = itertools.count()
_meshes: dict[str, DeviceMesh] = {}


def default_mesh(device: torch.device | str | None) -> DeviceMesh:
    """One dim over all ranks; without torchrun and without a process group, a world of one rank.

    Raises:
        AutoTPError: torchrun's environment is there, but the process group cannot be made.
    """
    if not dist.is_initialized() and "RANK" not in os.environ:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    kind = torch.device(device).type if device is not None else _accelerator()
    if not dist.is_initialized():
        dist.init_process_group()
    backend = str(dist.get_backend())
    if kind != "cpu" and "nccl" not in backend and device is None:
        kind = "cpu"
    return init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("tp",))


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def connect(mesh: DeviceMesh, parts_by_name: Mapping[str, tuple[tuple[int, ...], ...]]) -> str:
    """Register the mesh's group, and the subgroups that a plan names, under a prefix of their own; the prefix.

    ``parts_by_name`` names groups under the prefix ''; ranks in the parts are places in the mesh.
    """
    prefix = f"autotp{next(_count)}"
    _meshes[prefix] = mesh
    for name, parts in sorted(parts_by_name.items()):  # every rank makes the same groups in the same order
        if len(parts) == 1:
            register_group(prefix + name, mesh.get_group())
        else:
            register_subgroups(prefix + name, _in_world(mesh, parts))
    return prefix


def mesh_of(prefix: str) -> DeviceMesh:
    """The mesh that was connected under this prefix.

    Raises:
        AutoTPError: in another process, say.
    """
    if prefix not in _meshes:
        raise AutoTPError("this model was sharded in another process, whose device mesh is not known here.")
    return _meshes[prefix]


def _in_world(mesh: DeviceMesh, parts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """The parts of every mesh alike (one for each data-parallel replica), as global ranks."""
    mine: list[int] = mesh.mesh.tolist()
    everyone: list[list[int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    meshes = {tuple(ranks) for ranks in everyone if ranks is not None}
    return [[ranks[i] for i in part] for ranks in sorted(meshes) for part in parts]


@dataclass(frozen=True)
class Verdict:
    """What one rank tells the others before anything is changed.

    Attributes:
        stage: ``"start"`` of planning anew, ``"attempt"`` of a rewriting, or ``"end"`` of planning.
        fingerprint: of its model and plan, None where it has none.
        failure: why it cannot plan at all.
        error: (text, module, keys) of a `RewriteError`, after which all plan once more without what was in the way.
        diff: of the source that its attempt patches.
    """

    stage: str
    fingerprint: str | None
    failure: str | None = None
    error: tuple[str, str | None, tuple[str, ...]] | None = None
    diff: str = ""


def agree(mesh: DeviceMesh, mine: Verdict) -> list[Verdict]:
    """Every rank's verdict, in the order of the ranks; all are at the same stage of the same plan.

    Raises:
        RankMismatchError: the ranks hold different models or plans, or another rank could not plan.
    """
    everyone = [mine] * mesh.size()
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    if mine.failure is not None:
        return everyone  # raised by the caller, with its own traceback
    for rank, verdict in enumerate(everyone):
        if verdict.failure is not None:
            raise RankMismatchError(f"rank {rank} could not plan: {verdict.failure}")
    if len({(verdict.stage, verdict.fingerprint) for verdict in everyone}) > 1:
        listing = ", ".join(f"rank {rank}: {verdict.fingerprint}" for rank, verdict in enumerate(everyone))
        raise RankMismatchError(
            f"the ranks hold different models or plans ({listing}). "
            "Build the same model, with the same arguments, on each rank."
        )
    return everyone
