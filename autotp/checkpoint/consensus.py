"""One rank's failure is everyone's: a stage ends on all ranks in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ..errors import AutoTPError, CheckpointError


@contextmanager
def together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """What happens in here fails on every rank of the group, or on none. No collective in here may follow a failure.

    Raises:
        CheckpointError: here or on another rank; the others say which.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    conclude(group, failure)


def conclude(group: dist.ProcessGroup | None, failure: Exception | None) -> None:
    """Raise this rank's failure, or that of the first rank that has one."""
    if group is not None and dist.get_world_size(group) > 1:
        everyone: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, None if failure is None else _text(failure), group=group)
        if failure is None:
            for rank, text in enumerate(everyone):
                if text is not None:
                    raise CheckpointError(f"rank {rank} failed: {text}")
    if isinstance(failure, AutoTPError):
        raise failure
    if failure is not None:
        raise CheckpointError(_text(failure)) from failure


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, AutoTPError) else f"{type(error).__name__}: {error}"
