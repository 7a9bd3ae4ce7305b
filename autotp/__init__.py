"""autotp: automatic tensor parallelism for any PyTorch model.

model = autotp.parallelize(model)      # under torchrun; any nn.Module, unmodified
"""

from autotp.api import full_state_dict, parallelize, plan
from autotp.axes.rules.registry import register_rule
from autotp.errors import (
    AutoTPError,
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
    "Plan",
    "PlanError",
    "RankMismatchError",
    "RewriteError",
    "RuleError",
    "TraceError",
    "VerifyError",
    "full_state_dict",
    "parallelize",
    "plan",
    "register_rule",
]
