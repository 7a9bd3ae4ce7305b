"""``autotp shard`` and ``autotp merge``: there and back is the same bytes, and the cut files load."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import autotp
from autotp.cli import main
from tests.checkpoint import models
from tests.checkpoint.test_load import _differences
from tests.dist.pool import Pool


def load_cut(name: str, folder: str) -> list[str]:
    return _differences(autotp.from_pretrained(folder), models.build(name))


@pytest.mark.parametrize(("name", "tp"), [("llama", 3), ("gpt2", 2), ("mixtral", 4), ("t5", 2)])
def test_there_and_back(dist: Pool, name: str, tp: int, tmp_path: Path) -> None:
    models.write(name, tmp_path / "plain")
    cut, back = str(tmp_path / "cut"), str(tmp_path / "back")
    result = CliRunner().invoke(main, ["shard", str(tmp_path / "plain"), "--tp", str(tp), "-o", cut])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert dist.run(tp, load_cut, name, cut) == [[]] * tp
    result = CliRunner().invoke(main, ["merge", cut, "-o", back, "--max-shard-size", "40KB"])
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def load_refused(folder: str) -> str:
    with pytest.raises(autotp.CheckpointError) as caught:
        autotp.from_pretrained(folder)
    return str(caught.value)


def test_another_degree_is_refused(dist: Pool, tmp_path: Path) -> None:
    models.write("gpt2", tmp_path / "plain")
    autotp.shard_checkpoint(tmp_path / "plain", 2, tmp_path / "cut")
    for text in dist.run(3, load_refused, str(tmp_path / "cut")):
        assert "was cut for tp=2" in text
