"""What other libraries see of a sharded model: that it is one, and whole tensors or an error where they would save it.

transformers' Trainer and accelerate wrap what they are given in DDP over all ranks, and deal each rank other data,
unless the model says that it is tensor parallel (`_announce`). Those who write files take a state dict to be the whole
model's, from one rank often; of a sharded model it has this rank's slices, under the names of the whole (`_answer`,
`_save`). What is put into a sharded model later is noted (`watch`).
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.term import size_of
from ..errors import CheckpointError
from ..trace.library import is_transformers
from .state import Sharding, gather_state_dict, sharding_of
from .watch import watch


def announce(model: nn.Module) -> None:
    """Make the sharding of ``model``, which remembers it, known to the libraries that ask for it."""
    sharding = sharding_of(model)
    assert sharding is not None
    _announce(model, sharding.rank.tp)
    model.register_state_dict_post_hook(_answer)  # type: ignore[no-untyped-call]
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = partial(_save, model)
    _say_shapes(model, sharding)
    watch(model, sharding.rank)


def _announce(model: nn.Module, tp: int) -> None:
    """transformers keeps the degree on its models and in their config; accelerate asks any model for `tp_size`."""
    ours = [module for module in model.modules() if is_transformers(module)]
    if not ours:
        if not hasattr(model, "tp_size"):
            model.__dict__["tp_size"] = tp
        return
    try:
        made = importlib.import_module("transformers.distributed").DistributedConfig(tp_size=tp)
    except (ImportError, AttributeError):  # an older transformers, whose Trainer asks the model alone
        made = None
    copies: dict[int, Any] = {}
    for module in ours:
        module._tp_size = tp  # type: ignore[assignment]
        config = module.__dict__.get("config")
        if config is not None and made is not None:
            # a config may be shared with models that are not sharded
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                copies[id(config)].distributed_config = made
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.__dict__["config"] = copies[id(config)]


def _say_shapes(model: nn.Module, sharding: Sharding) -> None:
    """peft asks a parameter for its whole shape by DeepSpeed's name for it, where the module does not say its sizes."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for fqn, dims in sharding.dims.items():
        if fqn in tensors:
            tensors[fqn].ds_shape = torch.Size(map(size_of, dims))  # type: ignore[attr-defined]


# ---- saving --------------------------------------------------------------------------------------


def _answer(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After a state dict was made: whole tensors for those whose every rank asks, an error for one rank's file."""
    asking = _libraries()
    caller = next(asking, "")
    sharding = sharding_of(model)
    if sharding is None or not caller:
        return
    if caller == "accelerate.accelerator.get_state_dict":
        if "accelerate.accelerator.save_state" in asking:
            raise CheckpointError(
                "accelerator.save_state would write the optimizer's state of one rank for all. Call "
                "autotp.save_training_state(path, model, optimizer, scheduler) on every rank."
            )
        state.update({prefix + name: value for name, value in gather_state_dict(model).items()})
    elif caller == "peft.utils.save_and_load.get_peft_model_state_dict":
        raise CheckpointError(
            "an adapter of a sharded model would be saved with this rank's slices. "
            "Pass state_dict=autotp.full_state_dict(model), which every rank calls."
        )
    elif caller.startswith("transformers.trainer."):
        raise CheckpointError(
            "the Trainer would write this rank's slices of the model. Let its save_model call "
            "autotp.save_pretrained(self.model, output_dir), on every rank."
        )


def _libraries() -> Iterator[str]:
    """The functions that asked, innermost first, if the first one outside of torch is a library that writes files."""
    frame = sys._getframe(2)
    first = True
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        top = module.partition(".")[0]
        if not (first and top == "torch"):
            if first and top not in ("accelerate", "peft", "transformers"):
                return
            first = False
            yield f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]


def _save(model: nn.Module, directory: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of a library's own ``save_pretrained``."""
    state: Mapping[str, Tensor] | None = kwargs.get("state_dict")
    sharding = sharding_of(model)
    assert sharding is not None
    if is_transformers(model) or state is None:
        how = "" if is_transformers(model) else ", or pass state_dict=autotp.full_state_dict(model)"
        raise CheckpointError(
            "model.save_pretrained would write this rank's slices under the names of the whole tensors. "
            f"Call autotp.save_pretrained(model, directory) on every rank{how}."
        )
    for name, dims in sharding.dims.items():
        whole = tuple(size_of(d) for d in dims)
        if name in state and tuple(state[name].shape) != whole:
            raise CheckpointError(
                f"state_dict has {list(state[name].shape)} of {name}, which is {list(whole)}: it is a rank's "
                "slice. Pass state_dict=autotp.full_state_dict(model)."
            )
    saver: Any = type(model)
    return saver.save_pretrained(model, directory, *args, **kwargs)
