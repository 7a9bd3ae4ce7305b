"""Values of a trace on one rank, as verification numbers them, and what there is to read off the nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Described = tuple[object, ...]
"""A step as its op appears in a graph (`bind.describe`)."""
Steps = tuple[Described, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """What a local value is: a slice of the reference value ``root`` (output number ``output``), after ``steps``."""

    root: object
    output: int
    steps: Steps


def op_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; nothing for what is no ATen op."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


def shape_of(node: fx.Node) -> Shape | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def step_of(node: fx.Node) -> Described | None:
    """The step that this node is, with its dim counted from the front."""
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or node.target.namespace != "autotp"
        or is_lookup(node)
    ):
        return None
    name, rest = op_name(node), [tuple(a) if isinstance(a, (list, tuple)) else a for a in node.args[1:]]
    if name in ("gather", "take") and isinstance(rest[0], int):
        shape = shape_of(node)
        rest[0] = rest[0] % len(shape) if shape else rest[0]
    return (name, *rest)


def dimless(steps: Steps) -> Steps:
    """Steps without their dims, for where two ranks of tensor stand for one value ([b, t, f] and [b·t, f])."""
    return tuple((s[0], *s[2:]) if s[0] in ("gather", "take") else s for s in steps)


def show_steps(steps: Steps) -> str:
    return " → ".join(str(s[0]) if len(s) < 3 else f"{s[0]}{s[1:]}" for s in steps) or "no step"


def is_lookup(node: fx.Node) -> bool:
    return str(node.target).startswith("autotp.lookup")


def is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def tensor_args(node: fx.Node) -> Iterator[tuple[tuple[str | int, ...], fx.Node]]:
    """(path, operand) for each operand, also those in lists."""

    def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], fx.Node]]:
        if isinstance(value, fx.Node):
            yield path, value
        elif isinstance(value, (list, tuple)):
            for i, v in enumerate(value):
                yield from walk(v, (*path, i))

    for i, value in enumerate(node.args):
        yield from walk(value, ("args", i))
    for key, value in node.kwargs.items():
        yield from walk(value, ("kwargs", key))


def plain(value: Any) -> Any:
    """Arguments with every tensor replaced by a mark, lists as tuples."""
    if isinstance(value, fx.Node):
        return "tensor"
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def item_of(getitem: fx.Node) -> int:
    """Which of several results ``getitem`` takes."""
    index = getitem.args[1]
    assert isinstance(index, int)
    return index
