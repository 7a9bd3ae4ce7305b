"""Save a sharded model in the ordinary layout: names, shapes, files and index as the unsharded model's would be."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from ..newcomers import ready
from ..rewrite.state import Sharding, sharding_of
from ..runtime.group import get_group
from ..trace.library import is_transformers
from .consensus import conclude
from .folder import FORMAT, INDEX, MANIFEST, SINGLE, abandon, begin, finish, write_json
from .gathered import Desk, whole_state
from .lazy import Lazy, lazy, read, storage_of
from .tensorfile import Writer

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def is_ours(name: str) -> bool:
    """Whether a file of this name is part of a checkpoint's weights."""
    return name in (SINGLE, INDEX, MANIFEST) or _FILE.fullmatch(name) is not None


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    save_original_format: bool = True,
) -> None:
    """Write the ordinary, unsharded checkpoint: what transformers or ``load_state_dict`` of the plain model load.

    Every rank of the process group calls it. One tensor at a time is gathered, to the rank that writes its file: files
    are spread over the ranks; of several replicas of a sharded model the one with global rank 0 writes. A directory
    that exists is replaced in one step when all is on disk; killed before, it is as it was. Other files in it stay.

    Args:
        max_shard_size: of a file; with more than one there is an index.
        save_original_format: undo transformers' conversions (stacked experts become one tensor an expert again).

    Raises:
        CheckpointError: on every rank (a full disk, say); the directory is as it was.
    """
    ready(model, "autotp.save_pretrained")
    sharding = sharding_of(model)
    config = None if sharding is None else sharding.config
    names, desk = whole_state(model, sharding)
    kept = _without_ties(model, {name: source.value for name, source in names.items()})
    made: dict[int, Lazy] = {}
    tensors = {name: made.setdefault(id(names[name]), lazy(names[name])) for name in kept}
    if save_original_format and is_transformers(model):
        tensors = _original(model, tensors, config)

    def extras(target: Path) -> None:
        if is_transformers(model):
            _save_config(model, target, config)

    count = sum(math.prod(names[name].shape) for name, _ in model.named_parameters() if name in names)
    write(tensors, Path(directory), desk, sharding, shard_bytes(max_shard_size), count, extras)


def write(
    tensors: Mapping[str, Lazy],
    folder: Path,
    desk: Desk,
    sharding: Sharding | None,
    max_bytes: int,
    parameters: int,
    extras: Callable[[Path], None] = lambda target: None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write tensors one at a time to files of at most ``max_bytes``, with index and manifest; then exchange folders.

    Args:
        parameters: how many elements they have in all, for the index.
    """
    rank = 0 if sharding is None else sharding.rank.rank
    tp = 1 if sharding is None else sharding.rank.tp
    group = None if sharding is None else get_group(sharding.rank.prefix).process_group
    world = None if group is None else dist.group.WORLD
    writes = _rank() == 0 if group is None else 0 in dist.get_process_group_ranks(group)
    files = split(tensors, max_bytes)
    failure: Exception | None = None
    target: list[str | None] = [None]
    if rank == 0 and writes:
        try:
            target = [str(begin(folder))]
        except CheckpointError as error:
            failure = error
    if group is not None:
        dist.broadcast_object_list(target, group_src=0, group=group)
    conclude(world, failure)
    temporary = Path(target[0]) if target[0] is not None else None
    crc32: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for i, (name, keys) in enumerate(files.items()):
        desk.writer = i % tp
        writer: Writer | None = None
        for key in keys:
            # on every rank, also after a failure: the others wait for this rank's part
            value = read(tensors[key])
            if rank == desk.writer and temporary is not None and failure is None:
                try:
                    if writer is None:
                        layout = {k: (tensors[k].dtype, tuple(tensors[k].shape)) for k in keys}
                        writer = Writer(temporary / name, layout)
                    writer.add(key, value)
                except Exception as error:
                    failure = error
            del value
            progress(tensors[key].nbytes)
        if writer is not None:
            try:
                if failure is None:
                    writer.close()
                    crc32 |= writer.crc32
                    sizes[name] = writer.size
            except Exception as error:
                failure = error
            finally:
                writer.abandon()
    if group is not None:
        everyone: list[Any] = [None] * tp
        dist.all_gather_object(everyone, (crc32, sizes), group=group)
        for own_crc32, own_sizes in everyone:
            crc32, sizes = {**crc32, **own_crc32}, {**sizes, **own_sizes}
    try:
        conclude(world, failure)
        failure = None
        if rank == 0 and temporary is not None:
            try:
                extras(temporary)
                if len(files) > 1:
                    total = sum(t.nbytes for t in tensors.values())
                    index = {key: name for name, keys in files.items() for key in keys}
                    metadata = {"total_parameters": parameters, "total_size": total}
                    write_json(
                        temporary / INDEX, {"metadata": metadata, "weight_map": dict(sorted(index.items()))}
                    )
                write_json(temporary / MANIFEST, {"format": FORMAT, "files": sizes, "crc32": crc32})
                finish(temporary, folder, is_ours)
            except Exception as error:
                failure = error
        conclude(world, failure)
    except Exception:
        if rank == 0 and temporary is not None:
            abandon(temporary)
        raise


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def split(tensors: Mapping[str, Lazy], max_bytes: int) -> dict[str, list[str]]:
    """Files and their keys, filled in order; a tensor that is larger than a file may be gets one of its own.

    Views of one memory (the experts of a stack) stay together, as in the files that transformers writes.
    """
    by_storage: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        by_storage.setdefault(id(storage_of(tensor)), []).append(key)
    groups: list[list[str]] = []
    current: list[str] = []
    size = 0
    for keys in by_storage.values():
        nbytes = storage_of(tensors[keys[0]]).nbytes
        if nbytes > max_bytes:
            groups.append(keys)
            continue
        if current and size + nbytes > max_bytes:
            groups.append(current)
            current, size = [], 0
        current += keys
        size += nbytes
    if current or not groups:
        groups.append(current)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def shard_bytes(size: int | str) -> int:
    """``"5GB"`` as bytes."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", size.strip().upper())
    if found is None or found[2] not in UNITS:
        raise CheckpointError(f"a shard size is a number of bytes or text such as '5GB', not {size!r}")
    return int(float(found[1]) * UNITS[found[2]])


def _without_ties(model: Any, values: Mapping[str, Tensor]) -> list[str]:
    """The names to save: of tied ones the one that the library loads from (the first, for a plain module)."""
    derived: set[str] = set()
    ignored: set[str] = set()
    if is_transformers(model):
        derived = set(getattr(model, "all_tied_weights_keys", None) or {})
        ignored = set(model._keys_to_ignore_on_save or ())
    by_value: dict[int, list[str]] = {}
    for name, value in values.items():
        if name not in ignored:
            by_value.setdefault(id(value), []).append(name)
    keep = {min(names, key=lambda n: n in derived) for names in by_value.values()}
    return [name for name in values if name in keep]


class _Whole:
    """What transformers' conversions may ask of the model: sizes and config of the whole one."""

    def __init__(self, model: Any, tensors: Mapping[str, Lazy], config: Any) -> None:
        self._model, self._tensors, self.config = model, tensors, config

    def get_parameter(self, name: str) -> Lazy:
        return self._tensors[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _original(model: Any, tensors: dict[str, Lazy], config: Any) -> dict[str, Lazy]:
    """transformers' conversions undone, on tensors that are not gathered yet."""
    loading = importlib.import_module("transformers.core_model_loading")
    whole = _Whole(model, tensors, model.config if config is None else config)
    reverted: dict[str, Lazy] = loading.revert_weight_conversion(whole, tensors)
    return reverted


def _save_config(model: Any, target: Path, config: Any) -> None:
    config = model.config if config is None else config
    dtype = str(model.dtype).split(".")[1]
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
