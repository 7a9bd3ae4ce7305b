"""autotp: automatic tensor parallelism for any PyTorch model.

model = autotp.parallelize(model)      # under torchrun; any nn.Module, unmodified
"""

from autotp.api import (
    from_pretrained,
    full_state_dict,
    load_checkpoint,
    load_training_state,
    merge_checkpoint,
    parallelize,
    plan,
    save_pretrained,
    save_training_state,
    shard_checkpoint,
)
from autotp.axes.rules.registry import register_rule
from autotp.checkpoint.weightless import weightless
from autotp.errors import (
    AutoTPError,
    CheckpointError,
    PlanError,
    RankMismatchError,
    RewriteError,
    RuleError,
    TraceError,
    VerifyError,
)
from autotp.plan.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "AutoTPError",
    "CheckpointError",
    "Plan",
    "PlanError",
    "RankMismatchError",
    "RewriteError",
    "RuleError",
    "TraceError",
    "VerifyError",
    "from_pretrained",
    "full_state_dict",
    "load_checkpoint",
    "load_training_state",
    "merge_checkpoint",
    "parallelize",
    "plan",
    "register_rule",
    "save_pretrained",
    "save_training_state",
    "shard_checkpoint",
    "weightless",
]
