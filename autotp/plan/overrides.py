"""What a user fixes beforehand, checked against the analysis before anything is touched.

A YAML file (or a mapping) of glob patterns over module and parameter names::

    modules:
      "model.layers.*.mlp.down_proj": row
      lm_head: replicate

``column``: the output dim of each matched weight is sharded; ``row``: its input dim; ``vocab``: an embedding's vocabulary;
``shard``: any of its dims; ``replicate``: none. A whole plan, as `Plan.to_yaml` writes it, is taken too: then the model is
sharded exactly so, or refused.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..axes.analysis import Analysis
from ..axes.term import Atom
from ..errors import PlanError
from ..trace.fold import Folds
from .candidates import Candidate, atoms_of
from .candidates import candidates as all_candidates
from .document import Document, read
from .names import did_you_mean
from .placement import Uses
from .plan import PLACEMENTS, Plan

Allow = Callable[[Candidate], bool]


@dataclass(frozen=True, slots=True)
class Overrides:
    """Placements by pattern, or a whole plan."""

    modules: Mapping[str, str]
    plan: Plan | None
    document: Document

    @classmethod
    def load(cls, given: Plan | str | os.PathLike[str] | Mapping[str, Any] | None) -> Overrides:
        """Read overrides from what a user may give: a plan, a file, a mapping, or nothing."""
        if given is None:
            return cls({}, None, Document({}, "no overrides"))
        if isinstance(given, Plan):
            return cls({}, given, Document({}, "the given plan"))
        document = Document(given, "the given overrides") if isinstance(given, Mapping) else read(given)
        if "autotp" in document.value or "axes" in document.value:
            return cls({}, Plan.from_document(document), document)
        document.only(["modules"])
        modules = document.value.get("modules") or {}
        if not isinstance(modules, Mapping):
            raise document.error(("modules",), f"modules should be a mapping of patterns to placements, not {modules!r}")
        for pattern, word in modules.items():
            if word not in PLACEMENTS:
                raise document.error(
                    ("modules", pattern),
                    f"{word!r} is no placement{did_you_mean(str(word), PLACEMENTS)}: use one of {', '.join(PLACEMENTS)}",
                )
        return cls(dict(modules), None, document)

    def apply(
        self, analysis: Analysis, folds: Folds, model: nn.Module, tp: int
    ) -> tuple[Allow, list[frozenset[Atom]]]:
        """For the planner: which candidates are allowed, and sets of axes of each of which one is required."""
        return (lambda candidate: True), []

    def check(self, plan: Plan) -> None:
        """Raise unless the result is the given plan."""
