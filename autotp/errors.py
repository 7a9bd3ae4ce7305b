"""The errors that autotp raises on purpose: one root, a few kinds.

A message says what failed, where (module, op, ``file:line``), the numbers, and what to do about it.
"""

from __future__ import annotations

from typing import Any


class AutoTPError(Exception):
    """Root of all errors that autotp raises on purpose. The model is as it was when one is raised."""


class TraceError(AutoTPError):
    """The model's forward could not be captured as a graph (data-dependent branch, inputs that cannot be guessed).

    ``module`` (its fqn) is where, if that is known.
    """

    def __init__(self, text: str, module: str | None = None) -> None:
        super().__init__(text)
        self.module = module


class PlanError(AutoTPError):
    """No plan exists for what was asked: a bad degree, an override that cannot hold, a wrong plan file."""


class RewriteError(AutoTPError):
    """The planned sharding cannot be expressed in the model's code.

    ``module`` (its fqn) is where, ``keys`` which axes stand in the way, and ``places`` which module boundaries and
    expressions of the source cannot be used as planned (others may do), as far as that is known.
    """

    def __init__(
        self,
        text: str,
        module: str | None = None,
        keys: frozenset[str] = frozenset(),
        places: frozenset[Any] = frozenset(),
    ) -> None:
        super().__init__(text)
        self.module = module
        self.keys = keys
        self.places = places


class VerifyError(RewriteError):
    """The rewritten model, traced again, does not compute what was planned."""


class RankMismatchError(AutoTPError):
    """The ranks hold different models, plans or arguments."""


class HangError(AutoTPError):
    """A collective was not done in time: other ranks are somewhere else, or gone."""


class RuleError(AutoTPError):
    """A sharding rule is malformed, or contradicts the op it is for."""


class CheckpointError(AutoTPError):
    """A checkpoint cannot be read or written as it is: which file and which key, and what is wrong with it."""
