"""What is noted while the forward runs: for each node its call, its module and its place in the source."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._functorch.autograd_function import custom_function_call
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from autotp.trace.constants import Constants
from autotp.trace.graph import Call, Port
from autotp.trace.leaves import int_leaves, map_tensors, tensor_leaves
from autotp.trace.makefx import node_of
from autotp.trace.provenance import Dim, Session, make
from autotp.trace.sites import forward_code, frames_to
from autotp.trace.twins import Twins

_SHAPE = torch.Tensor.shape
_READS: dict[Any, Callable[[torch.Tensor], Any]] = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__index__: int,
    torch.Tensor.item: torch.Tensor.item,
    torch.Tensor.tolist: torch.Tensor.tolist,
}
_COUNTS = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
_INDEXES = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_REPEATS = (torch.repeat_interleave, torch.Tensor.repeat_interleave)


@dataclass(slots=True)
class RanModule:
    """A module call as it is recorded: marks are the last node made before its forward, and the last made in
    it."""

    fqn: str
    index: int
    inputs: tuple[Port, ...]
    before: fx.Node
    outputs: tuple[Port, ...] = ()
    end: fx.Node | None = None


@dataclass(slots=True)
class _Running:
    fqn: str
    code: CodeType | None


@dataclass(eq=False)
class Recorder(TorchFunctionMode):
    """Entered inside the traced function. Every torch call passes through it, and every module call through
    `modules`."""

    module: nn.Module
    tracer: Any
    session: Session | None
    constants: Constants
    twins: Twins = field(default_factory=Twins)
    ran: list[RanModule] = field(default_factory=list)
    failed_in: str | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.fqns = {id(m): fqn for fqn, m in self.module.named_modules()}
        self.running: list[_Running] = []
        self.times: dict[str, int] = {}
        self.calls = 0
        self.seen = self._last()
        self.known = self.tracer.graph._root  # the last node that `constants` has taken in

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.size or getattr(func, "__self__", None) is _SHAPE:
            return self._sized(func(*args, **kwargs), args, kwargs)
        if func in _COUNTS and args:
            return math.prod(self._sized(args[0].shape, args, {}))
        if func in _READS and (value := self._readable(func, args[0], sys._getframe(1))) is not None:
            with _disable_current_modes():
                return _READS[func](value)
        self.attribute(None)
        out = self._run(func, args, kwargs, sys._getframe(1))
        if self._last() is not self.seen:
            self.attribute(self._call(func, args, kwargs, sys._getframe(1)))
            for _, tensor in tensor_leaves(out, ()):
                if (node := node_of(tensor, self.tracer)) is not None:
                    node.meta["requires_grad"] = tensor.requires_grad
        return out

    def _run(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        """The call; where its result's shape depends on values, by those that are known."""
        if func in _READS:
            return func(*args, **kwargs)
        if func is custom_function_call and args[0].generate_vmap_rule:  # which has no rule for being traced
            return args[0].forward(*args[1:], **kwargs)
        if func in _INDEXES:
            args = (args[0], self._plain_index(args[1], frame), *args[2:])
        try:
            return func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            tensors = [t for _, t in tensor_leaves((args, kwargs), ())]
            known = {id(t): v for t in tensors if (v := self._known_value(t)) is not None}
            if not known:
                raise
            if len(known) == len({id(t) for t in tensors}):
                with _disable_current_modes():
                    real_args, real_kwargs = map_tensors((args, kwargs), lambda t: known[id(t)])
                    real = func(*real_args, **real_kwargs)
                given = any(self._is_given(t) for t in tensors)
                if given and not any(True for _ in tensor_leaves(real, ())):
                    raise  # a truth value, of `torch.equal`
                return map_tensors(real, lambda value: self._literal(value, given))
            if func in _REPEATS and (picked := self._repeated(known, *args, **kwargs)) is not None:
                return picked
            sizes: dict[int, Any] = {id(t): int(v) for t in tensors if (v := self._size(t, frame)) is not None}
            if not sizes:
                raise
            plain_args, plain_kwargs = map_tensors((args, kwargs), lambda t: sizes.get(id(t), t))
            return func(*plain_args, **plain_kwargs)

    def _size(self, tensor: torch.Tensor, frame: FrameType) -> torch.Tensor | None:
        """A whole number that was given as a tensor, in the place of a size."""
        whole = not tensor.dim() and not tensor.is_floating_point() and tensor.dtype != torch.bool
        return self._readable(torch.Tensor.__index__, tensor, frame) if whole else None

    def _repeated(
        self,
        known: Mapping[int, torch.Tensor],
        whole: torch.Tensor,
        repeats: torch.Tensor,
        dim: int | None = None,
        *,
        output_size: int | None = None,
    ) -> torch.Tensor | None:
        """What `repeat_interleave` gives for known counts: an index."""
        counts = known.get(id(repeats))
        if counts is None:
            return None
        if dim is None:
            whole, dim = whole.flatten(), 0
        with _disable_current_modes():
            size = whole.shape[dim]
            places = torch.arange(size).repeat_interleave(counts.expand(size), output_size=output_size)
        return whole.index_select(dim, self._literal(places, self._is_given(repeats)))

    def _plain_index(self, index: Any, frame: FrameType) -> Any:
        """An index with numbers for known tensors in slices, and the places that known masks pick in their stead."""
        items = index if isinstance(index, tuple) else (index,)
        found: list[Any] = []
        for item in items:
            if isinstance(item, slice):
                bounds = (item.start, item.stop, item.step)
                found.append(slice(*(self._plain_bound(bound, frame) for bound in bounds)))
                continue
            mask = isinstance(item, torch.Tensor) and item.dtype == torch.bool
            value = self._known_value(item) if mask else None
            if value is not None:
                with _disable_current_modes():
                    picked = value.nonzero(as_tuple=True)
                found += [self._literal(places, self._is_given(item)) for places in picked]
            else:
                found.append(item)
        return tuple(found) if isinstance(index, tuple) or len(found) > 1 else found[0]

    def _plain_bound(self, bound: Any, frame: FrameType) -> Any:
        if not isinstance(bound, torch.Tensor):
            return bound
        value = self._readable(torch.Tensor.__index__, bound, frame)
        return bound if value is None else int(value)

    def _literal(self, value: torch.Tensor, given: bool) -> torch.Tensor:
        """A tensor of known values in the graph."""
        tensor: torch.Tensor = torch.ops.aten.lift_fresh_copy.default(value)
        with _disable_current_modes():
            self.constants.advance(self._unknown())
        if given and (node := node_of(tensor, self.tracer)) is not None:
            self.constants.given.add(node)
        return tensor

    def _is_given(self, tensor: torch.Tensor) -> bool:
        return node_of(tensor, self.tracer) in self.constants.given

    def _readable(
        self, func: Callable[..., Any], tensor: torch.Tensor, frame: FrameType
    ) -> torch.Tensor | None:
        """The values, if Python may read them: those of a constant; of the inputs, whole numbers alone."""
        value = self._known_value(tensor)
        if value is None or not self._is_given(tensor):
            return value
        if value.dtype == torch.bool or value.is_floating_point() or func is torch.Tensor.__bool__:
            return None
        inner = self.running[-1] if self.running else _Running("", None)
        frames = frames_to(frame, inner.code, _CALL_MODULE_CODE)
        where = f"{inner.fqn or 'the model'}{f', {frames[0]}' if frames else ''}"
        self.notes.append(f"traced with sizes that the example inputs give, as read in {where}")
        return value

    def attribute(self, call: Call | None) -> None:
        """Say of the nodes made since the last time that `call` made them, in the module now running."""
        last = self._last()
        while self.seen is not last:
            self.seen = self.seen.next
            self.seen.meta["call"] = call
            self.seen.meta["module"] = self.running[-1].fqn if self.running else ""

    def _last(self) -> fx.Node:
        node: fx.Node = self.tracer.graph._root.prev
        return node

    def _call(self, func: Callable[..., Any], args: Any, kwargs: Any, frame: FrameType) -> Call:
        inner = self.running[-1] if self.running else _Running("", None)
        frames = frames_to(frame, inner.code, _CALL_MODULE_CODE)
        frames = tuple(site for site in frames if not self.twins.is_op(site.code))
        name = getattr(func, "__name__", None) or str(func)
        if name == "__get__":  # a property: T, mT, real …
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        ints = (*int_leaves(args, ("args",)), *int_leaves(kwargs, ("kwargs",)))
        self.calls += 1
        call = Call(name, frames[0] if frames else None, frames, inner.fqn, ints, self.calls - 1)
        outermost = max((i for i, site in enumerate(frames) if self.twins.of(site.code)), default=None)
        if outermost is None:
            return call
        twin_of = self.twins.of(frames[outermost].code)
        return replace(call, twin_of=twin_of, around=frames[outermost + 1 :])

    def _sized(self, size: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A size that was read, as provenance integers."""
        node = (
            node_of(args[0], self.tracer)
            if self.session is not None and isinstance(args[0], torch.Tensor)
            else None
        )
        if node is None or self.session is None:
            return size
        if isinstance(size, torch.Size):
            return torch.Size([make(int(n), Dim(node, d), self.session) for d, n in enumerate(size)])
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if type(size) is int and isinstance(dim, int):
            return make(size, Dim(node, int(dim) % args[0].dim()), self.session)
        return size

    def _known_value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        node = None if _transformed() else node_of(tensor, self.tracer)
        if node is None:
            return None
        with _disable_current_modes():
            self.constants.advance(self._unknown())
        value = self.constants.values.get(node)
        return value if isinstance(value, torch.Tensor) else None

    def _unknown(self) -> Iterator[fx.Node]:
        last = self._last()
        while self.known is not last:
            self.known = self.known.next
            yield self.known

    def ports(self, value: Any, path: tuple[str | int, ...]) -> tuple[Port, ...]:
        """The tensors of `value` that the graph holds."""
        found = ((leaf, node_of(tensor, self.tracer)) for leaf, tensor in tensor_leaves(value, path))
        return tuple(Port(leaf, node) for leaf, node in found if node is not None)

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Within, calls of the traced module and its submodules are recorded."""
        original = nn.Module.__call__
        recorder = self

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _call_module(recorder, original, module, args, kwargs)

        nn.Module.__call__ = __call__  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            self.attribute(None)


def _call_module(
    recorder: Recorder,
    original: Callable[..., Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run `module(*args, **kwargs)` and note what went in and out. Its frame is the boundary that `frames_to`
    stops at."""
    fqn = recorder.fqns.get(id(module))
    if fqn is None:  # made in the forward
        return original(module, *args, **kwargs)
    recorder.attribute(None)
    index = recorder.times.get(fqn, 0)
    recorder.times[fqn] = index + 1
    inputs = (*recorder.ports(args, ("args",)), *recorder.ports(kwargs, ("kwargs",)))
    ran = RanModule(fqn, index, inputs, recorder._last())
    recorder.ran.append(ran)
    recorder.running.append(_Running(fqn, forward_code(module)))
    try:
        out = original(module, *args, **kwargs)
    except Exception:
        if recorder.failed_in is None:
            recorder.failed_in = fqn
        raise
    finally:
        recorder.attribute(None)
        recorder.running.pop()
    ran.outputs = recorder.ports(out, ("out",))
    ran.end = recorder._last()
    return out


_CALL_MODULE_CODE = _call_module.__code__


def _transformed() -> bool:
    """Whether the code that runs is that of a `vmap`, say: a tensor there is one of many rows."""
    return torch._C._functorch.peek_interpreter_stack() is not None
