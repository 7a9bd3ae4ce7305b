"""Names of repeated layers, folded: ``h.0.q`` and ``h.1.q`` are ``h.{0-1}.q``; and names misspelt."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

Parts = tuple[str, ...]
K = TypeVar("K", bound=Hashable)

_FOLDED = re.compile(r"\{[\d,-]+\}")


def fold(items: Iterable[tuple[str, K]]) -> list[tuple[str, K, int]]:
    """Join items whose names differ in numbers only and whose keys are equal: (pattern, key, how many).

    In the order of the first ones. A name that comes several times counts as often. ``h.0.q``, ``h.1.q`` and
    ``h.3.q`` are ``h.{0-1,3}.q``.
    """
    times: dict[tuple[str, K], int] = defaultdict(int)
    for name, key in items:
        times[name, key] += 1
    first = {item: i for i, item in enumerate(times)}
    groups: dict[tuple[Parts, K, int], list[Parts]] = defaultdict(list)
    for (name, key), n in times.items():
        parts = tuple(name.split("."))
        groups[tuple("*" if part.isdigit() else part for part in parts), key, n].append(parts)
    found: list[tuple[int, str, K, int]] = []
    for (_, key, n), members in groups.items():
        for row in _merge(members):
            at = first[".".join(column[0] for column in row), key]
            found.append((at, ".".join(map(_column, row)), key, n * math.prod(map(len, row))))
    return [(pattern, key, n) for _, pattern, key, n in sorted(found, key=lambda item: item[0])]


def unfold(pattern: str) -> Iterator[str]:
    """The names that a folded one stands for."""
    columns = []
    for part in pattern.split("."):
        if not _FOLDED.fullmatch(part):
            columns.append([part])
            continue
        numbers: list[str] = []
        for run in part[1:-1].split(","):
            start, _, stop = run.partition("-")
            numbers += map(str, range(int(start), int(stop or start) + 1))
        columns.append(numbers)
    return map(".".join, itertools.product(*columns))


def _merge(members: list[Parts]) -> list[tuple[Parts, ...]]:
    """Names of the same skeleton as products of columns, from the last column to the first."""
    rows: list[tuple[Parts, ...]] = [tuple((part,) for part in parts) for parts in members]
    for c in reversed(range(len(members[0]))):
        if not members[0][c].isdigit():
            continue
        groups: dict[tuple[Parts, ...], list[Parts]] = defaultdict(list)
        for row in rows:
            groups[row[:c] + row[c + 1 :]].append(row[c])
        rows = [
            (*others[:c], tuple(number for column in columns for number in column), *others[c:])
            for others, columns in groups.items()
        ]
    return rows


def _column(column: Parts) -> str:
    """``("0", "1", "2", "5")`` -> ``{0-2,5}``"""
    if len(column) == 1:
        return column[0]
    runs: list[list[int]] = []
    for n in sorted(map(int, column)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'row'?)``, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
