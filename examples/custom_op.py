"""A model with an op that autotp does not know, before and after it is told how the op shards.

    torchrun --nproc-per-node 2 examples/custom_op.py

Without a rule the op needs all heads, so they are gathered for it; with one line it runs on each rank's heads. Exit
code 0 only if both give the numbers of the unsharded model, gradients included, on every rank.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from ranks import agree, say
from torch import Tensor, nn

import autotp

WIDTH, HEADS, TOLERANCE = 48, 8, 1e-12


@torch.library.custom_op("example::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v: [b, h, q, d], [b, h, k, d], [b, h, k, e] -> [b, h, q, e]"""
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = ctx.saved_tensors
    p = torch.softmax(q @ k.transpose(-1, -2), -1)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


attention.register_autograd(_backward, setup_context=_save)

# b and h pass: each rank calls the op on its heads. A softmax needs all keys, a product q·k all of d.
RULE = "b h q d, b h k d, b h k e -> b h q e"


class Block(nn.Module):
    """Self-attention and an MLP, as anybody would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.ops.example.attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(torch.relu(self.up(self.norm(x))))


def sharded_agrees(model: nn.Module, reference: nn.Module) -> bool:
    """Shard, and compare the output and the gradient of the input."""
    inputs = [torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))] * 2
    mine, theirs = (x.clone().requires_grad_() for x in inputs)
    model = autotp.parallelize(model, example_inputs=(inputs[0],))
    plan = autotp.plan(reference, dist.get_world_size(), example_inputs=(inputs[0],))
    for c in plan.collectives:
        if c.phase == "forward":
            say(f"  forward: {c.count} {c.kind} of {c.bytes} bytes at {c.where or 'the root module'}")
    for note in plan.notes:
        say(f"  {note}")
    a, b = model(mine), reference(theirs)
    a.square().sum().backward()
    b.square().sum().backward()
    same = agree("  output", a.detach(), b.detach(), TOLERANCE)
    assert mine.grad is not None and theirs.grad is not None
    return agree("  gradient of the input", mine.grad, theirs.grad, 100 * TOLERANCE) and same


def main() -> bool:
    torch.manual_seed(0)
    reference = Block().double()
    say("without a rule")
    ok = sharded_agrees(copy.deepcopy(reference), reference)
    say(f"\nwith the rule {RULE!r}")
    autotp.register_rule("example::attention", RULE, blocked="k d")
    example = [torch.randn(2, 5, n, 3, dtype=torch.float64) for n in (7, 11, 11)]
    say(f"  {autotp.check_rule('example::attention', example)}")
    return sharded_agrees(copy.deepcopy(reference), reference) and ok


if __name__ == "__main__":
    dist.init_process_group("gloo")
    agreed = main()
    dist.destroy_process_group()
    sys.exit(0 if agreed else 1)
