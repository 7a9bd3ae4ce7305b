"""A checkpoint as files: which keys are where, the manifest, and the exchange of a whole directory at once."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import pickled
from .pickled import read_pickle
from .tensorfile import Stored, read_header

SINGLE, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "autotp_manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Folder:
    """An opened checkpoint: its tensors by key, and the checksums of its manifest (none without one)."""

    path: Path
    tensors: Mapping[str, Stored]
    crc32: Mapping[str, int]

    @property
    def directory(self) -> Path:
        """Where the config and other files are."""
        return self.path if self.path.is_dir() else self.path.parent

    def verify(self, part: int, parts: int) -> None:
        """Compare one of ``parts`` shares of the tensors with the checksums that were noted when they were written.

        Raises:
            CheckpointError: bytes have changed since.
        """
        keys = sorted(self.crc32, key=lambda k: (-self.tensors[k].nbytes, k))
        for key in keys[part::parts]:
            tensor = self.tensors[key]
            if tensor.crc32() != self.crc32[key]:
                raise CheckpointError(
                    f"{tensor.path}: the bytes of {key!r} are not those that were written (its checksum differs "
                    f"from {MANIFEST}'s). The file is damaged: fetch or write it once more."
                )


def open_folder(path: Path, weights_only: bool = False) -> Folder:
    """Read the headers of a checkpoint: a safetensors file, or a directory with one or with an index of several.

    Args:
        weights_only: read pickles too, where there are no safetensors files.

    Raises:
        CheckpointError: something is missing, truncated or contradicts itself.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return Folder(path, read_header(path), {})
        if weights_only and path.suffix in pickled.SUFFIXES:
            return Folder(path, read_pickle(path), {})
        raise CheckpointError(
            f"{path}: only safetensors files are read, for a pickle can run any code when it is loaded. "
            "weights_only=True reads one that holds nothing but weights."
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    tensors: Mapping[str, Stored]
    alone = sorted(path.glob("*.safetensors"))
    if (path / INDEX).exists():
        tensors = _indexed(path, INDEX, read_header)
    elif (path / SINGLE).exists():
        tensors = read_header(path / SINGLE)
    elif len(alone) == 1:
        tensors = read_header(alone[0])
    elif weights_only and (path / pickled.INDEX).exists():
        tensors = _indexed(path, pickled.INDEX, read_pickle)
    elif weights_only and (path / pickled.SINGLE).exists():
        tensors = read_pickle(path / pickled.SINGLE)
    else:
        raise CheckpointError(
            f"{path}: has neither {SINGLE} nor {INDEX}"
            + (f", but {len(alone)} other safetensors files" if alone else "")
            + (". Its pickles are read with weights_only=True" if _has_pickles(path) else "")
        )
    return Folder(path, tensors, _checksums(path, tensors))


def _has_pickles(path: Path) -> bool:
    return any((path / name).exists() for name in (pickled.SINGLE, pickled.INDEX))


def _indexed(
    path: Path, index_name: str, read: Callable[[Path], Mapping[str, Stored]]
) -> dict[str, Stored]:
    index = read_json(path / index_name)
    try:
        files = {str(k): str(v) for k, v in index["weight_map"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / index_name}: has no weight_map") from error
    tensors: dict[str, Stored] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{path / index_name}: {name!r} is no file name")
        own = read(path / name)
        for key in sorted(k for k, v in files.items() if v == name):
            if key not in own:
                raise CheckpointError(f"{path / name}: has no {key!r}, though {index_name} says so")
            tensors[key] = own[key]
    return {key: tensors[key] for key in files}


def _checksums(path: Path, tensors: Mapping[str, Stored]) -> dict[str, int]:
    if not (path / MANIFEST).exists():
        return {}
    manifest = read_json(path / MANIFEST)
    try:
        sizes = {str(k): int(v) for k, v in manifest["files"].items()}
        found = {str(k): int(v) for k, v in manifest["crc32"].items()}
        version = int(manifest["format"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: is no manifest of autotp") from error
    if version != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: is of format {version}, this autotp reads {FORMAT}")
    for name, size in sizes.items():
        if not (path / name).exists():
            raise CheckpointError(f"{path / name}: is missing, though {MANIFEST} lists it")
        if (path / name).stat().st_size != size:
            raise CheckpointError(
                f"{path / name}: has {(path / name).stat().st_size} bytes, {MANIFEST} says {size}"
            )
    if set(found) != set(tensors):
        key = sorted(set(found) ^ set(tensors))[0]
        raise CheckpointError(
            f"{path}: {key!r} is in {'the files' if key in tensors else MANIFEST} only. Another program has "
            f"changed the checkpoint: delete {MANIFEST} to read it all the same."
        )
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def write_json(path: Path, value: Any) -> None:
    try:
        with open(path, "w") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


# ---- replacing a directory --------------------------------------------------------------------------------


def begin(target: Path) -> Path:
    """A new, empty directory beside ``target``, on the same file system. What killed saves left there goes."""
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target}: is a file, a checkpoint is a directory")
        for left in target.parent.glob(f".{target.name}.saving-*"):
            shutil.rmtree(left, ignore_errors=True)
        made = target.parent / f".{target.name}.saving-{uuid.uuid4().hex[:12]}"
        made.mkdir()
    except OSError as error:
        raise CheckpointError(f"{target}: cannot make a directory beside it: {error}") from error
    return made


def finish(made: Path, target: Path, is_ours: Callable[[str], bool]) -> None:
    """Put ``made`` in the place of ``target`` in one step. Other files of the old directory come along.

    Args:
        is_ours: whether a file of this name belongs to a checkpoint, so that an old one does not come along.
    """
    target = target.absolute()
    try:
        if target.exists():
            for item in target.iterdir():
                if is_ours(item.name) or (made / item.name).exists():
                    continue
                if item.is_dir():
                    shutil.copytree(item, made / item.name, symlinks=True, copy_function=os.link)
                elif item.is_symlink():
                    os.symlink(os.readlink(item), made / item.name)
                else:
                    os.link(item, made / item.name)
        _sync(made)
        if target.exists():
            _exchange(made, target)
            _sync(target.parent)
            shutil.rmtree(made, ignore_errors=True)
        else:
            os.rename(made, target)
            _sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: the new checkpoint cannot take its place: {error}") from error


def abandon(made: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(made)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories. At no moment is there none, where the system can do that (Linux's renameat2)."""
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return
    aside = a.with_name(a.name + "-old")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)
