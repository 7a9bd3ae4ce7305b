"""Outputs that are gathered when somebody looks at them, and never where only a loss does.

The logits of a vocab-parallel head are what a model returns, so they count as whole. Gathering them costs more than
any other collective of a step, though a cross-entropy needs three numbers a token. So where the plan gathers an
*output*, a `LazyGather` goes on in its place: a tensor of the whole shape that holds this rank's part.

    ``F.cross_entropy`` over the sharded dim     is computed from the parts (`cross_entropy`)
    casts, views, slices of the other dims       give another `LazyGather`; nothing moves
    whatever else                                gathers, once, and works on the whole tensor

When the model returns, its outputs are gathered (`settle`), unless it has computed a loss of parts, or the
caller will (under `loss_parallel`). Then they stay as they are: ``out.logits`` is gathered if it is looked at, which
is a collective that every rank has to take part in.

To autograd it is the gather that it stands for, so a gradient that comes to it by whatever way is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autotp.errors import AutoTPError
from autotp.runtime import ops, wire
from autotp.runtime.group import get_group

_keep = 0  # how many loss_parallel contexts are open
_losses = 0  # how many have been computed from parts


@dataclass(frozen=True, slots=True)
class Layout:
    """Which elements of the sharded dim each rank holds: ``sizes[r]`` of them, one rank after the other."""

    group: str
    sizes: tuple[int, ...]

    @property
    def whole(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        return sum(self.sizes[: get_group(self.group).index])


@dataclass(slots=True, eq=False)
class _Use:
    """What is known of one output and of all its views.

    Attributes:
        made: how many tensors stand for it; wholes: what was gathered for them.
    """

    made: int = 0
    wholes: list[Tensor] = field(default_factory=list)


class LazyGather(Tensor):
    """A whole tensor of which this rank holds a part along ``_dim``; ``_local`` may be of a narrower dtype yet.

    ``_cell`` holds what was gathered, once it is.
    """

    _local: Tensor
    _dim: int
    _layout: Layout
    _use: _Use
    _cell: list[Tensor]

    __slots__ = ("_cell", "_dim", "_layout", "_local", "_use")

    @staticmethod
    def __new__(cls, local: Tensor, dim: int, layout: Layout, dtype: torch.dtype, use: _Use) -> LazyGather:
        shape = list(local.shape)
        shape[dim] = layout.whole
        made: LazyGather = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=local.device)
        made._local, made._dim, made._layout, made._use, made._cell = local, dim, layout, use, []
        use.made += 1
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0] if args else None, LazyGather):
            found = handler(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        elif getattr(func, "__name__", "") in _WRITES and isinstance(args[0] if args else None, LazyGather):
            _check_alone(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            for value in args:
                if isinstance(value, LazyGather):
                    _check_alone(value)
        args, kwargs = tree_map(_data, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return whole(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return whole(self).__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]


class _Defer(torch.autograd.Function):
    """A gather as autograd sees it: the backward takes this rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, layout: Layout, dtype: torch.dtype, use: _Use) -> Tensor:
        ctx.args = dim, layout, local.dtype
        return LazyGather(local.detach(), dim, layout, dtype, use)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dim, layout, dtype = ctx.args
        return ops.ungather(grads[0].to(dtype), dim, layout.sizes, (), (), layout.group), None, None, None, None


def gather_when_needed(
    x: Tensor, dim: int, sizes: wire.Ints, perm_starts: wire.Ints, perm_lengths: wire.Ints, group: str
) -> Tensor:
    """`ops.gather` of an output, put off until somebody looks at it."""
    if perm_starts or not x.is_floating_point() or not ops.is_eager(x):
        return ops.gather(x, dim, sizes, perm_starts, perm_lengths, group)
    return _lazy(x, dim % x.dim(), Layout(group, tuple(sizes)), x.dtype, _Use())


def whole(x: Tensor) -> Tensor:
    """What ``x`` stands for, as a plain tensor."""
    if not isinstance(x, LazyGather):
        return x
    if x._cell:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.aten.view.default(x, x.shape)  # type: ignore[no-any-return]
    return ops.gather(x._local, x._dim, x._layout.sizes, (), (), x._layout.group).to(x.dtype)


def _lazy(local: Tensor, dim: int, layout: Layout, dtype: torch.dtype, use: _Use) -> Tensor:
    if not (local.requires_grad and torch.is_grad_enabled()):
        return LazyGather(local, dim, layout, dtype, use)
    made: LazyGather = _Defer.apply(local, dim, layout, dtype, use)  # type: ignore[no-untyped-call]
    made._local = local  # with its history, for what is made of the part
    return made


def _data(x: Any) -> Any:
    """The whole tensor's data, gathered once."""
    if not isinstance(x, LazyGather):
        return x
    if not x._cell:
        with torch.no_grad():
            layout = x._layout
            found = wire.gather_cat(x._local.detach(), x._dim, layout.sizes, (), (), layout.group)
        x._cell.append(found.to(x.dtype))
        x._use.wholes.append(x._cell[0])
    return x._cell[0]


def _check_alone(x: LazyGather) -> None:
    if x._use.made > 1:
        raise AutoTPError(
            "a sharded output (the logits of a vocab-parallel head) is written to in place after views were taken of "
            "it, and each rank holds a part of it only. Write to a clone of the whole: logits = logits + 0, say."
        )


# --- what does not need the whole ---


def _still_lazy(x: LazyGather) -> bool:
    """Whether its part is still what it stands for: nobody has written to a whole tensor that was gathered."""
    return x._version == 0 and all(w._version == 0 for w in x._use.wholes) and not x._cell


def _again(x: LazyGather, local: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return _lazy(local, x._dim if dim is None else dim, x._layout, dtype or x.dtype, x._use)


def _part(x: LazyGather) -> Tensor:
    """This rank's part in the dtype that the whole has."""
    return x._local.to(x.dtype)


_CASTS: dict[Any, torch.dtype] = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


def _cast(func: Any, x: LazyGather, *args: Any, **kwargs: Any) -> Any:
    if not _still_lazy(x) or kwargs.keys() - {"dtype", "device", "non_blocking"}:
        return NotImplemented
    dtype = _CASTS.get(func, x.dtype)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            if torch.device(value) != x.device:
                return NotImplemented
        elif value is not None and not isinstance(value, bool):
            return NotImplemented
    if dtype == x.dtype:
        return x
    if not dtype.is_floating_point:
        return NotImplemented
    return _again(x, _part(x) if x._local.dtype != x.dtype else x._local, dtype=dtype)


def _same_shape(func: Any, x: LazyGather, *args: Any, **kwargs: Any) -> Any:
    """contiguous, clone, detach."""
    if not _still_lazy(x) or args or kwargs:
        return NotImplemented
    made: Any = _again(x, func(x._local))
    if func in (Tensor.detach, torch.detach):  # the same memory
        made._cell = x._cell
    return made


def _scaled(func: Any, x: LazyGather, *args: Any, **kwargs: Any) -> Any:
    """Times or divided by a number."""
    if not _still_lazy(x) or kwargs or len(args) != 1 or not isinstance(args[0], (int, float)):
        return NotImplemented
    return _again(x, func(_part(x), args[0]))


def _reshaped(func: Any, x: LazyGather, *args: Any, **kwargs: Any) -> Any:
    """Views that leave the sharded dim, the last, as it is."""
    if not _still_lazy(x) or x._dim != x.dim() - 1 or any(isinstance(a, torch.dtype) for a in args):
        return NotImplemented
    shape = func(torch.empty(x.shape, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != x._layout.whole:
        return NotImplemented
    return _again(x, x._local.reshape(*shape[:-1], x._local.shape[-1]), len(shape) - 1)


def _permuted(func: Any, x: LazyGather, *args: Any, **kwargs: Any) -> Any:
    if not _still_lazy(x):
        return NotImplemented
    order = func(torch.empty([d + 2 for d in range(x.dim())], device="meta"), *args, **kwargs).shape
    return _again(x, func(x._local, *args, **kwargs), list(order).index(x._dim + 2))


def _indexed(func: Any, x: LazyGather, index: Any) -> Any:
    """An index that leaves the sharded dim, the last, alone."""
    if not _still_lazy(x) or x._dim != x.dim() - 1:
        return NotImplemented
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice, Tensor))) for i in items):
        return NotImplemented
    taken = [0 if i is None or i is Ellipsis else _dims_taken(i) for i in items]
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        if items[-1] is not Ellipsis:
            if not _is_all(items[-1]):
                return NotImplemented
            items.pop()  # ``[..., :-1, :]``: the rest must not reach the last dim
            at = next(k for k, i in enumerate(items) if i is Ellipsis)
            missing = x.dim() - 1 - sum(taken[:-1])
            if missing < 0:
                return NotImplemented
            items[at : at + 1] = [slice(None)] * missing
    elif sum(taken) == x.dim():
        if not _is_all(items[-1]):
            return NotImplemented
        items.pop()
    elif sum(taken) > x.dim():
        return NotImplemented
    local = x._local[tuple(items)]
    return _again(x, local, local.dim() - 1)


def _dims_taken(index: Any) -> int:
    return index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _plain(func: Any, x: LazyGather, *args: Any, **kwargs: Any) -> Any:
    return func(whole(x), *args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__repr__),
        _plain,
    ),
    **dict.fromkeys(_CASTS, _cast),
    Tensor.to: _cast,
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone, Tensor.detach, torch.detach), _same_shape),
    **dict.fromkeys(
        (Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, torch.div, Tensor.__truediv__), _scaled
    ),
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten), _reshaped
    ),
    **dict.fromkeys(
        (Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.movedim, torch.movedim), _permuted
    ),
    Tensor.__getitem__: _indexed,
}  # fmt: skip
"""By function; `cross_entropy` adds the loss."""

_WRITES = {name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")}
_WRITES -= {"requires_grad_"}
_WRITES |= {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def handles(func: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a function compute ``func`` of a `LazyGather`; it gives NotImplemented where it needs the whole."""

    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS[func] = handler
        return handler

    return add


def part_of(x: Tensor) -> tuple[Tensor, int, Layout] | None:
    """(this rank's part, its dim, the layout), where ``x`` is not whole yet."""
    if isinstance(x, LazyGather) and _still_lazy(x):
        return x._local, x._dim, x._layout
    return None


def note_loss() -> None:
    """A loss has been computed from parts."""
    global _losses
    _losses += 1


# --- when the model returns ---


@contextlib.contextmanager
def loss_parallel() -> Iterator[None]:
    """Within it a sharded model returns logits that are not gathered yet, for a loss that is computed outside of it.

    ``F.cross_entropy``, ``nn.CrossEntropyLoss`` and `autotp.cross_entropy` of them work on the ranks' parts; whatever
    else looks at them gathers them, which every rank has to do.

        with autotp.loss_parallel():
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    """
    global _keep
    _keep += 1
    try:
        yield
    finally:
        _keep -= 1


def losses() -> int:
    """How many losses have been computed from parts so far; within a compiled graph nobody counts."""
    return 0 if torch.compiler.is_compiling() else _losses


def settle(output: Any, before: int) -> Any:
    """What the whole model returns, gathered, unless it has computed a loss since there were ``before`` of them."""
    if torch.compiler.is_compiling() or _keep or before != _losses:
        return output
    return _settled(output)


def _settled(value: Any) -> Any:
    if isinstance(value, LazyGather):
        return whole(value)
    if isinstance(value, (list, tuple)):
        items = [_settled(v) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        for key, item in list(value.items()):
            found = _settled(item)
            if found is not item:
                value[key] = found
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            item = getattr(value, f.name, None)
            found = _settled(item)
            if found is not item:
                object.__setattr__(value, f.name, found)
    return value
