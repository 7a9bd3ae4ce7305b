"""Sharding rules: how an op relates the logical axes of its operands and results, and the table of them.

Most rules are one line of text, ``terms -> terms``, one term per tensor and one letter per dim::

    einsum_rule(["aten.linear"], "...i, oi, o -> ...o", linear="mul", of=(0, 1), added=(2,))

* the terms on the left stand for the tensor arguments of the op's schema, in order (an argument that is
  ``None`` is skipped, one without a term is blocked whole);
* a letter in several terms is one axis: their dims are unified (dims of size 1 broadcast, and take no part);
* ``...`` stands for any number of leading dims, broadcast against each other;
* a letter that the right side lacks is *contracted*: sharding it makes the result Partial;
* ``(hd)`` is one dim of two axes (see `notation`), ``1`` a dim of size 1;
* a letter in ``blocked`` is needed whole by every operand that has it; the result's dim is a fresh axis,
  whole as computed.

Where dims of one letter cannot be unified, that letter alone is blocked at this op. Ops that reshape or index
need a function, decorated with ``@rule("aten.view", ...)``, that talks to an `OpContext`. Rules are found by
overload name (``aten.view.default``) first, then by op name (``aten.view``). An op without a rule blocks
every dim of every operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from autotp.axes.rules.context import (
    NOT_LINEAR,
    Linear,
    LinearKind,
    Localize,
    LocalSize,
    OpContext,
    Operand,
    Path,
    Rule,
    is_tensor_node,
    output_shapes,
)
from autotp.axes.rules.notation import make_einsum_rule
from autotp.errors import RuleError

__all__ = [
    "NOT_LINEAR",
    "Linear",
    "LinearKind",
    "LocalSize",
    "Localize",
    "OpContext",
    "Operand",
    "Path",
    "Rule",
    "block_everything",
    "einsum_rule",
    "find_rule",
    "forget",
    "is_registered",
    "is_tensor_node",
    "make_einsum_rule",
    "output_shapes",
    "registered",
    "rule",
]

_RULES: dict[str, Rule] = {}


def rule(*targets: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ops, named ``aten.view`` (every overload) or ``aten.view.dtype``."""

    def register(fn: Rule) -> Rule:
        for target in targets:
            if _RULES.setdefault(target, fn) is not fn:
                both = f"{_RULES[target].__module__} and {fn.__module__}"
                raise RuleError(f"two sharding rules for {target}, of {both}")
        return fn

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule of a node's target, by overload, then by op."""
    if target is operator.getitem:
        return _RULES.get("getitem")
    name = str(target)
    return _RULES.get(name) or _RULES.get(name.rpartition(".")[0])


def is_registered(name: str) -> bool:
    """Whether a name of an op, as rules are found by, has a rule (an overload may have that of its op)."""
    return name in _RULES


def forget(name: str) -> None:
    """Take a rule out of the table."""
    del _RULES[name]


def registered() -> tuple[str, ...]:
    """The names of all ops that have a rule."""
    return tuple(sorted(_RULES))


def block_everything(op: OpContext) -> None:
    """The rule of an unknown op: it needs all of every operand, and makes its results whole."""
    for i in op.all_tensors():
        for d in range(op.rank(i)):
            op.block(i, d)
    op.outs([[op.whole(size) for size in shape] for shape in op.out_shapes()])


def einsum_rule(
    targets: Iterable[str],
    text: str,
    blocked: str = "",
    linear: LinearKind = "none",
    of: Iterable[int] = (),
    added: Iterable[int] = (),
    random: bool = False,
) -> None:
    """Register one line as the rule of ops."""
    rule(*targets)(make_einsum_rule(text, blocked, linear, of, added, random))
