"""Training state through ``torch.distributed.checkpoint``, resharded by it between degrees.

A sharded parameter, and what the optimizer keeps in its shape, is described to it as rectangular pieces of the
whole tensor, at their global offsets: a fused or uneven layout is a few pieces more. Elements that several ranks
hold are written by the first of them.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..axes.layout import indices_of, runs
from ..axes.term import Dim, size_of
from ..errors import CheckpointError
from ..rewrite.bind import Rank
from ..rewrite.state import Sharding, dims_by_id, sharding_of

Piece = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(global offset, local offset, sizes)."""


class Pieces(Tensor):
    """A local tensor as pieces of a global one, as ``torch.distributed.checkpoint`` asks for them."""

    _local: Tensor
    _pieces: list[Piece]
    _own: list[Piece]

    @staticmethod
    def __new__(cls, local: Tensor, dims: Sequence[Dim], rank: Rank) -> Pieces:
        shape = [size_of(dim) for dim in dims]
        made: Pieces = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        made._local = local.detach()
        made._pieces = _pieces([runs(dim, rank.partition, rank.rank) for dim in dims])
        made._own = _pieces(_own_runs(dims, rank), made._pieces)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func} on the pieces of a tensor")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pieces({tuple(self.shape)})"

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk((offset, at, sizes)), properties, self.shape),
            )
            for offset, at, sizes in self._own
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        self._own = (
            self._pieces
        )  # asked for when it is loaded: then into all of each piece, not what would be written
        return [_chunk(piece) for piece in self._pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offset, at, sizes in (*self._own, *self._pieces):
            if index.offset is not None and tuple(index.offset) == offset:
                part = self._local
                for d, (start, length) in enumerate(zip(at, sizes, strict=True)):
                    part = part.narrow(d, start, length)
                return part
        raise CheckpointError(f"{index.fqn}: this rank has no piece at {index.offset}")


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece[0]), torch.Size(piece[2]))


def _pieces(box: Sequence[Sequence[tuple[int, int]]], within: Sequence[Piece] | None = None) -> list[Piece]:
    """The rectangles of a box; with ``within``, their local offsets are those in these pieces."""
    found: list[Piece] = []
    for combination in itertools.product(*box):
        offset = tuple(start for start, _ in combination)
        sizes = tuple(length for _, length in combination)
        found.append((offset, offset, sizes))
    if within is None:
        local: list[list[int]] = []
        for own in box:
            local.append([sum(n for _, n in own[:i]) for i in range(len(own))])
        return [(o, at, s) for (o, _, s), at in zip(found, itertools.product(*local), strict=True)]
    placed: list[Piece] = []
    for offset, _, sizes in found:
        for start, at, size in within:
            if all(s <= o and o + n <= s + m for o, n, s, m in zip(offset, sizes, start, size, strict=True)):
                inside = tuple(a + o - s for a, o, s in zip(at, offset, start, strict=True))
                placed.append((offset, inside, sizes))
                break
        else:
            raise CheckpointError(f"a piece at {offset} is in none of the rank's")
    return placed


def _own_runs(dims: Sequence[Dim], rank: Rank) -> list[list[tuple[int, int]]]:
    """The runs that this rank writes: those of its own that no earlier rank has."""
    held = [d for d, dim in enumerate(dims) if rank.sharded((dim,))]
    mine = [runs(dim, rank.partition, rank.rank) for dim in dims]
    if not held:
        return mine if rank.rank == 0 else [[] for _ in dims]
    if len(held) > 1:
        earlier = [[runs(dim, rank.partition, r) for dim in dims] for r in range(rank.rank)]
        return [[] for _ in dims] if mine in earlier else mine
    d = held[0]
    taken = np.zeros(size_of(dims[d]), dtype=bool)
    for r in range(rank.rank):
        taken[indices_of(runs(dims[d], rank.partition, r))] = True
    own: list[tuple[int, int]] = []
    for start, length in mine[d]:
        free = start + np.flatnonzero(~taken[start : start + length])
        for part in np.split(free, np.flatnonzero(np.diff(free) != 1) + 1):
            if len(part):
                own.append((int(part[0]), len(part)))
    mine[d] = own
    return mine


# ---- the state of a training run --------------------------------------------------------------------------

JSON, RNG = (
    "autotp.json",
    "autotp.rng",
)  # what is no tensor is text in a tensor of bytes, so that nothing is pickled


def save_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Model, optimizer, scheduler and random state, through ``torch.distributed.checkpoint``; every rank calls it.

    Args:
        extra: plain values of your own (the number of the step), which :func:`load_training_state` gives back.
    """
    sharding = sharding_of(model)
    state = _model_state(model, sharding)
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        names = _names(model)
        dims_of = _dims_of(model, sharding)
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    raise CheckpointError(
                        f"the optimizer keeps a {type(value).__name__} as {key!r}, not a tensor"
                    )
                state[f"optim.{names[id(parameter)]}.{key}"] = _wrap(value, parameter, dims_of, sharding)
        for group in optimizer.param_groups:
            rest = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            groups.append({**rest, "params": [names[id(p)] for p in group["params"]]})
    plain = {
        "groups": groups,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(plain).encode()
    except TypeError as error:
        raise CheckpointError(
            f"scheduler, optimizer settings and extra must be plain values: {error}"
        ) from error
    state[JSON] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    state[RNG] = torch.get_rng_state()
    dcp_save(state, checkpoint_id=path)


def load_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Read what :func:`save_training_state` wrote, at this or any other degree; ``extra`` comes back.

    Raises:
        CheckpointError: it is another model's or another optimizer's.
    """
    path = Path(path)
    sharding = sharding_of(model)
    if not (path / ".metadata").exists():
        raise CheckpointError(f"{path}: has no .metadata: it is no training state, or an unfinished one")
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state = _model_state(model, sharding)
    names = _names(model)
    kept: dict[str, dict[str, Tensor]] = {}
    if optimizer is not None:
        dims_of = _dims_of(model, sharding)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                prefix = f"optim.{name}."
                whole = _wrap(parameter.detach(), parameter, dims_of, sharding).shape
                for full, there in metadata.items():
                    key = full.removeprefix(prefix)
                    if (
                        not full.startswith(prefix)
                        or "." in key
                        or not isinstance(there, TensorStorageMetadata)
                    ):
                        continue
                    like = parameter.detach() if there.size == whole else torch.empty(there.size)
                    value = torch.zeros_like(like, dtype=there.properties.dtype)
                    kept.setdefault(name, {})[key] = value
                    state[full] = _wrap(value, parameter, dims_of, sharding) if there.size == whole else value
    for key in (JSON, RNG):
        bytes_there = metadata.get(key)
        if not isinstance(bytes_there, TensorStorageMetadata):
            raise CheckpointError(f"{path}: was not written by autotp.save_training_state")
        state[key] = torch.empty(bytes_there.size, dtype=torch.uint8)
    for name, value in state.items():
        found = metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{path}: has no {name!r}: it is another model's")
        if found.size != value.shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(found.size)} there and {tuple(value.shape)} in the model"
            )
    dcp_load(state, checkpoint_id=path)
    plain: dict[str, Any] = json.loads(bytes(state[JSON].tolist()))
    torch.set_rng_state(state[RNG])
    if optimizer is not None:
        _restore(optimizer, names, kept, plain["groups"], path)
    if scheduler is not None:
        scheduler.load_state_dict(plain["scheduler"])
    extra: dict[str, Any] = plain["extra"]
    return extra


def _restore(
    optimizer: Any, names: Mapping[int, str], kept: Mapping[str, dict[str, Tensor]], groups: Any, path: Path
) -> None:
    if [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups] != [g["params"] for g in groups]:
        raise CheckpointError(f"{path}: the optimizer there has other parameter groups")
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if key != "params":
                old = group.get(key)
                group[key] = tuple(value) if isinstance(old, tuple) else value
        for parameter in group["params"]:
            found = kept.get(names[id(parameter)])
            if found is not None:
                optimizer.state[parameter] = found


def _dims_of(model: nn.Module, sharding: Sharding | None) -> Mapping[int, tuple[Dim, ...]]:
    return {} if sharding is None else dims_by_id(model, sharding.dims)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _model_state(model: nn.Module, sharding: Sharding | None) -> dict[str, Tensor]:
    dims_of = _dims_of(model, sharding)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[f"model.{name}"] = _wrap(value.detach(), value, dims_of, sharding)
    return found


def _wrap(
    value: Tensor, parameter: Tensor, dims_of: Mapping[int, tuple[Dim, ...]], sharding: Sharding | None
) -> Tensor:
    dims = dims_of.get(id(parameter))
    if sharding is None or dims is None or value.shape != parameter.shape:
        return value
    return Pieces(value, dims, sharding.rank)
