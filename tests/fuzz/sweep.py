"""Many random models over several pools of ranks at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from tests.dist.pool import JobTimeout, Pool, RankFailed
from tests.fuzz.check import Found, check_all
from tests.fuzz.models import draw_model

BATCH = 8  # models of one degree that a pool gets at a time
SECONDS = 60.0  # for one model

_ORDER = ("exact", "refused", "void", "wrong", "crash")


def batches(seeds: Sequence[int], tp: int | None = None, size: int = BATCH) -> list[tuple[int, list[int]]]:
    """(tp, seeds), those of one degree together."""
    by_degree: dict[int, list[int]] = {}
    for seed in seeds:
        by_degree.setdefault(tp or draw_model(seed).tp, []).append(seed)
    return [
        (degree, found[i : i + size])
        for degree, found in sorted(by_degree.items(), reverse=True)
        for i in range(0, len(found), size)
    ]


def run_batch(
    pool: Pool, tp: int, seeds: Sequence[int], fault: str | None = None, one_plans: bool = False
) -> list[Found]:
    """The worst that a rank found, for each model. Where the job fails, every model gets one of its own."""
    try:
        limit = SECONDS * len(seeds) ** 0.5
        ranks = pool.run(tp, check_all, list(seeds), tp, fault, timeout=limit, one_plans=one_plans)
    except (RankFailed, JobTimeout) as error:
        if len(seeds) > 1:
            return [found for seed in seeds for found in run_batch(pool, tp, [seed], fault, one_plans)]
        return [Found(seeds[0], tp, "crash", str(error))]
    return [_worst(found) for found in zip(*ranks, strict=True)]


def _worst(ranks: Sequence[Found]) -> Found:
    kinds = {found.kind for found in ranks}
    if kinds == {"exact", "refused"}:
        return dataclasses.replace(
            ranks[0], kind="crash", reason="some ranks refuse the model, others do not"
        )
    worst = max(ranks, key=lambda found: _ORDER.index(found.kind))
    return dataclasses.replace(worst, cpu=sum(found.cpu for found in ranks))


def sweep(seeds: Sequence[int], tp: int | None, jobs: int, fault: str | None = None) -> Iterator[list[Found]]:
    """Results as they come, ``jobs`` batches at a time."""
    pools = threading.local()
    made: list[Pool] = []

    def work(degree: int, batch: list[int]) -> list[Found]:
        if not hasattr(pools, "own"):
            pools.own = Pool()
            made.append(pools.own)
        return run_batch(pools.own, degree, batch, fault)

    executor = ThreadPoolExecutor(jobs)
    try:
        futures = [executor.submit(work, *batch) for batch in batches(seeds, tp)]
        for future in as_completed(futures):
            yield future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for pool in made:
            pool.close()
