"""Modules to patch: each way in which people write a call."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SCALE = 1.0


def split_heads(x, heads):
    return x.view(x.shape[0], heads, -1)


def scaled(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return SCALE * fn(*args, **kwargs)

    return wrapper


def plus(amount):
    def decorate(fn):
        @functools.wraps(fn)
        def wrapper(self, *args):
            return fn(self, *args) + amount

        return wrapper

    return decorate


class Decorator:
    def __init__(self, fn):
        self.fn = fn

    def __get__(self, instance, owner):
        return functools.partial(self.fn, instance)


@scaled
def decorated_split(x, heads):
    return x.view(x.shape[0], heads, -1)


class Attention(nn.Module):
    """Writes its calls in every way there is."""

    n_head = 4

    def __init__(self):
        super().__init__()
        self.size = 12
        self.bias = nn.Parameter(torch.zeros(12))
        self.proj = nn.Linear(12, 12)

    def plain(self, x):
        B, C = x.shape
        y = self.proj(x)
        return y.view(B, self.n_head, C // self.n_head) + 0

    def starred(self, x):
        shape = (self.n_head, 3)
        return x.view(*shape, *x.shape[:0], -1)

    def starred_last(self, x):
        return x.view(-1, *(self.n_head, 3))

    def variable(self, x):
        new_shape = x.size()[:-1] + (self.n_head, 3)
        return x.view(new_shape)

    def sliced(self, x):
        return x[:, : self.size][..., 0 : self.n_head]

    def listed(self, x):
        a, b = x.split([self.n_head, self.size - self.n_head], dim=1)
        return torch.cat([a, b], dim=1)

    def keyword(self, x):
        return x.unflatten(dim=1, sizes=(self.n_head, -1))

    # fmt: off
    def unicode(self, x):
        é = "à"; return x.view(len(é), self.n_head, -1)  # noqa: E702
    # fmt: on

    # fmt: off
    def chained(self, x):
        return (
            x
            .view(x.shape[0],
                  self.n_head, 3)  # heads
            .transpose(0, 1)
        )
    # fmt: on

    def augmented(self, x):
        y = self.proj(x)
        z = y
        y += x
        return y + 0 * z

    def nested(self, x):
        return torch.addmm(self.bias, x, self.proj.weight.t().mul(2.0)).view(-1, self.n_head)

    def comprehension(self, x):
        return torch.stack([part.view(-1, self.n_head) for part in (x, x + 1)])

    def local_lambda(self, x):
        cut = lambda t: t.view(-1, self.n_head)
        return cut(x) + cut(x + 1)

    def free(self, x):
        return split_heads(x, self.n_head) + split_heads(2 * x, self.n_head)

    def free_decorated(self, x):
        return decorated_split(x, self.n_head)

    def dynamic(self, x):
        interface = split_heads if self.size else None
        return interface(x, heads=self.n_head)

    def _helper(self, x, heads):
        return x.view(x.shape[0], heads, -1)

    def helper(self, x):
        return self._helper(x, self.n_head) + self._helper(3 * x, self.n_head)

    @staticmethod
    def _static(x, heads):
        return x.view(x.shape[0], heads, -1)

    def static(self, x):
        return self._static(x, self.n_head)

    @scaled
    def _wrapped_helper(self, x):
        return x.view(x.shape[0], self.n_head, -1)

    def wrapped_helper(self, x):
        return self._wrapped_helper(x)

    @property
    def table(self):
        return self.bias.view(self.n_head, -1)

    def uses_property(self, x):
        return x.sum() + self.table

    def checkpointed(self, x):
        return checkpoint(self._block, x, use_reentrant=False)

    def _block(self, x):
        return x.view(x.shape[0], self.n_head, -1)

    def __private(self, x):
        return x.view(-1, self.n_head) / math.sqrt(self.size)

    def mangled(self, x):
        return F.relu(self.__private(x))


def make(method: str, *decorators) -> nn.Module:
    """A module whose forward is this method of `Attention`."""
    forward = vars(Attention)[method]
    for decorator in decorators:
        forward = decorator(forward)
    cls = type(f"{method.title()}Module", (Attention,), {"forward": forward})
    globals()[cls.__name__] = cls  # where pickle looks for it
    torch.manual_seed(0)
    return cls()


class Decorated(nn.Module):
    n_head = 4

    @torch.no_grad()
    @scaled
    @plus(1.0)
    def forward(self, x):
        return x.view(x.shape[0], self.n_head, -1)


class ByObject(nn.Module):
    n_head = 4

    @Decorator
    def forward(self, x):
        return x.view(x.shape[0], self.n_head, -1)


class Child(Decorated):
    def forward(self, x):
        return super().forward(x).sum(-1)


def factory(heads):
    class Local(nn.Module):
        def forward(self, x):
            return super().__call__ and x.view(x.shape[0], heads, -1)

    return Local()
