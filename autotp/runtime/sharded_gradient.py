"""Gradients of sharded parameters that know that they are a part.

A norm of one rank's part is another number on each rank. A trainer that scales gradients by it would let the
replicated parameters drift apart in silence. So the ``.grad`` of a sharded parameter is a `ShardedGradient`:
elementwise ops, and so optimizers, work on the local tensor as ever; what makes one number of all elements
(norms, sums, extremes, `GradScaler`'s search for infinities) counts those of all ranks, each element once; and
what would mix elements that lie on several ranks (products of matrices, means of rows) is refused by name.

``torch.nn.utils.clip_grad_norm_`` asks for one norm a gradient and stacks them: the norms are answered lazily
(`_Norm`) and made whole where they come together, in one all-reduce.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map

from autotp.errors import AutoTPError
from autotp.runtime import wire
from autotp.runtime.wire import narrow_runs

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Share:
    """Which elements of a rank's slice it counts when all ranks' elements are counted.

    Attributes:
        group: of the ranks that hold the parameter.
        counted: None for all; ``(dim, starts, lengths)`` of runs, where an earlier rank counts the others.
    """

    group: str
    counted: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None

    def of(self, local: Tensor) -> Tensor:
        return local if self.counted is None else narrow_runs(local, *self.counted)


class ShardedGradient(Tensor):
    """A rank's slice of a gradient; shares the memory of the plain tensor ``_tp_local``."""

    _tp_local: Tensor
    _tp_share: Share

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, local: Tensor, share: Share) -> ShardedGradient:
        local = local.detach()
        made: ShardedGradient = Tensor._make_subclass(cls, local)
        made._tp_local = local
        made._tp_share = share
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if any(issubclass(t, _Norm) for t in types):
            args, kwargs = _settle(args, kwargs)
            if not tree_any(lambda a: isinstance(a, ShardedGradient), (args, kwargs)):
                return func(*args, **kwargs)
        collective = _COLLECTIVE.get(name)
        if collective is not None:
            return collective(func, *args, **kwargs)
        if not _elementwise(func, name):
            raise AutoTPError(
                f"{name} cannot run on the gradient of a sharded parameter: it would see this rank's part "
                "only, and mixes elements that lie on several ranks. Elementwise optimizers (AdamW, SGD, Lion) "
                "and norms of the whole gradient work; for others gather it first "
                "(autotp.full_state_dict), or replicate the parameter in the plan."
            )
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if name in _PLAIN_RESULT:
            return out
        owners = {id(a._tp_local): a for a in _sharded(args, kwargs)}
        like = next(iter(owners.values()))
        return tree_map(lambda o: _again(o, owners, like), out)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedGradient:
        if id(self) not in memo:
            memo[id(self)] = ShardedGradient(copy.deepcopy(self._tp_local, memo), self._tp_share)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self._tp_local
        return plain.__reduce_ex__(protocol)  # saved as the plain tensor that it is

    def numpy(self, *, force: bool = False) -> Any:
        """This rank's part."""
        return self._tp_local.numpy(force=force)

    def tolist(self) -> Any:
        """This rank's part."""
        return self._tp_local.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedGradient({self._tp_local!r})"


def local_gradient(gradient: Tensor) -> Tensor:
    """This rank's part, as a plain tensor in the same memory; a plain tensor as it is."""
    return gradient._tp_local if isinstance(gradient, ShardedGradient) else gradient


def _plain(value: Any) -> Any:
    return value._tp_local if isinstance(value, ShardedGradient) else value


def _sharded(*trees: Any) -> Iterable[ShardedGradient]:
    for leaf in torch.utils._pytree.tree_iter(trees):
        if isinstance(leaf, ShardedGradient):
            yield leaf


def _again(value: Any, owners: dict[int, ShardedGradient], like: ShardedGradient) -> Any:
    """What an in-place op returns is its argument; what is as large as the gradient is a part like it."""
    if not isinstance(value, Tensor):
        return value
    if id(value) in owners:
        return owners[id(value)]
    same = value.shape == like.shape or (like._tp_share.counted is None and value.numel() == like.numel())
    return ShardedGradient(value, like._tp_share) if same else value


_COPIES = frozenset(
    "alias clone detach copy copy_ _to_copy zero_ zero fill fill_ zeros_like ones_like empty_like full_like rand_like "
    "randn_like set_ resize_ record_stream is_pinned pin_memory lift_fresh is_same_size equal_sizes new_zeros "
    "new_empty new_ones new_full empty_strided new_empty_strided bernoulli_ normal_ uniform_".split()
)
_VIEWS = frozenset(
    "view _unsafe_view reshape _reshape_alias flatten unsqueeze squeeze t transpose permute".split()
)
_PLAIN_RESULT = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_empty new_ones new_full "
    "new_empty_strided is_same_size is_pinned".split()
)
_NOT_ELEMENTWISE = ("_foreach_max", "_foreach_norm", "_foreach_powsum")


def _elementwise(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags or name in _COPIES or name in _VIEWS:
        return True
    if func.namespace in ("c10d", "_c10d_functional"):
        return True
    return (
        name.startswith(("_foreach_", "_fused_adam", "_fused_sgd", "_fused_adagrad"))
        and name not in _NOT_ELEMENTWISE
    )


# --- one number of all elements ---


def _whole(gradient: ShardedGradient, dim: Any, name: str) -> None:
    """A reduction is over all dims, or refused."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return
    dims = {d % max(gradient.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)}
    if dims != set(range(gradient.dim())):
        raise AutoTPError(
            f"{name} over dims {sorted(dims)} of the gradient of a sharded parameter, of local shape "
            f"{tuple(gradient.shape)}: a row or column may lie on several ranks. An optimizer that works on rows or "
            "columns (Adafactor, Muon, Shampoo) needs whole parameters: replicate them in the plan, or use an "
            "elementwise optimizer (AdamW, SGD, Lion)."
        )


class _Norm(ShardedGradient):
    """The p-norm of a gradient, not yet summed over the ranks: a scalar that is made whole when it is used."""

    _tp_p: float

    @staticmethod
    def of(gradient: ShardedGradient, p: float, dtype: torch.dtype | None) -> _Norm:
        local = gradient._tp_share.of(gradient._tp_local)
        result = dtype or gradient.dtype
        wide = torch.float64 if result == torch.float64 else torch.float32
        if local.numel() == 0:
            part = local.new_full((), math.inf if p == -math.inf else 0.0, dtype=wide)
        else:
            part = torch.linalg.vector_norm(local, p, dtype=wide)
        if not math.isinf(p) and p != 0:
            part = part.pow(p)
        made: _Norm = Tensor._make_subclass(_Norm, part.to(result))
        made._tp_local, made._tp_share, made._tp_p = part, gradient._tp_share, p
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = settle([self])[0]
        return plain.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(settle([self])[0])


def settle(norms: Sequence[_Norm]) -> list[Tensor]:
    """The norms over all ranks: one all-reduce for all that have a group and a kind in common."""
    found: list[Tensor | None] = [None] * len(norms)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, norm in enumerate(norms):
        kind = norm._tp_p if math.isinf(norm._tp_p) else 0.0
        kinds.setdefault(
            (norm._tp_share.group, kind, norm._tp_local.dtype, norm._tp_local.device), []
        ).append(i)
    for (group, kind, _, _), places in kinds.items():
        parts = torch.stack([norms[i]._tp_local for i in places])
        total = wire.reduce_sum(parts, group) if kind == 0.0 else wire.reduce_max(parts, group, kind < 0)
        for i, value in zip(places, total.unbind(), strict=True):
            p = norms[i]._tp_p
            found[i] = (value if math.isinf(p) or p == 0 else value.pow(1 / p)).to(norms[i].dtype)
    return [value for value in found if value is not None]


def _settle(args: Any, kwargs: Any) -> Any:
    """The arguments, with norms made whole, all in one go."""
    norms = {id(n): n for n in _sharded(args, kwargs) if isinstance(n, _Norm)}
    values = dict(zip(norms, settle(list(norms.values())), strict=True))
    return tree_map(lambda a: values[id(a)] if isinstance(a, _Norm) else a, (args, kwargs))


def _vector_norm(
    func: Any,
    x: ShardedGradient,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    _whole(x, dim, "a norm")
    norm = _Norm.of(x, float(ord), dtype)
    return settle([norm])[0].view([1] * x.dim()) if keepdim else norm


def _old_norm(
    func: Any, x: ShardedGradient, p: Any = 2, dim: Any = None, keepdim: bool = False, **kw: Any
) -> Tensor:
    return _vector_norm(func, x, 2 if p is None else p, dim, keepdim, dtype=kw.get("dtype"))


def _foreach_norm(func: Any, tensors: Sequence[Tensor], ord: float = 2, dtype: Any = None) -> list[Tensor]:
    found: list[Any] = [
        _Norm.of(t, float(ord), dtype) if isinstance(t, ShardedGradient) else None for t in tensors
    ]
    whole = iter(settle([n for n in found if n is not None]))
    plain = iter(
        torch._foreach_norm([t for t, n in zip(tensors, found, strict=True) if n is None], ord, dtype=dtype)
        if None in found
        else ()
    )
    return [next(plain) if n is None else next(whole) for n in found]


def _sum(
    func: Any, x: ShardedGradient, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    _whole(x, dim, "a sum")
    local = x._tp_share.of(x._tp_local).sum(dtype=dtype)
    return _keep(wire.reduce_sum(local, x._tp_share.group), x, keepdim)


def _mean(
    func: Any, x: ShardedGradient, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    _whole(x, dim, "a mean")
    local = x._tp_share.of(x._tp_local)
    both = torch.stack(
        [local.sum(dtype=torch.float64), torch.tensor(local.numel(), dtype=torch.float64, device=x.device)]
    )
    total, count = wire.reduce_sum(both, x._tp_share.group)
    return _keep((total / count).to(dtype or x.dtype), x, keepdim)


def _extreme(least: bool) -> Callable[..., Tensor]:
    def extreme(func: Any, x: ShardedGradient, *args: Any, dim: Any = None, keepdim: bool = False) -> Tensor:
        _whole(x, args[0] if args else dim, "an extreme")
        local = x._tp_local
        if local.numel() == 0:
            value = local.new_full((), math.inf if least else -math.inf)
        else:
            value = local.amin() if least else local.amax()
        return _keep(wire.reduce_max(value, x._tp_share.group, least), x, keepdim)

    return extreme


def _truth(every: bool) -> Callable[..., Tensor]:
    def truth(func: Any, x: ShardedGradient, *args: Any, **kwargs: Any) -> Tensor:
        _whole(x, args[0] if args else kwargs.get("dim"), "a test")
        local = x._tp_local.all() if every else x._tp_local.any()
        return wire.reduce_max(local.to(torch.uint8), x._tp_share.group, every).bool()

    return truth


def _keep(value: Tensor, x: Tensor, keepdim: bool) -> Tensor:
    return value.view([1] * x.dim()) if keepdim else value


def _unscale(func: Any, tensors: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """GradScaler: an infinity on one rank is one on all, or some would skip the step and others not."""
    func([_plain(t) for t in tensors], found_inf, inv_scale)
    for group in dict.fromkeys(t._tp_share.group for t in tensors if isinstance(t, ShardedGradient)):
        found_inf.copy_(wire.reduce_max(found_inf, group, False))


def _equal(func: Any, a: Tensor, b: Tensor) -> bool:
    sharded = next(iter(_sharded(a, b)))
    same = torch.tensor(torch.equal(_plain(a), _plain(b)), dtype=torch.uint8, device=sharded.device)
    return bool(wire.reduce_max(same, sharded._tp_share.group, True))


def _item(func: Any, x: Tensor) -> Any:
    return func(_plain(x))


_COLLECTIVE: dict[str, Callable[..., Any]] = {
    "linalg_vector_norm": _vector_norm,
    "norm": _old_norm,
    "_foreach_norm": _foreach_norm,
    "sum": _sum,
    "mean": _mean,
    "max": _extreme(False),
    "amax": _extreme(False),
    "min": _extreme(True),
    "amin": _extreme(True),
    "all": _truth(True),
    "any": _truth(False),
    "equal": _equal,
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    "_local_scalar_dense": _item,
}


# --- which parameters ---


class GradientShare:
    """Makes the gradient of a sharded ``parameter`` a `ShardedGradient` as soon as it is accumulated."""

    def __init__(self, parameter: Tensor, share: Share) -> None:
        self.parameter = parameter
        self.share = share
        self.handle: Any = None
        self.moved = False
        if parameter.requires_grad:
            self.handle = parameter.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]

    def _mark(self, parameter: Tensor) -> None:
        grad: Any = parameter.grad
        if type(grad) is Tensor:
            parameter.grad = ShardedGradient(grad, self.share)
        elif self.moved and type(grad._local_tensor) is Tensor:
            grad._local_tensor = ShardedGradient(grad._local_tensor, _of_chunk(self.share, grad))

    def move(self, parameter: Tensor) -> None:
        """To the parameter that FSDP2 has made of it, whose gradient is a DTensor of the data-parallel mesh."""
        self.remove()
        _mark_as(parameter, self.parameter)
        self.parameter, self.moved = parameter, True
        if parameter.requires_grad:
            self.handle = parameter.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Mark no longer."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientShare:
        made = copy.deepcopy(self.parameter, memo)
        _mark_as(made, self.parameter)  # torch leaves a parameter's own attributes behind
        return GradientShare(made, self.share)

    def __reduce__(self) -> Any:
        return GradientShare, (self.parameter, self.share)


def _mark_as(made: Tensor, parameter: Tensor) -> None:
    """A parameter in place of another knows what that one knew: that it is a part."""
    for name, value in parameter.__dict__.items():
        if name.startswith("_tp_"):
            setattr(made, name, value)


def _of_chunk(share: Share, gradient: Any) -> Share:
    """The share of a rank that holds one data-parallel chunk, of dim 0, of its slice."""
    placement = gradient.placements[-1]
    if share.counted is None or share.counted[0] != 0 or not share.counted[1]:
        return share
    if len(gradient.placements) != 1 or not placement.is_shard(0):
        raise AutoTPError(
            f"cannot count the gradient of a partly replicated parameter that FSDP2 places as {gradient.placements}: "
            "use Shard(0), and one data-parallel mesh dim."
        )
    chunk = -(-gradient.shape[0] // gradient.device_mesh.size())
    low = min(chunk * gradient.device_mesh.get_local_rank(), gradient.shape[0])
    high = low + gradient._local_tensor.shape[0]
    _, starts, lengths = share.counted
    runs = [
        (max(start, low), min(start + length, high)) for start, length in zip(starts, lengths, strict=True)
    ]
    kept = [(start - low, stop - start) for start, stop in runs if start < stop]
    return Share(share.group, (0, tuple(start for start, _ in kept), tuple(n for _, n in kept)))


ATTRIBUTE = "_tp_gradient_shares"


def share_gradient(module: nn.Module, name: str, share: Share) -> None:
    """Let the gradient of ``module``'s own parameter ``name`` count as a part of the whole one."""
    shares = module.__dict__.setdefault(ATTRIBUTE, {})
    parameter = module._parameters[name]
    assert parameter is not None
    old: GradientShare | None = shares.get(name)
    if old is not None:
        if old.parameter is parameter and old.share == share and old.handle is not None:
            return
        old.remove()
    shares[name] = GradientShare(parameter, share)
