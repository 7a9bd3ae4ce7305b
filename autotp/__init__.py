"""autotp: automatic tensor parallelism for any PyTorch model.

model = autotp.parallelize(model)      # under torchrun; any nn.Module, unmodified
"""

from autotp import debug
from autotp.api import full_state_dict, parallelize, plan
from autotp.axes.check import RuleCheck, check_rule
from autotp.axes.rules.context import OpContext
from autotp.axes.rules.custom import register_rule, unregister_rule
from autotp.checkpoint.load import from_pretrained, load_checkpoint
from autotp.checkpoint.offline import merge_checkpoint, shard_checkpoint
from autotp.checkpoint.save import save_pretrained
from autotp.checkpoint.training import load_training_state, save_training_state
from autotp.checkpoint.weightless import weightless
from autotp.errors import (
    AutoTPError,
    CheckpointError,
    HangError,
    PlanError,
    RankMismatchError,
    RewriteError,
    RuleError,
    TraceError,
    VerifyError,
)
from autotp.plan.plan import Plan
from autotp.runtime.cross_entropy import cross_entropy
from autotp.runtime.lazy_gather import loss_parallel

__version__ = "0.1.0"

__all__ = [
    "AutoTPError",
    "CheckpointError",
    "HangError",
    "OpContext",
    "Plan",
    "PlanError",
    "RankMismatchError",
    "RewriteError",
    "RuleCheck",
    "RuleError",
    "TraceError",
    "VerifyError",
    "check_rule",
    "cross_entropy",
    "debug",
    "from_pretrained",
    "full_state_dict",
    "load_checkpoint",
    "load_training_state",
    "loss_parallel",
    "merge_checkpoint",
    "parallelize",
    "plan",
    "register_rule",
    "save_pretrained",
    "save_training_state",
    "shard_checkpoint",
    "unregister_rule",
    "weightless",
]
