"""Kernels of transformers that cannot be traced on a CPU, and what is traced in their place.

Attention that needs a GPU (or a function of the user's that fake tensors cannot follow) is traced as its *twin*:
"sdpa", or "eager" where the model has no sdpa. Loops over the experts that were hit are traced as "batched_mm".
Only a skeleton is switched: the user's model keeps the kernel that was chosen for it, and calls it with each rank's
own heads or each rank's own part of the experts' width. What the twin's code looks like counts for nothing then, so
no step and no patch may be put there (`Twins` says where that is), only around its call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

from torch import nn

from autotp.trace.library import is_transformers

Kind = Literal["attention", "experts"]

KINDS: dict[Kind, str] = {"attention": "_attn_implementation", "experts": "_experts_implementation"}
TRACEABLE: dict[Kind, frozenset[str | None]] = {
    "attention": frozenset((None, "eager", "sdpa")),
    "experts": frozenset((None, "batched_mm", "grouped_mm")),
}
_REPLACED = "_autotp_replaced"  # on a skeleton's config: by kind, what was chosen and what runs in its place


@dataclass(frozen=True, slots=True)
class Switch:
    """Which twins a skeleton runs; None: what the user chose."""

    attention: str | None = "sdpa"
    experts: str | None = "batched_mm"
    grouped: bool = True
    """Whether grouped products of experts are traced as they are."""


DEFAULT = Switch()


def switches(model: nn.Module) -> list[Switch]:
    """How to try to trace a model, in this order: with what its user has registered, with the usual twins, with
    slower ones."""
    chosen = {
        kind: {getattr(config, name, None) for _, config in _configs(model)} for kind, name in KINDS.items()
    }
    found = []
    own = {kind: any(_is_users(kind, name) for name in chosen[kind]) for kind in KINDS}
    if any(own.values()):
        found.append(
            Switch(None if own["attention"] else "sdpa", None if own["experts"] else "batched_mm")
        )
    found.append(DEFAULT)
    if chosen["attention"] - TRACEABLE["attention"]:
        found.append(Switch(attention="eager"))
    if "grouped_mm" in chosen["experts"]:
        found.append(Switch(grouped=False))
    return found


def replaced(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """What a skeleton does not run as it was chosen, and its twin."""
    found = {names: None for _, config in _configs(model) for names in _marks(config).values()}
    return tuple(found)


def registered(model: nn.Module) -> frozenset[str]:
    """The implementations that a model runs and somebody else than the library has registered."""
    return frozenset(
        name
        for _, config in _configs(model)
        for kind, attribute in KINDS.items()
        if (name := getattr(config, attribute, None)) is not None and _is_users(kind, name)
    )


def make_traceable(skeleton: nn.Module, switch: Switch = DEFAULT) -> None:
    """Let a skeleton run code that fake CPU tensors can follow, where what it would run is not such code.

    A skeleton of a skeleton stays as it is: its twins can be traced already.
    """
    for model, config in _configs(skeleton):
        if _REPLACED in config.__dict__:
            continue
        config.__dict__[_REPLACED] = {}
        attention, experts = (getattr(config, attribute, None) for attribute in KINDS.values())
        if switch.attention is not None and attention not in TRACEABLE["attention"]:
            has = switch.attention != "sdpa" or getattr(model, "_supports_sdpa", True)
            twin = switch.attention if has else "eager"
            config.__dict__[_REPLACED]["attention"] = attention, twin
            config._attn_implementation_internal = twin
        traced = TRACEABLE["experts"] - frozenset(() if switch.grouped else ("grouped_mm",))
        if switch.experts is not None and experts not in traced:
            config.__dict__[_REPLACED]["experts"] = experts, switch.experts
            config._experts_implementation_internal = switch.experts


def _marks(config: Any) -> dict[Kind, tuple[str, str]]:
    found: dict[Kind, tuple[str, str]] = config.__dict__.get(_REPLACED, {})
    return found


def _configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """Each config of the transformers models in a model, and of their parts, with the innermost one that it is of."""
    found: dict[int, tuple[Any, Any]] = {}
    parts: list[tuple[Any, Any]] = []
    for module in model.modules():
        if is_transformers(module):
            found.setdefault(id(module.config), (module, module.config))
            parts.append((module, module.config))
    while parts:
        module, config = parts.pop()
        for name in getattr(config, "sub_configs", ()):
            part = getattr(config, name, None)
            if part is not None and id(part) not in found:
                found[id(part)] = module, part
                parts.append((module, part))
    return list(found.values())


def _interface(kind: Kind) -> Any:
    """transformers' table of implementations of a kind; None where it is not loaded, or has none."""
    where = {"attention": "transformers.modeling_utils", "experts": "transformers.integrations.moe"}[kind]
    return getattr(sys.modules.get(where), f"{kind.capitalize()}Interface", None)


def _is_users(kind: Kind, name: str | None) -> bool:
    function = _plain(getattr(_interface(kind), "_global_mapping", {}).get(name))
    module = getattr(function, "__module__", None) or type(function).__module__
    return function is not None and module.split(".")[0] != "transformers"


def _plain(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


# ---- while it is traced --------------------------------------------------------------------------


@dataclass(slots=True)
class Twins:
    """The code that runs in place of other code, and the name of what it is the twin of."""

    codes: dict[int, tuple[CodeType, str]] = field(default_factory=dict)  # by id: equal codes are not one
    ops: list[CodeType] = field(default_factory=list)
    """Functions that count as one op: a call of it is where that op stands in the source."""

    def add(self, function: Any, name: str) -> None:
        """Count a function among them."""
        function = _plain(function)
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if isinstance(code, CodeType):
            self.codes[id(code)] = code, name

    def is_op(self, code: CodeType) -> bool:
        """Whether this is the code of a function that counts as an op."""
        return any(code is own for own in self.ops)

    def of(self, code: CodeType) -> str:
        """What the function with this code is the twin of; '' where it is none."""
        return self.codes[id(code)][1] if id(code) in self.codes else ""


@contextmanager
def twins(module: nn.Module) -> Iterator[Twins]:
    """While a skeleton is traced: the twins that it calls. And grouped products, of which torch knows shapes in
    bfloat16 only, are an op of any dtype."""
    found = Twins()
    with ExitStack() as stack:
        for kind in KINDS:
            names = {twin: chosen for _, c in _configs(module) for chosen, twin in [_marks(c).get(kind, ("", ""))]}
            names.pop("", None)
            interface = _interface(kind)
            if names and hasattr(interface, "get_interface"):
                stack.enter_context(_noting(interface, names, found))
        moe: Any = sys.modules.get("transformers.integrations.moe")
        if hasattr(moe, "_can_use_grouped_mm") and hasattr(moe, "_grouped_mm"):
            found.ops.append(moe._grouped_mm.__code__)
            stack.enter_context(_with(moe, "_can_use_grouped_mm", lambda *args: False))
        yield found


@contextmanager
def _noting(interface: Any, names: dict[str, str], found: Twins) -> Iterator[None]:
    """Note what the library hands out under the name of a twin."""
    original: Callable[..., Any] = interface.get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        function = original(self, name, default)
        if name in names:
            found.add(function, names[name])
        return function

    with _with(interface, "get_interface", get_interface):
        yield


@contextmanager
def _with(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
