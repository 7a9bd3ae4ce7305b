"""The pool of ranks: right results, worlds of every size, and no way to hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as torch_dist

from tests.dist.pool import JobTimeout, Pool, RankFailed


def sum_of_ranks(plus: int) -> tuple[int, int, int]:
    x = torch.tensor(torch_dist.get_rank() + plus)
    torch_dist.all_reduce(x)
    return torch_dist.get_rank(), torch_dist.get_world_size(), int(x)


def one_fails(which: int) -> None:
    if torch_dist.get_rank() == which:
        raise ValueError(f"rank {which} has had enough")
    torch_dist.barrier()


def one_hangs(which: int) -> None:
    if torch_dist.get_rank() == which:
        time.sleep(1000)


def one_dies(which: int) -> None:
    if torch_dist.get_rank() == which:
        os._exit(3)
    torch_dist.barrier()


def test_worlds_of_every_size_in_any_order(dist: Pool) -> None:
    for world in (2, 4, 3, 1, 4, 2):
        total = world * (world - 1) // 2 + world * 10
        assert dist.run(world, sum_of_ranks, 10) == [(rank, world, total) for rank in range(world)]


def test_a_failing_rank_shows_its_traceback_while_the_others_wait(dist: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 has had enough") as info:
        dist.run(3, one_fails, 1)
    assert time.monotonic() - start < 20
    assert info.value.rank == 1 and info.value.cause_type == "ValueError"
    assert "in one_fails" in str(info.value) and "barrier" in str(info.value)  # where the others were
    assert len(dist.run(3, sum_of_ranks, 0)) == 3


def test_a_hanging_rank_times_out_and_shows_where(dist: Pool) -> None:
    with pytest.raises(JobTimeout, match=r"not done after 1 s: ranks \[0, 1\] hang") as info:
        dist.run(2, one_hangs, 1, timeout=1)
    assert "in one_hangs" in str(info.value)
    assert len(dist.run(2, sum_of_ranks, 0)) == 2


def test_a_dying_rank_is_reported(dist: Pool) -> None:
    with pytest.raises(RankFailed, match="exit code 3"):
        dist.run(2, one_dies, 0)
    assert len(dist.run(2, sum_of_ranks, 0)) == 2


def test_only_functions_that_can_be_found_by_name(dist: Pool) -> None:
    with pytest.raises(TypeError, match="module-level"):
        dist.run(2, lambda: None)
