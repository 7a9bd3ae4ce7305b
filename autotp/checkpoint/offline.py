"""Checkpoints for many machines, made on one: cut into a file a rank, and put together again; no process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..api import PlanLike
from ..errors import CheckpointError
from ..plan.plan import Plan
from ..prepare import prepare
from . import pretrained
from .fill import initialise
from .folder import MANIFEST, open_folder
from .keys import match
from .presliced import is_presliced, merge, write_presliced

Progress = Callable[[int, int], None]
"""Is told (bytes done, bytes in all)."""


def shard_checkpoint(
    path_or_id: str | os.PathLike[str],
    tp: int,
    out: str | os.PathLike[str],
    *,
    plan: PlanLike | None = None,
    model_class: Any = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Cut a transformers checkpoint into one file a rank, without a process group and one slice in memory at a time.

    :func:`from_pretrained` then loads ``out`` at this degree, and each rank reads its own file only.

    Raises:
        CheckpointError: the checkpoint is damaged or another model's, or ``out`` cannot be written.
    """
    folder = open_folder(pretrained.locate(path_or_id))
    folder.verify(0, 1)
    model: Any = pretrained.build(folder.directory, model_class, dtype, {})
    keys = match(model, folder.tensors)
    pretrained.report(model, keys, folder, False, True)
    initialise(model, keys, set(keys.missing), seed=0)
    prepared = prepare(model, tp, given=plan)
    write_presliced(
        model,
        keys.tensors,
        prepared.rewriting.program.slices,
        lambda r: prepared.rank(r, ""),
        tp,
        prepared.fingerprint,
        Path(out),
        [file for file in sorted(folder.directory.iterdir()) if _comes_along(file)],
        _steps(progress, sum(value.nbytes for value in model.state_dict().values())),
    )
    return prepared.plan


def merge_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    progress: Progress = lambda done, total: None,
) -> None:
    """The inverse of :func:`shard_checkpoint`, one tensor in memory at a time and without a process group.

    Raises:
        CheckpointError: a file is damaged or missing, or ``out`` cannot be written.
    """
    path = Path(directory)
    if not is_presliced(path):
        raise CheckpointError(f"{path}: was not written by autotp shard")
    model = pretrained.build(path, None, None, {}) if (path / "config.json").exists() else None
    total = 0 if model is None else sum(value.nbytes for value in model.state_dict().values())
    merge(path, Path(out), model, max_shard_size, _steps(progress, total))


def _comes_along(file: Path) -> bool:
    """Whether a file beside the weights (config, tokenizer) is copied with them."""
    weights = file.name.endswith(".index.json") or file.name == MANIFEST
    return file.is_file() and file.suffix in (".json", ".txt", ".model") and not weights


def _steps(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, total), total)

    return step
