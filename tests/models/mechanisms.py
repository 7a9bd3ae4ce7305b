"""Models of one mechanism each, as small as they can be, that larger ones were found to need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from tests.models.naive import WeightNormed

BATCH, SEQ = 2, 5


class LookupThenLinear(nn.Module):
    """Two large tables, looked up by part, whose sum of parts goes through a small layer with a bias before it is
    reduced: the bias counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(222, 34)
        self.second = nn.Embedding(158, 26)
        self.down = nn.Linear(60, 7)

    def forward(self, ids: Tensor) -> Tensor:
        joined = torch.cat((self.first(ids), self.second(ids % 13)), -1).cumsum(
            -1
        )  # which no feature can be cut from
        return torch.tanh(self.down(joined))


class SelectiveScan(nn.Module):
    """Mamba's mixer: an initial state of zeros, a Python loop over time, and three parts of one reduced projection
    that all enter the sharded region."""

    def __init__(self, width: int = 10, inner: int = 26, rank: int = 3, state: int = 4) -> None:
        super().__init__()
        self.sizes = [rank, state, state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, state))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.in_proj(x).chunk(2, dim=-1)
        dt, b, c = torch.split(self.x_proj(F.silu(hidden)), self.sizes, dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        state = torch.zeros(x.shape[0], self.inner, self.A_log.shape[-1], dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (dt * hidden)[:, t, :, None] * b[:, t, None]
            outputs.append((state @ c[:, t, :, None])[..., 0])
        return self.out_proj(torch.stack(outputs, dim=1) * F.silu(gate))


class Scale(nn.Module):
    """A norm without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class OneNormManyPlaces(nn.Module):
    """A module that is called in several places, of which only some feed a sharded layer."""

    def __init__(self, width: int = 14, inner: int = 38) -> None:
        super().__init__()
        self.norm = Scale()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.norm(x)


class MeanSquareNorm(nn.Module):
    """RMSNorm in plain ops."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class NormOfAllHeads(nn.Module):
    """OLMo 2: queries and keys are normed over all heads together, a mean over what is sharded."""

    def __init__(self, width: int = 20, heads: int = 6, head: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, heads * head, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (MeanSquareNorm(heads * head) for _ in range(2))
        self.o = nn.Linear(heads * head, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Pooled(nn.Module):
    """The mean of hidden features, as it is and through a linear map: a local mean counts by its share."""

    def __init__(self, width: int = 12, inner: int = 34) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.up(x))
        return self.down(h), torch.tanh(2.0 * h.mean((1, 2)))


class SharedRotaryKey(nn.Module):
    """DeepSeek-V2: one key for all heads, rotated as complex numbers; here each head has a phase of its own, so the
    gradients of the heads meet at a complex value."""

    def __init__(self, width: int = 14, heads: int = 6, pairs: int = 5) -> None:
        super().__init__()
        self.heads, self.pairs = heads, pairs
        self.q = nn.Linear(width, heads * pairs * 2, bias=False)
        self.k = nn.Linear(width, pairs * 2, bias=False)
        self.v = nn.Linear(width, heads * pairs, bias=False)
        self.o = nn.Linear(heads * pairs, width, bias=False)
        self.register_buffer("phase", torch.randn(heads, 1, pairs))

    def turned(self, x: Tensor) -> Tensor:
        """[batch, heads or 1, seq, 2 pairs] → the same, turned by place and head."""
        pairs = torch.view_as_complex(x.unflatten(-1, (self.pairs, 2)))
        places = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        angle = places + self.phase
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.v))
        scores = self.turned(q) @ self.turned(self.k(x)[:, None]).transpose(-1, -2)
        return self.o((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))


class Dropped(nn.Module):
    """The sum of two tables, dropped from: in train mode the sum over ranks has to come before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Embedding(222, width)
        self.second = nn.Embedding(158, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.first(ids) + self.second(ids % 13))


class DroppedEmbeddings(nn.Module):
    """XLM-RoBERTa-XL: no norm between embeddings and their dropout."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.embeddings = Dropped(width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 38)
        self.down = nn.Linear(38, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PositionTable(nn.Module):
    """A table of positions as a parameter, cut to the length of the input behind a token of its own."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.tokens = nn.Embedding(158, width)
        self.first = nn.Parameter(torch.rand(1, 1, width))
        self.places = nn.Parameter(torch.rand(1, 64, width))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 38)
        self.down = nn.Linear(38, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(ids), -1, -1), self.tokens(ids)], 1)
        x = self.norm(x + self.places[:, : x.shape[1]])
        return x + self.down(F.gelu(self.up(x)))


class RefinedPoints(nn.Module):
    """Deformable DETR: what one head makes of points has a gradient in the first layer, and is detached in others."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Linear(14, 3)
        self.head = nn.Sequential(nn.Linear(3, 46), nn.ReLU(), nn.Linear(46, 14))
        self.ups = nn.ModuleList(nn.Linear(14, 34) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(34, 14) for _ in range(3))
        self.delta = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        points = self.points(x).sigmoid()
        refined = []
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x + self.head(points))))
            refined.append((torch.logit(points) + self.delta(x)).sigmoid())
            points = refined[-1].detach()
        return x, torch.stack(refined)


class Separable(nn.Module):
    """A depthwise convolution, whose channels are sharded as they come, and a pointwise one, which makes new ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(self.depthwise(x)))


class SeparableChain(nn.Module):
    """Alike blocks without a residual stream: the first gets other channels than the second, which gets whole ones."""

    def __init__(self, channels: int = 14) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.blocks = nn.Sequential(*(Separable(channels) for _ in range(7)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def images() -> Tensor:
    return torch.randn(BATCH, 3, 6, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(0, 158, (BATCH, SEQ), generator=torch.Generator().manual_seed(5))


class SummedAlready(nn.Module):
    """One of three projections is needed whole by itself, and scaled for the sum with the other two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 46)
        self.first, self.second, self.third = (nn.Linear(46, 10, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.up(x))
        kept = self.first(h)
        return torch.tanh((self.second(h) + kept * 2) + self.third(h)), torch.tanh(kept)


class NormOfAll(nn.Module):
    """A weight of one length for all of it, which no slice knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = weight_norm(nn.Linear(10, 46), dim=None)
        self.down = nn.Linear(46, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class AddedInPlace(nn.Module):
    """The result is written in place, by a statement whose value nothing takes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(158, 12)
        self.up = nn.Linear(12, 1)
        self.down = nn.Linear(1, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.tokens.weight)
        out = x.clone()
        out.add_(self.down(torch.sin(self.up(x))))
        return out


class OwnLoss(nn.Module):
    """Its own forward scales its output, in place or not, and computes a loss of it where labels are given."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.up = nn.Linear(10, 1)
        self.head = nn.Linear(1, 158, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.up(x).sin()) * 3
        if self.in_place:
            logits = logits.mul_(0.5)
        else:
            logits = logits * 0.5
        return logits if labels is None else (logits - labels).square().mean()


class LowRank(nn.Module):
    """A parametrization with parameters of its own."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(out, 3))
        self.second = nn.Parameter(torch.randn(3, width))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.first @ self.second


class Parametrized(nn.Module):
    """Weights that are computed each time, of a projection with as many rows as the next one has columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 46)
        self.down = nn.Linear(46, 10)
        register_parametrization(self.up, "weight", LowRank(46, 10))
        register_parametrization(self.down, "weight", LowRank(10, 46))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class ParametrizedAttention(nn.Module):
    """Stays whole: the class that stands in for it takes its weight as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        register_parametrization(self.attention, "in_proj_weight", nn.Tanh())
        self.up = nn.Linear(12, 46)
        self.down = nn.Linear(46, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


def floats(width: int) -> Tensor:
    return torch.randn(BATCH, SEQ, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class InGroups(nn.Module):
    """Features in two groups, which more ranks than two share: what is done with ``x [batch, seq, 2, each]`` sums
    within the groups, so that some of the ranks sum it."""

    def __init__(self, each: int, width: int = 2) -> None:
        super().__init__()
        self.each = each
        self.up = nn.Linear(width, 2 * each)
        self.down = nn.Linear(2 * each, width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        y = F.silu(self.up(x))
        out, *more = self.within(y.view(*y.shape[:-1], 2, self.each))
        out = self.down(out.flatten(-2))
        return (out, *more) if more else out

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


class NormInGroups(InGroups):
    """As in Mamba 2."""

    def __init__(self, each: int) -> None:
        super().__init__(each)
        self.gain = nn.Parameter(torch.rand(2 * self.each))

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return (normed.flatten(-2).mul(self.gain).view(x.shape),)


class ScaledNormInGroups(InGroups):
    """The statistics are scaled by weights, one of each group and one of all."""

    def __init__(self, each: int) -> None:
        super().__init__(each)
        self.of_group = nn.Parameter(torch.rand(2, 1))
        self.of_all = nn.Parameter(torch.rand(1))

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        size = torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-3)
        return (x / (size * self.of_group * self.of_all + 1),)


class ReturnedNormInGroups(InGroups):
    """What groups of ranks have in common is gathered, and comes back from one rank of each."""

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        size = torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-3)
        return x / (size + 1), size


class GateInGroups(InGroups):
    """Both the mean of each group and its expansion over it."""

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        mean = torch.tanh(x.mean(-1, keepdim=True))
        return ((x - mean) * torch.sigmoid(mean).expand_as(x),)


class LinearInGroups(InGroups):
    """One linear layer for both groups; its bias counts once in each."""

    def __init__(self, each: int) -> None:
        super().__init__(each)
        self.mix = nn.Linear(self.each, 1)

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x * torch.sigmoid(self.mix(x)),)


class NormedGain(InGroups):
    """A weight for both groups, that is normed itself."""

    def __init__(self, each: int) -> None:
        super().__init__(each)
        self.gain = nn.Parameter(torch.rand(self.each))

    def within(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x * self.gain * torch.rsqrt(self.gain.pow(2).mean() + 1e-3),)


#: name → (model, inputs, parameters that have to be sharded)
MECHANISMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "lookup then linear": (LookupThenLinear, ids, "first.weight second.weight"),
    "selective scan": (
        SelectiveScan, lambda: floats(10), "in_proj.weight x_proj.weight dt_proj.weight A_log out_proj.weight",
    ),
    "norm of all heads": (
        NormOfAllHeads, lambda: floats(20), "q.weight k.weight v.weight o.weight q_norm.weight k_norm.weight",
    ),
    "shared rotary key": (SharedRotaryKey, lambda: floats(14), "q.weight v.weight o.weight phase"),
    "dropped embeddings": (DroppedEmbeddings, ids, "embeddings.first.weight embeddings.second.weight up.weight"),
    "separable chain": (SeparableChain, images, "stem.weight"),
    "refined points": (RefinedPoints, lambda: floats(14), "head.0.weight head.2.weight ups.0.weight ups.2.weight"),
    "pooled": (Pooled, lambda: floats(12), "up.weight down.weight"),
    "summed already": (
        SummedAlready, lambda: floats(10), "up.weight first.weight second.weight third.weight",
    ),
    "weight norm": (
        WeightNormed, lambda: floats(10),
        " ".join(f"{layer}.parametrizations.weight.original{i}" for layer in ("up", "mix", "down") for i in (0, 1)),
    ),
    "weight norm by a hook": (
        lambda: WeightNormed(nn.utils.weight_norm), lambda: floats(10),
        "up.weight_g up.weight_v mix.weight_g mix.weight_v down.weight_g down.weight_v",
    ),
    "added in place": (AddedInPlace, ids, "tokens.weight down.weight"),
    "weight norm of all": (NormOfAll, lambda: floats(10), "down.weight"),
    "parametrized": (
        Parametrized, lambda: floats(10),
        " ".join(f"{layer}.parametrizations.weight.{own}" for layer, own in (
            ("up", "original"), ("up", "0.first"), ("down", "original"), ("down", "0.second"),
        )),
    ),
    "parametrized attention": (ParametrizedAttention, lambda: floats(12), "up.weight down.weight"),
    "one norm, many places": (OneNormManyPlaces, lambda: floats(14), "up.weight down.weight"),
}  # fmt: skip

#: the same of models that two groups of ranks share, by how many features each group has
IN_GROUPS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "norm in groups": (NormInGroups, "gain up.weight down.weight"),
    "scaled norm in groups": (ScaledNormInGroups, "of_group up.weight down.weight"),
    "gate in groups": (GateInGroups, "up.weight down.weight"),
    "returned norm in groups": (ReturnedNormInGroups, ""),
    "linear in groups": (LinearInGroups, ""),  # its bias would count in each group
    "normed gain": (NormedGain, ""),  # both groups hold what one has to sum
}
