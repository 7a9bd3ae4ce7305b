"""Whether two plans shard a model alike, whatever inputs they were traced with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .plan import Collective, Entry, Plan


def first_difference(given: Plan, found: Plan) -> str | None:
    """The first thing in which two plans differ, in words; None where they say the same.

    Notes, patches and bytes on the wire may differ: they depend on the inputs and on versions of the code.
    """
    for name in ("tp", "model", "axes", "weight_bytes"):
        text = _differ(name, getattr(given, name), getattr(found, name), "key")
        if text is not None:
            return text
    text = _differ("entries", tuple(map(_entry, given.entries)), tuple(map(_entry, found.entries)), "name")
    if text is not None:
        return text
    return _differ(
        "collectives",
        tuple(map(_collective, given.collectives)),
        tuple(map(_collective, found.collectives)),
        "where",
    )


def _entry(entry: Entry) -> Entry:
    return replace(entry, note="")


def _collective(collective: Collective) -> Collective:
    return replace(collective, bytes=0)


def _differ(what: str, given: Any, found: Any, key: str) -> str | None:
    if given == found:
        return None
    if not isinstance(given, tuple):
        return f"{what} is {given} in it and {found} here"
    for a, b in zip(given, found, strict=False):
        if getattr(a, key) != getattr(b, key):
            return f"{what}: {getattr(a, key)} in it and {getattr(b, key)} here"
        for slot in a.__dataclass_fields__:
            if getattr(a, slot) != getattr(b, slot):
                return f"{slot} of {getattr(a, key)} is {getattr(a, slot)} in it and {getattr(b, slot)} here"
    longer, where = (given, "here") if len(given) > len(found) else (found, "in it")
    return f"{what}: {getattr(longer[min(len(given), len(found))], key)} is missing {where}"
