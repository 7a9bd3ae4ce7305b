"""Where ``torch.distributed.checkpoint`` puts its pieces: a safetensors file a rank, and one JSON manifest, last.

Its own storage writes its index and its tensors as pickles, which can run any code when they are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..errors import CheckpointError
from .folder import FORMAT, Folder, read_json, write_json
from .tensorfile import DTYPES, NAMES, FileTensor, Writer, read_header

MANIFEST = "autotp_state.json"


def is_ours(name: str) -> bool:
    """Whether a file of this name is part of a training state."""
    return name == MANIFEST or (name.startswith("rank-") and name.endswith(".safetensors"))


@dataclass(frozen=True, slots=True)
class _Written:
    file: str
    key: str
    crc32: int


class PieceWriter(StorageWriter):
    """Writes this rank's pieces to a file of its own, and on the coordinator the manifest.

    Args:
        plain: what is no tensor, for the manifest.
    """

    def __init__(self, folder: Path, rank: int, plain: Mapping[str, Any]) -> None:
        self.folder, self.rank, self.plain = folder, rank, plain

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        keys = [_key(item.index) for item in plan.items]
        layout = {}
        for key, item in zip(keys, plan.items, strict=True):
            if item.tensor_data is None:
                raise CheckpointError(f"{item.index.fqn} is no tensor")
            layout[key] = (item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes))
        file = f"rank-{self.rank:05d}.safetensors"
        writer = Writer(self.folder / file, layout)
        try:
            for key, item in zip(keys, plan.items, strict=True):
                value = planner.resolve_data(item)
                assert isinstance(value, torch.Tensor)
                writer.add(key, value)
            writer.close()
        finally:
            writer.abandon()
        done.set_result(
            [
                WriteResult(item.index, 0, _Written(file, key, writer.crc32[key]))
                for key, item in zip(keys, plan.items, strict=True)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for own in results for result in own}
        tensors: dict[str, Any] = {}
        for fqn, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            pieces = []
            for chunk in found.chunks:
                there: _Written = written[MetadataIndex(fqn, chunk.offsets)]
                pieces.append(
                    {
                        "offset": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": there.file,
                        "key": there.key,
                        "crc32": there.crc32,
                    }
                )
            tensors[fqn] = {
                "dtype": NAMES[found.properties.dtype],
                "shape": list(found.size),
                "pieces": pieces,
            }
        write_json(
            self.folder / MANIFEST, {"format": FORMAT, "plain": dict(self.plain), "tensors": tensors}
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


class PieceReader(StorageReader):
    """Reads the pieces that a rank wants, whatever the ranks were that wrote them.

    Raises:
        CheckpointError: the folder is no training state, or one that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / MANIFEST).exists():
            raise CheckpointError(
                f"{folder}: has no {MANIFEST}: it is not what autotp.save_training_state has written"
            )
        manifest = read_json(folder / MANIFEST)
        try:
            version = int(manifest["format"])
            if version != FORMAT:
                raise CheckpointError(
                    f"{folder / MANIFEST}: is of format {version}, this autotp reads {FORMAT}"
                )
            self.plain: dict[str, Any] = manifest["plain"]
            self._find(folder, manifest["tensors"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: is no manifest of autotp") from error

    def _find(self, folder: Path, entries: Mapping[str, Any]) -> None:
        """Where each piece is; the headers of the files have to say so too."""
        files: dict[str, dict[str, FileTensor]] = {}
        crc32: dict[str, int] = {}
        by_key: dict[str, FileTensor] = {}
        self._pieces: dict[MetadataIndex, FileTensor] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        for fqn, entry in entries.items():
            chunks = []
            dtype = DTYPES[entry["dtype"]]
            for piece in entry["pieces"]:
                name, key = Path(piece["file"]).name, piece["key"]
                if name not in files:
                    files[name] = read_header(folder / name)
                found = files[name].get(key)
                if found is None or found.shape != tuple(piece["sizes"]) or found.dtype != dtype:
                    raise CheckpointError(
                        f"{folder / name}: has no {key!r} of {dtype} {tuple(piece['sizes'])}, though {MANIFEST} says so"
                    )
                self._pieces[MetadataIndex(fqn, piece["offset"])] = found
                by_key[f"{name}:{key}"], crc32[f"{name}:{key}"] = found, int(piece["crc32"])
                chunks.append(ChunkStorageMetadata(torch.Size(piece["offset"]), torch.Size(piece["sizes"])))
            shape = torch.Size(entry["shape"])
            self.tensors[fqn] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
        self.folder = Folder(folder, by_key, crc32)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self.tensors))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            box = [[(start, n)] for start, n in zip(item.storage_offsets, item.lengths, strict=True)]
            self._pieces[item.storage_index].read_into(box, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def as_plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON keeps of it.

    Raises:
        CheckpointError: it has values that are not plain.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"scheduler, optimizer settings and extra must be plain values: {error}"
        ) from error
    return found


def _key(index: MetadataIndex) -> str:
    return index.fqn if not index.offset else f"{index.fqn}@{','.join(map(str, index.offset))}"
