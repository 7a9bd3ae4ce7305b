"""Process groups by name.

A custom op takes strings, not process groups, and a name pickles, copies and goes into a compiled graph
where a process group does not. So every module and every op of a sharded model says *which* group by its
name, and this registry is the one place that knows what a name stands for in this process.

Ranks of different subgroups may use one name for "the subgroup that I am in": the code and the graph of all
ranks are then the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from autotp.errors import AutoTPError


@dataclass(frozen=True, slots=True)
class Group:
    """What a name stands for in this process.

    ``ranks`` are the global ranks in group order, ``index`` is this process's place among them. Without a
    ``process_group`` the group is pretended: collectives return tensors of the right shape and move nothing.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)


_groups: dict[str, Group] = {}


def register_group(name: str, process_group: dist.ProcessGroup, ranks: Sequence[int] | None = None) -> Group:
    """Let ``name`` stand for ``process_group``; a name that exists already changes its meaning."""
    if ranks is None:
        ranks = dist.get_process_group_ranks(process_group)
    me = dist.get_rank()
    if me not in ranks:
        raise AutoTPError(
            f"cannot register group {name!r}: rank {me} is not in its ranks {tuple(ranks)}. "
            "Register only the groups that this rank is in."
        )
    group = Group(name, tuple(ranks), list(ranks).index(me), process_group)
    _groups[name] = group
    return group


def register_subgroups(name: str, parts: Sequence[Sequence[int]]) -> Group:
    """Make a process group of each part, and let ``name`` stand for the one that this rank is in.

    A collective call: each rank of the default process group calls it, with the same parts.
    """
    me = dist.get_rank()
    mine: Group | None = None
    for part in parts:
        process_group = dist.new_group(list(part))  # every rank takes part in making every group
        if me in part:
            assert process_group is not None
            mine = register_group(name, process_group, part)
    if mine is None:
        raise AutoTPError(
            f"cannot register group {name!r}: rank {me} is in none of {[tuple(p) for p in parts]}."
        )
    return mine


def unregister_group(name: str) -> None:
    """Forget ``name``; the process group itself stays."""
    _groups.pop(name, None)


@contextmanager
def pretend_group(name: str, rank: int, size: int) -> Iterator[Group]:
    """Within this context, ``name`` stands for a group of ``size`` ranks in which this process plays
    ``rank``.

    Nothing is communicated, so that one process can trace what each rank would run. What the name stood for
    before comes back at the end.
    """
    if not 0 <= rank < size:
        raise AutoTPError(
            f"cannot pretend to be rank {rank} of {size} in group {name!r}: ranks go from 0 to {size - 1}."
        )
    before = _groups.get(name)
    group = Group(name, tuple(range(size)), rank, None)
    _groups[name] = group
    try:
        yield group
    finally:
        if before is None:
            _groups.pop(name, None)
        else:
            _groups[name] = before


def get_group(name: str) -> Group:
    """The group of this name."""
    try:
        return _groups[name]
    except KeyError:
        known = ", ".join(repr(n) for n in sorted(_groups)) or "none"
        raise AutoTPError(
            f"no process group is registered as {name!r} in this process (registered: {known}). A sharded "
            "model runs only where its process group exists: parallelize it here, or call "
            "autotp.runtime.register_group."
        ) from None


def has_group(name: str) -> bool:
    return name in _groups
