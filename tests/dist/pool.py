"""Worker processes for tests that need several ranks.

Importing torch takes seconds, so the workers live as long as the test session and are lent to one job at a
time. A job is a module-level function that runs on ``world`` ranks, each a single-threaded process with an
initialised default process group (Gloo) of exactly these ranks:

    def sum_of_ranks() -> int:
        x = torch.tensor(dist.get_rank())
        dist.all_reduce(x)
        return int(x)

    def test_sum(dist):
        assert dist.run(4, sum_of_ranks) == [6, 6, 6, 6]

Nothing hangs: a rank that fails is reported with its traceback while its peers still wait for it in a
collective, and a job that is not done in time is reported with the stack of every rank that it hangs on.
After both the workers are replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.dist import worker

WORKERS = 5
_GRACE_SECONDS = 3.0  # how long the peers of a rank that failed may take to fail as well


class RankFailed(AssertionError):
    """A rank raised. ``rank`` is the first one that did, ``cause_type`` the name of its exception's class."""

    def __init__(self, message: str, rank: int, cause_type: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.cause_type = cause_type


class JobTimeout(AssertionError):
    """A job was not done in time."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    stacks: Path  # where it writes its stacks on SIGUSR1


class Pool:
    """Up to five workers, started at the first job."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._folder: Path | None = None
        self._jobs = 0

    def run(
        self, world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, one_plans: bool = False
    ) -> list[Any]:
        """Run ``fn(*args)`` on ranks 0 .. world-1 and give back what each returned, in the order of the
        ranks.

        With ``one_plans`` rank 0 plans for all: see `planned_by_one`.
        """
        if not 1 <= world <= WORKERS:
            raise ValueError(f"world must be 1 to {WORKERS}, not {world}")
        if "<" in fn.__qualname__:
            raise TypeError(
                f"{fn.__qualname__} must be a module-level function: the workers find it by its name"
            )
        self._start()
        assert self._folder is not None
        self._jobs += 1
        store = self._folder / f"store{self._jobs}"
        where = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
        message = pickle.dumps((world, str(store), timeout, where, args, one_plans))
        done: dict[int, worker.Outcome] = {}
        try:
            for rank in range(world):
                self._workers[rank].connection.send_bytes(pickle.dumps(rank))
                self._workers[rank].connection.send_bytes(message)
            self._collect(world, timeout, done)
            missing = [rank for rank in range(world) if rank not in done]
            stacks = self._stacks(missing) if missing else ""
        except BaseException:  # Ctrl-C, too, leaves jobs behind
            self.close()
            raise
        if missing:
            self.close()
        failed = [rank for rank, outcome in done.items() if outcome.error is not None]
        failed.sort(
            key=lambda rank: done[rank].failed_at
        )  # a peer that fails because of it may report sooner
        if failed:
            raise RankFailed(_report(fn, world, done, failed, stacks), failed[0], done[failed[0]].error_type)
        if missing:
            what = f"{fn.__qualname__} on {world} ranks was not done after {timeout:g} s"
            raise JobTimeout(f"{what}: ranks {missing} hang.\n{stacks}")
        return [pickle.loads(done[rank].value) for rank in range(world)]

    def close(self) -> None:
        """End the workers; the next job starts new ones."""
        for w in self._workers:
            w.process.kill()
        for w in self._workers:
            w.process.join()
            w.connection.close()
        self._workers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        if self._workers and all(w.process.is_alive() for w in self._workers):
            return
        self.close()
        self._folder = Path(tempfile.mkdtemp(prefix="autotp-ranks-"))
        # The server imports what takes seconds once and every worker is a fork of it, so that replacing workers is cheap.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "transformers.modeling_utils", "autotp"])
        for index in range(WORKERS):
            ours, theirs = context.Pipe()
            stacks = self._folder / f"stacks{index}"
            process = context.Process(target=worker.serve, args=(theirs, str(stacks)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, stacks))

    def _collect(self, world: int, timeout: float, done: dict[int, worker.Outcome]) -> None:
        """Fill ``done``, in the order in which ranks finish, until all have or it takes too long."""
        deadline = time.monotonic() + timeout
        waiting: dict[Any, int] = {self._workers[rank].connection: rank for rank in range(world)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), left):
                rank = waiting.pop(ready)
                try:
                    done[rank] = pickle.loads(ready.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._workers[rank].process.join(1)
                    code = self._workers[rank].process.exitcode
                    done[rank] = worker.Outcome(
                        error=f"the process died (exit code {code})", error_type="Died"
                    )
                if done[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        texts = []
        for rank in ranks:
            file = self._workers[rank].stacks
            texts.append(f"--- rank {rank} was at\n{file.read_text() if file.exists() else '(no stack)'}")
        return "\n".join(texts)


def _report(
    fn: Callable[..., Any], world: int, done: dict[int, worker.Outcome], failed: list[int], stacks: str
) -> str:
    first = failed[0]
    lines = [f"{fn.__qualname__} on {world} ranks: rank {first} failed", str(done[first].error)]
    for rank in failed[1:]:
        if done[rank].error_type != done[first].error_type:
            lines += [f"--- rank {rank} failed afterwards", str(done[rank].error)]
        else:
            lines.append(f"--- rank {rank} failed as well ({done[rank].error_type})")
    if stacks:
        lines.append(stacks)
    return "\n".join(lines)


_pool = Pool()


def run(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, one_plans: bool = False
) -> list[Any]:
    """``Pool.run`` of the pool that the whole session shares."""
    return _pool.run(world, fn, *args, timeout=timeout, one_plans=one_plans)


def shared() -> Pool:
    return _pool
