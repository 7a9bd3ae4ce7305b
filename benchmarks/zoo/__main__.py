"""Shard every architecture of transformers, tiny and with random weights, and compare it with itself unsharded.

    python -m benchmarks.zoo --task causal-lm --tp 2 --json zoo.json

Each model ends in one class: ``exact`` (the numbers agree, and at least 90 % of the bytes of its linear, embedding and
expert weights are sharded), ``partial`` (they agree, fewer are), ``refused`` (an AutoTPError before weights),
``wrong``, ``crash``; or ``unbuildable``, where the tiny model does not run unsharded. Exit code 1 if any is wrong or
crashed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import gc
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from .compare import Result, compare, examine, shard
from .configs import TASKS, architectures
from .peers import PEERS, compare_peer

KINDS = ("exact", "partial", "refused", "wrong", "crash", "unbuildable")
US = "autotp"
GENERATIVE = ("causal-lm", "seq2seq")
COLLECT_AFTER = 20_000  # new objects: a trace makes many that stay, and collections of garbage look at all of them


def quietly(out: Connection, name: str, cls: Any, work: Callable[[], Result]) -> None:
    """In a forked process: send what the work finds, or how it failed."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        result = work()
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        result = Result(name, cls.__name__, "crash", f"{type(error).__name__}: {error} ({where})"[:500])
        result.whole = {"traceback": traceback.format_exc()[-3000:]}
    out.send(result)
    out.close()
    os._exit(0)


def model_main(who: str, name: str, cls: Any, tp: int, options: dict[str, Any], tokens: bool, folder: str) -> Result:
    """One model: planned once, then compared by a process for each rank."""
    subject = examine(name, cls, tp, options, plan=who == US)
    if isinstance(subject, Result):
        return subject
    if who == "hf":
        subject.reference.save_pretrained(f"{folder}/model")  # type: ignore[operator]

    def rank_main(rank: int) -> Result:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", tp), rank=rank, world_size=tp)
        if who != US:
            return compare_peer(who, name, subject, f"{folder}/model", rank, tp, tokens)
        return compare(name, shard(subject), subject.reference, subject.inputs, tokens)

    pipes = {}
    for rank in range(tp):
        pipe, process = fork(name, cls, partial(rank_main, rank))
        pipes[pipe] = process
    results = []
    while len(results) < tp:
        for pipe in wait([*pipes]):
            results.append(receive(pipe, name, cls))  # type: ignore[arg-type]
            del pipes[pipe]  # type: ignore[arg-type]
        if results[-1].kind == "crash":
            break
    for process in pipes.values():
        process.kill()
    return max(results, key=lambda r: badness(r.kind))


def fork(
    name: str, cls: Any, work: Callable[[], Result]
) -> tuple[Connection, multiprocessing.context.ForkProcess]:
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=quietly, args=(its, name, cls, work))
    process.start()
    its.close()
    return mine, process


def receive(pipe: Connection, name: str, cls: Any) -> Result:
    try:
        result: Result = pipe.recv()
    except EOFError:
        result = Result(name, cls.__name__, "crash", "the process died")
    return result


class Job:
    """A process for one model, in a process group of its own with those of its ranks."""

    def __init__(
        self, who: str, name: str, cls: Any, tp: int, options: dict[str, Any], tokens: bool, limit: float
    ) -> None:
        self.who, self.name, self.cls = who, name, cls
        self.started = time.monotonic()
        self.limit = limit
        self.folder = tempfile.mkdtemp(prefix="zoo-")

        def work() -> Result:
            os.setpgid(0, 0)
            return model_main(who, name, cls, tp, options, tokens, self.folder)

        self.pipe, self.process = fork(name, cls, work)

    def late(self) -> bool:
        return time.monotonic() - self.started > self.limit

    def close(self) -> Result:
        if self.pipe.poll():
            result = receive(self.pipe, self.name, self.cls)
        else:
            result = Result(self.name, self.cls.__name__, "crash", f"not done in {self.limit:.0f} s")
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        result.seconds = time.monotonic() - self.started
        return result


def badness(kind: str) -> int:
    return ("exact", "partial", "unbuildable", "refused", "wrong", "crash").index(kind)


def sweep(
    models: list[tuple[str, str, str, Any]], tp: int, options: dict[str, Any], jobs: int, limit: float,
    console: Console,
) -> Iterator[tuple[str, str, Result]]:  # fmt: skip
    """(task, who shards, what came of it) as each is done, of models as (task, who, name, class)."""
    waiting = list(models)
    running: list[tuple[str, Job]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            task, who, name, cls = waiting.pop(0)
            running.append((task, Job(who, name, cls, tp, options, task in GENERATIVE, limit)))
        ready = wait([job.pipe for _, job in running], timeout=1.0)
        for task, job in list(running):
            if job.pipe in ready or job.late():
                running.remove((task, job))
                result = job.close()
                console.print(
                    f"{task} {job.who} {result.name} [bold]{result.kind}[/] {result.weights:.1%} {result.error:.0e} "
                    f"{result.seconds:.0f} s {result.reason[:300] if result.kind != 'exact' else ''}",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip
                yield task, job.who, result


def write(path: Path, tp: int, found: list[tuple[str, str, Result]]) -> None:
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed") if find_spec(name)}
    results = [{"task": task, "by": who, **asdict(result)} for task, who, result in found]
    path.write_text(json.dumps({"tp": tp, "versions": versions, "results": results}, indent=1))


@click.command(help=__doc__)
@click.option("--task", type=click.Choice([*TASKS, "all"]), default="causal-lm", show_default=True)
@click.option("--tp", default=2, show_default=True)
@click.option("--heads", type=int, help="Attention heads of each model.")
@click.option("--kv-heads", type=int, help="Key and value heads of models that have fewer of them.")
@click.option("--only", multiple=True, help="Glob pattern of model types; may be repeated.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(PEERS), help="These in autotp's stead.")
@click.option("--jobs", default=2, show_default=True, help="Models at a time.")
@click.option("--limit", default=360.0, show_default=True, help="Seconds for one model.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
def main(
    task: str, tp: int, heads: int | None, kv_heads: int | None, only: tuple[str, ...], peers: tuple[str, ...],
    jobs: int, limit: float, out: Path | None,
) -> None:  # fmt: skip
    transformers.logging.set_verbosity_error()
    gc.set_threshold(COLLECT_AFTER)
    options: dict[str, Any] = {}
    if heads is not None:
        options["num_attention_heads"] = heads
    if kv_heads is not None:
        options["num_key_value_heads"] = kv_heads
    tasks = list(TASKS) if task == "all" else [task]
    models = [
        (t, who, name, cls)
        for t in tasks
        for who in peers or (US,)
        for name, cls in architectures(t)
        if not only or any(fnmatch(name, pattern) for pattern in only)
    ]
    found = []
    for done in sweep(models, tp, options, jobs, limit, Console(stderr=True)):
        found.append(done)
        if out is not None:  # an interrupted sweep keeps what it has
            write(out, tp, found)
    console = Console()
    table = Table("task", "by", *KINDS, "exact of those that run")
    for t, who in dict.fromkeys((t, who) for t, who, _ in found):
        count = Counter(result.kind for *its, result in found if its == [t, who])
        ran = sum(count.values()) - count["unbuildable"]
        table.add_row(t, who, *(str(count[kind]) for kind in KINDS), f"{count['exact'] / max(1, ran):.1%}")
    console.print(table)
    sys.exit(any(result.kind in ("wrong", "crash") for _, who, result in found if who == US))


if __name__ == "__main__":
    main()
