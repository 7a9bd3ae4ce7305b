"""Shard random models, and compare each with itself unsharded: exact, or refused, or a bug.

\b
    python -m tests.fuzz --models 2000          # the nightly setting
    python -m tests.fuzz --seed 17 --models 1   # one model again
    python -m tests.fuzz --seed 17 --show       # its source

A model that is neither exact nor refused is printed with the command that runs it alone; the exit code is then 1.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz.check import Found
from tests.fuzz.faults import FAULTS
from tests.fuzz.models import draw_model
from tests.fuzz.sweep import sweep


@click.command(help=__doc__)
@click.option("--models", default=100, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of the first model.")
@click.option(
    "--tp", type=click.IntRange(2, 5), help="Every model over so many ranks; else the seed says it."
)
@click.option("--jobs", default=2, show_default=True, help="Models at a time.")
@click.option("--fault", type=click.Choice(sorted(FAULTS)), help="Plant a fault in autotp first.")
@click.option(
    "--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here."
)
@click.option("--show", is_flag=True, help="Print the source of the seed's model, and stop.")
def main(
    models: int, seed: int, tp: int | None, jobs: int, fault: str | None, out: Path | None, show: bool
) -> None:
    if show:
        click.echo(draw_model(seed, tp).text)
        return
    notes = Console(stderr=True)
    start = time.monotonic()
    found: list[Found] = []
    counts: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes) as progress:
        bar = progress.add_task("random models", total=models)
        for batch in sweep(range(seed, seed + models), tp, jobs, fault):
            found += batch
            counts.update(f.kind for f in batch)
            words = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
            progress.update(bar, advance=len(batch), description=words)
            for bad in (f for f in batch if f.kind in ("wrong", "crash")):
                notes.print(f"[bold red]{bad.kind}[/] seed {bad.seed}, tp {bad.tp}", highlight=False)
                notes.print(bad.reason, markup=False, highlight=False)
                notes.print(f"    {command(bad, fault)}", markup=False, highlight=False)
    if out is not None:
        out.write_text(json.dumps([asdict(f) for f in sorted(found, key=lambda f: f.seed)], indent=1))
    Console().print(summary(found, time.monotonic() - start))
    sys.exit(any(f.kind in ("wrong", "crash") for f in found))


def command(found: Found, fault: str | None = None) -> str:
    """What runs one model again."""
    more = f" --fault {fault}" if fault else ""
    return f"python -m tests.fuzz --models 1 --seed {found.seed} --tp {found.tp}{more}"


def summary(found: list[Found], seconds: float) -> Table:
    """By degree: how many models ended how; of the exact ones, how many are replicated wholly and which share of their
    bytes is sharded; and what one took, of all ranks together.
    """
    heads = ("tp", "models", "exact", "refused", "void", "wrong", "crash", "replicated", "sharded", "core s")
    table = Table(*heads, title=f"{len(found)} random models in {seconds:.0f} s")
    for tp in [*sorted({f.tp for f in found}), None]:
        part = [f for f in found if tp in (None, f.tp)]
        exact = [f for f in part if f.kind == "exact"]
        kinds = Counter(f.kind for f in part)
        whole = sum(f.share == 0 for f in exact)
        mean = sum(f.share for f in exact) / max(1, len(exact))
        slow = sum(f.cpu for f in part) / max(1, len(part))
        counted = [str(kinds[kind]) for kind in ("exact", "refused", "void", "wrong", "crash")]
        ends = (str(whole), f"{mean:.0%}", f"{slow:.2f}")
        table.add_row("all" if tp is None else str(tp), str(len(part)), *counted, *ends)
    return table


if __name__ == "__main__":
    main()
