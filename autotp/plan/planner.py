"""The choice of axes.

The mathematical program. Let *S* be a set of candidates (`candidates.candidates`) of which no two conflict
(`candidates.conflicts`), corresponding axes of repeated layers in or out together. Among the sets that

* are *maximal*: no further candidate could be added, and
* shard at least ``1 - TOLERANCE`` of the weight bytes that the best set shards,

find the one of least communication (`reductions.Flow.communicate`: bytes first, then number of
collectives), then of most sharded bytes. The tolerance lets the hidden dim lose, which touches every last
norm weight but needs a sum at each of them. From the winner, axes are taken out that shard less than ``TRIFLE`` of the
weight bytes and are gathered for it (the router of a mixture of experts).

All maximal sets are enumerated (maximal cliques of the complement graph, Bron and Kerbosch 1973); the
communication of each is an exact minimum cut. Sets whose axes turn out not to be shardable together
(`PlanError` of the cut) lose those that cannot be sharded even alone, or drop out.

Where more than `MOST_SETS` sets are within the tolerance, they are thinned first: without the axes that conflict
with most others (the hidden dim, in or out), the conflicts fall apart into parts (an attention, an MLP), and in
each part a set has to shard nearly the most bytes that any set shards there. A plan says so (``proven`` is False).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from ..axes.analysis import Analysis
from ..axes.term import Atom, Dim
from ..errors import PlanError
from .candidates import Candidate, atoms_of, candidates, conflicts, sharded_share
from .communication import ANYWHERE, Communication, Places
from .price import nbytes
from .reductions import Flow
from .repair import Refusals, repaired

#: Share of the sharded weight bytes that may be given up for less communication.
TOLERANCE = 0.1
#: Share of the weight bytes that an axis has to shard to be worth a gather.
TRIFLE = 0.001
#: How many sets of axes are compared by their communication; of more, those that lose bytes in one part of the model
#: go first.
MOST_SETS = 64
#: How many maximal sets are enumerated.
MOST_ENUMERATED = 1 << 14
#: How many maximal sets, those of most bytes, are looked through for axes that refuse one another.
MOST_REPAIRED = 2048
#: How many sets times ops are cut exactly, so that a large graph is not compared for minutes.
MOST_VISITS = 20_000
#: The tolerance within one such part.
PART_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Choice:
    """The planner's answer.

    Attributes:
        candidates: the axes that are sharded.
        communication: where and how much is communicated.
        sharded_bytes: weight bytes that are sharded; ``weight_bytes``: all of them.
        proven: every maximal set was compared (False where there were too many).
    """

    candidates: tuple[Candidate, ...]
    communication: Communication
    sharded_bytes: float
    weight_bytes: int
    proven: bool

    @property
    def ranges(self) -> dict[Atom, tuple[tuple[int, int], ...]]:
        return {a: r for c in self.candidates for a, r in zip(c.atoms, c.ranges, strict=True)}


def choose(
    analysis: Analysis,
    tp: int,
    *,
    places: Places = ANYWHERE,
    allow: Callable[[Candidate], bool] = lambda candidate: True,
    require: Iterable[frozenset[Atom]] = (),
    tolerance: float = TOLERANCE,
) -> Choice:
    """Choose the axes to shard over ``tp`` ranks.

    Args:
        places: which collectives can be put where.
        allow: candidates for which it is False are left out (an override, or one that could not be rewritten).
        require: of each set, one axis has to be sharded (an override).

    Raises:
        PlanError: no set of axes meets ``require``.
    """
    flow = Flow(analysis, places)
    found = [c for c in candidates(analysis, tp) if allow(c)]
    own, against = conflicts(analysis, found)
    found = [c for c in found if c not in own]
    classes = _classes(found, against)
    weights = Weights(analysis)
    total, bytes_of = weights.total, weights.sharded

    required = tuple(require)
    holders_of = [
        [key for key, members in classes.items() if any(a in wanted for c in members for a in c.atoms)]
        for wanted in required
    ]
    if not all(holders_of):
        raise PlanError(_unmet(False, []))
    sets: list[tuple[float, tuple[Candidate, ...]]] = []
    maximal = iter(_maximal_sets(_beside(holders_of, classes, against), against))
    for keys in itertools.islice(maximal, MOST_ENUMERATED):
        chosen = tuple(c for key in sorted(keys) for c in classes[key])
        atoms = {a for c in chosen for a in c.atoms}
        if all(atoms & wanted for wanted in required):
            sets.append((bytes_of(chosen), chosen))
    cut_off = next(maximal, None) is not None
    sets.sort(key=_by_bytes)
    cut_off |= len(sets) > MOST_REPAIRED
    sets = _repaired(sets[:MOST_REPAIRED], classes, Refusals(analysis, flow), weights)
    if sets and sum(size >= (1 - tolerance) * sets[0][0] for size, _ in sets) > MOST_SETS:
        sets, cut_off = _thinned(sets, classes, against, bytes_of), True
    if required and not sets:
        raise PlanError(_unmet(cut_off, []))
    sets = _possible(flow, sets, classes, tolerance, bytes_of)
    best: Choice | None = None
    failures: list[str] = []
    dropped: dict[str, None] = {}
    most = 0.0
    bar = (
        (1 - tolerance) * sets[0][0] if sets else 0.0
    )  # what shards as much can no longer fall out of the tolerance
    for i, (size, chosen) in enumerate(_promising(flow, sets or [(0.0, ())], tolerance)):
        if i >= min(8 * MOST_SETS, max(MOST_SETS // 2, MOST_VISITS // max(len(analysis.ops), 1))):
            cut_off = True
            break
        if size < (1 - tolerance) * most:
            continue
        if best is not None and best.sharded_bytes >= bar:
            limit = best.communication.cost_bytes
            if flow.least(chosen) > limit or flow.exceeds(chosen, limit):
                continue
        feasible = _communicate(flow, chosen, failures, dropped)
        if feasible is None:
            continue
        kept, communication = feasible
        if not all(wanted & {a for c in kept for a in c.atoms} for wanted in required):
            continue
        size = bytes_of(kept)
        choice = Choice(kept, communication, size, total, True)
        if size > most:
            most = size
            if best is not None and best.sharded_bytes < (1 - tolerance) * most:
                best = None
        if size >= (1 - tolerance) * most and (best is None or _rank(choice) < _rank(best)):
            best = choice
    if best is None and required:
        raise PlanError(_unmet(cut_off, failures))
    if best is None:
        best = Choice((), Communication(), 0.0, total, True)
    best = _without_trifles(best, classes, required, flow, bytes_of)
    return Choice(best.candidates, best.communication, best.sharded_bytes, total, not cut_off)


def _by_bytes(found: tuple[float, tuple[Candidate, ...]]) -> tuple[float, list[str]]:
    """Most bytes first."""
    size, chosen = found
    return -size, [c.key for c in chosen]


def _unmet(cut_off: bool, failures: Sequence[str]) -> str:
    looked = " that were looked at (there are too many to look at all of them)" if cut_off else ""
    why = f": {failures[0]}" if failures else ""
    return f"no set of axes can be sharded as the overrides ask{looked}{why}"


def _beside(
    required: Iterable[list[str]],
    classes: dict[str, tuple[Candidate, ...]],
    against: Mapping[Candidate, frozenset[Candidate]],
) -> dict[str, tuple[Candidate, ...]]:
    """The classes that can be in a set with one of each of ``required``: without those that conflict with one that has
    to be."""
    taken = {c for keys in required if len(keys) == 1 for c in classes[keys[0]]}
    return {key: members for key, members in classes.items() if not any(against[c] & taken for c in members)}


def _repaired(
    sets: list[tuple[float, tuple[Candidate, ...]]],
    classes: Mapping[str, tuple[Candidate, ...]],
    refusals: Refusals,
    weights: Weights,
) -> list[tuple[float, tuple[Candidate, ...]]]:
    """The sets without the axes that would be refused in them, those that are maximal then, by their bytes."""
    home = {c: key for key, members in classes.items() for c in members}
    axes = {key: frozenset(a for c in members for a in c.atoms) for key, members in classes.items()}
    found: dict[tuple[str, ...], tuple[float, tuple[Candidate, ...]]] = {}
    for size, chosen in sets:
        keys = {home[c] for c in chosen}
        kept = tuple(repaired(keys, axes, refusals, weights.lost))
        if len(kept) == len(keys):
            found[kept] = size, chosen
        elif kept not in found:
            rest = tuple(c for key in kept for c in classes[key])
            found[kept] = weights.sharded(rest), rest
    return _maximal(found.values())


def _maximal(
    sets: Iterable[tuple[float, tuple[Candidate, ...]]],
) -> list[tuple[float, tuple[Candidate, ...]]]:
    """By their bytes, without those that are part of another: what was taken out of them stood in nothing else's way.
    """
    number: dict[Candidate, int] = {}
    kept: dict[int, tuple[float, tuple[Candidate, ...]]] = {}
    for size, chosen in sorted(sets, key=lambda found: (-len(found[1]), *_by_bytes(found))):
        members = sum(1 << number.setdefault(c, len(number)) for c in chosen)
        if not any(members & other == members for other in kept):
            kept[members] = size, chosen
    return sorted(kept.values(), key=_by_bytes)


def _thinned(
    sets: list[tuple[float, tuple[Candidate, ...]]],
    classes: Mapping[str, tuple[Candidate, ...]],
    against: Mapping[Candidate, frozenset[Candidate]],
    bytes_of: Callable[[Iterable[Candidate]], float],
) -> list[tuple[float, tuple[Candidate, ...]]]:
    """The sets that lose next to no bytes in any part of the model against the best set there; where each of them loses
    some, those put together of the best that any has in each part."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(classes)
    home = {c: key for key, members in classes.items() for c in members}
    graph.add_edges_from(
        (home[c], home[o]) for c in home for o in against[c] if o in home and home[o] != home[c]
    )
    hubs = {key for key, degree in graph.degree if 2 * degree > len(classes)}
    graph.remove_nodes_from(hubs)
    part_of = {key: i for i, part in enumerate(nx.connected_components(graph)) for key in part}
    best: dict[tuple[frozenset[str], int], float] = defaultdict(float)
    best_keys: dict[frozenset[str], dict[int, set[str]]] = defaultdict(dict)
    described = []
    for size, chosen in sets:
        members: dict[int, list[Candidate]] = defaultdict(list)
        for candidate in chosen:
            if home[candidate] in part_of:
                members[part_of[home[candidate]]].append(candidate)
        branch = frozenset(home[c] for c in chosen if home[c] in hubs)
        sizes = {part: bytes_of(members[part]) for part in set(part_of.values())}
        for part, own in sizes.items():
            if own > best[branch, part]:
                best[branch, part] = own
                best_keys[branch][part] = {home[c] for c in members[part]}
        described.append((size, chosen, branch, sizes))
    near = [
        (size, chosen)
        for size, chosen, branch, sizes in described
        if all(own >= (1 - PART_TOLERANCE) * best[branch, part] for part, own in sizes.items())
    ]
    if near:
        return near
    together = [
        tuple(c for key in sorted(branch.union(*parts.values())) for c in classes[key])
        for branch, parts in best_keys.items()
    ]
    return sorted(((bytes_of(chosen), chosen) for chosen in together), key=_by_bytes)


def _possible(
    flow: Flow,
    sets: list[tuple[float, tuple[Candidate, ...]]],
    classes: Mapping[str, tuple[Candidate, ...]],
    tolerance: float,
    bytes_of: Callable[[Iterable[Candidate]], float],
) -> list[tuple[float, tuple[Candidate, ...]]]:
    """The sets as they are where the first that would be solved can be sharded; else without the axes that cannot be
    sharded even alone, those that are maximal then."""

    def fails(chosen: tuple[Candidate, ...]) -> bool:
        try:
            flow.communicate(chosen)
        except PlanError:
            return True
        return False

    if not sets or not fails(next(iter(_promising(flow, sets, tolerance)))[1]):
        return sets
    alone = {c for members in classes.values() if fails(members) for c in members}
    kept = {tuple(c for c in chosen if c not in alone): None for _, chosen in sets}
    return _maximal((bytes_of(k), k) for k in kept)


def _promising(
    flow: Flow, sets: list[tuple[float, tuple[Candidate, ...]]], tolerance: float
) -> Iterable[tuple[float, tuple[Candidate, ...]]]:
    """The sets in an order in which few have to be solved: those near the most bytes first, by their lower bounds."""
    bar = (1 - tolerance) * sets[0][0]
    near = [s for s in sets if s[0] >= bar]
    yield from sorted(near, key=lambda s: flow.least(s[1]))
    yield from sets[len(near) :]


def _rank(choice: Choice) -> tuple[int, int, float]:
    return choice.communication.cost_bytes, choice.communication.collectives, -choice.sharded_bytes


def _without_trifles(
    choice: Choice,
    classes: Mapping[str, tuple[Candidate, ...]],
    required: Iterable[frozenset[Atom]],
    flow: Flow,
    bytes_of: Callable[[Iterable[Candidate]], float],
) -> Choice:
    """Less communication for next to no bytes: without the small weights that are sharded only to be gathered."""
    gathered = {
        atom
        for conversion in choice.communication.conversions
        if conversion.kind == "gather"
        for atom in atoms_of([conversion.axes])
    }
    for members in classes.values():
        rest = tuple(c for c in choice.candidates if c not in members)
        own = {a for c in members for a in c.atoms}
        left = {a for c in rest for a in c.atoms}
        if len(rest) == len(choice.candidates) or not own & gathered:
            continue
        size = bytes_of(rest)
        if choice.sharded_bytes - size > TRIFLE * choice.weight_bytes or not all(left & r for r in required):
            continue
        try:
            communication = flow.communicate(rest)
        except PlanError:
            continue
        if communication.cost_bytes < choice.communication.cost_bytes:
            choice = Choice(rest, communication, size, choice.weight_bytes, choice.proven)
    return choice


def _communicate(
    flow: Flow, chosen: tuple[Candidate, ...], failures: list[str], dropped: dict[str, None]
) -> tuple[tuple[Candidate, ...], Communication] | None:
    """The set's communication; where it is impossible as a whole, that of the set without its bad classes.

    Args:
        dropped: the classes that other sets had to do without; tried last, and added to.
    """
    try:
        return chosen, flow.communicate(chosen)
    except PlanError as error:
        failures.append(str(error))
    by_key: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in chosen:
        by_key[candidate.key].append(candidate)
    kept: tuple[Candidate, ...] = ()
    best: Communication | None = None

    def add(keys: list[str]) -> None:
        """As many of the classes as go with those that are kept."""
        nonlocal kept, best
        attempt = (*kept, *(c for key in keys for c in by_key[key]))
        try:
            best = flow.communicate(attempt)
        except PlanError as error:
            failures.append(str(error))
            if len(keys) == 1:
                dropped.update(dict.fromkeys(keys))
            else:
                add(keys[: len(keys) // 2])
                add(keys[len(keys) // 2 :])
        else:
            kept = attempt

    for keys in ([key for key in by_key if key not in dropped], [key for key in by_key if key in dropped]):
        if keys:
            add(keys)
    return (kept, best) if best is not None else None


def _classes(
    found: Iterable[Candidate], against: Mapping[Candidate, frozenset[Candidate]]
) -> dict[str, tuple[Candidate, ...]]:
    """Candidates decided together: those of the same key, unless they conflict with one another."""
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in found:
        groups[candidate.key].append(candidate)
    classes: dict[str, tuple[Candidate, ...]] = {}
    for key, members in groups.items():
        if any(b in against[a] for a, b in itertools.combinations(members, 2)):
            for i, member in enumerate(members):
                classes[f"{key}#{i}"] = (member,)
        else:
            classes[key] = tuple(members)
    return classes


def _maximal_sets(
    classes: Mapping[str, tuple[Candidate, ...]], against: Mapping[Candidate, frozenset[Candidate]]
) -> Iterable[list[str]]:
    """All of them, as lists of keys, in an order that is the same in every process: numbers stand for the keys, whose
    hashes are another in each."""
    names = list(classes)
    compatible: nx.Graph = nx.Graph()
    compatible.add_nodes_from(range(len(names)))
    for a, b in itertools.combinations(range(len(names)), 2):
        others = set(classes[names[b]])
        if not any(against[c] & others for c in classes[names[a]]):
            compatible.add_edge(a, b)
    if not names:
        return iter([[]])
    return ([names[i] for i in clique] for clique in nx.find_cliques(compatible))


class Weights:
    """The bytes of a model's parameters, and how many of them a set of axes shards."""

    def __init__(self, analysis: Analysis) -> None:
        params = analysis.trace.params
        counted: Counter[tuple[Dim, ...]] = Counter()
        for fqn, node in params.items():
            if fqn not in analysis.trace.is_buffer:
                counted[analysis.dims[node][0]] += nbytes(node)
        self._weights = [(dims, size, frozenset(atoms_of(dims))) for dims, size in counted.items()]
        self._holding: dict[Atom, set[int]] = defaultdict(set)
        for i, (_, _, own) in enumerate(self._weights):
            for atom in own:
                self._holding[atom].add(i)
        self._found: dict[tuple[int, frozenset[Atom]], float] = {}
        self.total = sum(size for _, size, _ in self._weights)

    def sharded(self, chosen: Iterable[Candidate]) -> float:
        axes = frozenset(a for c in chosen for a in c.atoms)
        return sum(self._share(i, axes) for i in self._held(axes))

    def lost(self, axes: frozenset[Atom], without: frozenset[Atom]) -> float:
        """The bytes that ``axes`` shard, and would not ``without`` these."""
        left = axes - without
        return sum(self._share(i, axes) - self._share(i, left) for i in self._held(without))

    def _held(self, axes: frozenset[Atom]) -> list[int]:
        return sorted(set().union(*(self._holding[a] for a in axes if a in self._holding)))

    def _share(self, weight: int, axes: frozenset[Atom]) -> float:
        dims, size, own = self._weights[weight]
        held = axes & own
        if not held:
            return 0.0
        found = self._found.get((weight, held))
        if found is None:
            found = self._found[weight, held] = size * sharded_share(dims, held)
        return found


def holders(analysis: Analysis, candidate: Candidate) -> list[str]:
    """The parameters that hold an axis of this candidate."""
    wanted = set(candidate.atoms)
    return [
        fqn
        for fqn, node in analysis.trace.params.items()
        if fqn not in analysis.trace.is_buffer and wanted & set(atoms_of(analysis.dims[node][0]))
    ]
