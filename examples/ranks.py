"""What the examples print: once, what each rank holds, and whether two tensors agree on every rank; their files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


def say(*words: object) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(*words, flush=True)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that all ranks of this machine see, and that is gone at the end."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made, src=0)
    try:
        yield Path(made[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(made[0])


def every_rank_holds(model: nn.Module, unsharded: nn.Module) -> bool:
    """Print what each rank holds next to the whole model, and one shape; true if no rank holds it all."""
    name, largest = max(model.named_parameters(), key=lambda item: item[1].numel())
    mine = (sum(p.nbytes for p in model.parameters()), tuple(largest.shape))
    everyone: list[tuple[int, tuple[int, ...]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole = sum(p.nbytes for p in unsharded.parameters())
    say(f"  unsharded: {whole / 1e6:.2f} MB, {name} {list(unsharded.get_parameter(name).shape)}")
    for rank, (held, shape) in enumerate(everyone):
        say(f"  rank {rank} holds {held / 1e6:.2f} MB ({held / whole:.1%}), {name} {list(shape)}")
    sharded = all(held < whole for held, _ in everyone)
    if not sharded:
        say("  nothing is sharded")
    return sharded


def same_curves(what: str, found: Tensor, expected: Tensor, tolerance: float, rows: int = 6) -> bool:
    """Print two loss curves and their largest relative difference; true if all ranks are within the tolerance."""
    steps = sorted({round(i * (len(expected) - 1) / (rows - 1)) for i in range(rows)})
    say(f"  {what + ' step':>14} {'unsharded loss':>18} {'sharded loss':>18}")
    for step in steps:
        say(f"  {step:>14} {expected[step].item():>18.12f} {found[step].item():>18.12f}")
    return agree(f"{what} losses, relatively,", found.double() / expected.double(), torch.ones(len(found)), tolerance)


def agree(what: str, found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Print the largest difference on any rank; true if it is within the tolerance on all of them."""
    difference = (found - expected).abs().max().nan_to_num(nan=torch.inf)
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    ok = difference.item() <= tolerance
    verdict = "agree" if ok else "DIFFER"
    say(f"  {what} {verdict}: the largest difference is {difference.item():.1e} (allowed: {tolerance:.0e})")
    return ok
