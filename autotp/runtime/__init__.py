"""What a sharded model needs to run: groups by name, differentiable collectives, sharded modules."""

from autotp.runtime.attention import (
    AttentionOptions,
    ShardedMultiheadAttention,
    attention_slices,
    disable_fast_paths,
)
from autotp.runtime.conv import ConvOptions, ShardedConv
from autotp.runtime.edges import Enter, Gather, SharedEnter, Take
from autotp.runtime.embedding import EmbeddingOptions, ShardedEmbedding
from autotp.runtime.gradients import GradSync, sync_gradient
from autotp.runtime.group import (
    Group,
    get_group,
    has_group,
    pretend_group,
    register_group,
    register_subgroups,
    unregister_group,
)
from autotp.runtime.linear import LinearOptions, ShardedLinear, ShardedTransposedLinear
from autotp.runtime.ops import all_reduce, enter, gather, mask, take
from autotp.runtime.record import Collective, CollectiveLog, record_collectives
from autotp.runtime.rng import sharded_rng
from autotp.runtime.swap import Sharded, set_parameter, slice_parameter, take_runs

__all__ = [
    "AttentionOptions",
    "Collective",
    "CollectiveLog",
    "ConvOptions",
    "EmbeddingOptions",
    "Enter",
    "Gather",
    "GradSync",
    "Group",
    "LinearOptions",
    "Sharded",
    "ShardedConv",
    "ShardedEmbedding",
    "ShardedLinear",
    "ShardedMultiheadAttention",
    "ShardedTransposedLinear",
    "SharedEnter",
    "Take",
    "all_reduce",
    "attention_slices",
    "disable_fast_paths",
    "enter",
    "gather",
    "get_group",
    "has_group",
    "mask",
    "pretend_group",
    "record_collectives",
    "register_group",
    "register_subgroups",
    "set_parameter",
    "sharded_rng",
    "slice_parameter",
    "sync_gradient",
    "take",
    "take_runs",
    "unregister_group",
]
