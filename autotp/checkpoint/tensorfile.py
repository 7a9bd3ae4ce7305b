"""safetensors files: the header checked, slices read in bounded memory, tensors written one at a time.

The format is a length of eight bytes, a JSON header and the bytes of the tensors. It is read here with plain
reads rather than through a memory map: the pages of a map count as memory of the rank that touches them, and a
file that shrinks under a map kills the process.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import CheckpointError

Run = tuple[int, int]
Box = Sequence[Sequence[Run]]
"""For each dim the runs ``(start, length)`` that are wanted, in their order."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK_BYTES = 4 << 20  # how much is read at a time
PIECE_BYTES = 64 << 10  # smaller pieces are read together with what lies between them
LARGEST_HEADER = 100_000_000  # as the safetensors library has it


class Source(Protocol):
    """A whole tensor somewhere (in a file, on the ranks), of which parts can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read_into(self, box: Box, out: Tensor) -> None:
        """Copy a part into ``out``, which has the part's shape, on any device, and casts to its own dtype."""


@runtime_checkable
class Stored(Source, Protocol):
    """A tensor in a file, under a key."""

    @property
    def path(self) -> Path: ...
    @property
    def key(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def crc32(self) -> int:
        """The checksum of its bytes."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a safetensors file."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file
    nbytes: int

    def read_into(self, box: Box, out: Tensor) -> None:
        if out.numel() == 0:
            return
        with open(self.path, "rb", buffering=0) as file:
            if self.shape:
                self._read(file.fileno(), 0, self.start, box, out)
            else:
                out.copy_(self._bytes(file.fileno(), self.start, self.nbytes).view(self.dtype)[0])

    def crc32(self) -> int:
        """The checksum of all its bytes, read block by block."""
        found = 0
        with open(self.path, "rb", buffering=0) as file:
            for at in range(0, self.nbytes, BLOCK_BYTES):
                n = min(BLOCK_BYTES, self.nbytes - at)
                found = zlib.crc32(self._bytes(file.fileno(), self.start + at, n).numpy().data, found)
        return found

    def _read(self, fd: int, d: int, at: int, box: Box, out: Tensor) -> None:
        inner = self.shape[d + 1 :]
        row_bytes = math.prod(inner) * self.dtype.itemsize
        partial = [i for i, n in enumerate(inner) if list(box[d + 1 + i]) != [(0, n)]]
        piece_bytes = row_bytes
        if partial:  # the contiguous pieces of a row
            last = partial[-1]
            runs = box[d + 1 + last]
            whole = math.prod(inner[last + 1 :]) * self.dtype.itemsize
            piece_bytes = whole * min((length for _, length in runs), default=0)
        by_row = bool(inner) and (row_bytes > BLOCK_BYTES or (bool(partial) and piece_bytes >= PIECE_BYTES))
        done = 0
        for start, length in box[d]:
            if by_row:
                for i in range(length):
                    self._read(fd, d + 1, at + (start + i) * row_bytes, box, out[done + i])
            else:
                step = max(1, BLOCK_BYTES // row_bytes)
                for i in range(0, length, step):
                    n = min(step, length - i)
                    raw = self._bytes(fd, at + (start + i) * row_bytes, n * row_bytes)
                    rows = raw.view(self.dtype).view(n, *inner)
                    for k in partial:
                        rows = take(rows, k + 1, box[d + 1 + k])
                    out.narrow(0, done + i, n).copy_(rows)
            done += length

    def _bytes(self, fd: int, at: int, n: int) -> Tensor:
        buffer = torch.empty(n, dtype=torch.uint8)
        view = buffer.numpy().data
        got = 0
        while got < n:
            try:
                more = os.preadv(fd, [view[got:]], at + got)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {self.key!r} cannot be read: {error}") from error
            if more == 0:
                raise CheckpointError(
                    f"{self.path}: the file ends at byte {at + got}, inside {self.key!r}: it is truncated. "
                    "Fetch or write it once more."
                )
            got += more
        return buffer


def take(tensor: Tensor, dim: int, runs: Sequence[Run]) -> Tensor:
    """The runs of a dim."""
    parts = [tensor.narrow(dim, start, length) for start, length in runs]
    if not parts:
        return tensor.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def cut(tensor: Tensor, box: Box) -> Tensor:
    """That part of a tensor."""
    for d, runs in enumerate(box):
        tensor = take(tensor, d, runs)
    return tensor


def whole_box(shape: Sequence[int]) -> list[list[Run]]:
    return [[(0, n)] for n in shape]


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by key, nothing of them read yet.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: no safetensors file, or a truncated one: {size} bytes, of which its header should "
                    f"take {length}"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file, though the checkpoint wants it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    found = {key: _entry(path, key, entry, 8 + length) for key, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise CheckpointError(f"{path}: {tensor.key!r} begins at byte {tensor.start}, not at {end}")
        end += tensor.nbytes
        if end > size:
            raise CheckpointError(
                f"{path}: the file has {size} bytes, and {tensor.key!r} ends at {end}: it is truncated. "
                "Fetch or write it once more."
            )
    if end != size:
        raise CheckpointError(f"{path}: the file has {size} bytes, its header accounts for {end}")
    return found


def _entry(path: Path, key: str, entry: Any, base: int) -> FileTensor:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        start, stop = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry of {key!r} cannot be read: {entry!r}") from error
    if min((*shape, start), default=0) < 0 or math.prod(shape) * dtype.itemsize != stop - start:
        raise CheckpointError(
            f"{path}: {key!r} of shape {shape} and {dtype} should take {math.prod(shape) * dtype.itemsize} "
            f"bytes, its header says {stop - start}"
        )
    return FileTensor(path, key, dtype, shape, base + start, stop - start)


class Writer:
    """Writes a safetensors file tensor by tensor, in the order of ``tensors``, and syncs it to disk at the end."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = path
        self.crc32: dict[str, int] = {}
        self._expected = dict(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # the widest dtypes first, then by name, as the safetensors library does: so that each is aligned
        self.order = sorted(self._expected, key=lambda k: (-self._expected[k][0].itemsize, k))
        for key in self.order:
            dtype, shape = self._expected[key]
            if dtype not in NAMES:
                raise CheckpointError(f"{path}: safetensors has no {dtype}, which {key!r} is of")
            stop = at + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {k: 8 + len(text) + header[k]["data_offsets"][0] for k in self.order}
        self.size = 8 + len(text) + at
        self._key = "the header"
        self._file = self._guard(lambda: open(path, "wb", buffering=0))  # noqa: SIM115 (close() closes it)
        self._write(0, memoryview(len(text).to_bytes(8, "little") + text))

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor, in any order."""
        dtype, shape = self._expected[key]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.path}: {key!r} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}"
            )
        self._key = repr(key)
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        found = 0
        for at in range(0, flat.numel(), BLOCK_BYTES):
            block = flat[at : at + BLOCK_BYTES].numpy().data
            found = zlib.crc32(block, found)
            self._write(self._offsets[key] + at, block)
        self.crc32[key] = found

    def close(self) -> None:
        """Everything to disk."""
        missing = sorted(set(self._expected) - set(self.crc32))
        if missing:
            raise CheckpointError(f"{self.path}: {missing[0]!r} was never written")
        self._key = "the end"
        self._guard(os.fsync, self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _write(self, at: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._guard(os.pwrite, self._file.fileno(), data[done:], at + done)

    def _guard(self, fn: Any, *args: Any) -> Any:
        try:
            return fn(*args)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot write {self._key}: {error}") from error
