"""A plan as text: what each rank holds, one row a kind of parameter, the collectives, and what stays whole.

Repeated layers fold into one row (``layers.0-125``). On a terminal the table has colours and the terminal's
width; everywhere else it is plain text at 110 columns, the same on every machine: plans can be golden files.
This module knows a plan by its attributes only and imports nothing of autotp.
"""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 110


class EntryLike(Protocol):
    @property
    def name(self) -> str: ...  # a parameter's fqn
    @property
    def placement(self) -> str: ...  # "S(0)", "R", "S(0) column" …
    @property
    def dims(self) -> str: ...  # its logical axes, "heads·64 , model"
    @property
    def global_bytes(self) -> int: ...
    @property
    def local_bytes(self) -> tuple[int, ...]: ...  # of each rank
    @property
    def note(self) -> str: ...


class CollectiveLike(Protocol):
    @property
    def phase(self) -> str: ...  # "forward" or "backward"
    @property
    def kind(self) -> str: ...  # "all_reduce", "all_gather"
    @property
    def where(self) -> str: ...  # the fqn of the module whose value is communicated
    @property
    def cost_bytes(self) -> int: ...


class PlanLike(Protocol):
    @property
    def tp(self) -> int: ...
    @property
    def entries(self) -> Sequence[EntryLike]: ...
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
    for phase in ("forward", "backward"):
        parts.append(_collectives([c for c in plan.collectives if c.phase == phase], phase))
    if plan.notes:
        parts += ["", Text("Notes", style="bold")]
        parts += [Padding(Text(note), (0, 0, 0, 2)) for note in plan.notes]
    return Group(*parts)


def _summary(plan: PlanLike) -> Text:
    total = sum(e.global_bytes for e in plan.entries)
    sharded = sum(e.global_bytes for e in plan.entries if max(e.local_bytes) < e.global_bytes)
    held = [sum(e.local_bytes[rank] for e in plan.entries) for rank in range(plan.tp)]
    share = f"{percent(sharded, total)} of {size(total)} of weights sharded"
    return Text(f"tp={plan.tp}: {share}, {ranks(held)} on each rank")


def _entries(plan: PlanLike) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    out.add_column("parameter", overflow="fold")
    out.add_column("count", justify="right", no_wrap=True)
    out.add_column("placement", no_wrap=True)
    out.add_column("logical axes", overflow="fold")
    out.add_column("each", justify="right", no_wrap=True)
    out.add_column("on a rank", justify="right", no_wrap=True)
    reasons: dict[str, int] = {}
    for name, group in fold(
        (e.name, (e.placement, e.dims, e.global_bytes, e.local_bytes, e.note), e) for e in plan.entries
    ):
        entry = group[0]
        mark = f" [{reasons.setdefault(entry.note, len(reasons) + 1)}]" if entry.note else ""
        out.add_row(
            Text(name),
            Text(f"x{len(group)}" if len(group) > 1 else ""),
            Text(entry.placement + mark, style="" if max(entry.local_bytes) < entry.global_bytes else "dim"),
            Text(entry.dims),
            Text(size(entry.global_bytes)),
            Text(ranks(entry.local_bytes)),
        )
    if reasons:
        out.caption = Text("\n".join(f"[{number}] {reason}" for reason, number in reasons.items()))
        out.caption_justify = "left"
    return out


def _collectives(collectives: Sequence[CollectiveLike], phase: str) -> RenderableType:
    if not collectives:
        return Text(f"No collectives {phase}.", style="bold")
    number = "1 collective" if len(collectives) == 1 else f"{len(collectives)} collectives"
    head = f"{number} {phase}, {size(sum(c.cost_bytes for c in collectives))}"
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for where, group in fold((c.where, (c.kind, c.cost_bytes), c) for c in collectives):
        count = f"x{len(group)}" if len(group) > 1 else ""
        rows.add_row(
            Text(group[0].kind), Text(where or "(model)"), Text(count), Text(size(group[0].cost_bytes))
        )
    return Group(Text(head, style="bold"), Padding(rows, (0, 0, 0, 2)))


T = TypeVar("T")


def fold(items: Iterable[tuple[str, Hashable, T]]) -> list[tuple[str, list[T]]]:
    """Join items whose names differ in numbers only and whose keys are equal, in the order of the first ones.

    ``layers.0.q``, ``layers.1.q``, ``layers.3.q`` -> ``layers.0-1,3.q``. Where two numbers vary and not every
    pair of them occurs, the items stay apart.
    """
    groups: dict[Hashable, list[tuple[str, T]]] = defaultdict(list)
    for name, key, item in items:
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "*", name), key].append((name, item))
    result: list[tuple[str, list[T]]] = []
    for members in groups.values():
        joined = _join([name for name, _ in members])
        if joined is None:
            result.extend((name, [item]) for name, item in members)
        else:
            result.append((joined, [item for _, item in members]))
    return result


def _join(names: list[str]) -> str | None:
    columns = [
        list(dict.fromkeys(column)) for column in zip(*(name.split(".") for name in names), strict=True)
    ]
    if len(set(names)) == 1:  # the same module several times
        return names[0]
    if len(list(itertools.product(*columns))) != len(names):
        return None
    return ".".join(column[0] if len(column) == 1 else _numbers(column) for column in columns)


def _numbers(column: list[str]) -> str:
    """``["0", "1", "2", "5"]`` -> ``0-2,5``"""
    numbers = sorted(map(int, column))
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


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
    return most if least == most else f"{least} to {most}"


def percent(part: int, whole: int) -> str:
    """Rounded towards zero, so that 100 % means all."""
    return f"{int(10000 * part / whole) / 100:g} %" if whole else "0 %"
