"""Damage is found before the model is used, named by file and key, and on every rank."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
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


def _of(value: float) -> nn.Module:
    net = _net()
    for p in net.parameters():
        nn.init.constant_(p, value)
    return net


def _save(folder: Path, value: float = 1.0) -> None:
    autotp.save_pretrained(_of(value), folder, max_shard_size=600)


def _save_state(folder: Path, value: float = 1.0) -> None:
    autotp.save_training_state(folder, _of(value))


def load_net(folder: str, **options: Any) -> str:
    """What was wrong, or nothing."""
    with autotp.weightless():
        net = _net()
    try:
        autotp.load_checkpoint(net, folder, example_inputs=(torch.randn(3, 8),), **options)
    except autotp.CheckpointError as error:
        return str(error)
    return ""


def load_nets(folders: list[str]) -> list[str]:
    return [load_net(folder) for folder in folders]


def load_states(folders: list[str]) -> list[str]:
    net = autotp.parallelize(_net(), example_inputs=(torch.randn(3, 8),))
    found = []
    for folder in folders:
        try:
            autotp.load_training_state(folder, net)
            found.append("")
        except autotp.CheckpointError as error:
            found.append(str(error))
    return found


# ---- what is done to a checkpoint, and the words that the message has -------------------------------------

SECOND = "model-00002-of-00002.safetensors"


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)


def _truncate(folder: Path) -> None:
    (folder / "autotp_manifest.json").unlink()
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-8])


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    shutil.rmtree(folder)
    folder.mkdir()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _other_model(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors["encoder.weight"] = torch.ones(3)


FAULTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing": (lambda f: None, ()),
    "bit_flipped": (lambda f: _flip(f / SECOND), (SECOND, "'2.weight'", "checksum")),
    "truncated": (_truncate, (SECOND, "'2.weight'", "truncated")),
    "missing_file": (lambda f: (f / SECOND).unlink(), (SECOND, "no such file")),
    "shape": (
        lambda f: _change(f, lambda t: t.update({"0.weight": torch.ones(16, 9)})),
        ("0.weight", "model.safetensors", "(16, 9)", "(16, 8)"),
    ),
    "dtype": (
        lambda f: _change(f, lambda t: t.update({"0.weight": torch.ones(16, 8, dtype=torch.int32)})),
        ("0.weight", "model.safetensors", "torch.int32"),
    ),
    "model": (lambda f: _change(f, _other_model), ("0.weight", "missing")),
    "missing_key": (lambda f: _change(f, lambda t: t.pop("2.bias")), ("2.bias", "missing")),
    "pickle": (
        lambda f: (shutil.rmtree(f), f.mkdir(), torch.save(_net().state_dict(), f / "pytorch_model.bin")),
        ("pickles", "weights_only=True"),
    ),
}
FIRST = "rank-00000.safetensors"
STATE_FAULTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing": (lambda f: None, ()),
    "bit_flipped": (lambda f: _flip(f / FIRST), (FIRST, "checksum")),
    "truncated": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-8]), (FIRST, "truncated")),
    "missing_file": (lambda f: (f / FIRST).unlink(), (FIRST, "no such file")),
    "unfinished": (lambda f: (f / "autotp_state.json").unlink(), ("has no autotp_state.json",)),
    "model": (
        lambda f: autotp.save_training_state(f, nn.Linear(3, 4)),
        ("has no 'model.0.weight': it is another model's",),
    ),
    "shape": (
        lambda f: autotp.save_training_state(f, nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))),
        ("'model.0.weight'", "(12, 8)", "(16, 8)"),
    ),
}


@pytest.mark.parametrize("kind", ["weights", "training_state"])
def test_damage_is_named_on_every_rank(dist: Pool, kind: str, tmp_path: Path) -> None:
    faults, save, load = {
        "weights": (FAULTS, _save, load_nets),
        "training_state": (STATE_FAULTS, _save_state, load_states),
    }[kind]
    for name, (damage, _) in faults.items():
        save(tmp_path / name)
        damage(tmp_path / name)
    for found in dist.run(2, load, [str(tmp_path / name) for name in faults]):
        for (name, (_, words)), text in zip(faults.items(), found, strict=True):
            assert bool(text) == bool(words), f"{name}: {text}"
            assert all(word in text for word in words), f"{name}: {text}"


def load_where_one_has_no_file(folder: str) -> list[str]:
    other = "-not" if torch.distributed.get_rank() == 1 else ""
    return [*load_nets([folder + other]), *load_states([folder + "-state" + other])]


def test_one_rank_fails(dist: Pool, tmp_path: Path) -> None:
    _save(tmp_path / "x")
    _save_state(tmp_path / "x-state")
    for first, second, third in zip(*dist.run(3, load_where_one_has_no_file, str(tmp_path / "x")), strict=True):
        assert first == third and first.startswith("rank 1 failed: ") and second in first


def save_with_little_disk(folder: str) -> list[str]:
    net = autotp.parallelize(_net(64), example_inputs=(torch.randn(3, 64),))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1:  # its file system takes no more than that
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    found = []
    try:
        for save in (
            lambda: autotp.save_pretrained(net, folder, max_shard_size=3000),
            lambda: autotp.save_training_state(folder + "-state", net),
        ):
            try:
                save()
            except autotp.CheckpointError as error:
                found.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return found


def test_full_disk(dist: Pool, tmp_path: Path) -> None:
    _save(tmp_path / "x", 3.0)
    _save_state(tmp_path / "x-state", 3.0)
    for texts in dist.run(2, save_with_little_disk, str(tmp_path / "x")):
        assert len(texts) == 2
        assert all("cannot write '" in text and ".safetensors" in text for text in texts), texts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x-state"]
    assert _value(tmp_path / "x") == _state_value(tmp_path / "x-state") == 3.0


# ---- killed while it saves --------------------------------------------------------------------------------


def _value(folder: Path) -> float:
    """The one value that all weights of a whole checkpoint have."""
    found = open_folder(folder)
    found.verify(0, 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in set(index.values()):
        tensors |= load_file(folder / file)
    assert set(tensors) == set(index) == set(_net().state_dict())
    return _only(tensors.values())


def _state_value(folder: Path) -> float:
    net = _net()
    autotp.load_training_state(folder, net)
    return _only(net.state_dict().values())


def _only(tensors: Any) -> float:
    values = {float(v) for t in tensors for v in t.flatten()}
    assert len(values) == 1
    return values.pop()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child only writes files
@pytest.mark.parametrize(("kind", "kills"), [("weights", 50), ("training_state", 50)])
def test_killed_at_any_point(kind: str, kills: int, tmp_path: Path) -> None:
    """Whenever the saving process dies, a whole checkpoint is there, and none older than the last that it finished."""
    save, value_of = {"weights": (_save, _value), "training_state": (_save_state, _state_value)}[kind]
    rng = random.Random(0)
    folder = tmp_path / "x"
    save(folder, 1.0)
    last, cut_short, one_save = 1.0, 0, 0.0
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # saves larger and larger values until it is killed, and tells of each that is done
            try:
                value = last
                while True:
                    value += 1
                    save(folder, value)
                    os.write(writer, b"x")
            finally:
                os._exit(1)
        finished = rng.randrange(3)
        for _ in range(finished):
            begun = time.monotonic()
            os.read(reader, 1)
            one_save = time.monotonic() - begun
        time.sleep(one_save * rng.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        os.close(reader)
        os.close(writer)
        cut_short += bool(list(tmp_path.glob(".x.saving-*")))
        now = value_of(folder)
        assert now >= last + finished
        last = now
    assert cut_short > kills // 10
    save(folder, 7.0)
    assert value_of(folder) == 7.0
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# ---- what is not read -------------------------------------------------------------------------------------


def test_lost_buffers_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "x")
    with torch.device("meta"):
        net = _net()
        net.register_buffer("table", torch.arange(3), persistent=False)
    with pytest.raises(autotp.CheckpointError, match="table .* autotp.weightless"):
        autotp.load_checkpoint(net, tmp_path / "x")


def test_pickles_only_by_request(tmp_path: Path) -> None:
    expected = _net().state_dict()
    torch.save(expected, tmp_path / "x.bin")
    torch.save({"0.weight": Path("/")}, tmp_path / "code.bin")
    assert "only safetensors files are read" in load_net(str(tmp_path / "x.bin"))
    with autotp.weightless():
        net = _net()
    autotp.load_checkpoint(net, tmp_path / "x.bin", weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    text = load_net(str(tmp_path / "code.bin"), weights_only=True)
    assert "code.bin: cannot be read as weights: UnpicklingError" in text
