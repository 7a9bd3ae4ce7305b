"""One architecture on one rank: build, shard, and hold outputs, gradients and tokens against the unsharded model."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import autotp
from autotp.api import carry_out
from autotp.axes.layout import slice_tensor
from autotp.errors import AutoTPError
from autotp.prepare import Prepared, prepare
from autotp.rewrite.state import Asked, sharding_of
from autotp.runtime.mesh import default_mesh
from autotp.runtime.sharded_gradient import local_gradient

from .configs import build

#: Relative to the largest element. Many models compute norms or softmax in float32 (eps 1.2e-7) whatever their dtype.
RTOL = 1e-4
#: Of the largest gradient of the model: one below is rounding (the bias of attention's keys, whose gradient is zero).
#: Of a gradient in float32 more: a difference of one unit in the largest one's last place.
NOISE = 1e-5
#: A gradient below `NOISE` may be off by so many times what rounding to float32 does to it (`moved_by_rounding`).
ROUNDED = 4
NEW_TOKENS = 8
_LAYER = re.compile(r"(?<![^.])(\d+|\{[\d,-]+\})(?![^.])")  # of a name in a model, or in a plan that joins layers
LEAST_SHARE = 0.9


@dataclass
class Result:
    """What one rank found: ``kind`` is exact, partial, refused, wrong, crash or unbuildable."""

    name: str
    cls: str
    kind: str = "crash"
    reason: str = ""
    share: float = 0.0  # of all parameter bytes
    weights: float = 0.0  # of those of linear, embedding and expert weights
    error: float = 0.0
    seconds: float = 0.0
    whole: dict[str, str] = field(default_factory=dict)  # weights that stayed replicated: name → why


@dataclass(frozen=True)
class Subject:
    """A model that runs unsharded, and how it will be sharded: found once, before the ranks part."""

    reference: nn.Module
    inputs: Mapping[str, Any]
    prepared: Prepared | None = None


def examine(name: str, cls: Any, tp: int, options: Mapping[str, Any], plan: bool = True) -> Result | Subject:
    """The model and its plan, proven for all ranks; or why there is none. Without ``plan``, the model alone."""
    result = Result(name, cls.__name__)
    warnings.filterwarnings("ignore")
    try:
        reference, inputs = build(name, cls, options)
    except Exception as error:
        result.kind, result.reason = "unbuildable", _line(error)
        return result
    try:
        return Subject(reference, inputs, prepare(reference, tp) if plan else None)
    except AutoTPError as error:
        result.kind, result.reason = "refused", f"{type(error).__name__}: {error}"
        return result


def shard(subject: Subject) -> nn.Module:
    """The model on this rank, as planned."""
    assert subject.prepared is not None
    return carry_out(copy.deepcopy(subject.reference), default_mesh(None), subject.prepared, Asked())


def compare(
    name: str, model: nn.Module, reference: nn.Module, inputs: Mapping[str, Any], tokens: bool
) -> Result:
    """A sharded model, on one rank, against the whole of it."""
    result = Result(name, type(reference).__name__)
    sharding = sharding_of(model)
    assert sharding is not None
    result.share, result.weights, result.whole = sharded_share(reference, sharding.plan)

    def aligned(name: str, mine: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        dims = sharding.dims.get(name)
        rank = sharding.rank
        return mine, whole if dims is None else slice_tensor(whole, dims, rank.partition, rank.rank)

    result.error, problem = difference(model, reference, inputs, aligned)
    if not problem and tokens and reference.can_generate():  # type: ignore[operator]
        problem = other_tokens(model, reference, inputs)
    if problem:
        result.kind, result.reason = "wrong", problem
    elif result.weights >= LEAST_SHARE:
        result.kind = "exact"
    else:
        result.kind = "partial"
        result.reason = "; ".join(f"{name}: {why}" for name, why in list(result.whole.items())[:3])
        result.reason += "".join(f"; {note}" for note in sharding.plan.notes[:3])
    return result


def sharded_share(model: nn.Module, plan: autotp.Plan) -> tuple[float, float, dict[str, str]]:
    """(share of all bytes that no rank holds whole, that of linear, embedding and expert weights, those of them that
    all hold whole): every parameter of two and more dims, but for the kernels of convolutions.
    """
    kernels = {_LAYER.sub("*", name) for name in _kernels(model)}
    total = sharded = 0
    whole: dict[str, tuple[int, str]] = {}
    for entry in plan.entries:
        if len(entry.global_shape) < 2 or _LAYER.sub("*", entry.name) in kernels:
            continue
        total += entry.global_bytes * entry.count
        if max(entry.local_bytes) < entry.global_bytes:
            sharded += entry.global_bytes * entry.count
        else:
            whole[entry.name] = (entry.global_bytes * entry.count, entry.note)
    largest = sorted(whole.items(), key=lambda item: -item[1][0])
    everything = plan.sharded_bytes / max(1, plan.weight_bytes)
    return everything, sharded / total if total else everything, {name: note for name, (_, note) in largest}


def _kernels(model: nn.Module) -> set[str]:
    """Those of convolutions over more than one place."""
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and max(module.kernel_size) > 1
        for own, _ in module.named_parameters()  # of a weight norm, too
    }


def large_weights(model: nn.Module) -> set[str]:
    """The linear, embedding and expert weights."""
    return {name for name, p in model.named_parameters() if p.ndim > 1} - _kernels(model)


Aligned = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


def difference(
    model: nn.Module, reference: nn.Module, inputs: Mapping[str, Any], aligned: Aligned, gradients: bool = True
) -> tuple[float, str]:
    """(largest relative difference, what is wrong) of outputs, gradients of inputs and of all parameters.

    ``aligned`` takes a parameter's name and its gradients, the rank's own and the whole one, to two that have to agree.
    """
    worst = 0.0
    outputs, theirs = [], []
    given: list[dict[str, Any]] = []
    for m, found in ((model, outputs), (reference, theirs)):
        given.append(
            {
                k: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in inputs.items()
            }
        )
        torch.manual_seed(3)
        with torch.set_grad_enabled(gradients):
            found += list(tensors(m(**given[-1])))
    if len(outputs) != len(theirs):
        return math.inf, f"{len(outputs)} outputs, not {len(theirs)}"
    moved: dict[str, float] = {}
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(outputs, theirs, strict=True))]
    if gradients:
        try:
            backward(theirs)
        except Exception:  # what cannot go backwards unsharded, in eval mode, is compared forwards
            reference.zero_grad()
        else:
            backward(outputs)
    pairs += [
        (f"gradient of {k}", given[0][k].grad, v.grad)
        for k, v in given[1].items()
        if isinstance(v, Tensor) and v.grad is not None
    ]
    grads = {k: None if p.grad is None else local_gradient(p.grad) for k, p in model.named_parameters()}
    whole = {k: p.grad for k, p in reference.named_parameters()}
    for name, grad in whole.items():
        mine = grads.get(name)
        if (mine is None) != (grad is None):
            return math.inf, f"gradient of {name}: one has none"
        if grad is not None and mine is not None:
            pairs.append((f"gradient of {name}", *aligned(name, mine, grad)))
    largest = max((float(g.abs().max()) for g in whole.values() if g is not None and g.numel()), default=0.0)
    for i, (what, a, b) in enumerate(pairs):
        if a is None or a.shape != b.shape:
            return math.inf, f"{what}: {None if a is None else tuple(a.shape)}, not {tuple(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return math.inf, f"{what} differs"
        elif b.numel():
            noise = 0.0 if i < len(outputs) else max(NOISE, torch.finfo(b.dtype).eps / RTOL)
            a, b = a.detach().double(), b.detach().double()
            finite = torch.isfinite(b)
            if not torch.equal(finite, torch.isfinite(a)):
                return math.inf, f"{what}: other elements are infinite or NaN"
            if not finite.any():
                continue
            scale, off = float(b[finite].abs().max()), float((a[finite] - b[finite]).abs().max())
            error = off / max(scale, noise * largest, 1e-8)
            if not error <= RTOL:
                name = what.removeprefix("gradient of ")
                if name in whole and scale < noise * largest and not moved:
                    moved = moved_by_rounding(reference, inputs, whole)
                if scale >= noise * largest or not off <= ROUNDED * moved.get(name, 0.0):
                    return error, f"{what}: off by {error:.1e} of its largest element {scale:.1e}"
            else:
                worst = max(worst, error)
    return worst, ""


def moved_by_rounding(
    model: nn.Module, inputs: Mapping[str, Any], gradients: Mapping[str, Tensor | None]
) -> dict[str, float]:
    """How far the elements of each gradient move, at most, where each weight moves by a unit in float32's last place.

    A factor in front of a norm has a gradient of zero but for what rounding leaves; the models that compute their norms
    in float32, whatever their dtype, leave that much.
    """
    found = dict.fromkeys(gradients, 0.0)
    for seed in range(3):
        nudged = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        unit = torch.finfo(torch.float32).eps
        with torch.no_grad():
            for parameter in nudged.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + unit * (sign - 0.5))
        nudged.zero_grad()
        torch.manual_seed(3)
        backward(list(tensors(nudged(**inputs))))
        for name, parameter in nudged.named_parameters():
            before = gradients.get(name)
            if before is not None and parameter.grad is not None and before.numel():
                found[name] = max(found[name], float((parameter.grad - before).abs().max()))
    return found


def backward(outputs: list[Tensor]) -> None:
    """From a sum of all outputs' elements, each by a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(outputs):
        if t.requires_grad and t.is_floating_point():
            weights = torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            total = total + (t.double() * weights).sum()
    if total.requires_grad:
        total.backward()


def other_tokens(model: Any, reference: Any, inputs: Mapping[str, Any]) -> str:
    """Greedy tokens with the cache that the model makes by itself."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    inputs = {k: v for k, v in inputs.items() if k != "use_cache"}
    try:
        torch.manual_seed(3)  # VibeVoice adds noise to what it hears
        with torch.no_grad():
            theirs = reference.generate(**inputs, **options)
    except Exception:  # it cannot generate unsharded either
        return ""
    torch.manual_seed(3)
    with torch.no_grad():
        mine = model.generate(**inputs, **options)
    return "" if torch.equal(mine, theirs) else "generates other tokens"


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, without caches."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if "cache" not in key and "past_key_values" not in key and "states" not in key:
                yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
