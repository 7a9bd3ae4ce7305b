"""Plan once for all ranks of a job, where planning is not what its test is about."""

from __future__ import annotations

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
    sent: list[bytes | None] = [None]
    if mesh.get_local_rank() == 0:
        try:
            sent = [_pickled(prepare(model, tp, **options))]
        except AutoTPError:
            pass
    dist.broadcast_object_list(sent, group=mesh.get_group(), group_src=0)
    if sent[0] is None:
        return prepare(model, tp, mesh=mesh, **options)
    found: Prepared = pickle.loads(sent[0])
    return found


def _pickled(prepared: Prepared) -> bytes:
    out = io.BytesIO()
    _Pickler(out).dump(prepared)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    """Also of code: patches name the functions that they change by it, and compare it by its value."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return marshal.loads, (marshal.dumps(value),)
        return NotImplemented
