"""What sharding has changed on each module, kept with the module, so that it can be undone there.

Names in the tree change when somebody wraps a module; the module keeps its record. A record speaks of attributes only
(patched methods, local integers, private configs, hooks); the class says itself what it was made of, and what becomes
of the slices is not decided here. Whatever somebody else has changed since stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..axes.term import Dim
from ..errors import AutoTPError
from ..runtime.gradients import forget_gradients
from ..runtime.swap import Sharded

_RECORD = "_autotp_record"
_CHILDREN = ("_parameters", "_buffers", "_modules")


@dataclass(slots=True)
class Record:
    """The changes of one module.

    Attributes:
        now: the attributes that were set, and before: what those of them were that existed.
        drawn: of what was replaced by a private copy (a config), what the copy said then.
        hooks: the ids of the hooks that were added, by their table.
        own: the names of the module's own parameters and buffers, and dims: of those that are slices.
        came: whether the module was put into a model that was sharded.
    """

    now: dict[str, Any]
    before: dict[str, Any]
    drawn: dict[str, dict[str, Any]]
    hooks: dict[str, tuple[int, ...]]
    own: frozenset[str]
    dims: dict[str, tuple[Dim, ...]]
    came: bool = False


Snapshot = dict[int, dict[str, Any]]


def snapshot(model: nn.Module) -> Snapshot:
    """The attributes of each module, before it is changed."""
    return {id(module): _attributes(module) for module in model.modules()}


def record(model: nn.Module, earlier: Snapshot, slices: Mapping[str, tuple[Dim, ...]]) -> None:
    """Keep with each module what was changed on it since."""
    by_tensor = {id(_tensor(model, fqn)): dims for fqn, dims in slices.items()}
    for module in model.modules():
        before, after = earlier[id(module)], _attributes(module)
        hooks = {}
        for name, value in after.items():
            if _is_hooks(name, value):
                added = tuple(key for key in value if key not in before.get(name, {}))
                if added:
                    hooks[name] = added
        now = {
            name: value
            for name, value in after.items()
            if not _is_hooks(name, value) and (name not in before or before[name] is not value)
        }
        was = {name: before[name] for name in now if name in before}
        own = {**module._parameters, **module._buffers}
        dims = {name: by_tensor[id(tensor)] for name, tensor in own.items() if id(tensor) in by_tensor}
        drawn = {name: dict(now[name].__dict__) for name, value in was.items() if _is_copy(value, now[name])}
        module.__dict__[_RECORD] = Record(now, was, drawn, hooks, frozenset(own), dims)


def record_of(module: nn.Module) -> Record | None:
    """What was changed on a module when it was sharded."""
    found: Record | None = module.__dict__.get(_RECORD)
    return found


def undo(model: nn.Module) -> None:
    """Give every module the class, attributes and hooks back that it had before it was sharded.

    Its slices stay. Anything else that shares what it is built of (an unsharded model, a config) stays as it is.

    Raises:
        AutoTPError: before anything is changed, where somebody has changed over what is to be undone.
    """
    for fqn, module in model.named_modules():
        _check(fqn, module)
    for module in model.modules():
        if isinstance(module, Sharded):
            plain: Any = type(module)._sharded_from
            module.__class__ = plain
        found: Record | None = module.__dict__.pop(_RECORD, None)
        if found is None:
            continue
        forget_gradients(module)
        for name, ids in found.hooks.items():
            for key in ids:
                module.__dict__[name].pop(key, None)
        for name, value in found.now.items():
            if name in module.__dict__ and _same(module.__dict__[name], value):
                _restore(module, name, value, found)


def _check(fqn: str, module: nn.Module) -> None:
    found = record_of(module)
    replaced = None
    if isinstance(module, Sharded) and "_sharded_from" not in vars(type(module)):
        replaced = f"its class is now {type(module).__name__}"
    elif found is not None and "forward" in found.now and module.__dict__.get("forward") is not found.now["forward"]:
        replaced = "its forward was replaced"
    if replaced is not None:
        raise AutoTPError(f"{fqn or 'the root module'} is not as it was left when it was sharded: {replaced}")


def _restore(module: nn.Module, name: str, value: Any, found: Record) -> None:
    if name not in found.before:
        del module.__dict__[name]
        return
    was = module.__dict__[name] = found.before[name]
    drawn = found.drawn.get(name)
    if drawn is not None:  # what was written to the private copy since
        for key, item in value.__dict__.items():
            if key not in drawn or not _same(drawn[key], item):
                was.__dict__[key] = item


def _attributes(module: nn.Module) -> dict[str, Any]:
    found = {name: value for name, value in module.__dict__.items() if name not in (*_CHILDREN, _RECORD)}
    return {name: dict(value) if _is_hooks(name, value) else value for name, value in found.items()}


def _is_hooks(name: str, value: Any) -> bool:
    return isinstance(value, dict) and "_hooks" in name


def _same(a: Any, b: Any) -> bool:
    """Whether an attribute is what it was; plain values are other objects after a pickle."""
    return a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b)


def _is_copy(before: Any, after: Any) -> bool:
    plain = not callable(after) and not isinstance(after, (nn.Module, Tensor))
    return plain and type(before) is type(after) and hasattr(after, "__dict__")


def _tensor(model: nn.Module, fqn: str) -> Tensor:
    module, _, name = fqn.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), name)
    return found
