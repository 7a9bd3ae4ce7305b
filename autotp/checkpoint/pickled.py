"""Checkpoints that are pickles, where they are asked for: read by `torch.load(weights_only=True)`, through a map."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensorfile import BLOCK_BYTES, Box, cut

SUFFIXES = (".bin", ".pt", ".pth")
SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor of a pickle; its bytes stay in the file until they are copied."""

    path: Path
    key: str
    value: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    def read_into(self, box: Box, out: Tensor) -> None:
        out.copy_(cut(self.value, box))

    def crc32(self) -> int:
        found = 0
        flat = self.value.contiguous().reshape(-1).view(torch.uint8)
        for at in range(0, flat.numel(), BLOCK_BYTES):
            found = zlib.crc32(flat[at : at + BLOCK_BYTES].numpy().data, found)
        return found


def read_pickle(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a state dict that `torch.save` wrote.

    Raises:
        CheckpointError: it is damaged, holds more than tensors, or is no state dict.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as weights: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path}: is no state dict, a mapping from names to tensors")
    return {str(key): PickledTensor(path, str(key), value) for key, value in found.items()}
