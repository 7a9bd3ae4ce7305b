"""A set of axes of which some cannot be sharded: which are left out, and how they are looked for."""

from __future__ import annotations

from typing import Any

import pytest

from autotp.axes.term import Atom
from autotp.errors import PlanError
from autotp.plan.candidates import Candidate
from autotp.plan.communication import Communication
from autotp.plan.planner import _communicate, _maximal, _maximal_sets, _thinned

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


CLASSES = {key: (candidate,) for key, candidate in CANDIDATES.items()}


def against(*pairs: str) -> dict[Candidate, frozenset[Candidate]]:
    found: dict[Candidate, frozenset[Candidate]] = dict.fromkeys(CANDIDATES.values(), frozenset())
    for a, b in pairs:
        found[CANDIDATES[a]] |= {CANDIDATES[b]}
        found[CANDIDATES[b]] |= {CANDIDATES[a]}
    return found


def test_where_no_set_is_best_in_all_parts_one_is_put_together() -> None:
    """``a`` or ``b``, ``c`` or ``d``: of the sets that were looked at each loses something in one of the two."""
    size = dict(zip("abcde", (10.0, 5.0, 12.0, 6.0, 1.0), strict=True))
    classes = {key: CLASSES[key] for key in "abcde"}

    def bytes_of(chosen: Any) -> float:
        return sum(size[c.key] for c in chosen)

    def thinned(*sets: str) -> list[tuple[float, str]]:
        given = [(bytes_of(c), c) for c in (tuple(CANDIDATES[key] for key in keys) for keys in sets)]
        found = _thinned(given, classes, against("ab", "cd"), bytes_of)
        return [(total, "".join(c.key for c in chosen)) for total, chosen in found]

    assert thinned("bce", "ade") == [(23.0, "ace")]
    assert thinned("ace", "bce", "ade") == [(23.0, "ace")]


def test_a_part_of_another_set_is_none() -> None:
    """Of what was left after axes were taken out: ``b`` could be added to ``ac``."""
    given = ("ac", "abc", "cd", "abc", "d", "ce")
    sets = [(float(len(keys)), tuple(CANDIDATES[key] for key in keys)) for keys in given]
    assert ["".join(c.key for c in chosen) for _, chosen in _maximal(sets)] == ["abc", "cd", "ce"]


class Named(str):
    """A name whose hash is ``salt``'s, as that of any name is another in each process."""

    salt = 0

    def __hash__(self) -> int:
        return hash((Named.salt, ord(self) * 0x9E3779B97F4A7C15))


def test_maximal_sets_come_in_one_order() -> None:
    """Where there are too many, every rank has to look at the same ones."""
    conflicts = against("ab", "cd", "ef", "gh", "ij", "kl", "ac", "eg")
    orders = []
    for Named.salt in range(4):
        classes = {Named(key): members for key, members in CLASSES.items()}
        orders.append([tuple(keys) for keys in _maximal_sets(classes, conflicts)])
    assert len(orders[0]) > 20 and all(order == orders[0] for order in orders)
