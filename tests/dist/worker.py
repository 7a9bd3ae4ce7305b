"""What runs in a worker process of the pool."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import pickle
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

#: New objects between two collections of garbage: a trace makes many that stay, and collections look at all of them.
COLLECT_AFTER = 20_000


@dataclass
class Outcome:
    """What one rank made of a job: a pickled value, or the text of an error."""

    value: bytes = b""
    error: str | None = None
    error_type: str = ""
    failed_at: float = 0.0  # on the clock that all processes of a machine share


def serve(connection: Connection, stacks: str) -> None:
    """Do jobs until the other end of the connection goes away."""
    import torch

    gc.set_threshold(COLLECT_AFTER)
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "error", message=r".*torch\.distributed.*"
    )  # pytest's own filters end at its process
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        while True:
            try:
                rank = pickle.loads(connection.recv_bytes())
                job = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(pickle.dumps(_do(rank, job)))


def _do(rank: int, job: bytes) -> Outcome:
    import torch
    import torch.distributed as dist

    try:
        world, store, timeout, where, args, one_plans = pickle.loads(job)
        # A process group of its own for each job: nothing that a job did to its groups can reach the next
        # one.
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout + 30),  # the pool is the one that reports a hang
        )
        torch.manual_seed(0)
        with _planning(one_plans):
            value = pickle.dumps(_find(*where)(*args))
        dist.barrier()  # no rank tears its connections down while another still uses them
        return Outcome(value=value)
    except BaseException as e:
        return Outcome(error=traceback.format_exc(), error_type=type(e).__name__, failed_at=time.monotonic())
    finally:
        _clean_up()


def _planning(one_plans: bool) -> contextlib.AbstractContextManager[None]:
    if not one_plans:
        return contextlib.nullcontext()
    from tests.dist.planning import planned_by_one

    return planned_by_one()


def _clean_up() -> None:
    import torch
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch._dynamo.reset() if "torch._dynamo" in sys.modules else None
    if (groups := sys.modules.get("autotp.runtime.group")) is not None:
        groups._groups.clear()
    if (meshes := sys.modules.get("autotp.runtime.mesh")) is not None:
        meshes._meshes.clear()  # each keeps a process group, whose thread polls


def _find(module: str, file: str, qualname: str) -> Callable[..., Any]:
    found: Any = _load(module, file)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _load(name: str, file: str) -> types.ModuleType:
    if name == "__main__":
        name = "_main_of_job"
    if name in sys.modules:
        return sys.modules[name]
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
