"""What a sharded model needs to run: groups by name, differentiable collectives, sharded modules."""

from autotp.runtime.group import (
    Group,
    get_group,
    has_group,
    pretend_group,
    register_group,
    register_subgroups,
    unregister_group,
)
from autotp.runtime.ops import all_reduce, enter, gather, mask, take
from autotp.runtime.record import Collective, CollectiveLog, record_collectives

__all__ = [
    "Collective",
    "CollectiveLog",
    "Group",
    "all_reduce",
    "enter",
    "gather",
    "get_group",
    "has_group",
    "mask",
    "pretend_group",
    "record_collectives",
    "register_group",
    "register_subgroups",
    "take",
    "unregister_group",
]
