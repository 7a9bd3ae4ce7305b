"""Plan once for all ranks of a job, where planning is not what its test is about."""

from __future__ import annotations

import contextlib
import gc
import io
import marshal
import pickle
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.errors import AutoTPError
from autotp.prepare import Prepared, prepare


@contextmanager
def planned_by_one() -> Iterator[None]:
    """Within, `parallelize` lets the first rank of its mesh plan and prove for all of them.

    Else every rank does, each for itself, which on two cores takes as many times as long as there are ranks. A model
    that is refused is prepared by each rank all the same, so that each raises what it would raise.
    """
    with mock.patch("autotp.carry.prepare", prepare_for_all):
        yield


def prepare_for_all(model: nn.Module, tp: int, *, mesh: DeviceMesh | None = None, **options: Any) -> Prepared:
    """`prepare`, on the first rank of ``mesh`` for every rank; collective."""
    if mesh is None:
        return prepare(model, tp, **options)
    found: Prepared | None = None
    sent: list[bytes | None] = [None]
    if mesh.get_local_rank() == 0:
        with contextlib.suppress(AutoTPError):
            found = prepare(model, tp, **options)
            sent = [_pickled(found)]
    dist.broadcast_object_list(sent, group=mesh.get_group(), group_src=0)
    if sent[0] is None:
        return prepare(model, tp, mesh=mesh, **options)
    return found if found is not None else _Unpickler(io.BytesIO(sent[0])).load()


def _pickled(prepared: Prepared) -> bytes:
    out = io.BytesIO()
    _Pickler(out).dump(prepared)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    """Also of code, by which patches name the functions that they change."""

    def persistent_id(self, value: Any) -> bytes | None:
        return marshal.dumps(value) if isinstance(value, types.CodeType) else None


class _Unpickler(pickle.Unpickler):
    """Code becomes that of the function here which has the same."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        codes = [f.__code__ for f in gc.get_objects() if type(f) is types.FunctionType]
        self.codes = {(code.co_filename, code): code for code in codes}

    def persistent_load(self, data: bytes) -> types.CodeType:
        code = marshal.loads(data)
        return self.codes.get((code.co_filename, code), code)
