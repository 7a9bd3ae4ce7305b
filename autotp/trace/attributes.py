"""The integer attributes of modules, and how they become provenance integers while a model is traced.

A module's integers are its own attributes, those inside its tuples and lists, and those of its config
objects. A config is shared by many modules, so each module gets a private shallow copy of its own for the
trace: a later stage may want `num_attention_heads` to be local for one module and not for another.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any

import torch
from torch import nn

from autotp.trace.provenance import Attr, AttrPath, ProvInt, Session, make

_CONFIG_NAME = re.compile(
    r"(config|cfg|conf|args|params|hparams|opts?|options|hyperparameters)$", re.IGNORECASE
)
#: Whose objects are left as a forward leaves them.
_NO_HELPERS = sys.stdlib_module_names | {"torch"}
#: Where a module keeps its hooks: a forward may register some, and note in an attribute that it did.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_CONFIG_DEPTH = 3  # config.text_config.rope_parameters


def is_config(name: str, value: object) -> bool:
    """Whether attribute `name` of a module holds hyperparameters: by its name, its class's name, or as a
    dataclass."""
    if type(value) is dict:
        return bool(_CONFIG_NAME.search(name)) and all(isinstance(key, str) for key in value)
    if isinstance(value, (type, nn.Module, torch.Tensor)) or callable(value):
        return False
    if not (hasattr(value, "__dict__") or dataclasses.is_dataclass(value)):
        return False
    if type(value).__module__.split(".")[0] in {"torch", "builtins", "collections"}:
        return False
    named = _CONFIG_NAME.search(name) or _CONFIG_NAME.search(type(value).__name__)
    return bool(named) or dataclasses.is_dataclass(value)


def fields(value: object) -> dict[str, Any]:
    """The attributes of a config object as a dict: the live one where the object has one."""
    if isinstance(value, dict):
        return value
    if hasattr(value, "__dict__"):
        return vars(value)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}  # type: ignore[arg-type]


def read_attribute(module: nn.Module, path: AttrPath) -> Any:
    """What `path` of an `Attr` leads to: attributes, dict keys and positions, as the object wants."""
    value: Any = module
    for key in path:
        if isinstance(key, int) or isinstance(value, dict):
            value = value[key]
        elif isinstance(value, nn.Module):
            value = value.__dict__[key] if key in value.__dict__ else getattr(value, key)
        else:
            value = fields(value)[key]
    return value


def int_attributes(module: nn.Module) -> Iterator[tuple[AttrPath, int]]:
    """Each integer that `provenance` would wrap, with its path."""
    for name, value in module.__dict__.items():
        yield from _ints(value, (name,), 0)


def _ints(value: Any, path: AttrPath, depth: int) -> Iterator[tuple[AttrPath, int]]:
    if type(value) is int or isinstance(value, ProvInt):
        yield path, value
    elif type(value) in (tuple, list, torch.Size):
        for i, item in enumerate(value):
            if type(item) in (int, tuple, list) or isinstance(item, ProvInt):
                yield from _ints(item, (*path, i), depth)
    elif depth < _CONFIG_DEPTH and is_config(str(path[-1]), value):
        for name, item in fields(value).items():
            yield from _ints(item, (*path, name), depth + 1)


@contextmanager
def provenance(
    module: nn.Module, session: Session | None, exclude: frozenset[type] = frozenset()
) -> Iterator[None]:
    """Within, the integers of `module` and its submodules are `ProvInt`s. After, every attribute is what it
    was before, also those that the forward wrote, and so are its hooks.

    Modules of a class in `exclude` keep plain integers; without a session, all do.
    """
    before = [
        (live, dict(live))
        for m in module.modules()
        for live in (m.__dict__, m._buffers, m._parameters, *(m.__dict__[name] for name in _HOOKS))
    ]
    before += [(live, dict(live)) for live in _helpers(module)]
    try:
        for fqn, m in module.named_modules():
            if session is None or type(m) in exclude:
                continue
            for name, value in list(m.__dict__.items()):
                wrapped = _wrapped(value, fqn, (name,), session, 0)
                if wrapped is not value:
                    m.__dict__[name] = wrapped
        yield
    finally:
        for live, saved in before:
            live.clear()
            live.update(saved)
        if session is not None:
            session.open = False
            if session.hashed:
                _forget_cached()


def _helpers(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The attributes of plain objects that modules have, and of those that these have: where a forward keeps what it
    computed once (a `cached_property`), too."""
    seen: set[int] = set()
    waiting = [value for m in module.modules() for value in m.__dict__.values()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, (list, tuple, dict)):
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif _is_helper(value):
            seen.add(id(value))
            waiting += vars(value).values()
            yield vars(value)


def _is_helper(value: Any) -> bool:
    """Whether it is an object that somebody's class made, of neither Python's libraries nor torch's."""
    made_by = type(value).__module__.partition(".")[0]
    left = made_by in _NO_HELPERS or isinstance(value, (type, nn.Module, torch.Tensor))
    return not left and hasattr(value, "__dict__")


def _wrapped(value: Any, fqn: str, path: AttrPath, session: Session, depth: int) -> Any:
    if type(value) is int:
        return make(value, Attr(fqn, path), session)
    if type(value) in (tuple, list, torch.Size):
        items = [
            _wrapped(item, fqn, (*path, i), session, depth) if type(item) in (int, tuple, list) else item
            for i, item in enumerate(value)
        ]
        changed = any(a is not b for a, b in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    if depth < _CONFIG_DEPTH and is_config(str(path[-1]), value):
        return _private_config(value, fqn, path, session, depth)
    return value


def _private_config(config: Any, fqn: str, path: AttrPath, session: Session, depth: int) -> Any:
    try:
        private = copy.copy(config)
    except Exception:  # a config that does not copy is read without provenance
        return config
    for name, value in list(fields(private).items()):
        wrapped = _wrapped(value, fqn, (*path, name), session, depth + 1)
        if wrapped is value:
            continue
        if isinstance(private, dict):
            private[name] = wrapped
        elif hasattr(private, "__dict__"):  # past properties, validators and frozen dataclasses
            private.__dict__[name] = wrapped
        else:
            object.__setattr__(private, name, wrapped)
    return private


def _forget_cached() -> None:
    """Clear the `functools.lru_cache`s that were asked for a `ProvInt` (dynamo refuses the subclass,
    later)."""
    for cache in (o for o in gc.get_objects() if type(o) is _lru_cache_wrapper):
        for entries in (o for o in gc.get_referents(cache) if type(o) is dict):
            if any(_holds_provint(key) for key in list(entries)):
                cache.cache_clear()
                break


def _holds_provint(key: object) -> bool:
    if isinstance(key, (tuple, list, torch.Size)):
        return any(map(_holds_provint, key))
    return isinstance(key, ProvInt)
