"""The same models through the peers, as their documentations say: transformers' tp_plan="auto", DeepSpeed AutoTP.

A peer's ``exact`` is autotp's: the same outputs and, for transformers, gradients, with the same share of the weights
sharded. Where a peer has no plan for a model it stays whole, which is ``partial``. DeepSpeed shards for inference, so
only outputs are held against it, in float32. Whatever a peer raises before the model's first forward counts as
``refused``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .compare import LEAST_SHARE, Result, Subject, difference, large_weights, other_tokens

PEERS = ("hf", "deepspeed")


def compare_peer(
    peer: str, name: str, subject: Subject, folder: str, rank: int, tp: int, tokens: bool
) -> Result:
    """What the peer makes of the model, on one rank. ``folder`` holds the model's checkpoint."""
    reference, inputs = subject.reference, subject.inputs
    if peer == "deepspeed":  # which takes no float64 on a CPU
        reference = copy.deepcopy(reference).float()
        inputs = {
            key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
    result = Result(name, type(reference).__name__)
    try:
        model = _hf(reference, folder, tp) if peer == "hf" else _deepspeed(reference, rank, tp)
    except Exception as error:
        result.kind, result.reason = "refused", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return result
    whole = {key: p for key, p in reference.named_parameters() if key in large_weights(reference)}
    mine = dict(model.named_parameters())
    total = sum(p.numel() for p in whole.values())
    kept = sum(p.numel() for key, p in whole.items() if key not in mine or _local(mine[key]).numel() == p.numel())
    result.weights = 1 - kept / max(1, total)

    def aligned(_: str, own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        own = _local(own)
        return own, min(_parts(theirs, own.shape, rank, tp), key=lambda part: float((part - own).abs().max()))

    gradients = peer == "hf"
    result.error, problem = difference(model, reference, inputs, aligned, gradients=gradients)
    if not problem and tokens and reference.can_generate():  # type: ignore[operator]
        problem = other_tokens(model, reference, inputs)
    result.kind = "wrong" if problem else "exact" if result.weights >= LEAST_SHARE else "partial"
    result.reason = problem
    return result


def _hf(reference: Any, folder: str, tp: int) -> nn.Module:
    from transformers.distributed import DistributedConfig

    model: nn.Module = type(reference).from_pretrained(
        folder,
        dtype=next(reference.parameters()).dtype,
        distributed_config=DistributedConfig(tp_plan="auto", tp_size=tp),
    )
    experts = getattr(reference.config, "_experts_implementation", None)
    if experts is not None:
        model.set_experts_implementation(experts)  # type: ignore[operator]
    return model.eval()


def _deepspeed(reference: nn.Module, rank: int, tp: int) -> nn.Module:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(tp), "RANK": str(rank), "WORLD_SIZE": str(tp)}
    import deepspeed

    dtype = next(reference.parameters()).dtype
    engine = deepspeed.init_inference(
        copy.deepcopy(reference), tensor_parallel={"tp_size": tp}, dtype=dtype, replace_with_kernel_inject=False
    )
    model: nn.Module = engine.module
    return model


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator, no-any-return]


def _parts(whole: Tensor, shape: torch.Size, rank: int, tp: int) -> Iterator[Tensor]:
    """What a rank can hold of a tensor in this shape: a chunk of one dim, or of each of two or three fused parts."""
    if whole.shape == shape:
        yield whole
        return
    for dim in [d for d, (a, b) in enumerate(zip(whole.shape, shape, strict=False)) if a != b][:1]:
        for fused in (1, 2, 3):
            if whole.shape[dim] % fused:
                continue
            chunks = [part.chunk(tp, dim) for part in whole.chunk(fused, dim)]
            if any(len(part) <= rank for part in chunks):
                continue
            found = torch.cat([part[rank] for part in chunks], dim)
            if found.shape == shape:
                yield found
