"""Letters for axes, for people to read. Nothing depends on them.

H heads, K kv heads, G query heads of each, D head size, F feed-forward, E experts, M model, V vocabulary,
A any other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from ..axes.analysis import Analysis
from ..axes.term import Atom, Cat, Dim
from ..trace.graph import Call
from ..trace.provenance import Attr, expression
from .candidates import atoms_of, axis_keys

#: Words in the names of attributes, the first that occurs wins.
WORDS = (
    ("head_dim", "D"),
    ("head_size", "D"),
    ("d_k", "D"),
    ("group", "G"),
    ("kv", "K"),
    ("key_value", "K"),
    ("head", "H"),
    ("expert", "E"),
    ("vocab", "V"),
    ("inter", "F"),
    ("inner", "F"),
    ("ff", "F"),
    ("rank", "R"),
    ("state", "S"),
)


def letters(analysis: Analysis, sharded: frozenset[Atom]) -> Mapping[Atom, str]:
    """A name for each axis of a parameter.

    Sharded axes have names of their own, but corresponding axes of repeated layers share one. Other axes have
    just the letter of what they are.
    """
    keys = axis_keys(analysis)
    kinds = _kinds(analysis, keys)
    own = {keys[atom] for atom in sharded if atom in keys}
    names: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for key in dict.fromkeys(keys.values()):
        letter = kinds.get(key, "A")
        if key in own:
            taken[letter] += 1
            n = taken[letter]
            names[key] = letter + ("" if n == 1 else chr(ord("a") + n - 1) if n <= 26 else f"_{n}_")
        else:
            names[key] = letter
    return {atom: names[key] for atom, key in keys.items()}


def _kinds(analysis: Analysis, keys: Mapping[Atom, str]) -> dict[str, str]:
    """The letter of each axis, by its key."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for atom, found in _hints(analysis).items():
        if atom in keys:
            votes[keys[atom]].update(found)
    kinds = {key: min(c, key=lambda letter: (-c[letter], letter)) for key, c in votes.items()}
    values = [
        analysis.dims[n][0] for fqn, n in analysis.trace.params.items() if fqn not in analysis.trace.is_buffer
    ]
    sizes: Counter[int] = Counter(dim[0].size for dims in values for dim in dims if len(dim) == 1)
    for node, info in analysis.ops.items():
        if "embedding" in str(node.target):
            for atom in atoms_of(info.contracted):
                kinds.setdefault(keys.get(atom, ""), "V")
    if sizes:
        width = sizes.most_common(1)[0][0]  # of most weights
        for dims in values:
            for dim in dims:
                if len(dim) == 1 and isinstance(dim[0], Atom) and dim[0].size == width:
                    kinds.setdefault(keys[dim[0]], "M")
    for dims in values:
        if len(dims) == 3 and len(dims[0]) == 1 and isinstance(dims[0][0], Atom):  # weights stacked for bmm
            kinds.setdefault(keys[dims[0][0]], "E")
        for dim in dims:
            _structure(dim, keys, kinds)
    return kinds


def _structure(dim: Dim, keys: Mapping[Atom, str], kinds: dict[str, str]) -> None:
    """What stands where in a product: K·G·D, H·D; an axis that is a whole dim by itself is a width."""
    if len(dim) == 1 and isinstance(dim[0], Cat):
        for part in dim[0].parts:
            _structure(part, keys, kinds)
        return
    atoms = [factor for factor in dim if isinstance(factor, Atom)]
    last = dim[-1] if dim else None
    inner = list(atoms_of([(last,)])) if isinstance(last, Cat) else []
    if len(dim) == 1 and atoms:
        kinds.setdefault(keys[atoms[0]], "F")
    elif len(dim) == 2 and atoms:
        kinds.setdefault(keys[atoms[0]], "H")
        for atom in [*atoms[1:], *inner]:
            kinds.setdefault(keys[atom], "D")
    elif len(dim) == 3 and len(atoms) >= 2:
        for atom, letter in zip(atoms, "KGD", strict=False):
            if kinds.get(keys[atom], "H") == "H":
                kinds[keys[atom]] = letter
        for atom in inner:
            kinds.setdefault(keys[atom], "D")


def _hints(analysis: Analysis) -> Mapping[Atom, Counter[str]]:
    """Attributes that size arguments were read from, for the axes that these arguments are the size of."""
    found: dict[Atom, Counter[str]] = defaultdict(Counter)
    for node, info in analysis.ops.items():
        call: Call | None = node.meta.get("call")
        if call is None:
            continue
        for _, value in call.ints:
            expr = expression(value)
            letter = _letter(expr) if isinstance(expr, Attr) else None
            if letter is not None:
                for dims in info.out:
                    for dim in dims:
                        if len(dim) == 1 and isinstance(dim[0], Atom) and dim[0].size == value:
                            found[dim[0]][letter] += 1
    return found


def _letter(expr: Attr) -> str | None:
    word = next((str(p) for p in reversed(expr.path) if isinstance(p, str)), "")
    return next((letter for part, letter in WORDS if part in word), None)
