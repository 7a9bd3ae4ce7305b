"""autotp: automatic tensor parallelism for any PyTorch model.

model = autotp.parallelize(model)      # under torchrun; any nn.Module, unmodified
"""

from autotp import debug
from autotp.api import full_state_dict, parallelize, plan
from autotp.axes.check import RuleCheck, check_rule
from autotp.axes.rules.context import OpContext
from autotp.axes.rules.custom import register_rule, unregister_rule
from autotp.errors import (
    AutoTPError,
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
    "full_state_dict",
    "loss_parallel",
    "parallelize",
    "plan",
    "register_rule",
    "unregister_rule",
]
