"""The public door: sharding rules for ops that autotp does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from autotp.axes.rules.context import LinearKind, OpContext, Rule
from autotp.axes.rules.notation import make_einsum_rule
from autotp.axes.rules.registry import forget, is_registered, rule
from autotp.errors import RuleError

_MINE: set[str] = set()  # what users registered, and may take back


def register_rule(
    op: Any,
    rule: str | Callable[[OpContext], None],
    *,
    blocked: str | Iterable[str] = "",
    sizes: Mapping[str, str] | None = None,
    linear: LinearKind = "none",
    of: Sequence[int] = (),
    added: Sequence[int] = (),
    random: bool = False,
) -> None:
    """Tell autotp how an op of yours shards. On every rank, before `parallelize` or `plan`::

        autotp.register_rule("mylib::attn", "b h q d, b h k d, b h k e -> b h q e", blocked="k d")

    An op without a rule needs all of its operands whole. `check_rule` holds a rule against the op itself.

    Args:
        op: ``"namespace::name"`` (every overload), ``"namespace::name.overload"``, what ``torch.library.custom_op``
            or ``triton_op`` returned, or ``torch.ops.namespace.name``.
        rule: ``terms -> terms``: one term for each tensor argument in the order of the schema, one letter for each
            dim. Dims of one letter are one axis. A letter on both sides *passes*: each rank calls the op on its slice
            of that axis. One that the right side lacks is *summed*: the result is Partial, and all-reduced somewhere
            after. ``(h d)`` is a dim of two axes, h the major one; ``...`` leading dims; ``1`` a dim of size 1.
            Or a function of an `OpContext`, for ops that no line describes.
        blocked: letters of axes that the op needs whole (a softmax over them, a scan along them). Where such an axis
            is sharded, it is gathered before the op.
        sizes: letter → the integer argument of the op that is the axis's size; a rank passes its local size there.
        linear: ``"mul"``: the op is linear in each of the operands ``of`` by itself (a product; a matrix product), so
            that one of them may stay Partial. ``"add"``: the result is a sum of the operands ``of``.
        of: operand numbers for ``linear``, counted in terms.
        added: operands that are added to a sum (a bias): on one rank only, where the result is Partial.
        random: the op draws random numbers.

    Raises:
        RuleError: no such op, an unreadable rule, or an op that has a rule already.
    """
    made = _compiled(op, rule, blocked, sizes, linear, of, added, random)
    name = op_name(op)
    packet = ".".join(
        name.split(".")[:2]
    )  # an overload may have a rule of its own, but for an op that autotp knows
    if is_registered(name) or (is_registered(packet) and packet not in _MINE):
        own = "by register_rule: call autotp.unregister_rule first" if name in _MINE else "of autotp's own"
        raise RuleError(f"register_rule: {_shown(name)} has a sharding rule already, {own}")
    _check_arguments(name, sizes or {})
    _register(name, made)


def _compiled(
    op: Any,
    rule: object,
    blocked: str | Iterable[str],
    sizes: Mapping[str, str] | None,
    linear: LinearKind,
    of: Sequence[int],
    added: Sequence[int],
    random: bool,
) -> Rule:
    if isinstance(rule, str):
        return _with_writes(make_einsum_rule(rule, blocked, linear, of, added, random, sizes))
    if not callable(rule):
        raise RuleError(f"register_rule: the rule of {op} is a {type(rule).__name__}, not text or a function")
    if blocked or sizes or linear != "none" or of or added or random:
        raise RuleError(
            f"register_rule: the rule of {op} is a function, which says all of it; blocked, sizes, linear, of, "
            "added and random belong to a line of text"
        )
    return rule


def _register(name: str, made: Rule) -> None:
    rule(name)(made)
    _MINE.add(name)


def unregister_rule(op: Any) -> None:
    """Take a rule of `register_rule` back.

    Raises:
        RuleError: the op has none, or one of autotp's own.
    """
    name = op_name(op)
    if name not in _MINE:
        raise RuleError(
            f"unregister_rule: {_shown(name)} has no rule from register_rule"
            + (", its rule is autotp's own" if is_registered(name) else "")
        )
    _MINE.discard(name)
    forget(name)


def op_name(op: Any) -> str:
    """``namespace.name`` or ``namespace.name.overload``, as rules are found by.

    Raises:
        RuleError: that is no op that torch knows.
    """
    if isinstance(op, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(op)
    name = getattr(op, "_qualname", op)  # what custom_op and triton_op return
    parts = name.split("::") if isinstance(name, str) else []
    if len(parts) != 2 or not all(parts):
        raise RuleError(f"{op!r} is not the name of an op, such as 'mylib::attn'")
    overloads(name)
    return str(name).replace("::", ".")


def overloads(name: str) -> tuple[Any, ...]:
    """The overloads that ``namespace::name`` or ``namespace::name.overload`` stands for.

    Raises:
        RuleError: there are none.
    """
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    if packet is None or (overload and overload not in packet.overloads()):
        raise RuleError(
            f"torch knows no op {name!r}: import what defines it (torch.library.custom_op, or a library's extension) "
            "before its rule is registered"
        )
    return tuple(getattr(packet, o) for o in ([overload] if overload else packet.overloads()))


def _shown(name: str) -> str:
    return name.replace(".", "::", 1)


def _check_arguments(name: str, sizes: Mapping[str, str]) -> None:
    for overload in overloads(_shown(name)):
        known = [a.name for a in overload._schema.arguments]
        for argument in sizes.values():
            if argument not in known:
                raise RuleError(f"register_rule: {overload} has no argument {argument!r}, only {known}")


def _with_writes(made: Rule) -> Rule:
    """The rule of an op that writes into one of its arguments has to say so; its schema knows."""

    def apply(op: OpContext) -> None:
        schema = getattr(op.node.target, "_schema", None)
        written = [
            a.name
            for a in (schema.arguments if schema else ())
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if len(written) > 1:
            raise RuleError(
                f"{op.node.target} writes into {written}: a line of text cannot say how that shards"
            )
        made(op)
        for name in written:
            if op.has(name):
                op.mutates(op.tensor(name))

    return apply
