"""Random numbers inside a sharded region: different on each rank, and reproducible from one seed.

Replicated regions must draw the same numbers on every rank, so a sharded region may not advance the default
generator by an amount that depends on the rank. It draws one number from it (the same on every rank), and
uses that and the rank as the seed of everything it draws. No state is kept, so recomputing a checkpointed
activation, which restores the default generator, draws the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autotp.runtime.group import get_group

_MIX = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: spreads neighbouring ranks over the seeds


@contextmanager
def sharded_rng(group: str, device: torch.device) -> Iterator[None]:
    """Within this context the default generator of ``device`` is one of this rank's own."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        yield  # nothing is drawn while tracing
        return
    drawn = int(torch.randint(2**62, (), dtype=torch.int64))
    seed = (drawn + (get_group(group).index + 1) * _MIX) % 2**63
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    return module.default_generators[index]  # type: ignore[no-any-return]
