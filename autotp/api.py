"""The public functions: the stages in order, nothing more."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .checkpoint import pretrained
from .checkpoint.consensus import together
from .checkpoint.fill import fill, initialise
from .checkpoint.folder import Folder, open_folder
from .checkpoint.keys import Keys, match
from .checkpoint.presliced import is_presliced, merge, open_presliced, write_presliced
from .checkpoint.save import save_model
from .checkpoint.training import load_state, save_state
from .checkpoint.weightless import lost_tensors, materialize, room
from .errors import AutoTPError, CheckpointError, PlanError, RankMismatchError
from .plan.plan import Plan
from .prepare import Prepared, prepare
from .rewrite.apply import apply
from .rewrite.state import Sharding, gather_state_dict, remember, sharding_of
from .runtime.mesh import Verdict, agree, connect, default_mesh

ExampleInputs = Sequence[Any] | Mapping[str, Any]
_CONFIG = "_autotp_config"
PlanLike = Plan | str | os.PathLike[str] | Mapping[str, Any]


def plan(
    model: nn.Module,
    tp: int,
    *,
    example_inputs: ExampleInputs | None = None,
    plan: PlanLike | None = None,
    strict: bool = False,
    verify: bool = True,
) -> Plan:
    """How ``model`` would be sharded over ``tp`` ranks.

    Needs no process group, no weights (the model may be on the meta device) and no GPU, and leaves the model alone.

    Args:
        example_inputs: a tuple of positional or a dict of keyword arguments of the model's forward. Found by
            themselves for transformers models, and guessed for others where the guess is safe.
        plan: overrides, or a whole plan to check against this model: a `Plan`, a YAML file, or a mapping.
        strict: raise instead of replicating what cannot be sharded.
        verify: prove the rewriting too (on weightless copies).

    Raises:
        AutoTPError: with what, where and what to do.
    """
    return prepare(model, tp, example_inputs=example_inputs, given=plan, strict=strict, verify=verify).plan


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    plan: PlanLike | None = None,
    device: torch.device | str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Shard ``model`` in place over a one-dimensional device mesh, and return it: the same object, the same function.

    Call it on every rank, under ``torchrun`` or with an initialised process group. With one rank the model is
    returned as it is.

    Args:
        mesh: the ranks that share the model (default: all of them).
        example_inputs, plan, strict: as for :func:`plan`.
        device: where each slice goes as it is cut, so that the whole model never has to fit there.

    Raises:
        AutoTPError: before anything is changed.
    """
    mesh = default_mesh(device) if mesh is None else mesh
    target = None if device is None else torch.device(device)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if target is None else tensor.to(target)

    _shard(model, mesh, example_inputs, plan, strict, place)
    return model if target is None else model.to(target)


def _shard(
    model: nn.Module,
    mesh: DeviceMesh,
    example_inputs: ExampleInputs | None,
    plan: PlanLike | None,
    strict: bool,
    place: Callable[[torch.Tensor], torch.Tensor],
    before: Callable[[Mapping[int, object]], object] = lambda sliced: None,
) -> None:
    """Shard in place; ``before`` is told the ids of the parameters that will be sliced, right before they are."""
    tp = mesh.size()
    if mesh.ndim != 1:
        raise PlanError(
            f"parallelize takes one dim of a device mesh, this one has {mesh.ndim} ({mesh.mesh_dim_names}): "
            "pass mesh['tp'], say."
        )
    if sharding_of(model) is not None:
        raise AutoTPError(
            "this model is sharded already: parallelize a model once, before anything else shards it."
        )
    if tp == 1:
        before({})
        return
    prepared: Prepared | None = None
    failure: AutoTPError | None = None
    try:
        prepared = prepare(
            model, tp, example_inputs=example_inputs, given=plan, strict=strict, verify=True, mesh=mesh
        )
    except RankMismatchError:
        raise
    except AutoTPError as error:
        failure = error
    fingerprint = None if prepared is None else prepared.fingerprint
    agree(mesh, Verdict("end", fingerprint, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    assert prepared is not None
    prefix = connect(mesh, prepared.groups())
    rank = prepared.rank(mesh.get_local_rank(), prefix)
    slices = dict(prepared.rewriting.program.slices)
    model.__dict__[_CONFIG] = model.__dict__.get(
        "config"
    )  # a local constant may put a private copy in its place
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before({id(parameters[fqn]): fqn for fqn in slices if fqn in parameters})
    apply(model, prepared.rewriting.program, prepared.constants(rank.rank), rank, place)
    remember(model, Sharding(prepared.plan, rank, slices))


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
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """A sharded transformers model, of which each rank reads its own slices only.

    The model is built without weights, planned and rewritten; then every rank reads its part of one tensor after the
    other, straight to its device. Call it on every rank.

    Args:
        path_or_id: a directory with a config and safetensors files, or a model id on the hub.
        model_class: a class of transformers; by default the one that the config names.
        dtype: as for transformers' ``from_pretrained``; by default what the config says.
        device: where the weights go (default: the mesh's device).
        ignore_mismatched_sizes: draw weights anew whose shape in the checkpoint is another one.
        output_loading_info: return (model, transformers' record of missing, unexpected and mismatched keys).
        options: for the model's config (``attn_implementation``).

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or another model's; on every rank, before anything is
            computed with it.
    """
    mesh = default_mesh(device) if mesh is None else mesh
    with together(mesh.get_group()):
        folder, cut_for = _open(pretrained.locate(path_or_id, revision), mesh)
        where = folder.path if folder.path.is_dir() else folder.path.parent
        model: Any = pretrained.build(where, model_class, dtype, options)
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
) -> nn.Module:
    """Shard ``model``, built without weights (under :func:`weightless`), and fill it from safetensors; return it.

    Each rank reads its own slices only, one tensor at a time. Call it on every rank.

    Args:
        path: a safetensors file, or a directory with one or with an index of several.
        key_map: from keys of the checkpoint to names of the model: a function, or a mapping of whole keys or of
            regular expressions and what replaces them.
        allow_unexpected: ignore tensors that the model does not have. Missing ones are always refused.

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
        folder, cut_for = _open(pretrained.locate(path), mesh)
        keys = match(model, folder.tensors, key_map)
        _refuse(keys, folder, allow_unexpected)
    _shard_and_fill(model, mesh, folder, keys, device, example_inputs, plan, strict, cut_for)
    return model


def _open(path: Path, mesh: DeviceMesh) -> tuple[Folder, str | None]:
    """A checkpoint, and the plan that it was cut for where `shard_checkpoint` wrote it."""
    if is_presliced(path):
        return open_presliced(path, mesh.get_local_rank(), mesh.size())
    return open_folder(path), None


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
    _shard(
        model,
        mesh,
        example_inputs,
        plan,
        strict,
        lambda tensor: room(tensor, target),
        lambda sliced: materialize(model, target, sliced),
    )
    sharding = sharding_of(model)
    with together(group):
        if cut_for is not None and sharding is not None and sharding.plan.fingerprint != cut_for:
            raise CheckpointError(
                f"{folder.path}: was cut for plan {cut_for}, and this one is {sharding.plan.fingerprint}. "
                "Cut it again (autotp shard), with the same plan and versions."
            )
        fill(model, keys.tensors, sharding)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The ordinary, unsharded state dict (original names, shapes and order of rows), on every rank.

    A collective call: every rank of the model's mesh calls it.
    """
    sharding = sharding_of(model)
    if sharding is None:
        return dict(model.state_dict())
    return gather_state_dict(model, sharding)


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    save_original_format: bool = True,
) -> None:
    """Write the ordinary, unsharded checkpoint: what transformers or ``load_state_dict`` of the plain model load.

    Every rank calls it. One tensor at a time is gathered, to the rank that writes its file. A directory that exists is
    replaced in one step when all is on disk; killed before, it is as it was. Other files in it stay.

    Args:
        max_shard_size: of a file; with more than one there is an index.
        save_original_format: undo transformers' conversions (stacked experts become one tensor an expert again).

    Raises:
        CheckpointError: on every rank (a full disk, say); the directory is as it was.
    """
    save_model(
        model,
        Path(directory),
        sharding_of(model),
        max_shard_size=max_shard_size,
        config=model.__dict__.get(_CONFIG),
        original_format=save_original_format,
    )


def shard_checkpoint(
    path_or_id: str | os.PathLike[str],
    tp: int,
    out: str | os.PathLike[str],
    *,
    plan: PlanLike | None = None,
    model_class: Any = None,
    dtype: torch.dtype | str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Cut a transformers checkpoint into one file a rank, without a process group and one slice in memory at a time.

    :func:`from_pretrained` then loads ``out`` at this degree, and each rank reads its own file only.

    Args:
        progress: is told (bytes done, bytes in all).
    """
    folder = open_folder(pretrained.locate(path_or_id))
    folder.verify(0, 1)
    where = folder.path if folder.path.is_dir() else folder.path.parent
    model: Any = pretrained.build(where, model_class, dtype, {})
    keys = match(model, folder.tensors)
    pretrained.report(model, keys, folder, False, True)
    initialise(model, keys, set(keys.missing), seed=0)
    prepared = prepare(model, tp, given=plan)
    extra = [f for f in sorted(where.iterdir()) if f.is_file() and f.suffix in (".json", ".txt", ".model")]
    slices = prepared.rewriting.program.slices
    step = _steps(progress, sum(value.nbytes for value in model.state_dict().values()))
    extra = [f for f in extra if not f.name.endswith(".index.json") and f.name != "autotp_manifest.json"]
    write_presliced(
        model,
        keys.tensors,
        slices,
        lambda r: prepared.rank(r, ""),
        tp,
        prepared.fingerprint,
        Path(out),
        extra,
        step,
    )
    return prepared.plan


def merge_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """The inverse of :func:`shard_checkpoint`, one tensor in memory at a time and without a process group."""
    path = Path(directory)
    if not is_presliced(path):
        raise CheckpointError(f"{path}: was not written by autotp shard")
    model = pretrained.build(path, None, None, {}) if (path / "config.json").exists() else None
    total = 0 if model is None else sum(value.nbytes for value in model.state_dict().values())
    merge(path, Path(out), model, max_shard_size, _steps(progress, total))


def _steps(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, total), total)

    return step


def save_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Model, optimizer, scheduler and random state, through ``torch.distributed.checkpoint``; every rank calls it.

    Args:
        extra: plain values of your own (the number of the step), which :func:`load_training_state` gives back.
    """
    save_state(Path(path), model, sharding_of(model), optimizer, scheduler, extra or {})


def load_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Read what :func:`save_training_state` wrote, at this or any other degree; ``extra`` comes back.

    Raises:
        CheckpointError: it is another model's or another optimizer's.
    """
    return load_state(Path(path), model, sharding_of(model), optimizer, scheduler)
