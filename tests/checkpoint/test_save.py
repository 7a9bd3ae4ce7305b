"""What is saved loads elsewhere bit for bit, and is laid out as the libraries lay it out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import autotp
from tests.checkpoint import models
from tests.dist.pool import Pool


def shard_and_save(name: str, folder: str) -> int:
    model = autotp.parallelize(models.build(name), example_inputs=models.inputs(name))
    autotp.save_pretrained(model, folder, max_shard_size="40KB")
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "nanogpt"])
def test_saved_as_the_unsharded_model_is(dist: Pool, name: str, tp: int, tmp_path: Path) -> None:
    reference = models.write(name, tmp_path / "plain")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "tokenizer.txt").write_text("stays")
    dist.run(tp, shard_and_save, name, str(tmp_path / "ours"))
    assert (tmp_path / "ours" / "tokenizer.txt").read_text() == "stays"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "plain"]
    plain, ours = ({p.name: p for p in (tmp_path / d).iterdir()} for d in ("plain", "ours"))
    if name in models.FROM_TRANSFORMERS:
        assert set(ours) == {*plain, "tokenizer.txt", "autotp_manifest.json"}
        for file, path in plain.items():
            if file.endswith(".safetensors"):
                assert path.read_bytes() == ours[file].read_bytes(), file
            elif "index" in file:
                mine, theirs = json.loads(ours[file].read_text()), json.loads(path.read_text())
                assert mine["weight_map"] == theirs["weight_map"]
                assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"]
            else:
                assert json.loads(ours[file].read_text()) == json.loads(path.read_text())
        loaded = type(reference).from_pretrained(tmp_path / "ours")
    else:
        loaded = models.MODELS[name].build(torch.float32, seed=1)
        state = {}
        for file in ours.values():
            state |= load_file(file) if file.suffix == ".safetensors" else {}
        missing, unexpected = loaded.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= set(reference.state_dict()) - set(models.untied(reference))
    expected = reference.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())
