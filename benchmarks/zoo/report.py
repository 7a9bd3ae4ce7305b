"""The table of architectures in the docs, from what sweeps wrote.

    python -m benchmarks.zoo.report tp2.json tp3.json peers.json > docs/architectures.md

Files of one degree are merged: of the results of one model by one tool the last counts, so that a model which was run
again, alone, replaces its earlier result.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .configs import TASKS

US = "autotp"
NAMES = {"hf": "transformers", "deepspeed": "DeepSpeed"}
KINDS = ("exact", "partial", "refused", "wrong", "crash")
LONGEST_REASON = 220

HEAD = """\
# Architectures

Made by `python -m benchmarks.zoo` and `python -m benchmarks.zoo.report`, not by hand. Versions: {versions}.

Every architecture in transformers' auto classes for the tasks below, tiny and with random weights, is sharded and held
against itself unsharded: outputs, the gradient of every parameter and input, and 8 greedy tokens where it generates.
*exact*: the numbers agree, and at least 90 % of the bytes of its linear, embedding and expert weights are sharded.
*partial*: they agree, less is sharded. *refused*: an error before any weight is touched. The percentages are those of
the weights.
"""

Results = dict[tuple[int, str, str], dict[str, Mapping[str, Any]]]  # (degree, task, tool) → model → its result


def load(paths: Sequence[Path]) -> tuple[Results, dict[str, str]]:
    results: Results = {}
    versions: dict[str, str] = {}
    for path in paths:
        sweep = json.loads(path.read_text())
        versions |= sweep["versions"]
        for result in sweep["results"]:
            own = results.setdefault((sweep["tp"], result["task"], result["by"]), {})
            own[result["name"]] = result
    return results, versions


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row(*("---" for _ in cells))]


def counts(results: Results) -> list[str]:
    lines = head("task", "tp", "by", "models", *KINDS, "exact", "do not run unsharded")
    order = [(tp, task, by) for task in TASKS for tp, its, by in sorted(results) if its == task]
    totals: dict[int, Counter[str]] = {}
    for tp, task, by in order:
        count = Counter(result["kind"] for result in results[tp, task, by].values())
        lines.append(_counted(task, tp, by, count))
        if by == US:
            totals.setdefault(tp, Counter()).update(count)
    complete = [tp for tp in totals if all((tp, task, US) in results for task in TASKS)]
    return [*lines, *(_counted("all", tp, US, totals[tp]) for tp in complete)]


def _counted(task: str, tp: int, by: str, count: Counter[str]) -> str:
    ran = sum(count[kind] for kind in KINDS)
    shown = f"{count['exact'] / max(1, ran):.1%}"
    return row(task, tp, NAMES.get(by, by), ran, *(count[kind] for kind in KINDS), shown, count["unbuildable"])


def models(results: Results, task: str) -> list[str]:
    columns = sorted((tp, by != US, by) for tp, its, by in results if its == task)
    names = sorted({name for tp, _, by in columns for name in results[tp, task, by]})
    lines = head("model type", *(f"{NAMES.get(by, by)}, tp {tp}" for tp, _, by in columns))
    for name in names:
        found = [results[tp, task, by].get(name) for tp, _, by in columns]
        lines.append(row(f"`{name}`", *("" if result is None else _shown(result) for result in found)))
    return lines


def _shown(result: Mapping[str, Any]) -> str:
    kind: str = result["kind"]
    return f"{kind} {result['weights']:.0%}" if kind in ("exact", "partial") else kind


def obstacles(results: Results) -> list[str]:
    lines = head("task", "model type", "tp", "result", "what stands in the way")
    for tp, task, by in sorted(results, key=lambda key: (list(TASKS).index(key[1]), key[0])):
        if by != US:
            continue
        for name, result in sorted(results[tp, task, by].items()):
            if result["kind"] in ("partial", "refused", "wrong", "crash"):
                share = f" {result['weights']:.0%}" if result["kind"] == "partial" else ""
                lines.append(row(task, f"`{name}`", tp, result["kind"] + share, _reason(result["reason"])))
    return lines


def unbuildable(results: Results) -> list[str]:
    lines = head("task", "model type", "why its tiny model does not run")
    for task in TASKS:
        tps = [tp for tp, its, by in sorted(results) if its == task and by == US]
        for name, result in sorted(results[tps[0], task, US].items()) if tps else ():
            if result["kind"] == "unbuildable":
                lines.append(row(task, f"`{name}`", _reason(result["reason"])))
    return lines


def _reason(text: str) -> str:
    """On one line, without this machine's folders."""
    text = re.sub(r"[\w./-]*/(?=[\w.-]+\.py\b)", "", text).replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON].rstrip()} …"


@click.command(help=__doc__)
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(paths: tuple[Path, ...]) -> None:
    results, versions = load(paths)
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        *HEAD.format(versions=said).splitlines(),
        "",
        *counts(results),
        "",
        "## What is not exact, and why",
        "",
        *obstacles(results),
        "",
        "## What was not run",
        "",
        *unbuildable(results),
    ]
    for task in TASKS:
        if any(its == task for _, its, _ in results):
            lines += ["", f"## {task}", "", *models(results, task)]
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
