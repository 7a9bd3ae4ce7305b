"""Names of a checkpoint and of a model: mapped, missing, unexpected, mismatched, tied, of another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autotp
from tests.checkpoint import models


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def _loaded(path: Path, **options: Any) -> nn.Module:
    with autotp.weightless():
        net = _net()
    return autotp.load_checkpoint(net, path, **options)


@pytest.mark.parametrize(
    "key_map",
    [
        lambda key: key.removeprefix("body.").replace("up", "0").replace("down", "2"),
        {r"^body\.up": "0", r"^body\.down": "2"},
        {f"body.{name}.{kind}": f"{i}.{kind}" for i, name in ((0, "up"), (2, "down")) for kind in ("weight", "bias")},
    ],
)
def test_key_map(key_map: Any, tmp_path: Path) -> None:
    expected = _net().state_dict()
    names = {"0": "body.up", "2": "body.down"}
    save_file({names[k[0]] + k[1:]: v for k, v in expected.items()}, tmp_path / "x.safetensors")
    model = _loaded(tmp_path / "x.safetensors", key_map=key_map)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(autotp.CheckpointError, match="the same name"):
        _loaded(tmp_path / "x.safetensors", key_map=lambda key: "0.weight")


def test_unexpected_keys_of_a_plain_module(tmp_path: Path) -> None:
    save_file({**_net().state_dict(), "more": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(autotp.CheckpointError, match="1 tensors are unexpected: more"):
        _loaded(tmp_path / "x.safetensors")
    _loaded(tmp_path / "x.safetensors", allow_unexpected=True)


def _rewrite(folder: Path, change: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_reported_as_transformers_reports_them(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    models.write("gpt2", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.h.0.mlp.c_fc.weight"]
        tensors["transformer.h.9.bias"] = torch.ones(3)
        tensors["transformer.ln_f.weight"] = torch.ones(7, dtype=torch.float64)

    _rewrite(tmp_path, change)
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    _, theirs = GPT2LMHeadModel.from_pretrained(tmp_path, **options)
    model, mine = autotp.from_pretrained(tmp_path, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert set(getattr(mine, kind)) == set(theirs[kind]), kind
    drawn = model.transformer.h[0].mlp.c_fc.weight
    assert 0.01 < drawn.std() < 0.03 and torch.all(model.transformer.ln_f.weight == 1)  # by its _init_weights
    with pytest.raises(autotp.CheckpointError, match="transformer.ln_f.weight has shape \\(7,\\)"):
        autotp.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_another_dtype(name: str, tmp_path: Path) -> None:
    """T5 keeps some weights in float32, whatever it is loaded in; buffers are as transformers makes them."""
    reference = type(models.write(name, tmp_path)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for given in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        model = autotp.from_pretrained(tmp_path, **given)
        assert models.differences(model.state_dict(), model, reference) == []
        assert model.dtype == torch.bfloat16


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    models.write("gpt2", tmp_path)
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    with pytest.raises(autotp.CheckpointError, match="one parameter in the model, and differ"):
        autotp.from_pretrained(tmp_path)
