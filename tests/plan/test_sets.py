"""A set of axes of which some cannot be sharded: which are left out, and how they are looked for."""

from __future__ import annotations

from typing import Any

import pytest

from autotp.axes.term import Atom
from autotp.errors import PlanError
from autotp.plan.candidates import Candidate
from autotp.plan.communication import Communication
from autotp.plan.planner import _communicate

CANDIDATES = {key: Candidate((Atom(i, 4),), (((0, 2), (2, 4)),), key) for i, key in enumerate("abcdefghijklmnop")}


class Rules:
    """In place of a flow: what goes with what."""

    def __init__(self, *impossible: str) -> None:
        self.impossible = [frozenset(keys) for keys in impossible]
        self.asked: list[str] = []

    def communicate(self, chosen: tuple[Candidate, ...]) -> Communication:
        keys = "".join(candidate.key for candidate in chosen)
        self.asked.append(keys)
        if any(keys_of <= frozenset(keys) for keys_of in self.impossible):
            raise PlanError(keys)
        return Communication(collectives=len(chosen))


def kept(rules: Any, keys: str, dropped: dict[str, None]) -> str:
    found = _communicate(rules, tuple(CANDIDATES[key] for key in keys), [], dropped)
    if found is None:
        return ""
    chosen, communication = found
    assert communication.collectives == len(chosen)  # that of these, not of another attempt
    return "".join(candidate.key for candidate in chosen)


@pytest.mark.parametrize(
    ("impossible", "expected"),
    [
        ((), "abcdefghijklmnop"),
        (("g",), "abcdefhijklmnop"),
        (("a", "p"), "bcdefghijklmno"),
        (("bk",), "abcdefghijlmnop"),  # the first of two that do not go together
        (("bk", "c", "lmn"), "abdefghijlmop"),
        (tuple("abcdefghijklmnop"), ""),
    ],
)
def test_as_many_as_go_together(impossible: tuple[str, ...], expected: str) -> None:
    dropped: dict[str, None] = {}
    assert kept(Rules(*impossible), "abcdefghijklmnop", dropped) == expected
    assert set(dropped) == set("abcdefghijklmnop") - set(expected)


def test_what_was_left_out_before_is_tried_last() -> None:
    dropped: dict[str, None] = {}
    rules = Rules("g", "bk")
    assert kept(rules, "abcdefghijklmnop", dropped) == "abcdefhijlmnop"
    first = len(rules.asked)
    assert first <= 16  # by halves, not one by one
    assert kept(rules, "abefgijk", dropped) == "abefij"
    assert rules.asked[first:] == ["abefgijk", "abefij", "abefijgk", "abefijg", "abefijk"]
    assert kept(rules, "gkm", dropped) == "mk"  # without b, k can be sharded
