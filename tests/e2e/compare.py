"""Is the sharded model the unsharded one? These functions run on every rank, in the workers of the pool.

The reference is built from the same seed on every rank; both compute in float64. A gradient that is zero in
exact arithmetic (that of a key bias: softmax does not see it) is noise of either model, hence the absolute
part of the tolerance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp.axes.layout import owners, slice_tensor
from autotp.plan.names import unfold
from autotp.plan.plan import Plan
from autotp.rewrite.state import Sharding, sharding_of
from autotp.runtime.record import CollectiveLog, record_collectives
from autotp.runtime.sharded_gradient import local_gradient
from tests.models import MODELS, Inputs, ModelCase, call

RTOL, ATOL = 1e-9, 1e-11
NEW_TOKENS = 16
OTHER_BATCH, OTHER_SEQ = 2, 7


@dataclass(frozen=True)
class Report:
    """What one rank found out about one model."""

    problems: tuple[str, ...]
    plan: Plan
    placements: Mapping[str, str]  # parameter → column, row, vocab, shard or replicate


@dataclass
class Problems:
    found: list[str] = field(default_factory=list)
    rtol: float = RTOL

    def close(self, what: str, mine: Tensor, theirs: Tensor) -> None:
        """Equal up to rounding, on the scale of the tensor's largest element."""
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            self.found.append(
                f"{what}: {mine.dtype} {list(mine.shape)}, not {theirs.dtype} {list(theirs.shape)}"
            )
        elif not theirs.is_floating_point():
            self.check(torch.equal(mine, theirs), f"{what} differs")
        elif theirs.numel():
            mine, theirs = mine.detach(), theirs.detach()
            error, scale = float((mine - theirs).abs().max()), float(theirs.abs().max())
            self.check(
                error <= ATOL + self.rtol * scale,
                f"{what}: off by {error:.2e}, its largest element is {scale:.2e}",
            )

    def check(self, good: bool, problem: str) -> None:
        if not good:
            self.found.append(problem)

    def equal(self, what: str, mine: object, planned: object) -> None:
        self.check(mine == planned, f"{what}: {mine}, planned {planned}")


def compare(name: str, variant: dict[str, object], guessed: bool = False, rtol: float = RTOL) -> Report:
    """Shard a model of the table and hold everything that it does against the unsharded one.

    Args:
        guessed: let autotp find the example inputs.
    """
    case = MODELS[name]
    reference, model = case.build(**variant), case.build(**variant)
    traced, other = case.inputs(0), case.inputs(1, OTHER_BATCH, OTHER_SEQ)
    sharded = autotp.parallelize(model, example_inputs=None if guessed else traced)
    assert sharded is model
    sharding = sharding_of(model)
    assert sharding is not None
    problems = Problems(rtol=rtol)
    compare_parameters(problems, model, reference, sharding)
    with record_collectives() as log:
        compare_passes(problems, "inputs as traced", model, reference, traced, sharding)
    if not guessed:  # of other inputs the plan does not know the bytes
        compare_collectives(problems, log, sharding.plan, sharding.rank.rank)
    compare_passes(problems, "other inputs", model, reference, other, sharding)
    compare_state(problems, model, reference)
    if case.generative:
        _compare_generated(problems, case, model, reference)
    placements = {name: e.placement for e in sharding.plan.entries for name in unfold(e.name)}
    return Report(tuple(problems.found), sharding.plan, placements)


def compare_parameters(
    problems: Problems, model: nn.Module, reference: nn.Module, sharding: Sharding
) -> None:
    """Names, slices and planned shapes."""
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    problems.equal("parameters", list(mine), list(theirs))
    shapes = {name: e.local_shapes for e in sharding.plan.entries for name in unfold(e.name)}
    problems.equal("planned parameters", set(shapes), set(mine))
    rank = sharding.rank.rank
    for name, parameter in mine.items():
        problems.equal(f"local shape of {name}", tuple(parameter.shape), shapes[name][rank])
        problems.check(
            torch.equal(parameter, _slice(theirs[name], name, sharding)), f"{name} is not its slice"
        )
        problems.check(parameter.is_contiguous(), f"{name} is not contiguous")


def _slice(whole: Tensor, name: str, sharding: Sharding) -> Tensor:
    dims = sharding.dims.get(name)
    return whole if dims is None else slice_tensor(whole, dims, sharding.rank.partition, sharding.rank.rank)


def compare_passes(
    problems: Problems, which: str, model: nn.Module, reference: nn.Module, inputs: Inputs, sharding: Sharding
) -> None:
    """Outputs, the gradients of all parameters and of the inputs."""
    before = len(problems.found)
    mine_in, their_in = trainable(inputs), trainable(inputs)
    mine, theirs = tensors_of(call(model, mine_in)), tensors_of(call(reference, their_in))
    problems.equal("number of outputs", len(mine), len(theirs))
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        problems.close(f"output {i}", a, b)
        problems.equal(f"output {i} needs a gradient", a.requires_grad, b.requires_grad)
    reference.zero_grad()
    model.zero_grad()
    loss_of(theirs).backward()
    loss_of(mine).backward()
    for i, (a, b) in enumerate(zip(tensors_of(mine_in), tensors_of(their_in), strict=True)):
        if b.grad is not None:
            assert a.grad is not None
            problems.close(f"gradient of input {i}", a.grad, b.grad)
    whole = dict(reference.named_parameters())
    alike: dict[str, Tensor] = {f"output {i}": a.detach() for i, a in enumerate(mine)}
    for name, parameter in model.named_parameters():
        grad = whole[name].grad
        if grad is None or parameter.grad is None:
            problems.equal(f"{name} has a gradient", parameter.grad is not None, grad is not None)
            continue
        mine_grad = local_gradient(parameter.grad)
        problems.close(f"gradient of {name}", mine_grad, _slice(grad, name, sharding))
        alike[name] = mine_grad
    _compare_ranks(problems, alike, sharding)
    problems.found[before:] = [f"{which}: {p}" for p in problems.found[before:]]


def _compare_ranks(problems: Problems, values: dict[str, Tensor], sharding: Sharding) -> None:
    """Ranks that hold the same slice hold the same bits: replicas must not drift apart as they are trained."""
    digests = {n: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for n, v in values.items()}
    everyone: list[dict[str, str]] = [{}] * sharding.rank.tp
    dist.all_gather_object(everyone, digests)
    for name in values:
        dims = sharding.dims.get(name)
        groups = ((*range(sharding.rank.tp),),) if dims is None else owners(dims, sharding.rank.partition)
        for group in groups:
            problems.check(
                len({everyone[rank].get(name) for rank in group}) == 1,
                f"{name} differs on ranks {group}, who all have it",
            )


def compare_collectives(problems: Problems, log: CollectiveLog, plan: Plan, rank: int) -> None:
    """What went over the wire in one forward and backward pass is what the plan says, number and bytes."""
    for kind in ("all_reduce", "all_gather"):
        for direction, phases in (("forward", ("forward",)), ("backward", ("backward", "step"))):
            planned = [c for c in plan.collectives if c.kind == kind and c.phase in phases]
            what = f"{direction} {kind}"
            problems.equal(what, log.count(kind, direction), sum(c.count for c in planned))
            problems.equal(
                f"bytes of {what}", log.bytes(kind, direction), sum(c.bytes * c.count for c in planned)
            )


def compare_state(problems: Problems, model: nn.Module, reference: nn.Module) -> None:
    mine, theirs = autotp.full_state_dict(model), reference.state_dict()
    problems.equal("names in the state dict", list(mine), list(theirs))
    for name, tensor in theirs.items():
        problems.check(
            name in mine and torch.equal(mine[name], tensor), f"{name} is not the same in the state dict"
        )


def _compare_generated(problems: Problems, case: ModelCase, model: Any, reference: Any) -> None:
    """Greedy tokens, with the KV cache that the model makes by itself, and the logits behind them."""
    inputs = case.inputs(2, OTHER_BATCH, OTHER_SEQ)
    assert isinstance(inputs, dict)
    options = {
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "use_cache": True,
    }
    options |= {"output_logits": True, "return_dict_in_generate": True}
    mine, theirs = (m.generate(inputs["input_ids"], **options) for m in (model, reference))
    problems.check(torch.equal(mine.sequences, theirs.sequences), "generates other tokens")
    for i, (a, b) in enumerate(zip(mine.logits, theirs.logits, strict=True)):
        problems.close(f"logits of new token {i}", a, b)


def trainable(inputs: Inputs) -> Inputs:
    """The same inputs, float ones with a gradient."""

    def fresh(value: Tensor) -> Tensor:
        return value.clone().requires_grad_(value.is_floating_point())

    if isinstance(inputs, dict):
        return {name: fresh(value) for name, value in inputs.items()}
    return tuple(map(fresh, inputs))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output; a KV cache holds each rank's own heads and is left out."""
    return list(_walk(value))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _walk(item)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A number in which every output counts, each element with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(outputs):
        if output.is_floating_point() and output.requires_grad:
            weights = torch.randn(
                output.shape, generator=torch.Generator().manual_seed(i), dtype=output.dtype
            )
            total = total + (output * weights).sum()
    return total
