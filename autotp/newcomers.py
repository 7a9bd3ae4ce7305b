"""What is put into a sharded model (adapters, say) is taken in by planning the model anew, whole.

A weightless copy of the model, with what sharding did to it undone, is planned and proven as any model is. Only then
the same is undone on the model, and the new plan carried out on the slices that are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .carry import carry_out, prepare_on
from .errors import AutoTPError
from .rewrite.recut import Slices, recut, whole_copy
from .rewrite.state import Asked, Sharding, refuse_wrapper, sharded_in, sharding_of
from .rewrite.undo import record_of, undo
from .runtime.group import get_group
from .runtime.mesh import Verdict, agree, mesh_of
from .runtime.parts import bar, let_run, parts_of, take_in_newcomers, take_in_with


def take_in(model: nn.Module, asked: Asked | None = None) -> None:
    """Plan a sharded model, into which something was put, anew. Every rank of its mesh calls it.

    Raises:
        AutoTPError: on every rank, before anything is changed.
    """
    sharding, parts = sharding_of(model), parts_of(model)
    assert sharding is not None and parts is not None
    asked = sharding.asked if asked is None else asked
    with _plainly():
        try:
            mesh = mesh_of(sharding.rank.prefix)
            earlier = _slices(model, sharding, mesh)
            whole = whole_copy(model, earlier)
            let_run(whole)
            undo(whole)
            prepared = prepare_on(whole, mesh, asked)
        except AutoTPError as error:
            if not parts.changed:
                raise
            raise AutoTPError(
                f"{parts.changed}, and so the model has to be planned anew, which failed: {error}\n"
                "The slices are as they were: take out what was put in, and the model runs as before. What is put in "
                "before autotp.parallelize sees whole weights and their shapes: do that first."
            ) from error
        assert prepared is not None
        came = [m for m in model.modules() if (found := record_of(m)) is None or found.came]
        let_run(model)
        undo(model)
        try:
            carry_out(model, mesh, prepared, asked, cut=partial(recut, earlier=earlier))
        except BaseException:  # no memory left, say
            bar(model, "this model was about to be planned anew, which was interrupted: build and shard it again.")
            raise
    fqns = {module: fqn for fqn, module in model.named_modules()}
    for module in came:
        record, fqn = record_of(module), fqns[module]
        assert record is not None
        record.came = True
        names = {f"{fqn}.{name}" for name, p in module._parameters.items() if p is not None}
        if names and not names & prepared.used:
            bar(
                module,
                f"{fqn!r} did not run when the model was planned with it (it was no active adapter, say). Call "
                "autotp.parallelize(model) once more, on every rank, now that it does.",
            )


def _slices(model: nn.Module, sharding: Sharding, mesh: DeviceMesh) -> Slices:
    """What is there; all ranks know it, or none goes on."""
    failure: AutoTPError | None = None
    try:
        return Slices.of(model, sharding.rank)
    except AutoTPError as error:
        failure = error
        raise
    finally:
        agree(mesh, Verdict("start", None, None if failure is None else str(failure)))


@contextmanager
def _plainly() -> Iterator[None]:
    """As outside of the forward that has brought us here: with gradients, and without autocast."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


take_in_with(take_in)


def take_in_all(model: nn.Module) -> None:
    """Plan anew what is sharded of a model and has changed."""
    for module in sharded_in(model):
        take_in_newcomers(module)


def ready(model: nn.Module, what: str) -> None:
    """Before the state of a model is saved or loaded: refuse a wrapper of a sharded one, and take in what has come."""
    refuse_wrapper(model, what)
    take_in_all(model)


def again(model: nn.Module, mesh: DeviceMesh | None, asked: Asked) -> bool:
    """`autotp.parallelize` of a model that is sharded, or wraps one: plan it anew; whether it was one.

    What is not given is as it was the first time.
    """
    inside = sharded_in(model)
    for module in inside:
        sharding = sharding_of(module)
        assert sharding is not None
        ranks = get_group(sharding.rank.prefix).ranks
        if mesh is not None and tuple(dist.get_process_group_ranks(mesh.get_group())) != ranks:
            raise AutoTPError(f"this model is sharded already, over ranks {ranks}: leave mesh out to plan it anew.")
        first = sharding.asked
        take_in(
            module,
            Asked(
                first.example_inputs if asked.example_inputs is None else asked.example_inputs,
                first.plan if asked.plan is None else asked.plan,
                asked.strict or first.strict,
            ),
        )
    return bool(inside)
