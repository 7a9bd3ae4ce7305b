"""Whether two modules are the same but for their weights' values and their own index in a list."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

from autotp.trace.provenance import AttrPath

_OWN = {"_parameters", "_buffers", "_modules"}


class Alike:
    """Compares layers. `indices` gathers the attributes that differ, each equal to its layer's own index.

    Parameters in `tied` are shared by several modules: they match only themselves.
    """

    def __init__(self, tied: frozenset[int]) -> None:
        self.tied = tied
        self.indices: set[tuple[type, AttrPath]] = set()
        self._known: dict[tuple[int, int], bool] = {}

    def layers(self, a: nn.Module, b: nn.Module, index_a: int, index_b: int) -> bool:
        """Whether children number `index_a` and `index_b` of a list are alike."""
        key = (id(a), id(b))
        if key not in self._known:
            one = _Comparison(self.tied, (index_a, index_b))
            self._known[key] = one.modules(a, b)
            if self._known[key]:
                self.indices |= one.indices
        return self._known[key]


class _Comparison:
    def __init__(self, tied: frozenset[int], own: tuple[int, int]) -> None:
        self.tied = tied
        self.own = own
        self.indices: set[tuple[type, AttrPath]] = set()
        self.assumed: dict[tuple[int, int], tuple[object, object]] = {}

    def modules(self, a: nn.Module, b: nn.Module) -> bool:
        if a is b:
            return True
        if (id(a), id(b)) in self.assumed:
            return True
        self.assumed[id(a), id(b)] = (a, b)
        if type(a) is not type(b) or a.__dict__.keys() != b.__dict__.keys():
            return False
        if not self._tensors(a._parameters, b._parameters) or not self._tensors(a._buffers, b._buffers):
            return False
        for name, value in a.__dict__.items():
            if name not in _OWN and not self.values(value, b.__dict__[name], type(a), (name,)):
                return False
        if a._modules.keys() != b._modules.keys():
            return False
        for name, child in a._modules.items():
            other = b._modules[name]
            if child is None or other is None:
                if child is not other:
                    return False
            elif not self.modules(child, other):
                return False
        return True

    def _tensors(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a.keys() == b.keys() and all(self._tensor(a[name], b[name]) for name in a)

    def _tensor(self, a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        if a is b:
            return True
        if a is None or b is None or id(a) in self.tied or id(b) in self.tied:
            return False
        if (a.shape, a.dtype, a.requires_grad, a.device) != (b.shape, b.dtype, b.requires_grad, b.device):
            return False
        # an integer table may be an index that the analysis reads
        read = a.device.type != "meta" and not a.is_floating_point() and not isinstance(a, nn.Parameter)
        return not read or torch.equal(a, b)

    def values(self, a: Any, b: Any, owner: type, path: AttrPath) -> bool:
        """Whether two attributes are alike: `path` leads to them from modules of class `owner`."""
        if a is b:
            return True
        if type(a) is not type(b) or len(path) > 6:
            return False
        if type(a) is int:
            if a != b and (a, b) == self.own:
                self.indices.add((owner, path))
                return True
            return bool(a == b)
        if isinstance(a, torch.Tensor):
            return self._tensor(a, b)
        if isinstance(a, nn.Module):
            return self.modules(a, b)
        if path[-1:] and isinstance(path[-1], str) and path[-1].endswith("_hooks") and isinstance(a, dict):
            a, b = list(a.values()), list(b.values())  # the keys count all hooks ever made
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(
                self.values(x, y, owner, (*path, i)) for i, (x, y) in enumerate(zip(a, b, strict=True))
            )
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.values(a[k], b[k], owner, (*path, str(k))) for k in a)
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and self._assumed_or_alike(a.__self__, b.__self__, owner, path)
        if isinstance(a, functools.partial):
            parts = (a.func, a.args, a.keywords), (b.func, b.args, b.keywords)
            return self.values(*parts, owner, path)
        if isinstance(a, (types.FunctionType, type)):
            return False
        return self._objects(a, b, owner, path)

    def _assumed_or_alike(self, a: Any, b: Any, owner: type, path: AttrPath) -> bool:
        return (id(a), id(b)) in self.assumed or self.values(a, b, owner, path)

    def _objects(self, a: Any, b: Any, owner: type, path: AttrPath) -> bool:
        """Objects of one class: equal by value, or attribute by attribute. What cannot be told is not
        alike."""
        compares: Any = type(a).__eq__
        if compares is not object.__eq__:
            try:
                if a == b:
                    return True
            except Exception:
                return False
        if not hasattr(a, "__dict__"):
            return False
        if (id(a), id(b)) in self.assumed:
            return True
        self.assumed[id(a), id(b)] = (a, b)
        return self.values(vars(a), vars(b), owner, path)
