"""What other libraries see of a sharded model: that it is one, and whole tensors or an error where they would save it.

transformers' Trainer and accelerate wrap what they are given in DDP over all ranks, and deal each rank other data,
unless the model says that it is tensor parallel (`_announce`). Those who write files take a state dict to be the whole
model's, from one rank often; of a sharded model it has this rank's slices, under the names of the whole (`_answer`,
`_save`). And what wraps a sharded module into one with parameters of its own (adapters, parametrizations)
computes with slices as if they were whole, so it has to be there before (`_refuse_newcomers`).
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..axes.term import size_of
from ..errors import AutoTPError, CheckpointError
from ..trace.library import is_transformers
from .state import gather_state_dict, sharding_of

_PART = "_autotp_part"  # a module that was there when the model was sharded
_watching = False


def announce(model: nn.Module) -> None:
    """Make the sharding of ``model``, which remembers it, known to the libraries that ask for it."""
    global _watching
    sharding = sharding_of(model)
    assert sharding is not None
    _announce(model, sharding.rank.tp)
    model.register_state_dict_post_hook(_answer)  # type: ignore[no-untyped-call]
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = partial(_save, model)
    for module in model.modules():
        module.__dict__[_PART] = True
    if not _watching:
        register_module_module_registration_hook(_refuse_newcomers)
        _watching = True


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
        state.update({prefix + name: value for name, value in gather_state_dict(model, sharding).items()})
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


# ---- what is added later -------------------------------------------------------------------------


def _refuse_newcomers(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Before a module is put into another one."""
    if _PART not in parent.__dict__ or child is None or _PART in child.__dict__:
        return
    for fqn, module in child.named_modules(prefix=name):
        if _PART in module.__dict__:
            continue
        if any(p is not None for p in module._parameters.values()):
            raise AutoTPError(
                f"{fqn!r}, with parameters of its own, cannot become part of a {type(parent).__name__} of a model "
                "that is sharded: it would take this rank's slices for the whole. Add adapters, heads and "
                "parametrizations first, then call autotp.parallelize."
            )
        module.__dict__[_PART] = True  # an empty container, which may be filled later
