"""A model that is sharded and has changed: its weightless whole, to plan anew, and the way from the slices that are
there to those of the new plan.

A slice that the new plan cuts alike stays the same tensor. What came in is whole, and drawn at random on each rank
perhaps: it becomes what the first rank has, and is cut in place, since an optimizer may hold it already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..axes.layout import runs, slice_tensor
from ..axes.term import Dim, size_of
from ..errors import AutoTPError
from ..runtime.gradients import fully_sharded_parameters
from ..runtime.group import get_group
from ..runtime.optimizers import replaced, sharded, unsharded
from ..runtime.parts import parts_of
from ..trace.skeleton import weightless_copy
from .apply import Place, places_of
from .bind import Rank
from .state import gather
from .undo import record_of


@dataclass(frozen=True, slots=True)
class Slices:
    """The tensors of a sharded model: by id, the dims of each that was there when it was planned, None for whole ones;
    those that are not in it came in since."""

    dims: Mapping[int, tuple[Dim, ...] | None]
    rank: Rank

    @classmethod
    def of(cls, model: nn.Module, rank: Rank) -> Slices:
        """Those of ``model``.

        Raises:
            AutoTPError: one is not as autotp left it, or what came in cannot be cut.
        """
        if DistributedDataParallel._active_ddp_module is not None:
            raise AutoTPError(f"the model was wrapped in DistributedDataParallel before. {_WRAP_LATER}")
        if fully_sharded_parameters(model):
            raise AutoTPError(f"the model was wrapped in FSDP2 before. {_WRAP_LATER}")
        found: dict[int, tuple[Dim, ...] | None] = {}
        for fqn, module in model.named_modules():
            record, parts = record_of(module), parts_of(module)
            if record is not None and (parts is None or parts.plan != rank.prefix):
                raise AutoTPError(f"{fqn!r} was sharded by another plan than the rest of the model")
            for name, tensor in _own(module).items():
                if record is not None and name in record.own:
                    found[id(tensor)] = record.dims.get(name)
        for name, tensor in _named(model):
            dims = found.get(id(tensor))
            if isinstance(tensor, DTensor):
                raise AutoTPError(f"{name} is a DTensor, sharded by somebody else as well. {_WRAP_LATER}")
            if dims is not None and tuple(tensor.shape) != rank.shape(dims):
                raise AutoTPError(f"{name} is {list(tensor.shape)}, and this rank's slice of it is {rank.shape(dims)}")
            if id(tensor) not in found and tensor.is_meta:
                raise AutoTPError(f"{name} is on the meta device. Give it values first")
            if id(tensor) not in found and tensor.grad is not None:
                raise AutoTPError(f"{name} has a gradient that was made elsewhere. Set it to None first")
        return cls(found, rank)

    def layout(self, tensor: Tensor) -> object:
        """Which elements each rank has."""
        return _layout(self.dims.get(id(tensor)), self.rank)

    def gather(self, tensor: Tensor) -> Tensor:
        """The whole tensor."""
        dims = self.dims.get(id(tensor))
        return tensor.detach() if dims is None else gather(tensor.detach(), dims, self.rank)


_WRAP_LATER = "Call autotp.parallelize(model) once more after adding adapters, then wrap it."


def whole_copy(model: nn.Module, slices: Slices) -> nn.Module:
    """A copy of a sharded model with weightless parameters of their whole shape, else as the model is."""
    known: dict[int, Tensor] = {}
    for _, tensor in _named(model):
        dims = slices.dims.get(id(tensor))
        if dims is None:
            continue
        if isinstance(tensor, nn.Parameter):
            whole = torch.empty([size_of(d) for d in dims], dtype=tensor.dtype, device="meta")
            known[id(tensor)] = nn.Parameter(whole, requires_grad=tensor.requires_grad)
            known[id(tensor)].__dict__.update(tensor.__dict__)
        else:
            known[id(tensor)] = slices.gather(tensor).cpu()
    return weightless_copy(model, known)


def recut(
    model: nn.Module, wanted: Mapping[str, tuple[Dim, ...]], rank: Rank, place: Place, earlier: Slices
) -> None:
    """Bring each parameter and buffer from the slices of ``earlier`` to those that are ``wanted``.

    A trained parameter that is cut otherwise becomes another one: an optimizer has state in the shape of its slice.
    """
    named = dict(_named(model))
    dims_of = {id(named[fqn]): dims for fqn, dims in wanted.items()}
    places = places_of(model)
    done: set[int] = set()
    device = next((t.device for t in named.values() if id(t) in earlier.dims), torch.device("cpu"))
    for fqn, tensor in named.items():
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        dims = dims_of.get(id(tensor))
        known = id(tensor) in earlier.dims
        if known and earlier.layout(tensor) == _layout(dims, rank):
            continue
        whole = earlier.gather(tensor) if known else _from_first(tensor, rank, device)
        local = whole if dims is None else slice_tensor(whole, dims, rank.partition, rank.rank)
        local = place(local.clone(memory_format=torch.contiguous_format))
        if known and tensor.requires_grad:
            made = nn.Parameter(local)
            made.__dict__.update(tensor.__dict__)
            replaced(tensor, fqn)
            for holder, name in places[id(tensor)]:
                holder[name] = made
            done.add(id(made))
            tensor = made
        else:
            tensor.data = local
        if isinstance(tensor, nn.Parameter):
            unsharded(tensor) if dims is None else sharded(tensor, fqn)


def _layout(dims: tuple[Dim, ...] | None, rank: Rank) -> object:
    if dims is None or not rank.sharded(dims):
        return None
    return [[runs(dim, rank.partition, r) for dim in dims] for r in range(rank.tp)]


def _from_first(tensor: Tensor, rank: Rank, device: torch.device) -> Tensor:
    """What the first rank has; it travels on the device that the model is on."""
    group = get_group(rank.prefix).process_group
    assert group is not None
    value = tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    dist.broadcast(value.view(torch.uint8) if value.dtype == torch.bool else value, group_src=0, group=group)
    return value.to(tensor.device)


def _own(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
