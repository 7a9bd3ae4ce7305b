"""Streamed loading: the model is built without weights, planned and rewritten, then each rank reads its own slices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..api import ExampleInputs, PlanLike
from ..carry import carry_out, prepare_on
from ..errors import CheckpointError
from ..rewrite.state import Asked, dims_by_id, sharding_of
from ..runtime.mesh import default_mesh
from . import pretrained
from .consensus import together
from .fill import fill, initialise
from .folder import Folder, open_folder
from .keys import Keys, match
from .presliced import is_presliced, open_presliced
from .weightless import lost_tensors, materialize, room


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    mesh: DeviceMesh | None = None,
    *,
    model_class: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    example_inputs: ExampleInputs | None = None,
    plan: PlanLike | None = None,
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    revision: str | None = None,
    weights_only: bool = False,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """A sharded transformers model, of which each rank reads its own slices only.

    The model is built without weights, planned and rewritten; then every rank reads its part of one tensor after the
    other, straight to its device. Call it on every rank.

    Args:
        path_or_id: a directory with a config and safetensors files, or a model id on the hub.
        model_class: a class of transformers; by default the one that the config names.
        dtype: as for transformers' ``from_pretrained`` (``torch_dtype`` too); by default what the config says.
        device: where the weights go (default: the mesh's device).
        ignore_mismatched_sizes: draw weights anew whose shape in the checkpoint is another one.
        weights_only: read pickles (``pytorch_model.bin``) too, as ``torch.load(weights_only=True)`` does, where there
            are no safetensors files.
        output_loading_info: return (model, transformers' record of missing, unexpected and mismatched keys).
        options: for the model's config (``attn_implementation``).

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or another model's; on every rank, before anything is
            computed with it.
    """
    mesh = default_mesh(device) if mesh is None else mesh
    with together(mesh.get_group()):
        folder, cut_for = _open(pretrained.locate(path_or_id, revision), mesh, weights_only)
        model: Any = pretrained.build(folder.directory, model_class, dtype, options)
        keys = match(model, folder.tensors)
        info = pretrained.report(model, keys, folder, ignore_mismatched_sizes, mesh.get_local_rank() == 0)
        fresh = set(keys.missing) | {name for name, *_ in keys.mismatched}
        initialise(model, keys, fresh, seed=0)
    _shard_and_fill(model, mesh, folder, keys, device, example_inputs, plan, strict, cut_for)
    return (model, info) if output_loading_info else model


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    mesh: DeviceMesh | None = None,
    *,
    key_map: Mapping[str, str] | Callable[[str], str] | None = None,
    device: torch.device | str | None = None,
    example_inputs: ExampleInputs | None = None,
    plan: PlanLike | None = None,
    strict: bool = False,
    allow_unexpected: bool = False,
    weights_only: bool = False,
) -> nn.Module:
    """Shard ``model``, built without weights (under :func:`weightless`), and fill it from safetensors; return it.

    Each rank reads its own slices only, one tensor at a time. Call it on every rank.

    Args:
        path: a safetensors file, or a directory with one or with an index of several.
        key_map: from keys of the checkpoint to names of the model: a function, or a mapping of whole keys or of
            regular expressions and what replaces them.
        allow_unexpected: ignore tensors that the model does not have. Missing ones are always refused.
        weights_only: read pickles (``.bin``, ``.pt``) too, as ``torch.load(weights_only=True)`` does.

    Raises:
        CheckpointError: on every rank, before anything is computed with the model.
    """
    mesh = default_mesh(device) if mesh is None else mesh
    with together(mesh.get_group()):
        lost = lost_tensors(model)
        if lost:
            raise CheckpointError(
                f"{lost[0]} was computed on the meta device, so its values are lost, and no checkpoint has them. "
                "Build the model under autotp.weightless() in place of torch.device('meta')."
            )
        folder, cut_for = _open(pretrained.locate(path), mesh, weights_only)
        keys = match(model, folder.tensors, key_map)
        _refuse(keys, folder, allow_unexpected)
    _shard_and_fill(model, mesh, folder, keys, device, example_inputs, plan, strict, cut_for)
    return model


def _open(path: Path, mesh: DeviceMesh, weights_only: bool) -> tuple[Folder, str | None]:
    """A checkpoint, and the plan that it was cut for where `shard_checkpoint` wrote it."""
    if is_presliced(path):
        return open_presliced(path, mesh.get_local_rank(), mesh.size())
    return open_folder(path, weights_only), None


def _refuse(keys: Keys, folder: Folder, allow_unexpected: bool) -> None:
    for name, there, wanted in sorted(keys.mismatched):
        raise CheckpointError(
            f"{name} has shape {there} in the checkpoint ({keys.where(name)}) and {wanted} in the model"
        )
    for what, names in (
        ("are missing", keys.missing),
        ("are unexpected", set() if allow_unexpected else keys.unexpected),
    ):
        if names:
            raise CheckpointError(
                f"{folder.path}: {len(names)} tensors {what}: {', '.join(sorted(names)[:5])}"
                f"{' …' if len(names) > 5 else ''}. A key_map gives keys other names."
            )


def _shard_and_fill(
    model: nn.Module,
    mesh: DeviceMesh,
    folder: Folder,
    keys: Keys,
    device: torch.device | str | None,
    example_inputs: ExampleInputs | None,
    plan: PlanLike | None,
    strict: bool,
    cut_for: str | None,
) -> None:
    kind = mesh.device_type
    if device is None and kind != "cpu":
        device = f"{kind}:{torch.accelerator.current_device_index()}"
    target = torch.device(kind if device is None else device)
    group = mesh.get_group()
    with together(group):
        part, parts = (mesh.get_local_rank(), mesh.size()) if cut_for is None else (0, 1)
        folder.verify(part, parts)
    asked = Asked(example_inputs, plan, strict)
    prepared = prepare_on(model, mesh, asked)
    with together(group):  # a device may be full
        sliced = {} if prepared is None else dims_by_id(model, prepared.rewriting.program.slices)
        materialize(model, target, sliced)
    with together(group):  # where its own collectives come before what can fail
        if prepared is not None:
            carry_out(model, mesh, prepared, asked, place=partial(room, device=target))
    with together(group):
        if cut_for is not None and prepared is not None and prepared.fingerprint != cut_for:
            raise CheckpointError(
                f"{folder.path}: was cut for plan {cut_for}, and this one is {prepared.fingerprint}. "
                "Cut it again (autotp shard), with the same plan and versions."
            )
        fill(model, keys.tensors, sharding_of(model))
