"""From the keys of a checkpoint to the names of a model: renamed, converted, tied; missing, unexpected, mismatched."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..trace.library import is_transformers
from .lazy import Lazy, lazy, sources
from .tensorfile import Stored


@dataclass(slots=True)
class Keys:
    """What a checkpoint has for a model. ``mismatched`` holds (name, shape in the checkpoint, the model's)."""

    tensors: dict[str, Lazy]
    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def where(self, name: str) -> str:
        return place(self.tensors[name])


def place(tensor: Lazy) -> str:
    """The files and keys that a tensor is made of, for messages."""
    found = [f"{s.key!r} of {s.path}" for s in sources(tensor) if isinstance(s, Stored)]
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")


def match(model: nn.Module, found: Mapping[str, Stored], key_map: Any = None) -> Keys:
    """Which tensor of the checkpoint each name of the whole (not yet sharded) model gets.

    Raises:
        CheckpointError: two names are tied in the model, and the checkpoint has different values for them.
    """
    given = {_mapped(key, key_map): lazy(tensor) for key, tensor in found.items()}
    if len(given) != len(found):
        raise CheckpointError("the key map gives two keys of the checkpoint the same name")
    expected = model.state_dict(keep_vars=True)
    keys = _converted(model, given, expected) if is_transformers(model) else Keys(given)
    keys.unexpected |= set(keys.tensors) - set(expected)
    keys.tensors = {k: v for k, v in keys.tensors.items() if k in expected}
    by_value: dict[int, list[str]] = {}
    for name, value in expected.items():
        by_value.setdefault(id(value), []).append(name)
    for names in by_value.values():
        present = [n for n in names if n in keys.tensors]
        if not present:
            keys.missing |= set(names)
            continue
        _check_tied(present, keys)
        value = expected[names[0]]
        for name in names:
            keys.tensors.setdefault(name, keys.tensors[present[0]])
        there = keys.tensors[present[0]]
        if there.shape != value.shape:
            keys.mismatched |= {(n, tuple(there.shape), tuple(value.shape)) for n in names}
        elif there.dtype != value.dtype and not (there.is_floating_point() and value.is_floating_point()):
            raise CheckpointError(
                f"{names[0]} is {value.dtype} in the model, and {there.dtype} in the checkpoint ({place(there)})"
            )
    return keys


def _mapped(key: str, key_map: Any) -> str:
    if key_map is None:
        return key
    if callable(key_map):
        return str(key_map(key))
    if key in key_map:
        return str(key_map[key])
    for pattern, name in key_map.items():
        key = re.sub(pattern, name, key)
    return key


def _check_tied(names: list[str], keys: Keys) -> None:
    first = keys.tensors[names[0]]._origin
    for name in names[1:]:
        other = keys.tensors[name]._origin
        if isinstance(first, Stored) and isinstance(other, Stored) and first.crc32() != other.crc32():
            raise CheckpointError(
                f"{names[0]} and {name} are one parameter in the model, and differ in the checkpoint "
                f"({keys.where(names[0])}; {keys.where(name)}). Untie them (tie_word_embeddings=False, say)."
            )


def _converted(model: Any, given: dict[str, Lazy], expected: Mapping[str, Tensor]) -> Keys:
    """transformers' own renamings and conversions, run on tensors that are not read yet."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    keys = Keys({})
    steps: dict[str, Any] = {}
    for key, tensor in sorted(given.items(), key=lambda item: loading.dot_natural_key(item[0])):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = loading.rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            targets = by_pattern[pattern].target_patterns if pattern is not None else [""]
            keys.unexpected |= {name.replace(targets[0], t) if t else name for t in targets}
            continue
        if pattern is None:
            step, pattern = steps.setdefault(name, loading.WeightRenaming(key, name)), key
        else:
            step = steps.setdefault(name, copy.deepcopy(by_pattern[pattern]))
        step.add_tensor(name, key, pattern, tensor)
    for name, step in steps.items():
        try:
            with torch.no_grad():
                made = step.convert(name, model=model, config=model.config)
        except Exception as error:
            raise CheckpointError(f"{name} cannot be made of the checkpoint's tensors: {error}") from error
        for target, value in made.items():
            keys.tensors[target] = value[0] if isinstance(value, list) else value
    model._weight_conversions = [m for m in mapping if m.was_used()]
    return keys
