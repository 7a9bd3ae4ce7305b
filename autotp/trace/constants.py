"""Values known while tracing: small tensors that a forward makes out of literals, `arange` and integer
buffers.

An `index` by such a tensor is a slice to the analysis (Falcon picks its keys with `fused_qkv[..., [-2], :]`),
and a branch on one (`if positions.max() > limit`) can be followed.

What follows from integers that the example inputs *give* is known as well, but holds for these inputs alone: heights
and widths of images (`grid_thw.tolist()`), lengths of sequences. The code may read them as sizes, as it reads a shape;
they are no constants, and no branch on one is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

LARGEST = 1 << 20  # elements

#: Of their second argument only the shape counts.
_AS = (torch.ops.aten.expand_as.default, torch.ops.aten.view_as.default, torch.ops.aten.reshape_as.default)


class Constants:
    """The known values of a growing graph. `advance` takes in the nodes made since the last call."""

    def __init__(
        self, root: Any, buffers: Mapping[fx.Node, torch.Tensor], inputs: Mapping[fx.Node, torch.Tensor]
    ) -> None:
        self.root = root
        self.buffers = {**buffers, **inputs}
        self.given = set(inputs)
        """Whose values come from the example inputs."""
        self.values: dict[fx.Node, torch.Tensor | list[Any] | tuple[Any, ...]] = {}
        """As they are now: what is written to changes."""
        self.sources: set[int] = set()
        self.written: set[int] = set()
        """Memory of the model's own tensors, and that of values that were written to."""

    def advance(self, nodes: Iterator[fx.Node]) -> None:
        for node in nodes:
            if node.op == "placeholder" and node in self.buffers:
                self.values[node] = self.buffers[node]
                self.sources.add(_memory(self.buffers[node]))
            elif node.op == "get_attr":
                value = getattr(self.root, str(node.target), None)
                if (
                    isinstance(value, torch.Tensor)
                    and not isinstance(value, FakeTensor)
                    and not torch._C._functorch.is_functorch_wrapped_tensor(value)  # one row, in a vmap
                    and value.device.type == "cpu"
                ):
                    self.values[node] = value.detach()
                    self.sources.add(_memory(value))
            elif node.op == "call_function":
                self._evaluate(node)

    def tensors(self) -> dict[fx.Node, torch.Tensor]:
        """The constants: those that are never written to."""
        return {
            node: value
            for node, value in self.values.items()
            if isinstance(value, torch.Tensor) and node not in self.given and _memory(value) not in self.written
        }

    def _evaluate(self, node: fx.Node) -> None:
        target: Any = node.target
        writes = False
        if isinstance(target, torch._ops.OpOverload):
            writes = target._schema.is_mutable and target is not torch.ops.aten.detach_.default
            if not _deterministic(target):
                self._forget(self._written(node, target) if writes else [])
                return
        elif getattr(target, "__name__", "") != "getitem":
            return
        known = {arg: self.values[arg] for arg in node.all_input_nodes if arg in self.values}
        if target in _AS and node.args[0] in self.given:
            like: Any = node.args[1]
            known.setdefault(like, torch.zeros(()).expand(like.meta["val"].shape))
        written = self._written(node, target) if writes else []
        unknown = len(known) < len(node.all_input_nodes) or not _small(node.meta.get("val"))
        if unknown or any(_memory(value) in self.sources for value in written):
            self._forget(written)
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        target = torch.ops.aten.detach.default if target is torch.ops.aten.detach_.default else target
        try:
            self.values[node] = target(*args, **kwargs)
        except Exception:  # a constant is a bonus: what cannot be computed here stays unknown
            self._forget(written)
            return
        self.written |= {_memory(value) for value in written}
        if not self.given.isdisjoint(node.all_input_nodes):
            self.given |= {node, *(other for value in written for other in self._sharing(value))}

    def _written(self, node: fx.Node, target: torch._ops.OpOverload) -> list[torch.Tensor]:
        """The known values that an op writes to."""
        given = (
            dict(zip((arg.name for arg in target._schema.arguments), node.args, strict=False)) | node.kwargs
        )
        found = (
            self.values.get(written)
            for argument in target._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for written in pytree.tree_leaves(given.get(argument.name))
            if isinstance(written, fx.Node)
        )
        return [value for value in found if isinstance(value, torch.Tensor)]

    def _forget(self, written: list[torch.Tensor]) -> None:
        """What unknown values are written to is not known, nor are its views."""
        for value in written:
            for node in self._sharing(value):
                del self.values[node]
            self.written.discard(_memory(value))  # which other values may be in from now on

    def _sharing(self, value: torch.Tensor) -> list[fx.Node]:
        """The nodes whose values are in the same memory."""
        memory = _memory(value)
        return [n for n, held in self.values.items() if isinstance(held, torch.Tensor) and _memory(held) == memory]


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _deterministic(target: torch._ops.OpOverload) -> bool:
    name = target._schema.name.split("::")[-1]
    return torch.Tag.nondeterministic_seeded not in target.tags and not name.startswith(
        ("empty", "new_empty")
    )


def _small(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(not isinstance(x, torch.Tensor) or x.numel() <= LARGEST for x in leaves)
