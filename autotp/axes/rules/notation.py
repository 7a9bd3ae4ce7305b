"""The one-line notation of sharding rules, ``"...i, oi, o -> ...o"`` (see `registry` for what it means)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from autotp.axes.rules.context import LinearKind, OpContext, Rule
from autotp.axes.term import Dim
from autotp.errors import RuleError

_TERM = re.compile(r"(?P<dots>\.\.\.)?(?P<letters>[a-zA-Z]*)")


def _parse(text: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    sides = text.split("->")
    if len(sides) != 2:
        raise RuleError(f"sharding rule {text!r}: expected exactly one '->'")

    def side(part: str) -> list[tuple[bool, str]]:
        terms = []
        for raw in part.split(","):
            match = _TERM.fullmatch("".join(raw.split()))
            if match is None:
                raise RuleError(
                    f"sharding rule {text!r}: cannot read the term {raw.strip()!r} (letters, '...' first)"
                )
            terms.append((match["dots"] is not None, match["letters"]))
        return terms

    left, right = side(sides[0]), side(sides[1])
    known = {c for _, letters in left for c in letters}
    for dots, letters in right:
        unknown = set(letters) - known
        if unknown:
            raise RuleError(f"sharding rule {text!r}: {sorted(unknown)} on the right but not on the left")
        if dots and not any(d for d, _ in left):
            raise RuleError(f"sharding rule {text!r}: '...' on the right but not on the left")
    return left, right


def make_einsum_rule(
    text: str,
    blocked: str = "",
    linear: LinearKind = "none",
    of: Iterable[int] = (),
    added: Iterable[int] = (),
    random: bool = False,
) -> Rule:
    """The rule function for one line of the notation; operand numbers in `of` and `added` count terms."""
    left, right = _parse(text)
    blocked_letters = set("".join(blocked.replace(",", " ").split()))
    unknown = blocked_letters - {c for _, letters in left for c in letters}
    if unknown:
        raise RuleError(f"sharding rule {text!r}: blocked letters {sorted(unknown)} do not occur in it")
    kept = {c for _, letters in right for c in letters}
    of, added = tuple(of), tuple(added)

    def apply(op: OpContext) -> None:
        slots: list[int | None] = []
        for name in op.tensor_names:
            if isinstance(op.args[name], (list, tuple)):
                slots += op.tensors(name)
            else:
                slots.append(op.tensor(name) if op.has(name) else None)
        number: dict[int, int] = {}
        uses: dict[str, list[tuple[int, int]]] = {}
        spread: list[tuple[int, int]] = []  # operands with "...", and how many dims it stands for
        for term, (dots, letters) in enumerate(left):
            if term >= len(slots) or slots[term] is None:
                continue
            i = slots[term]
            assert i is not None
            number[term] = i
            extra = op.rank(i) - len(letters)
            if extra < 0 or (extra and not dots):
                raise RuleError(
                    f"sharding rule {text!r} of {op.node.target}: operand {term} has {op.rank(i)} dims"
                )
            if dots:
                spread.append((i, extra))
            for k, letter in enumerate(letters):
                uses.setdefault(letter, []).append((i, extra + k))
        for i in (s for s in slots[len(left) :] if s is not None):
            for d in range(op.rank(i)):
                op.block(i, d)
        bound: dict[str, Dim] = {}
        for letter, places in uses.items():
            if letter in blocked_letters:
                for i, d in places:
                    op.block(i, d)
                size = max(op.shape(i)[d] for i, d in places)
                bound[letter] = op.whole(size)
            else:
                bound[letter] = op.join(places)
                if letter not in kept and not any(op.is_blocked(i, d) for i, d in places):
                    op.contract(bound[letter])
        width = max((n for _, n in spread), default=0)
        leading = [op.join((i, n - k) for i, n in spread if n >= k) for k in range(width, 0, -1)]
        op.outs([[*(leading if dots else []), *(bound[c] for c in letters)] for dots, letters in right])
        if linear != "none":
            op.linear(linear, [number[t] for t in of if t in number])
        op.added(*(number[t] for t in added if t in number))
        if random:
            op.random()

    return apply
