"""What a user sees of the planner's answer: plain data that prints as a table and goes to YAML and back."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..report import table
from .document import Document, read, typed

#: The version of the file format.
FORMAT = 1

PLACEMENTS = ("column", "row", "vocab", "shard", "replicate")


@dataclass(frozen=True, slots=True)
class Axis:
    """A sharded logical axis, or a nested pair of them: kv heads, then the query heads of each.

    Attributes:
        key: the parameter that holds it first, its dim, and which factor; ``*`` for numbers of layers.
        name: its letter in the table.
        sizes: of the axis, or of outer and inner axis.
        counts: for each of ``sizes`` how many elements each rank holds.
        layers: in how many layers there is an axis like it, each sharded so.
    """

    key: str
    name: str
    sizes: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    layers: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter, or one of repeated layers: ``layers.{0-125}.mlp.up_proj.weight`` with a count of 126.

    Attributes:
        placement: ``column`` (its output dim is sharded), ``row`` (its input dim), ``vocab`` (an embedding's
            rows), ``shard`` (any other dim), ``replicate``.
        dims: logical axes with their sizes, ``F53248/8 , M16384``; ``/8``: sharded in 8 parts.
        global_bytes, local_bytes: of one parameter: whole, and on each rank.
        note: why it is replicated, or what it is tied to.
    """

    name: str
    count: int
    placement: str
    dims: str
    global_shape: tuple[int, ...]
    local_shapes: tuple[tuple[int, ...], ...]
    global_bytes: int
    local_bytes: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective, or that of repeated layers.

    Attributes:
        phase: ``forward``, ``backward``, or ``step``: the gradients that are summed in one bucket, once a
            backward pass.
        kind: ``all_reduce`` or ``all_gather``.
        where: the module (or parameter) whose value is communicated; op: the op that makes it.
        bytes: of the value, for the inputs that were traced.
    """

    phase: str
    kind: str
    where: str
    op: str
    bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is sharded over ``tp`` ranks.

    Attributes:
        model: its class, for display only.
        fingerprint: of the model and everything that was decided: the same on all ranks.
        proven: no other set of axes is better (False where there were too many to look at).
        weight_bytes: of all parameters; sharded_bytes: of them, what lies on one rank only.
        patches: what changes in the model's source, as unified diffs.
    """

    tp: int
    model: str
    fingerprint: str
    proven: bool
    weight_bytes: int
    sharded_bytes: int
    axes: tuple[Axis, ...] = ()
    entries: tuple[Entry, ...] = ()
    collectives: tuple[Collective, ...] = ()
    notes: tuple[str, ...] = ()
    patches: str = ""

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The plan as a table of plain text."""
        return table(self)

    def diff(self) -> str:
        """What changes in the model's source, as unified diffs."""
        return self.patches

    def count(self, phase: str, kind: str | None = None) -> int:
        """How many collectives there are: ``plan.count("forward", "all_reduce")``."""
        return sum(c.count for c in self.collectives if c.phase == phase and kind in (None, c.kind))

    # ---- files

    def to_mapping(self) -> dict[str, Any]:
        """The plan as dicts, lists, texts and numbers."""
        found: dict[str, Any] = {"autotp": FORMAT, **_plain(self)}
        for entry in found["entries"]:
            for key in ("local_shapes", "local_bytes"):  # most are the same on all ranks
                if len(entry[key]) > 1 and all(item == entry[key][0] for item in entry[key]):
                    entry[key] = entry[key][:1]
        return found

    def to_yaml(self) -> str:
        """The plan as YAML; `from_yaml` gives an equal plan back."""
        text: str = yaml.dump(
            self.to_mapping(),
            Dumper=_Dumper,
            sort_keys=False,
            default_flow_style=None,
            allow_unicode=True,
            width=120,
        )
        return text

    def to_json(self) -> str:
        """The same data as `to_yaml`, as JSON."""
        return json.dumps(self.to_mapping(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_yaml(cls, given: str | os.PathLike[str]) -> Plan:
        """The plan in a YAML file, or in a text of several lines.

        Raises:
            PlanError: that it is no plan, with the line and the key.
        """
        return cls.from_document(read(given))

    @classmethod
    def from_document(cls, document: Document) -> Plan:
        """The plan in a mapping that was read."""
        if "autotp" not in document.value:
            raise document.error((), "this is no plan: it lacks the key 'autotp'")
        if document.value["autotp"] != FORMAT:
            raise document.error(
                ("autotp",),
                f"this is a plan of format {document.value['autotp']!r}, and this autotp reads {FORMAT}",
            )
        value = dict(document.value)
        del value["autotp"]
        document.only(["autotp", *(f.name for f in dataclasses.fields(cls))])
        plan: Plan = typed(document, cls, value, ())
        if plan.tp < 1:
            raise document.error(("tp",), f"tp should be at least 1, not {plan.tp}")
        entries = tuple(_on_every_rank(document, entry, plan.tp, i) for i, entry in enumerate(plan.entries))
        return dataclasses.replace(plan, entries=entries)


def _on_every_rank(document: Document, entry: Entry, tp: int, i: int) -> Entry:
    if entry.placement not in PLACEMENTS:
        raise document.error(
            ("entries", i, "placement"),
            f"{entry.placement!r} is no placement, which are {', '.join(PLACEMENTS)}",
        )
    for key in ("local_shapes", "local_bytes"):
        n = len(getattr(entry, key))
        if n not in (1, tp):
            raise document.error(("entries", i, key), f"entries[{i}].{key} has {n} items for {tp} ranks")
    shapes, sizes = entry.local_shapes, entry.local_bytes
    return dataclasses.replace(
        entry,
        local_shapes=shapes * tp if len(shapes) == 1 else shapes,
        local_bytes=sizes * tp if len(sizes) == 1 else sizes,
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
