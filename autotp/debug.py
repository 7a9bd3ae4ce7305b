"""When a sharded model misbehaves: do the ranks still agree, what do they communicate, and who waits for whom?

    autotp.debug.check_sync(model)                  # raises, naming the first tensor that has drifted apart
    autotp.debug.check_inputs(model)                # from now on, raises where ranks are given different batches

    with autotp.debug.trace_collectives(model) as trace:
        model(ids).sum().backward()
    print(trace)                                    # each collective: module, bytes, time

    with autotp.debug.report_hangs(model, timeout_s=60):
        train(model)                                # a rank that waits longer says who is where, and raises
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.utils._pytree import tree_flatten_with_path

from .axes.layout import common_parts
from .errors import AutoTPError, HangError, RankMismatchError
from .rewrite.state import Sharding, sharding_of
from .runtime import record
from .runtime.group import get_group
from .runtime.record import Collective
from .runtime.sharded_gradient import local_gradient
from .runtime.wire import narrow_runs

_CHUNK = 1 << 20

# ---- do the ranks agree? -------------------------------------------------------------------------


def check_sync(model: nn.Module) -> None:
    """Whether what ranks hold in common is the same on all of them, to the last bit.

    Replicated parameters, buffers and their gradients; of key and value weights that some ranks share, the rows in
    common. A collective call.

    Raises:
        RankMismatchError: naming the first tensor that differs, which ranks, and by how much.
    """
    sharding = _sharding(model)
    rank, group = sharding.rank, get_group(sharding.rank.prefix)
    dims_by_id = {id(_find(model, fqn)): dims for fqn, dims in sharding.dims.items()}
    names: list[str] = []
    common: list[Tensor | None] = []
    groups: list[tuple[tuple[int, ...], ...]] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        together, part = common_parts(dims_by_id.get(id(tensor), ()), rank.partition, rank.rank)
        for what, value in ((repr(name), tensor), (f"the gradient of {name!r}", tensor.grad)):
            if tensor.grad is None and what != repr(name) and not tensor.requires_grad:
                continue
            local = None if value is None else _plain(value)
            names.append(what)
            common.append(local if local is None or part is None else narrow_runs(local, *part))
            groups.append(together if together else (tuple(range(rank.tp)),))
    mine = [None if t is None else (_digest(t), tuple(t.shape), t.dtype) for t in common]
    everyone: list[Any] = [None] * group.size
    dist.all_gather_object(everyone, (names, mine), group=group.process_group)
    for r, (theirs, _) in enumerate(everyone):
        if theirs != names:
            odd = _odd(everyone[0][0], theirs)
            raise RankMismatchError(f"ranks 0 and {r} hold different parameters or buffers: {odd}")
    different = [
        (i, ranks[0], r)
        for i, together in enumerate(groups)
        for ranks in together
        for r in ranks[1:]
        if everyone[r][1][i] != everyone[ranks[0]][1][i]
    ]
    if not different:
        return
    i, first, other = min(different)
    ours, theirs = (everyone[r][1][i] for r in (first, other))
    if ours is None or theirs is None:
        how = f"only rank {first if theirs is None else other} has one"
    else:
        how = f"the largest difference is {_difference(common[i], ours, first, other, rank.rank, group):.1e}"
    count = len({index for index, _, _ in different})
    raise RankMismatchError(
        f"{names[i]} differs between ranks {first} and {other}, which hold it in common: {how} "
        f"({count} of {len(names)} tensors differ). Were the ranks given different batches (debug.check_inputs tells), "
        "or was it changed on one rank only?"
    )


def _sharding(model: nn.Module) -> Sharding:
    sharding = sharding_of(model)
    if sharding is None:
        raise AutoTPError("this model is not sharded: pass what autotp.parallelize returned.")
    return sharding


def _find(model: nn.Module, fqn: str) -> Any:
    module, _, name = fqn.rpartition(".")
    return getattr(model.get_submodule(module), name)


def _plain(tensor: Tensor) -> Tensor:
    """This rank's elements: of a gradient that knows it is a part, or of FSDP2's chunk."""
    tensor = tensor.detach()
    if hasattr(tensor, "_local_tensor"):
        tensor = tensor._local_tensor
    return local_gradient(tensor)


def _digest(tensor: Tensor) -> int:
    """A number that tells the bits of a tensor from others'."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().view(ints[tensor.element_size()]).flatten()
    total = 0
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + piece.numel(), device=piece.device) * 0x9E3779B97F4A7C1 + 1
        total = (total * 31 + int((piece * weights).sum())) % 2**61
    return total


def _difference(mine: Tensor | None, what: Any, first: int, other: int, rank: int, group: Any) -> float:
    """The largest difference of one tensor on two ranks, told to all."""
    _, shape, dtype = what
    device = mine.device if mine is not None else torch.device("cpu")
    theirs = mine.clone() if rank == first and mine is not None else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(theirs, group_src=first, group=group.process_group)
    found = torch.zeros((), dtype=torch.float64, device=device)
    if rank == other and mine is not None and mine.numel():
        found += (mine.double() - theirs.double()).abs().max()
    dist.broadcast(found, group_src=other, group=group.process_group)
    return float(found)


def _odd(a: list[str], b: list[str]) -> str:
    return ", ".join(sorted(set(a) ^ set(b))[:3]) or "in another order"


def check_inputs(model: nn.Module) -> Any:
    """From now on, each forward first makes sure that all ranks were given the same tensors; a handle to ``remove()``.

    Ranks that share a model's weights have to see the same batch; only data-parallel replicas see others.
    """
    group = get_group(_sharding(model).rank.prefix)

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, _ = tree_flatten_with_path((args, kwargs))
        mine = [
            ("".join(map(str, path[1:])), _digest(leaf), tuple(leaf.shape))
            for path, leaf in leaves
            if isinstance(leaf, Tensor)
        ]
        everyone: list[Any] = [None] * group.size
        dist.all_gather_object(everyone, mine, group=group.process_group)
        for r, theirs in enumerate(everyone):
            for a, b in zip(everyone[0], theirs, strict=False):
                if a != b:
                    shapes = f" (shapes {list(a[2])} and {list(b[2])})" if a[2] != b[2] else ""
                    raise RankMismatchError(
                        f"ranks 0 and {r} were given different tensors as argument {a[0]}{shapes}. The ranks of one "
                        "tensor-parallel group need the same batch: give each the sampler's rank and seed of the "
                        "data-parallel dim, not of the whole world."
                    )
            if len(theirs) != len(everyone[0]):
                raise RankMismatchError(f"ranks 0 and {r} were given another number of tensors.")

    return model.register_forward_pre_hook(check, with_kwargs=True, prepend=True)


# ---- what is communicated? -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traced:
    """One collective. ``module`` is where it is in the forward, or whose gradient it sums; '' is outside of any."""

    module: str
    kind: str
    phase: str
    bytes: int
    shape: tuple[int, ...]
    seconds: float


class CollectiveTrace(list[Traced]):
    """The collectives in the order in which they ran; prints as a table."""

    def __str__(self) -> str:
        rows = [(c.phase, c.kind, c.module or "-", f"{c.bytes:,} B", f"{1e6 * c.seconds:,.0f} µs") for c in self]
        rows.insert(0, ("phase", "collective", "module", "bytes", "time"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = sum(c.bytes for c in self)
        return "\n".join([*lines, f"{len(self)} collectives, {total:,} B, {1e3 * sum(c.seconds for c in self):.1f} ms"])


_traces: list[CollectiveTrace] = []
_hangs: list[_Hangs] = []


@contextlib.contextmanager
def trace_collectives(model: nn.Module) -> Iterator[CollectiveTrace]:
    """Record each collective that ``model`` runs, with its module, bytes and time (of this rank, waiting included).

    On an accelerator each collective is waited for, so that its time is its own. Compiled code is not seen.
    """
    trace = CollectiveTrace()
    _traces.append(trace)
    with _watching(model):
        try:
            yield trace
        finally:
            _traces[:] = [t for t in _traces if t is not trace]


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[None]:
    """Know which module is running, and carry out the collectives."""
    running: list[str] = []

    def enter(fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            running.append(record.where)
            record.where = fqn

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record.where = running.pop() if running else ""

    handles = []
    for fqn, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(fqn or type(module).__name__), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    before, record.watcher = record.watcher, _carry_out
    try:
        yield
    finally:
        record.watcher, record.where = before, ""
        for handle in handles:
            handle.remove()


def _carry_out(what: Collective, start: Callable[[], Any]) -> None:
    module = record.where
    for hangs in _hangs:
        hangs.note(what, module, "waits in")
    began = time.perf_counter()
    work = start()
    if _hangs:
        _hangs[-1].wait(work)
    elif work is not None:
        work.wait()
    if torch.accelerator.is_available() and _traces:
        torch.accelerator.synchronize()
    took = time.perf_counter() - began
    for trace in _traces:
        trace.append(Traced(module, what.kind, what.direction, what.bytes, what.shape, took))
    for hangs in _hangs:
        hangs.note(what, module, "has left")


# ---- who waits for whom? -------------------------------------------------------------------------


class _Hangs:
    """Each rank's last collective, where all can read it."""

    _number = 0

    def __init__(self, timeout_s: float) -> None:
        _Hangs._number += 1
        self.timeout_s = timeout_s
        store = dist.distributed_c10d._get_default_store()
        self.store = PrefixStore(f"autotp/hangs/{_Hangs._number}", store)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.count = 0

    def note(self, what: Collective, module: str, state: str) -> None:
        self.count += state == "waits in"
        text = f"{state} {what.kind} number {self.count} ({what.direction} of {module!r}, {list(what.shape)})"
        self.store.set(str(self.rank), json.dumps([text, time.time()]))

    def wait(self, work: Any) -> None:
        if work is None:
            return
        began = time.monotonic()
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            waited = time.monotonic() - began
            raise HangError(
                f"rank {self.rank} has waited {waited:.1f} s in a collective, and not every rank has come to it (or "
                f"one has gone):\n{self.report()}\nRanks have to run the same forward and backward passes in the same "
                "order: look for a branch on the rank, for unequal numbers of batches, or for an exception on one rank."
            ) from error

    def report(self) -> str:
        lines = []
        for rank in range(self.world):
            if not self.store.check([str(rank)]):
                lines.append(f"  rank {rank} has run no collective of this model yet")
                continue
            text, at = json.loads(self.store.get(str(rank)))
            lines.append(f"  rank {rank} {text}, since {max(0.0, time.time() - at):.1f} s")
        return "\n".join(lines)


@contextlib.contextmanager
def report_hangs(model: nn.Module, timeout_s: float = 60.0) -> Iterator[None]:
    """A collective of ``model`` that takes longer than ``timeout_s`` raises, saying where each rank is.

    Every rank has to be within it. It tells the store of the process group about each collective, so it is for finding
    a fault, not for every run.

    Raises:
        HangError: with the last collective of every rank.
    """
    hangs = _Hangs(timeout_s)
    _hangs.append(hangs)
    with _watching(model):
        try:
            yield
        finally:
            _hangs[:] = [h for h in _hangs if h is not hangs]
