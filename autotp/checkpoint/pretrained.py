"""transformers checkpoints: the model that a config describes, without weights, and its files."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .folder import Folder
from .keys import Keys
from .weightless import lost_tensors, weightless

# The heads of transformers to try, in this order, for a config that does not say its architecture.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def locate(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a checkpoint; one on the hub is fetched first (config, index and safetensors files only).

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path_or_id)
    if path.exists():
        return path
    text = os.fspath(path_or_id)
    if text.count("/") > 1 or text.startswith((".", "/")):
        raise CheckpointError(f"{text}: no such file or directory")
    try:
        hub = importlib.import_module("huggingface_hub")
        return Path(
            hub.snapshot_download(
                text, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"]
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"{text}: is no directory, and cannot be fetched as a model id: {error}"
        ) from error


def build(
    folder: Path, model_class: Any, dtype: torch.dtype | str | None, options: dict[str, Any]
) -> nn.Module:
    """The model of a directory's config, in eval mode, with parameters on the meta device and real buffers.

    Args:
        model_class: a class of transformers (``AutoModelForCausalLM``, ``LlamaModel``); by default the one that the
            config names.
        dtype: ``"auto"`` or None: what the config says, as transformers does.

    Raises:
        CheckpointError: no model can be built of it.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(
            "from_pretrained needs transformers: pip install 'autotp[transformers]'"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: has no config that transformers can read: {error}") from error
    kind = _class_for(transformers, config, model_class)
    older = options.pop("torch_dtype", None)  # the older name of dtype
    dtype = older if dtype is None else dtype
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    assert dtype is None or isinstance(dtype, torch.dtype)
    with weightless():
        model: Any = kind._from_config(config, dtype=dtype, **options)
    if dtype is not None:
        _keep_wide(model, dtype)
    lost = lost_tensors(model)
    if lost:
        raise CheckpointError(
            f"{kind.__name__} computes {lost[0]} in a way that cannot be repeated without weights"
        )
    model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()  # type: ignore[no-any-return]


def _class_for(transformers: Any, config: Any, model_class: Any) -> Any:
    classes = (
        [model_class]
        if model_class is not None
        else [
            getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)
        ]
        or [getattr(transformers, name) for name in AUTO_CLASSES]
    )
    for cls in classes:
        if hasattr(cls, "_from_config"):
            return cls
        if type(config) in cls._model_mapping:
            found = cls._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise CheckpointError(f"transformers has no model class for a {type(config).__name__}: pass model_class")


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Parameters that the model's class wants in float32, whatever it is loaded in."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    find = importlib.import_module("transformers.core_model_loading").build_glob_alternation
    pattern, by_group, _ = find(list(plan))
    for name, parameter in model.named_parameters():
        found = pattern.search(name)
        if found is not None:
            parameter.data = parameter.data.to(plan[by_group[found.lastgroup]])


def report(model: Any, keys: Keys, folder: Folder, ignore_mismatched_sizes: bool, log: bool) -> Any:
    """What is missing, unexpected and mismatched, as transformers reports it (to its log); its own record of that.

    Raises:
        CheckpointError: sizes differ, and that is not to be ignored; or nothing of the checkpoint is the model's.
    """
    loading = importlib.import_module("transformers.utils.loading_report")
    info = loading.LoadStateDictInfo(
        missing_keys=set(keys.missing),
        unexpected_keys=set(keys.unexpected),
        mismatched_keys=set(keys.mismatched),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    if keys.mismatched and not ignore_mismatched_sizes:
        name, there, wanted = sorted(keys.mismatched)[0]
        raise CheckpointError(
            f"{name} has shape {there} in the checkpoint ({keys.where(name)}) and {wanted} in the model"
            + (f", and {len(keys.mismatched) - 1} more differ" if len(keys.mismatched) > 1 else "")
            + ". Is it the checkpoint of another model? ignore_mismatched_sizes=True draws such weights anew."
        )
    if not set(keys.tensors) - {name for name, *_ in keys.mismatched}:
        raise CheckpointError(
            f"{folder.path}: none of its {len(folder.tensors)} tensors is one of {type(model).__name__}'s: it is a "
            f"checkpoint of another model ({sorted(folder.tensors)[:1]})"
        )
    if log:
        loading.log_state_dict_report(
            model,
            str(folder.path),
            ignore_mismatched_sizes,
            info,
            logging.getLogger("transformers.modeling_utils"),
        )
    return info
