"""A plan as text: what each rank holds, one row a kind of parameter, the collectives, and what stays whole.

On a terminal the table has colours and the terminal's width; everywhere else it is plain text at 120 columns,
the same on every machine: plans can be golden files. This module knows a plan by its attributes only and
imports nothing of autotp.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 120


class EntryLike(Protocol):
    @property
    def name(self) -> str: ...  # a parameter's fqn, layers.{0-2}.q.weight for that of repeated layers
    @property
    def count(self) -> int: ...  # of how many layers
    @property
    def placement(self) -> str: ...  # "column", "row", "vocab", "shard", "replicate"
    @property
    def dims(self) -> str: ...  # its logical axes, "H8/2·D64 , M512"
    @property
    def global_bytes(self) -> int: ...  # of one of them
    @property
    def local_bytes(self) -> tuple[int, ...]: ...  # of one of them on each rank
    @property
    def note(self) -> str: ...


class CollectiveLike(Protocol):
    @property
    def phase(self) -> str: ...  # "forward", "backward" or "step"
    @property
    def kind(self) -> str: ...  # "all_reduce", "all_gather"
    @property
    def where(self) -> str: ...  # the fqn of the module (or parameter) whose value is communicated
    @property
    def op(self) -> str: ...  # the op that makes it
    @property
    def bytes(self) -> int: ...  # of one of them
    @property
    def count(self) -> int: ...


class PlanLike(Protocol):
    @property
    def tp(self) -> int: ...
    @property
    def entries(self) -> Sequence[EntryLike]: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def sharded_bytes(self) -> int: ...
    @property
    def proven(self) -> bool: ...
    @property
    def collectives(self) -> Sequence[CollectiveLike]: ...
    @property
    def notes(self) -> Sequence[str]: ...


def table(plan: PlanLike, width: int = WIDTH) -> str:
    """The plan as plain text, without colours and trailing blanks."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, emoji=False).print(render(plan))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def render(plan: PlanLike) -> RenderableType:
    """The plan for a rich console."""
    parts: list[RenderableType] = [_summary(plan), "", _Entries(plan), ""]
    for phase, words in PHASES.items():
        found = [c for c in plan.collectives if c.phase == phase]
        if found or phase != "step":
            parts.append(_collectives(found, words))
    notes = list(plan.notes)
    if not plan.proven:
        notes.insert(0, "There were too many sets of axes to compare all: this is the best that was seen.")
    if notes:
        parts += ["", Text("Notes", style="bold")]
        parts += [Padding(Text(note), (0, 0, 0, 2)) for note in notes]
    return Group(*parts)


PHASES = {"forward": "forward", "backward": "backward", "step": "of gradients, once a step"}


def _summary(plan: PlanLike) -> Text:
    total, sharded = plan.weight_bytes, plan.sharded_bytes
    held = [sum(e.local_bytes[rank] * e.count for e in plan.entries) for rank in range(plan.tp)]
    share = f"{percent(sharded, total)} of {size(total)} of weights sharded"
    return Text(f"tp={plan.tp}: {share}, {ranks(held)} on each rank")


class _Entries:
    """The table of parameters, fitted to the console: names and axes are broken where that has to be."""

    def __init__(self, plan: PlanLike) -> None:
        self.plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        reasons: dict[str, int] = {}
        rows: list[tuple[str, str, str, str, str]] = [HEADINGS]
        for e in self.plan.entries:
            mark = f" [{reasons.setdefault(e.note, len(reasons) + 1)}]" if e.note else ""
            times = f"{e.count} x " if e.count > 1 else ""
            rows.append(
                (e.name, e.placement + mark, e.dims, times + size(e.global_bytes), ranks(e.local_bytes))
            )
        name, placement, dims, whole, local = (max(map(len, column)) for column in zip(*rows, strict=True))
        room = options.max_width - placement - whole - local - 2 * (len(HEADINGS) - 1)
        if name + dims > room:
            dims = min(dims, max(room - name, room // 3, 12))
            name = min(name, max(room - dims, 12))
        out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for heading, width in zip(HEADINGS, (name, placement, dims, whole, local), strict=True):
            size_column = heading in ("bytes", "on a rank")
            out.add_column(
                heading, justify="right" if size_column else "left", width=width, no_wrap=size_column
            )
        for entry, row in zip(self.plan.entries, rows[1:], strict=True):
            style = "dim" if entry.placement == "replicate" else ""
            out.add_row(
                _broken(row[0], name), Text(row[1], style=style), _broken(row[2], dims), *map(Text, row[3:])
            )
        yield out
        for reason, number in reasons.items():
            yield Text(f"[{number}] {reason}", style="dim")


HEADINGS = ("parameter", "placement", "logical axes", "bytes", "on a rank")


def _broken(text: str, width: int) -> Text:
    """A dotted name or a term in lines of at most this width, broken after dots and bars where it can be."""
    lines = [""]
    for piece in re.findall(r"[^.|·, ]*[.|·, ]*", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return Text("\n".join(line.rstrip() for line in lines), overflow="fold")


def _collectives(collectives: Sequence[CollectiveLike], words: str) -> RenderableType:
    if not collectives:
        return Text(f"No collectives {words}.", style="bold")
    many = sum(c.count for c in collectives)
    number = "1 collective" if many == 1 else f"{many} collectives"
    head = f"{number} {words}, {size(sum(c.bytes * c.count for c in collectives))}"
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for c in collectives:
        count = f"x{c.count}" if c.count > 1 else ""
        rows.add_row(Text(c.kind), Text(c.where or "(model)"), Text(c.op), Text(count), Text(size(c.bytes)))
    return Group(Text(head, style="bold"), Padding(rows, (0, 0, 0, 2)))


def size(number_of_bytes: int) -> str:
    """``1536`` -> ``1.5 kB``: powers of 1000, three digits."""
    value = float(number_of_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"


def ranks(local_bytes: Sequence[int]) -> str:
    """What each rank holds: one size where they are equal, the least and the most where they are not."""
    least, most = size(min(local_bytes)), size(max(local_bytes))
    if least == most:
        return most
    number, unit = least.split()
    return f"{number if most.endswith(' ' + unit) else least} to {most}"


def percent(part: int, whole: int) -> str:
    """Rounded towards zero, so that 100 % means all."""
    return f"{int(10000 * part / whole) / 100:g} %" if whole else "0 %"
