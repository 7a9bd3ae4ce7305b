"""Tensors that are not read yet: a checkpoint's conversions run on them, and only what a rank wants is read.

A library turns one layout of a checkpoint into another with plain torch ops (stack the experts, concatenate gate
and up, split a fused projection). Run on a `Lazy` these ops are recorded; `read_into` walks them back from the
part that is wanted to the parts of the files it is made of. An op that cannot be walked back gets its operands
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .tensorfile import Box, Run, Source, cut, whole_box

aten = torch.ops.aten


class Lazy(Tensor):
    """A tensor that is a source, or an op's result on others. It has a shape and a dtype, and no values."""

    _origin: Source | tuple[Any, tuple[Any, ...], dict[str, Any], int | None]

    @staticmethod
    def __new__(cls, like: Tensor, origin: Any) -> Lazy:
        made: Lazy = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("meta")
        )
        made._origin = origin
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Lazy({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Lazy:
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        bare = tree_map(lambda v: _meta(v) if isinstance(v, Lazy) else v, (args, kwargs))
        out = func(*bare[0], **bare[1])
        if isinstance(out, Tensor):
            return Lazy(out, (func, args, kwargs, None))
        if isinstance(out, (list, tuple)):
            return type(out)(
                Lazy(o, (func, args, kwargs, i)) if isinstance(o, Tensor) else o for i, o in enumerate(out)
            )
        return out


def _meta(lazy: Lazy) -> Tensor:
    return torch.empty_strided(tuple(lazy.shape), lazy.stride(), dtype=lazy.dtype, device="meta")


def lazy(source: Source) -> Lazy:
    """A source as a tensor to compute with."""
    return Lazy(torch.empty(source.shape, dtype=source.dtype, device="meta"), source)


def read(tensor: Lazy, box: Box | None = None) -> Tensor:
    """A part of it (all, by default) on the CPU."""
    box = whole_box(tensor.shape) if box is None else box
    out = torch.empty([sum(n for _, n in runs) for runs in box], dtype=tensor.dtype)
    read_into(tensor, box, out)
    return out


def read_into(tensor: Lazy, box: Box, out: Tensor) -> None:
    """Copy a part of it into ``out``, which has the part's shape."""
    if out.numel() == 0:
        return
    origin = tensor._origin
    if not isinstance(origin, tuple):
        origin.read_into(box, out)
        return
    func, args, kwargs, index = origin
    rule = _RULES.get(func)
    if rule is None or not rule(args, kwargs, index, list(box), out):
        _whole(func, args, kwargs, index, box, out)


def _whole(func: Any, args: Any, kwargs: Any, index: int | None, box: Box, out: Tensor) -> None:
    real = tree_map(lambda v: read(v) if isinstance(v, Lazy) else v, (args, kwargs))
    result = func(*real[0], **{k: v for k, v in real[1].items() if k != "device"})
    if index is not None:
        result = result[index]
    out.copy_(cut(result, box))


# ---- one rule an op: walk the wanted part back; False: give it its operands whole ---------------------------


def _same(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    if kwargs.get("dtype") not in (None, args[0].dtype):
        return False
    read_into(args[0], box, out)
    return True


def _permute(order: Callable[[Any], list[int]]) -> Any:
    def rule(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
        dims = order(args)  # out dim i is the operand's dim dims[i]
        back = [dims.index(d) for d in range(len(dims))]
        read_into(args[0], [box[i] for i in back], out.permute(back))
        return True

    return rule


def _swapped(args: Any) -> list[int]:
    n = args[0].ndim
    a, b = (args[1] % n, args[2] % n) if len(args) > 1 else (0, n - 1)
    dims = list(range(n))
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _slice(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    operand: Lazy = args[0]
    dim = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else None
    if len(args) > 4 and args[4] != 1:
        return False
    n = operand.shape[dim]
    begin = min(max(start + n if start is not None and start < 0 else start or 0, 0), n)
    return _shifted(operand, dim % operand.ndim, begin, box, out)


def _split(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    operand, sizes = args[0], args[1]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % operand.ndim
    assert index is not None
    begin = sizes * index if isinstance(sizes, int) else sum(sizes[:index])
    return _shifted(operand, dim, begin, box, out)


def _shifted(operand: Lazy, dim: int, begin: int, box: list[Sequence[Run]], out: Tensor) -> bool:
    box[dim] = [(start + begin, length) for start, length in box[dim]]
    read_into(operand, box, out)
    return True


def _select(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    operand, dim, at = args
    dim %= operand.ndim
    box.insert(dim, [(at % operand.shape[dim], 1)])
    read_into(operand, box, out.unsqueeze(dim))
    return True


def _unbind(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    return _select((args[0], args[1] if len(args) > 1 else 0, index), kwargs, None, box, out)


def _unsqueeze(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    dim = args[1] % (args[0].ndim + 1)
    del box[dim]
    read_into(args[0], box, out.select(dim, 0))
    return True


def _squeeze(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    operand, dim = args[0], args[1] % args[0].ndim
    if operand.shape[dim] != 1:
        return _same(args, kwargs, index, box, out)
    box.insert(dim, [(0, 1)])
    read_into(operand, box, out.unsqueeze(dim))
    return True


def _stack(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    operands, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= operands[0].ndim + 1
    rest = [*box[:dim], *box[dim + 1 :]]
    done = 0
    for start, length in box[dim]:
        for i in range(start, start + length):
            read_into(operands[i], rest, out.select(dim, done))
            done += 1
    return True


def _cat(args: Any, kwargs: Any, index: int | None, box: list[Sequence[Run]], out: Tensor) -> bool:
    operands, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if len({o.dtype for o in operands}) > 1 or any(not isinstance(o, Lazy) for o in operands):
        return False
    dim %= operands[0].ndim
    done = 0
    for start, length in box[dim]:
        begin = 0
        for operand in operands:
            first, last = max(start, begin), min(start + length, begin + operand.shape[dim])
            if first < last:
                part = [*box[:dim], [(first - begin, last - first)], *box[dim + 1 :]]
                read_into(operand, part, out.narrow(dim, done, last - first))
                done += last - first
            begin += operand.shape[dim]
    return True


_RULES: dict[Any, Any] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _same,
    aten.transpose.int: _permute(_swapped),
    aten.t.default: _permute(_swapped),
    aten.permute.default: _permute(lambda args: [d % args[0].ndim for d in args[1]]),
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
}


def sources(tensor: Lazy) -> list[Source]:
    """All that it is made of."""
    origin = tensor._origin
    if not isinstance(origin, tuple):
        return [origin]
    leaves, _ = tree_flatten((origin[1], origin[2]))
    return [s for leaf in leaves if isinstance(leaf, Lazy) for s in sources(leaf)]


_VIEWS = {
    aten.detach.default,
    aten.alias.default,
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.select.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}


def storage_of(tensor: Lazy) -> Lazy:
    """The tensor whose memory this one would be a view of."""
    while isinstance(tensor._origin, tuple) and tensor._origin[0] in _VIEWS:
        tensor = tensor._origin[1][0]
    return tensor
