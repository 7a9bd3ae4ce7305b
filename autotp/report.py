"""A plan as text: what each rank holds, one row a kind of parameter, the collectives, and what stays whole.

On a terminal the table has colours and the terminal's width; everywhere else it is plain text at 120 columns,
the same on every machine: plans can be golden files. This module knows a plan by its attributes only and
imports nothing of autotp.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
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
    parts: list[RenderableType] = [_summary(plan), "", _entries(plan), ""]
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


def _entries(plan: PlanLike) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    longest = max((len(entry.name) for entry in plan.entries), default=0)
    out.add_column("parameter", overflow="fold", min_width=min(longest, 42))
    out.add_column("placement", no_wrap=True)
    out.add_column("logical axes", overflow="fold")
    out.add_column("bytes", justify="right", no_wrap=True)
    out.add_column("on a rank", justify="right", no_wrap=True)
    reasons: dict[str, int] = {}
    for entry in plan.entries:
        mark = f" [{reasons.setdefault(entry.note, len(reasons) + 1)}]" if entry.note else ""
        out.add_row(
            Text(entry.name),
            Text(entry.placement + mark, style="dim" if entry.placement == "replicate" else ""),
            Text(entry.dims),
            Text((f"{entry.count} x " if entry.count > 1 else "") + size(entry.global_bytes)),
            Text(ranks(entry.local_bytes)),
        )
    if reasons:
        out.caption = Text("\n".join(f"[{number}] {reason}" for reason, number in reasons.items()))
        out.caption_justify = "left"
    return out


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
