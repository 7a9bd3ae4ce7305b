"""Random numbers inside a sharded region: different on each rank, and reproducible from one seed.

Replicated regions must draw the same numbers on every rank, so a sharded region may not advance the default
generator by an amount that depends on the rank. It draws one number from it (the same on every rank), and
uses that and the rank as the seed of everything it draws. No state is kept, so recomputing a checkpointed
activation, which restores the default generator, draws the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autotp.runtime.group import get_group

_MIX = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: spreads neighbouring ranks over the seeds


@contextmanager
def sharded_rng(group: str, device: torch.device) -> Iterator[None]:
    """Within this context the default generator of ``device`` is one of this rank's own."""
    kept = _enter(group, device)
    try:
        yield
    finally:
        _leave(kept)


Kept = tuple[torch.Generator, torch.Tensor] | None
"""A generator and the state that it is to have again; None while tracing, when nothing is drawn."""


def _enter(group: str, device: torch.device) -> Kept:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    drawn = int(torch.randint(2**62, (), dtype=torch.int64))
    seed = (drawn + (get_group(group).index + 1) * _MIX) % 2**63
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    return generator, state


def _leave(kept: Kept) -> None:
    if kept is not None:
        generator, state = kept
        generator.set_state(state)


class DrawGate:
    """`sharded_rng` around a module's forward, or around one call in somebody's source.

    There, ``open`` wraps an operand, so that it runs just before the call, and ``close`` wraps the call's value.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._kept: list[Kept] = []

    def open(self, x: torch.Tensor) -> torch.Tensor:
        self._kept.append(_enter(self.group, x.device))
        return x

    def close(self, x: torch.Tensor) -> torch.Tensor:
        _leave(self._kept.pop())
        return x

    def around(self, module: nn.Module) -> None:
        """Let all that this module draws in train mode be this rank's own."""
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._kept.append(_enter(self.group, args[0].device) if module.training and args else None)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        _leave(self._kept.pop())

    def __getstate__(self) -> str:
        return self.group

    def __setstate__(self, group: str) -> None:
        self.group = group
        self._kept = []


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    return module.default_generators[index]  # type: ignore[no-any-return]
