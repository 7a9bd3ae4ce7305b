"""The one-line notation of sharding rules, ``"...i, oi, o -> ...o"`` (see `registry` for what it means).

    rule  =  term {"," term} "->" term {"," term}
    term  =  ["..."] {dim}            one term for each tensor, one dim for each of its dims
    dim   =  letter | "(" letter {letter} ")" | "1"

Blanks are free. ``(h d)`` is one dim that holds two axes, h the major one; the sizes of its axes follow from other
dims, or from integer arguments of the op (``sizes``). ``1`` is a dim of size 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autotp.axes.rules.context import LinearKind, OpContext, Rule, is_tensor_node
from autotp.axes.term import CannotUnify, Dim
from autotp.errors import RuleError

_DIM = re.compile(r"[a-zA-Z1]|\([a-zA-Z]+\)")


@dataclass(frozen=True, slots=True)
class Term:
    """One tensor: whether it begins with ``...``, and the letters of each dim (none for ``1``)."""

    dots: bool
    dims: tuple[str, ...]

    @property
    def letters(self) -> str:
        return "".join(self.dims)


def _parse(text: str) -> tuple[list[Term], list[Term]]:
    sides = text.split("->")
    if len(sides) != 2:
        raise RuleError(f"sharding rule {text!r}: expected exactly one '->'")

    def side(part: str) -> list[Term]:
        terms = []
        for raw in part.split(","):
            term = "".join(raw.split())
            rest = term.removeprefix("...")
            dims = _DIM.findall(rest)
            if "".join(dims) != rest:
                raise RuleError(
                    f"sharding rule {text!r}: cannot read the term {raw.strip()!r} (letters, '...' first, and "
                    "'(hd)' for a dim of two axes)"
                )
            terms.append(Term(rest != term, tuple(d.strip("()").replace("1", "") for d in dims)))
        return terms

    left, right = side(sides[0]), side(sides[1])
    known = {c for term in left for c in term.letters}
    for term in right:
        unknown = set(term.letters) - known
        if unknown:
            raise RuleError(f"sharding rule {text!r}: {sorted(unknown)} on the right but not on the left")
        if term.dots and not any(t.dots for t in left):
            raise RuleError(f"sharding rule {text!r}: '...' on the right but not on the left")
    return left, right


def _letters(given: str | Iterable[str]) -> set[str]:
    return set("".join("".join(given).replace(",", " ").split()))


def make_einsum_rule(
    text: str,
    blocked: str | Iterable[str] = "",
    linear: LinearKind = "none",
    of: Iterable[int] = (),
    added: Iterable[int] = (),
    random: bool = False,
    sizes: Mapping[str, str] | None = None,
) -> Rule:
    """The rule function for one line of the notation; operand numbers in `of` and `added` count terms."""
    left, right = _parse(text)
    blocked_letters = _letters(blocked)
    given = dict(sizes or {})
    for what, letters in (("blocked letters", blocked_letters), ("sizes of", set(given))):
        unknown = letters - {c for term in left for c in term.letters}
        if unknown:
            raise RuleError(f"sharding rule {text!r}: {what} {sorted(unknown)} do not occur in it")
    of, added = tuple(of), tuple(added)
    for what, numbers in (("of", of), ("added", added)):
        wrong = [n for n in numbers if not 0 <= n < len(left)]
        if wrong:
            raise RuleError(
                f"sharding rule {text!r}: {what}={wrong} counts terms, of which there are {len(left)}"
            )
    products = any(len(d) > 1 for term in (*left, *right) for d in term.dims) or bool(given)

    def apply(op: OpContext) -> None:
        number, uses, leading = _operands(op, text, left)
        relate = _relate_products if products else _relate
        bound = relate(op, text, uses, blocked_letters, right, given)
        op.outs(
            [
                [*(leading if term.dots else []), *(_product(bound, letters) for letters in term.dims)]
                for term in right
            ]
        )
        if linear != "none":
            op.linear(linear, [number[t] for t in of if t in number])
        op.added(*(number[t] for t in added if t in number))
        if random:
            op.random()

    return apply


_Uses = dict[tuple[int, int], str]  # (operand, dim) → its letters


def _operands(op: OpContext, text: str, left: list[Term]) -> tuple[dict[int, int], _Uses, list[Dim]]:
    """The operand of each term, the letters of each of their dims, and the dims that ``...`` stands for."""
    slots: list[int | None] = []
    for name in op.tensor_names:
        if isinstance(op.args[name], (list, tuple)):
            slots += op.tensors(name)
        else:
            slots.append(op.tensor(name) if op.has(name) else None)
    if len(left) > len(slots):
        raise RuleError(
            f"sharding rule {text!r} of {op.node.target}: it has {len(left)} terms on the left, and the op "
            f"{len(slots)} tensors"
        )
    number: dict[int, int] = {}
    uses: _Uses = {}
    spread: list[tuple[int, int]] = []  # operands with "...", and how many dims it stands for
    for t, term in enumerate(left):
        i = slots[t]
        if i is None:
            continue
        number[t] = i
        extra = op.rank(i) - len(term.dims)
        if extra < 0 or (extra and not term.dots):
            raise RuleError(f"sharding rule {text!r} of {op.node.target}: operand {t} has {op.rank(i)} dims")
        if term.dots:
            spread.append((i, extra))
        uses |= {(i, extra + k): letters for k, letters in enumerate(term.dims)}
    for i in (s for s in slots[len(left) :] if s is not None):
        for d in range(op.rank(i)):
            op.block(i, d)
    width = max((n for _, n in spread), default=0)
    leading = [op.join((i, n - k) for i, n in spread if n >= k) for k in range(width, 0, -1)]
    return number, uses, leading


def _product(bound: Mapping[str, Dim], letters: str) -> Dim:
    return tuple(factor for letter in letters for factor in bound[letter])


def _kept(op: OpContext, uses: _Uses, right: list[Term]) -> set[str]:
    """The letters that are not summed: those of results, and those of what the op writes into."""
    schema = getattr(op.node.target, "_schema", None)
    written = [
        op.tensor(a.name)
        for a in (schema.arguments if schema is not None else ())
        if a.alias_info is not None and a.alias_info.is_write and is_tensor_node(op.args[a.name])
    ]
    letters = {c for (i, _), found in uses.items() if i in written for c in found}
    return letters | {c for term in right for c in term.letters}


def _relate(
    op: OpContext, text: str, uses: _Uses, blocked: set[str], right: list[Term], given: Mapping[str, str]
) -> dict[str, Dim]:
    """The axis of each letter, where a dim holds one axis. Letters that cannot be unified are blocked, one by one."""
    kept = _kept(op, uses, right)
    places: dict[str, list[tuple[int, int]]] = {}
    for place, letter in uses.items():
        if letter:
            places.setdefault(letter, []).append(place)
    bound: dict[str, Dim] = {}
    for letter, found in places.items():
        if letter in blocked:
            for i, d in found:
                op.block(i, d)
            bound[letter] = op.whole(max(op.shape(i)[d] for i, d in found))
        else:
            bound[letter] = op.join(found)
            if letter not in kept and not any(op.is_blocked(i, d) for i, d in found):
                op.contract(bound[letter])
    return bound


def _relate_products(
    op: OpContext, text: str, uses: _Uses, blocked: set[str], right: list[Term], given: Mapping[str, str]
) -> dict[str, Dim]:
    """The axis of each letter, where a dim may hold several. Where one cannot be unified, the whole op is blocked
    (`CannotUnify`)."""
    kept = _kept(op, uses, right)
    size = _sizes(op, text, uses, given)
    bound: dict[str, Dim] = {}
    for letter in blocked & set(size):
        bound[letter] = op.solver.fresh(size[letter], frozen=True)
    for (i, d), letters in uses.items():
        if op.shape(i)[d] == 1:
            continue  # broadcasts
        if op.shape(i)[d] != math.prod(size[c] for c in letters):
            raise RuleError(
                f"sharding rule {text!r} of {op.node.target}: dim {d} of operand {i} has {op.shape(i)[d]} elements, "
                f"({letters}) has {' · '.join(str(size[c]) for c in letters)}"
            )
        for letter, piece in zip(
            letters, op.solver.split(op.dims(i)[d], [size[c] for c in letters]), strict=True
        ):
            if letter not in blocked:
                op.solver.unify(bound.setdefault(letter, piece), piece)
    for (i, d), letters in uses.items():
        if op.shape(i)[d] == 1:
            continue
        if set(letters) <= blocked:
            op.block(i, d)
        else:
            op.consume_as(i, d, _product(bound, letters))
    for letter in size:
        dim = bound.setdefault(letter, ())
        if letter in blocked:
            continue
        if letter not in kept:
            op.contract(dim)
        if letter in given:
            op.local(given[letter], lambda local, dim=dim: local(dim))  # type: ignore[misc]
    dims = [*uses.values(), *(letters for term in right for letters in term.dims)]
    alone = [c for c in sorted(blocked & set(size)) if all(c == letters for letters in dims if c in letters)]
    return bound | {c: op.whole(size[c]) for c in alone}


def _sizes(op: OpContext, text: str, uses: _Uses, given: Mapping[str, str]) -> dict[str, int]:
    """The size of each letter: of an argument, of a dim of its own, or what is left of a product."""
    size: dict[str, int] = {}
    for letter, name in given.items():
        value = op.args.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RuleError(
                f"sharding rule {text!r} of {op.node.target}: the size of {letter!r} is to be its argument {name!r}, "
                f"which is {value!r}"
            )
        size[letter] = int(value)
    for (i, d), letters in uses.items():
        if len(letters) == 1:
            size[letters] = max(size.get(letters, 1), op.shape(i)[d])
    for (i, d), letters in uses.items():
        unknown = [c for c in letters if c not in size]
        known = math.prod(size[c] for c in letters if c in size)
        if len(unknown) == 1 and op.shape(i)[d] % known == 0:
            size[unknown[0]] = op.shape(i)[d] // known
    missing = sorted({c for letters in uses.values() for c in letters} - set(size))
    if missing:
        raise RuleError(
            f"sharding rule {text!r} of {op.node.target}: nothing says how large {missing} are; name the integer "
            "argument that does, as in sizes={'h': 'num_heads'}"
        )
    return size


__all__ = ["CannotUnify", "Term", "make_einsum_rule"]
