"""The state of a training run through ``torch.distributed.checkpoint``, resharded by it between degrees.

A sharded parameter, and what the optimizer keeps in its shape, is described to it as `Pieces` of the whole tensor.
What is saved takes the place of what was there in one step, when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..errors import CheckpointError
from ..newcomers import ready
from ..rewrite.state import Sharding, dims_by_id, sharding_of
from ..runtime.group import get_group
from .consensus import conclude, together
from .folder import abandon, begin, finish
from .pieces import Pieces
from .state_files import PieceReader, PieceWriter, as_plain, is_ours

RNG = "rng"


def save_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Model, optimizer, scheduler and random state, through ``torch.distributed.checkpoint``; every rank calls it.

    A directory that exists is replaced in one step when all is on disk; killed before, it is as it was.

    Args:
        extra: plain values of your own (the number of the step), which :func:`load_training_state` gives back.

    Raises:
        CheckpointError: on every rank (a full disk, say); what was there before is as it was.
    """
    group = _world()
    rank = 0 if group is None else dist.get_rank()
    ready(model, "autotp.save_training_state")
    sharding = sharding_of(model)
    replica = _replica(sharding, group)
    target: list[str | None] = [None]
    with together(group):
        plain = as_plain(
            {
                "groups": _settings(model, optimizer),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "extra": dict(extra or {}),
            }
        )
        state = _model_state(model, sharding) | _optimizer_state(model, sharding, optimizer)
        for kind, value in _random_states(model).items():
            state[f"{RNG}.{replica}.{kind}"] = value
    with together(group):
        if rank == 0:
            target = [str(begin(Path(path)))]
    if group is not None:
        dist.broadcast_object_list(target, src=0)
    assert target[0] is not None
    temporary = Path(target[0])
    try:
        with _told_to_all():
            dcp_save(state, storage_writer=PieceWriter(temporary, rank, plain), no_dist=group is None)
        failure: Exception | None = None
        if rank == 0:
            try:
                finish(temporary, Path(path), is_ours)
            except CheckpointError as error:
                failure = error
        conclude(group, failure)
    except Exception:
        if rank == 0:
            abandon(temporary)
        raise


def load_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Read what :func:`save_training_state` wrote, at this or any other degree; ``extra`` comes back.

    Every rank calls it. Each has the random state of its replica; replicas beyond those that were saved draw numbers
    of their own.

    Raises:
        CheckpointError: it is damaged, another model's or another optimizer's; on every rank.
    """
    group = _world()
    ready(model, "autotp.load_training_state")
    sharding = sharding_of(model)
    replica = _replica(sharding, group)
    with together(group):
        reader = PieceReader(Path(path))
        rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
        reader.folder.verify(rank, ranks)
    with together(group):
        names = _names(model)
        state = _model_state(model, sharding)
        kept: dict[str, dict[str, Tensor]] = {}
        if optimizer is not None:
            _refuse_other_groups(optimizer, names, reader)
            kept = _room(optimizer, names, reader, model, sharding, state)
        saved = 1 + max((int(key.split(".")[1]) for key in reader.tensors if key.startswith(f"{RNG}.")), default=0)
        random = {}
        for kind in _random_states(model):
            key = f"{RNG}.{replica % saved}.{kind}"
            if key in reader.tensors:
                random[kind] = state[key] = torch.empty(reader.tensors[key].size, dtype=torch.uint8)
        for name, value in state.items():
            if name not in reader.tensors:
                raise CheckpointError(f"{path}: has no {name!r}: it is another model's")
            there = tuple(reader.tensors[name].size)
            if there != tuple(value.shape):
                raise CheckpointError(
                    f"{path}: {name!r} has shape {there} there and {tuple(value.shape)} in the model"
                )
    with _told_to_all():
        dcp_load(state, storage_reader=reader, no_dist=group is None)
    _set_random_states(model, random, replica // saved)
    if optimizer is not None:
        _restore(optimizer, names, kept, reader.plain["groups"])
    if scheduler is not None:
        scheduler.load_state_dict(reader.plain["scheduler"])
    extra: dict[str, Any] = reader.plain["extra"]
    return extra


# ---- who is there -----------------------------------------------------------------------------------------


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _replica(sharding: Sharding | None, group: dist.ProcessGroup | None) -> int:
    """Which of several replicas of the sharded model this rank belongs to."""
    if group is None:
        return 0
    own = None if sharding is None else get_group(sharding.rank.prefix).process_group
    first = dist.get_rank() if own is None else min(dist.get_process_group_ranks(own))
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, first)
    return sorted(set(everyone)).index(first)


@contextlib.contextmanager
def _told_to_all() -> Iterator[None]:
    """What fails in ``torch.distributed.checkpoint`` on any rank fails on all, as a `CheckpointError`."""
    with warnings.catch_warnings():
        # that there is no process group, where there is none
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = sorted(error.failures.items())[0]
            raise CheckpointError(f"rank {rank} failed: {type(cause).__name__}: {cause}") from error


# ---- the parts of the state -------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _model_state(model: nn.Module, sharding: Sharding | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    wrap = _Wrap(model, sharding)
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[f"model.{name}"] = wrap(value.detach(), value)
    return found


def _optimizer_state(
    model: nn.Module, sharding: Sharding | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    names = _names(model)
    wrap = _Wrap(model, sharding)
    for parameter, values in {} if optimizer is None else optimizer.state.items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"the optimizer keeps a {type(value).__name__} as {key!r}, not a tensor")
            found[f"optim.{names[id(parameter)]}.{key}"] = wrap(value, parameter)
    return found


class _Wrap:
    """A tensor of a sharded parameter's shape as pieces of the whole; others as they are."""

    def __init__(self, model: nn.Module, sharding: Sharding | None) -> None:
        self.rank = None if sharding is None else sharding.rank
        self.dims_of = {} if sharding is None else dims_by_id(model, sharding.dims)

    def __call__(self, value: Tensor, parameter: Tensor) -> Tensor:
        dims = self.dims_of.get(id(parameter))
        if self.rank is None or dims is None or value.shape != parameter.shape:
            return value
        return Pieces(value, dims, self.rank)


def _settings(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    names = _names(model)
    return [
        {
            **{k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in ([] if optimizer is None else optimizer.param_groups)
    ]


def _refuse_other_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str], reader: PieceReader) -> None:
    mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if mine != [group["params"] for group in reader.plain["groups"]]:
        raise CheckpointError(f"{reader.folder.path}: the optimizer there has other parameter groups")


def _room(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    reader: PieceReader,
    model: nn.Module,
    sharding: Sharding | None,
    state: dict[str, Tensor],
) -> dict[str, dict[str, Tensor]]:
    """Memory for what the optimizer keeps of each parameter; it is put into ``state``, to be read."""
    kept: dict[str, dict[str, Tensor]] = {}
    wrap = _Wrap(model, sharding)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            prefix = f"optim.{name}."
            whole = wrap(parameter.detach(), parameter).shape
            for full, there in reader.tensors.items():
                key = full.removeprefix(prefix)
                if not full.startswith(prefix) or "." in key:
                    continue
                like = parameter.detach() if there.size == whole else torch.empty(there.size)
                value = torch.zeros_like(like, dtype=there.properties.dtype)
                kept.setdefault(name, {})[key] = value
                state[full] = wrap(value, parameter) if there.size == whole else value
    return kept


def _restore(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    kept: Mapping[str, dict[str, Tensor]],
    groups: list[dict[str, Any]],
) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if key != "params":
                old = group.get(key)
                group[key] = tuple(value) if isinstance(old, tuple) else value
        for parameter in group["params"]:
            found = kept.get(names[id(parameter)])
            if found is not None:
                optimizer.state[parameter] = found


# ---- random states ----------------------------------------------------------------------------------------


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """By the type of device: the CPU's, and those of the devices that the model is on."""
    kinds = {p.device.type for p in model.parameters()} - {"cpu", "meta"}
    found = {"cpu": torch.get_rng_state()}
    found.update({kind: torch.get_device_module(kind).get_rng_state() for kind in sorted(kinds)})
    return found


def _set_random_states(model: nn.Module, states: Mapping[str, Tensor], round_: int) -> None:
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(kind).set_rng_state(state)
    if round_:  # more replicas than were saved: not the same numbers once more
        torch.manual_seed(int(torch.randint(2**62, ())) + round_)
