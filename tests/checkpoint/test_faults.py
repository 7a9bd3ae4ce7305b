"""Damage is found before the model is used, named by file and key, and on every rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autotp
from autotp.checkpoint.folder import open_folder
from tests.dist.pool import Pool


def _net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width)).eval()


def _save(folder: Path, value: float = 1.0) -> None:
    net = _net()
    for p in net.parameters():
        nn.init.constant_(p, value)
    autotp.save_pretrained(net, folder, max_shard_size=600)


def load_net(folder: str, width: int = 8) -> str:
    with autotp.weightless():
        net = _net(width)
    try:
        autotp.load_checkpoint(net, folder, example_inputs=(torch.randn(3, width),))
    except autotp.CheckpointError as error:
        return str(error)
    return ""


def _flip(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)


def _truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    (folder / "autotp_manifest.json").unlink()
    file.write_bytes(file.read_bytes()[:-8])


def _remove(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _rewrite(folder: Path, change: Any) -> None:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    shutil.rmtree(folder)
    folder.mkdir()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _other_shape(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({"0.weight": torch.ones(16, 9)}))


def _other_dtype(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({"0.weight": torch.ones(16, 8, dtype=torch.int32)}))


def _other_model(folder: Path) -> None:
    _rewrite(folder, lambda t: (t.clear(), t.update({"encoder.weight": torch.ones(3)})))


def _missing_key(folder: Path) -> None:
    _rewrite(folder, lambda t: t.pop("2.bias"))


FAULTS = {
    "bit_flipped": (_flip, ("model-00002-of-00002.safetensors", "'2.weight'", "checksum")),
    "truncated": (_truncate, ("model-00002-of-00002.safetensors", "'2.weight'", "truncated")),
    "missing_file": (_remove, ("model-00002-of-00002.safetensors", "no such file")),
    "shape": (_other_shape, ("0.weight", "model.safetensors", "(16, 9)", "(16, 8)")),
    "dtype": (_other_dtype, ("0.weight", "model.safetensors", "torch.int32")),
    "model": (_other_model, ("0.weight", "missing")),
    "missing_key": (_missing_key, ("2.bias", "missing")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged(dist: Pool, fault: str, tmp_path: Path) -> None:
    damage, words = FAULTS[fault]
    _save(tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 2
    assert dist.run(2, load_net, str(tmp_path / "x")) == ["", ""]
    damage(tmp_path / "x")
    for text in dist.run(2, load_net, str(tmp_path / "x")):
        assert all(word in text for word in words), text


def load_where_one_has_no_file(folder: str) -> str:
    return load_net(folder + ("-not" if torch.distributed.get_rank() == 1 else ""))


def test_one_rank_fails(dist: Pool, tmp_path: Path) -> None:
    _save(tmp_path / "x")
    first, second, third = dist.run(3, load_where_one_has_no_file, str(tmp_path / "x"))
    assert first == third and first.startswith("rank 1 failed: ") and second in first


def save_with_little_disk(folder: str) -> str:
    net = autotp.parallelize(_net(64), example_inputs=(torch.randn(3, 64),))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1:  # its file system takes no more than that
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        autotp.save_pretrained(net, folder, max_shard_size=3000)
    except autotp.CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def test_full_disk(dist: Pool, tmp_path: Path) -> None:
    _save(tmp_path / "x", 3.0)
    for text in dist.run(2, save_with_little_disk, str(tmp_path / "x")):
        assert "cannot write '" in text and ".safetensors" in text
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert _value(tmp_path / "x") == 3.0


def _value(folder: Path) -> float:
    """The one value that all weights of a whole checkpoint have."""
    found = open_folder(folder)
    found.verify(0, 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in set(index.values()):
        tensors |= load_file(folder / file)
    assert set(tensors) == set(index) == set(_net().state_dict())
    values = {float(v) for t in tensors.values() for v in t.flatten()}
    assert len(values) == 1
    return values.pop()


def _save_on_and_on(folder: str, value: float) -> None:
    while True:
        value += 1
        _save(Path(folder), value)


def test_killed_at_any_point(tmp_path: Path) -> None:
    """Whenever the saving process dies, a whole checkpoint is there, and never an older one than before."""
    rng = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.test_faults"])
    last = 1.0
    seen = set()
    _save(tmp_path / "x", 1.0)
    for _ in range(50):
        process = context.Process(target=_save_on_and_on, args=(str(tmp_path / "x"), last))
        left = set(tmp_path.glob(".x.saving-*"))  # by the one that was killed before
        process.start()
        begun = time.monotonic()
        while not set(tmp_path.glob(".x.saving-*")) - left and time.monotonic() < begun + 30:
            time.sleep(0.001)
        time.sleep(0.3 * rng.random() ** 2)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = _value(tmp_path / "x")
        assert now >= last
        last = now
        seen.add(last)
    assert len(seen) > 5
    _save(tmp_path / "x", 7.0)
    assert _value(tmp_path / "x") == 7.0
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_lost_buffers_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "x")
    with torch.device("meta"):
        net = _net()
        net.register_buffer("table", torch.arange(3), persistent=False)
    with pytest.raises(autotp.CheckpointError, match="table .* autotp.weightless"):
        autotp.load_checkpoint(net, tmp_path / "x")


def test_only_safetensors(tmp_path: Path) -> None:
    torch.save(_net().state_dict(), tmp_path / "x.bin")
    with autotp.weightless():
        net = _net()
    with pytest.raises(autotp.CheckpointError, match="only safetensors"):
        autotp.load_checkpoint(net, tmp_path / "x.bin")
