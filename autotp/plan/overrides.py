"""What a user fixes beforehand, checked against the analysis before anything is touched.

A YAML file (or a mapping) of glob patterns over the names of modules or parameters::

    modules:
      "model.layers.*.mlp.down_proj": row
      lm_head: replicate

``column``: the output dim of each matched weight is sharded; ``row``: its input dim; ``vocab``: the
vocabulary of an embedding; ``shard``: any dim; ``shard(0)``: that dim (of stacked experts, the experts themselves:
expert parallelism); ``replicate``: none, and as an axis is sharded everywhere or
nowhere, no other parameter that holds the same axis either. A whole plan, as `Plan.to_yaml` writes it, is
taken too: then the model is sharded exactly so, or refused.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..axes.analysis import Analysis
from ..axes.term import Atom
from ..errors import PlanError
from ..trace.fold import Folds
from .candidates import Candidate, atoms_of, candidates
from .document import Document, read
from .names import did_you_mean, unfold
from .obstacles import Obstacles
from .placement import Uses
from .plan import PLACEMENTS, Entry, Plan
from .same import first_difference

Allow = Callable[[Candidate], bool]

WHICH = {"column": "output axis", "row": "input axis", "vocab": "vocabulary", "shard": "axes"}


@dataclass(frozen=True, slots=True)
class Overrides:
    """Placements by pattern, or a whole plan; and the document that they were read from."""

    modules: Mapping[str, str]
    plan: Plan | None
    document: Document

    @classmethod
    def load(cls, given: Plan | str | os.PathLike[str] | Mapping[str, Any] | None) -> Overrides:
        """Read overrides from what a user may give: a plan, a file, a mapping, or nothing.

        Raises:
            PlanError: naming the line and the key.
        """
        if given is None:
            return cls({}, None, Document({}, "no overrides"))
        if isinstance(given, Plan):
            return cls({}, given, Document({}, "the given plan"))
        document = Document(given, "the given overrides") if isinstance(given, Mapping) else read(given)
        if "autotp" in document.value or "axes" in document.value:
            return cls({}, Plan.from_document(document), document)
        for key, value in document.value.items():
            if key != "modules" and value in PLACEMENTS:
                raise document.error((key,), f"placements go under 'modules:', and {key!r}: {value} does not")
        document.only(["modules"])
        modules = document.value.get("modules")
        if not isinstance(modules, Mapping):
            raise document.error(
                ("modules",), f"modules should map patterns to placements, and is {modules!r}"
            )
        for pattern, word in modules.items():
            if word not in PLACEMENTS and dim_of(str(word)) is None:
                raise document.error(
                    ("modules", pattern),
                    f"{pattern!r}: {word!r} is no placement{did_you_mean(str(word), PLACEMENTS)}; "
                    f"there are {', '.join(PLACEMENTS)}, and shard(0) for one dim",
                )
        return cls(dict(modules), None, document)

    def splits(self, model: nn.Module, folds: Folds) -> bool:
        """Whether a pattern tells layers apart that are folded into one: then trace the model unfolded."""
        stands = {name: fqn for fqn in folds.stands for name in folds.originals(fqn)}
        for pattern in self.modules:
            matched = set(self._parameters(model, pattern))
            for name in matched:
                prefix = name
                while prefix and prefix not in stands:
                    prefix = prefix.rpartition(".")[0]
                if (
                    prefix
                    and not {o + name[len(prefix) :] for o in folds.originals(stands[prefix])} <= matched
                ):
                    return True
        return False

    def apply(
        self, analysis: Analysis, folds: Folds, model: nn.Module, tp: int
    ) -> tuple[Allow, list[frozenset[Atom]]]:
        """For the planner: which candidates are allowed; and sets of axes, of each of which one is required.

        Raises:
            PlanError: an override matches nothing or cannot hold; with the op and the source line in the way.
        """
        if self.plan is not None:
            return self._apply_plan(self.plan, analysis, folds, model, tp)
        if not self.modules:
            return (lambda candidate: True), []
        return _Check(self, analysis, folds, model, tp).run()

    def check(self, plan: Plan) -> None:
        """Whether the planner did what was asked.

        Raises:
            PlanError: it did not; with the first difference.
        """
        if self.plan is not None:
            difference = first_difference(self.plan, plan)
            if difference is not None:
                raise PlanError(
                    f"{self.document.name} is not the plan of this model: {difference}. "
                    "Was it made for another model, other inputs, or by another version of autotp?"
                )
        placed = {name: entry.placement for entry in plan.entries for name in unfold(entry.name)}
        split = {
            (name, d): any(local[d] != n for local in entry.local_shapes)
            for entry in plan.entries
            for name in unfold(entry.name)
            for d, n in enumerate(entry.global_shape)
        }
        for pattern, word in self.modules.items():
            found = {n: p for n, p in placed.items() if fnmatch_any(pattern, [n, *_prefixes(n)])}
            if (dim := dim_of(word)) is not None:
                found = {n: p if split.get((n, dim)) else "replicate" for n, p in found.items()}
            if word == "replicate":
                wrong = {n: p for n, p in found.items() if p != word}
            else:
                wrong = {} if set(found.values()) - {"replicate"} else found
            for name, placement in wrong.items():
                raise self.document.error(
                    ("modules", pattern),
                    f"{pattern!r}: {word} cannot hold: the best that can be done is {name}: {placement}",
                )

    def _apply_plan(
        self, plan: Plan, analysis: Analysis, folds: Folds, model: nn.Module, tp: int
    ) -> tuple[Allow, list[frozenset[Atom]]]:
        if plan.model != type(model).__name__:
            raise PlanError(
                f"{self.document.name} is a plan of {plan.model}, and this is a {type(model).__name__}"
            )
        if plan.tp != tp:
            raise PlanError(f"{self.document.name} is a plan for tp={plan.tp}, and tp={tp} is asked for")
        found = candidates(analysis, tp)
        known = {candidate.key for candidate in found}
        for i, axis in enumerate(plan.axes):
            if axis.key not in known:
                raise self.document.error(
                    ("axes", i, "key"),
                    f"this model has no axis {axis.key!r} to shard{did_you_mean(axis.key, known)}",
                )
        keys = {axis.key for axis in plan.axes}
        entries = {name: entry for entry in plan.entries for name in unfold(entry.name)}
        held: dict[Atom, list[tuple[Entry | None, int]]] = defaultdict(list)
        for fqn, node in analysis.trace.params.items():
            if fqn not in analysis.trace.is_buffer:
                entry = entries.get(folds.originals(fqn)[0])
                for d, dim in enumerate(analysis.dims[node][0]):
                    for atom in atoms_of([dim]):
                        held[atom].append((entry, d))

        def asked(candidate: Candidate) -> bool:
            """One of the plan's axes: by its key, and (layers of a Sequential share keys) by the dims that hold it."""
            dims = [at for atom in candidate.atoms for at in held[atom]]
            return candidate.key in keys and all(
                e is not None
                and d < len(e.global_shape)
                and any(s[d] < e.global_shape[d] for s in e.local_shapes)
                for e, d in dims
            )

        return asked, [frozenset(candidate.atoms) for candidate in found if asked(candidate)]

    def _parameters(self, model: nn.Module, pattern: str) -> list[str]:
        """The parameters of the modules that a pattern matches, and those that it matches themselves."""
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        modules = fnmatch_any(pattern, names)
        matched = fnmatch_any(pattern, parameters)
        if not modules and not matched:
            known = dict.fromkeys(
                [*names, *(re.sub(r"(?<![^.])\d+(?![^.])", "*", n) for n in names), *parameters]
            )
            raise self.document.error(
                ("modules", pattern),
                f"{pattern!r} matches no module or parameter{did_you_mean(pattern, known)}",
            )
        inside = set(modules)
        found = [
            n for n in parameters if n in set(matched) or any(prefix in inside for prefix in _prefixes(n))
        ]
        if not found:
            raise self.document.error(
                ("modules", pattern),
                f"{pattern!r} matches only modules without parameters, {modules[0]!r} for one",
            )
        return found


def fnmatch_any(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob pattern matches; it may be folded, as the table prints it: ``h.{0-11}.attn``."""
    names = list(names)
    return list(dict.fromkeys(n for glob in unfold(pattern) for n in names if fnmatch.fnmatchcase(n, glob)))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


@dataclass(frozen=True, slots=True)
class _Wish:
    """One parameter of which one of these candidates is to be sharded, and the pattern that says so."""

    pattern: str
    word: str
    fqn: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        return f"{self.fqn} {self.word} ({self.pattern!r})"


class _Check:
    """Overrides by pattern against the analysis of one model."""

    def __init__(
        self, overrides: Overrides, analysis: Analysis, folds: Folds, model: nn.Module, tp: int
    ) -> None:
        self.overrides = overrides
        self.analysis = analysis
        self.folds = folds
        self.model = model
        self.uses = Uses(analysis)
        self.obstacles = Obstacles(analysis, tp)
        trace = analysis.trace
        self.stands = {
            name: trace.aliases.get(fqn, fqn)
            for fqn in [*trace.params, *trace.aliases]
            for name in folds.originals(fqn)
        }

    def run(self) -> tuple[Allow, list[frozenset[Atom]]]:
        whole: dict[Atom, tuple[str, str]] = {}  # axis → the pattern and the parameter that keep it whole
        wishes: list[_Wish] = []
        for pattern, word in self.overrides.modules.items():
            fqns = self.parameters(pattern)
            if word == "replicate":
                for fqn in fqns:
                    for atom in atoms_of(self.analysis.dims[self.analysis.trace.params[fqn]][0]):
                        whole.setdefault(atom, (pattern, fqn))
        for pattern, word in self.overrides.modules.items():
            if word != "replicate":
                wishes += self.wishes(pattern, word, whole)
        self.exclusive(wishes)
        require = [frozenset(a for c in wish.candidates for a in c.atoms) for wish in wishes]
        return (lambda candidate: not whole.keys() & set(candidate.atoms)), list(dict.fromkeys(require))

    def error(self, pattern: str, text: str) -> PlanError:
        return self.overrides.document.error(("modules", pattern), text)

    def parameters(self, pattern: str) -> list[str]:
        """The parameters of the skeleton that stand for those that a pattern matches."""
        names = self.overrides._parameters(self.model, pattern)
        found = list(dict.fromkeys(self.stands[name] for name in names))
        matched = set(names)
        for fqn in found:
            originals = self.folds.originals(fqn)
            if len(originals) > 1 and matched & set(originals) != set(originals):
                some = f"{len(matched & set(originals))} of {len(originals)}"
                raise self.error(pattern, f"{pattern!r} matches {some} layers that are planned as one")
        return found

    def wishes(self, pattern: str, word: str, whole: Mapping[Atom, tuple[str, str]]) -> list[_Wish]:
        found: list[_Wish] = []
        fqns = self.parameters(pattern)
        for fqn in fqns:
            node = self.analysis.trace.params[fqn]
            roles = list(self.uses.roles(node))
            atoms = frozenset(a for role, held, _ in roles if role == word for a in held)
            dims = self.analysis.dims[node][0]
            dim = dim_of(word)
            if dim is not None and dim >= len(dims):
                continue
            if dim is not None:
                atoms = frozenset(atoms_of(dims[dim : dim + 1]))
            elif word == "shard":
                atoms = frozenset(atoms_of(dims))
            elif not any(role == word for role, _, _ in roles):
                continue
            able = self.obstacles.shardable(atoms)
            if not able:
                reason = self.obstacles.why(node, atoms)
                others = self.obstacles.shardable(set(atoms_of(dims)) - atoms) if dim is not None else ()
                if others:
                    at = [d for d in range(len(dims)) if any(set(c.atoms) & set(atoms_of([dims[d]])) for c in others)]
                    reason += f". What can be sharded of it is {' or '.join(f'shard({d})' for d in at)}"
                raise self.error(pattern, f"{self.name(fqn)} cannot be {_words(word)}: {reason}")
            free = tuple(c for c in able if not whole.keys() & set(c.atoms))
            if not free:
                other, holder = next(whole[a] for c in able for a in c.atoms if a in whole)
                raise self.error(
                    pattern,
                    f"{self.name(fqn)} cannot be {_words(word)}: "
                    f"{self.name(holder)} also holds its {WHICH.get(word, 'axis')}, "
                    f"and {other!r}: replicate keeps it whole",
                )
            found.append(_Wish(pattern, word, self.name(fqn), free))
        if not found:
            raise self.error(pattern, f"{pattern!r}: {word} cannot hold: {self.no_role(fqns, word)}")
        return found

    def no_role(self, fqns: list[str], word: str) -> str:
        """Why none of these parameters could have a placement: how the first is used."""
        node = self.analysis.trace.params[fqns[0]]
        if dim_of(word) is not None:
            return f"{self.name(fqns[0])} has {len(self.analysis.dims[node][0])} dims"
        users = [f"{_op(user)} in {self.analysis.trace.where(user)}" for user, _ in self.uses.ends(node)]
        wanted = "looked up in" if word == "vocab" else "multiplied with"
        return f"{self.name(fqns[0])} is not {wanted}, it is used by {users[0] if users else 'no op'}"

    def exclusive(self, wishes: list[_Wish]) -> None:
        """Raise where two wishes cannot both hold, whichever axes are taken for them."""
        for i, one in enumerate(wishes):
            for other in wishes[:i]:
                pairs = [(a, b) for a in one.candidates for b in other.candidates]
                if all(self.obstacles.conflict(a, b) for a, b in pairs):
                    where = self.obstacles.meeting(*pairs[0])
                    raise self.error(one.pattern, f"{one} and {other} exclude each other: {where}")

    def name(self, fqn: str) -> str:
        return self.folds.originals(fqn)[0]


def dim_of(word: str) -> int | None:
    """Which dim ``shard(0)`` names; None for other words."""
    found = re.fullmatch(r"shard\((\d+)\)", word)
    return int(found[1]) if found else None


def _words(word: str) -> str:
    dim = dim_of(word)
    if dim is not None:
        return f"sharded along dim {dim}"
    return "sharded" if word == "shard" else f"{word}-parallel"


def _op(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
