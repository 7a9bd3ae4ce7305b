"""The forward of a whole sharded model: what is done before and after it, however it is called.

Hooks run when a module is called, and not when somebody calls ``model.forward(...)``, as the tuners of peft do. So the
steps around the whole model are in its ``forward``, which is the instance's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from autotp.runtime.boundary import InputHook, OutputHook, PortSteps
from autotp.runtime.gradients import follow_gradients
from autotp.runtime.lazy_gather import losses, settle
from autotp.runtime.parts import take_in_newcomers

_STEPS = "_tp_entry"  # (input hook or None, output hook or None)
_INNER = "_tp_forward"  # the forward that the instance had of its own: one that is patched, say


def enter_by(model: nn.Module, inputs: Sequence[PortSteps], outputs: Sequence[PortSteps]) -> None:
    """From now on the forward of the whole ``model`` does these steps, gathers what it returns unless a loss has been
    computed from parts, sees to the sums and shares of gradients, and takes in what was put into the model.
    """
    before = model.forward
    if "forward" in model.__dict__:
        model.__dict__[_INNER] = before
    model.__dict__[_STEPS] = (
        InputHook(model, inputs) if inputs else None,
        OutputHook(outputs) if outputs else None,
    )
    # a partial, and no bound method, which pickle would write as the class's own forward
    model.__dict__["forward"] = functools.update_wrapper(functools.partial(_forward, model), before)


def _forward(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    if args and args[0] is model:  # accelerate, when it takes its own wrapper off, binds what was in it once more
        args = args[1:]
    if take_in_newcomers(model):
        return model.forward(*args, **kwargs)
    inputs, outputs = model.__dict__[_STEPS]
    follow_gradients(model)
    before = losses()
    if inputs is not None:
        args, kwargs = inputs(model, args, kwargs)
    if _INNER in model.__dict__:
        output = model.__dict__[_INNER](*args, **kwargs)
    else:
        output = type(model).forward(model, *args, **kwargs)
    if outputs is not None:
        output = outputs(model, args, output)
    return settle(output, before)
