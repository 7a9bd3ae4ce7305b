"""``autotp shard`` and ``autotp merge``, and what is not cut for the plan at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import autotp
from autotp.cli import main
from tests.checkpoint import models
from tests.dist.pool import Pool


def load_refused(folder: str, plan: dict[str, str] | None = None) -> str:
    with pytest.raises(autotp.CheckpointError) as caught:
        autotp.from_pretrained(folder, plan=None if plan is None else {"modules": plan})
    return str(caught.value)


def test_there_and_back(dist: Pool, tmp_path: Path) -> None:
    models.write("gpt2", tmp_path / "plain")
    cut, back = str(tmp_path / "cut"), str(tmp_path / "back")
    result = CliRunner().invoke(main, ["shard", str(tmp_path / "plain"), "--tp", "2", "-o", cut])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{cut}: 2 files, plan ")
    assert result.stderr == ""  # progress is for a terminal
    result = CliRunner().invoke(main, ["merge", cut, "-o", back, "--max-shard-size", "60KB"])
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()

    for text in dist.run(3, load_refused, cut):
        assert "was cut for tp=2" in text
    for text in dist.run(2, load_refused, cut, {"transformer.h.*.mlp": "replicate"}):
        assert "was cut for plan" in text
    file = tmp_path / "cut" / "rank-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for text in dist.run(2, load_refused, cut):
        assert file.name in text and "checksum" in text
    result = CliRunner().invoke(main, ["merge", cut, "-o", back])
    assert result.exit_code == 2 and file.name in result.stderr


def test_merge_takes_only_what_was_cut(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["merge", str(tmp_path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "was not written by autotp shard" in result.stderr
