"""Slices of converted tensors, read from files, are slices of the converted whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autotp.checkpoint.lazy import lazy, read, sources
from autotp.checkpoint.tensorfile import Writer, read_header, take
from autotp.errors import CheckpointError

CONVERSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": lambda a, b: a,
    "stack": lambda a, b: torch.stack([a, b, a]),
    "stack_last": lambda a, b: torch.stack([a, b], dim=-1),
    "cat_of_stacks": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "chunk": lambda a, b: torch.chunk(a, 3)[1].contiguous(),
    "split": lambda a, b: torch.split(a, [2, 5], dim=1)[1],
    "transpose": lambda a, b: a.transpose(0, 1).contiguous(),
    "slice": lambda a, b: a[1:-1, 2:5],
    "select": lambda a, b: torch.stack([a, b])[1].squeeze(0),
    "squeeze": lambda a, b: torch.chunk(torch.stack([a, b]), 2)[0].squeeze(0),
    "unbind": lambda a, b: torch.stack(a.unbind(1)[::2]),
    "reshape": lambda a, b: a.reshape(3, 2, 7).transpose(0, 1).reshape(6, 7),
    "arithmetic": lambda a, b: (a * 2 + b).T,
    "step": lambda a, b: a[::2],
}


def _runs(rng: random.Random, n: int) -> list[tuple[int, int]]:
    picked = [i for i in range(n) if rng.random() < 0.6] or [0]
    return [(i, 1) for i in picked] if rng.random() < 0.5 else [(picked[0], n - picked[0])]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_part_of_a_conversion(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    whole = {"a": torch.randn(6, 7), "b": torch.randn(6, 7)}
    save_file(whole, tmp_path / "x.safetensors")
    found = {k: lazy(t) for k, t in read_header(tmp_path / "x.safetensors").items()}
    expected = CONVERSIONS[name](whole["a"], whole["b"])
    got = CONVERSIONS[name](found["a"], found["b"])
    assert sources(got)
    for _ in range(20):
        box = [_runs(rng, n) for n in expected.shape]
        part = expected
        for d, runs in enumerate(box):
            part = take(part, d, runs)
        assert torch.equal(read(got, box), part)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 40_000), (3, 2_000_000), (40, 3, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_reads_what_safetensors_wrote(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    value = (torch.rand(shape) * 9).to(dtype)
    save_file({"other": torch.ones(3, dtype=torch.uint8), "x": value}, tmp_path / "x.safetensors")
    tensor = lazy(read_header(tmp_path / "x.safetensors")["x"])
    assert torch.equal(read(tensor), value)
    box = [[(0, n // 3), (n // 2, n - n // 2)] for n in shape]
    part = value
    for d, runs in enumerate(box):
        part = take(part, d, runs)
    assert torch.equal(read(tensor, box), part)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    values = {"w": torch.randn(5, 3), "b": torch.ones(3, dtype=torch.bool), "n": torch.tensor(7)}
    writer = Writer(tmp_path / "y.safetensors", {k: (v.dtype, tuple(v.shape)) for k, v in values.items()})
    for key, value in values.items():
        writer.add(key, value)
    writer.close()
    back = load_file(tmp_path / "y.safetensors")
    assert back.keys() == values.keys() and all(torch.equal(back[k], v) for k, v in values.items())
    assert {k: t.crc32() for k, t in read_header(tmp_path / "y.safetensors").items()} == writer.crc32
    save_file(values, tmp_path / "z.safetensors", {"format": "pt"})
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "z.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.randn(5, 3)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_header(file)
