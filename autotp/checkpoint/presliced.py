"""Checkpoints cut beforehand: one file a rank, so that a machine reads only its own; and back into one whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.term import Dim
from ..errors import CheckpointError
from ..rewrite.bind import Rank
from ..rewrite.state import dims_by_id
from ..trace.library import is_transformers
from .fill import box_of
from .folder import FORMAT, Folder, abandon, begin, finish, read_json, write_json
from .gathered import Desk
from .lazy import Lazy, lazy, read
from .save import _original, _without_ties, is_ours, shard_bytes, write
from .tensorfile import DTYPES, NAMES, Box, FileTensor, Run, Writer, read_header, take

MANIFEST = "autotp_shards.json"


def file_of(rank: int, tp: int) -> str:
    return f"rank-{rank:05d}-of-{tp:05d}.safetensors"


def is_presliced(path: Path) -> bool:
    return (path / MANIFEST).exists()


def write_presliced(
    model: nn.Module,
    tensors: Mapping[str, Lazy],
    slices: Mapping[str, tuple[Dim, ...]],
    rank_of: Callable[[int], Rank],
    tp: int,
    fingerprint: str,
    out: Path,
    extra_files: list[Path],
    progress: Callable[[int], None],
) -> None:
    """Write every rank's file, one slice in memory at a time."""
    dims_of = dims_by_id(model, slices)
    values = model.state_dict(keep_vars=True)
    kept = _without_ties(model, values)
    boxes = {
        name: [box_of(dims_of.get(id(values[name])), rank_of(r), tensors[name].shape) for r in range(tp)]
        for name in kept
    }
    made = begin(out)
    try:
        crc32: dict[str, dict[str, int]] = {}
        for r in range(tp):
            layout = {
                name: (values[name].dtype, tuple(sum(n for _, n in own) for own in boxes[name][r]))
                for name in kept
            }
            writer = Writer(made / file_of(r, tp), layout)
            try:
                for name in kept:
                    writer.add(name, read(tensors[name], boxes[name][r]).to(values[name].dtype))
                    progress(values[name].nbytes // tp)
                writer.close()
            finally:
                writer.abandon()
            crc32[file_of(r, tp)] = writer.crc32
        for file in extra_files:
            shutil.copyfile(file, made / file.name)
        entries = {
            name: {
                "shape": list(tensors[name].shape),
                "dtype": NAMES[values[name].dtype],
                "boxes": [[[list(map(int, run)) for run in own] for own in box] for box in boxes[name]],
            }
            for name in kept
        }
        manifest = {"format": FORMAT, "tp": tp, "plan": fingerprint, "tensors": entries, "crc32": crc32}
        write_json(made / MANIFEST, manifest)
        finish(made, out, lambda name: is_ours(name) or name == MANIFEST or name.startswith("rank-"))
    except Exception as error:
        abandon(made)
        if isinstance(error, OSError):
            raise CheckpointError(f"{out}: cannot be written: {error}") from error
        raise


@dataclass(frozen=True, slots=True)
class Presliced:
    """A whole tensor of which this rank has its own slice, and no other, in its file."""

    local: FileTensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box

    @property
    def path(self) -> Path:
        return self.local.path

    @property
    def key(self) -> str:
        return self.local.key

    @property
    def nbytes(self) -> int:
        return self.local.nbytes

    def crc32(self) -> int:
        return self.local.crc32()

    def read_into(self, box: Box, out: Tensor) -> None:
        if [list(map(tuple, own)) for own in box] != self.box:
            raise CheckpointError(
                f"{self.path}: {self.key!r} was cut for another plan. Cut the checkpoint once more."
            )
        self.local.read_into([[(0, n)] for n in self.local.shape], out)


def open_presliced(path: Path, rank: int, tp: int) -> tuple[Folder, str]:
    """One rank's file, and the fingerprint of the plan that it was cut for.

    Raises:
        CheckpointError: it was cut for another number of ranks, or is damaged.
    """
    manifest = _manifest(path)
    if manifest["tp"] != tp:
        raise CheckpointError(
            f"{path}: was cut for tp={manifest['tp']}, and this is tp={tp}. Merge it (autotp merge), or cut it again."
        )
    found = _rank_tensors(path, manifest, rank)
    return Folder(path, found, manifest["crc32"][file_of(rank, tp)]), str(manifest["plan"])


def _manifest(path: Path) -> Any:
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not {"format", "tp", "plan", "tensors", "crc32"} <= set(manifest):
        raise CheckpointError(f"{path / MANIFEST}: is no manifest of autotp")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST}: is of format {manifest['format']}, this autotp reads {FORMAT}"
        )
    return manifest


def _rank_tensors(path: Path, manifest: Any, rank: int) -> dict[str, Any]:
    file = path / file_of(rank, manifest["tp"])
    own = read_header(file)
    found: dict[str, Any] = {}
    for name, entry in manifest["tensors"].items():
        box = [[(int(a), int(n)) for a, n in runs] for runs in entry["boxes"][rank]]
        if name not in own:
            raise CheckpointError(f"{file}: has no {name!r}, though {MANIFEST} says so")
        if own[name].shape != tuple(sum(n for _, n in runs) for runs in box):
            raise CheckpointError(f"{file}: {name!r} has shape {own[name].shape}, not what {MANIFEST} says")
        found[name] = Presliced(own[name], tuple(entry["shape"]), DTYPES[entry["dtype"]], box)
    return found


class Merged:
    """A whole tensor, put together from the files of all ranks."""

    def __init__(self, parts: list[Presliced], cache: dict[str, Tensor]) -> None:
        self.parts = parts
        self.shape = parts[0].shape
        self.dtype = parts[0].dtype
        self._cache = cache  # the last one, for a tensor that is written in several pieces

    def read_into(self, box: Box, out: Tensor) -> None:
        key = self.parts[0].key
        if key not in self._cache:
            self._cache.clear()
            whole = torch.empty(self.shape, dtype=self.dtype)
            for part in self.parts:
                local = torch.empty(part.local.shape, dtype=self.dtype)
                part.local.read_into([[(0, n)] for n in part.local.shape], local)
                _put(whole, local, part.box)
            self._cache[key] = whole
        result = self._cache[key]
        for d, runs in enumerate(box):
            result = take(result, d, runs)
        out.copy_(result)


def _put(whole: Tensor, local: Tensor, box: Box, d: int = 0) -> None:
    if d == len(box):
        whole.copy_(local)
        return
    runs: list[Run] = list(box[d])
    done = 0
    for start, length in runs:
        _put(whole.narrow(d, start, length), local.narrow(d, done, length), box, d + 1)
        done += length


def merge(
    path: Path, out: Path, model: Any, max_shard_size: int | str, progress: Callable[[int], None]
) -> None:
    """Write the ordinary checkpoint that a directory was cut from, one tensor in memory at a time.

    Args:
        model: of transformers, without weights, to undo conversions; None: names stay as they are.
    """
    manifest = _manifest(path)
    ranks = [_rank_tensors(path, manifest, r) for r in range(manifest["tp"])]
    for r, own in enumerate(ranks):
        Folder(path, own, manifest["crc32"][file_of(r, manifest["tp"])]).verify(0, 1)
    cache: dict[str, Tensor] = {}
    tensors = {name: lazy(Merged([own[name] for own in ranks], cache)) for name in manifest["tensors"]}
    if model is not None and is_transformers(model):
        tensors = _original(model, tensors, None)

    def extras(target: Path) -> None:
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name != MANIFEST:
                shutil.copyfile(file, target / file.name)

    whole = tensors.values() if model is None else model.parameters()
    count = sum(t.numel() for t in whole)
    write(tensors, out, Desk(None), None, shard_bytes(max_shard_size), count, extras, progress)
