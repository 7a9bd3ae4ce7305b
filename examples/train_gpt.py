"""Pre-train a nanoGPT-style character model on real text, sharded, against the same training unsharded.

    torchrun --nproc-per-node 2 examples/train_gpt.py [--steps 50]

The model is written as people write it and knows nothing of tensor parallelism. The run is trained in float32 and in
float64: two runs that compute the same function stay together to the last digits of either. With the targets given,
the loss is taken from each rank's part of the vocabulary, and the logits are never gathered. Half way the sharded run
is saved and taken up by a new model, as after a crash, at this degree or any other. At the end the weights are saved in
the ordinary layout, for the plain model to load.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import agree, every_rank_holds, same_curves, say, shared_folder
from safetensors.torch import load_file
from torch import Tensor, nn

import autotp

TEXT = Path(__file__).parent / "text" / "king_james.txt"
STEPS, BATCH, BLOCK, LEARNING_RATE, CLIP = 50, 8, 64, 2e-3, 1.0
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative, of each loss


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_embd, self.n_head = n_embd, n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class CharGPT(nn.Module):
    """Tied embedding and head, learned positions, returns (logits, loss)."""

    def __init__(self, vocab_size: int, n_embd: int = 96, n_head: int = 6, n_layer: int = 3) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(BLOCK, n_embd)
        self.h = nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class Batches:
    """Random pieces of the text, the same ones on every rank."""

    def __init__(self) -> None:
        text = TEXT.read_text()
        self.characters = sorted(set(text))
        number = {c: i for i, c in enumerate(self.characters)}
        self.data = torch.tensor([number[c] for c in text])

    def draw(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.data) - BLOCK - 1, (BATCH,), generator=generator)
        pieces = torch.stack([self.data[i : i + BLOCK + 1] for i in starts.tolist()])
        return {"idx": pieces[:, :-1].contiguous(), "targets": pieces[:, 1:].contiguous()}


def build(batches: Batches, dtype: torch.dtype) -> CharGPT:
    torch.manual_seed(1611)
    return CharGPT(len(batches.characters)).to(dtype)


def train(
    model: nn.Module, batches: Batches, steps: int, stop: int | None = None, state: Path | None = None
) -> Tensor:
    """The loss of every step up to ``stop``: from the one that ``state`` was saved at, and saved there in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stop, start = steps if stop is None else stop, 0
    if state is not None and state.exists():
        start = autotp.load_training_state(state, model, optimizer, schedule)["step"]
    losses = []
    for step in range(start, stop):
        _, loss = model(**batches.draw(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    if state is not None:
        autotp.save_training_state(state, model, optimizer, schedule, extra={"step": stop})
    return torch.stack(losses)


def compare(batches: Batches, dtype: torch.dtype, steps: int) -> bool:
    """Train both in this dtype."""
    unsharded = build(batches, dtype)
    expected = train(unsharded, batches, steps)
    with shared_folder() as folder:
        losses = []
        for stop in (steps // 2, steps):
            model = autotp.parallelize(build(batches, dtype), example_inputs=batches.draw(0))
            losses.append(train(model, batches, steps, stop, folder / "state"))
        autotp.save_pretrained(model, folder / "weights")
        plain = build(batches, dtype)
        # a tied weight is saved once, under its first name
        other = plain.load_state_dict(load_file(folder / "weights" / "model.safetensors"), strict=False)
    ok = every_rank_holds(model, unsharded)
    ok &= same_curves(f"{dtype}".removeprefix("torch."), torch.cat(losses), expected, TOLERANCE[dtype])
    if expected[-1] > 0.8 * expected[0]:
        say("  the loss did not fall: the comparison would say little")
        ok = False
    if other.unexpected_keys or other.missing_keys != ["lm_head.weight"]:
        say(f"  what was saved has other names: {other}")
        return False
    trained, whole = plain.state_dict(), unsharded.state_dict()
    found, expected = (torch.cat([state[name].flatten() for name in whole]) for state in (trained, whole))
    return agree("trained weights, saved and loaded", found, expected, 10 * TOLERANCE[dtype]) and ok


def main(dtypes: tuple[torch.dtype, ...] = (torch.float64,), steps: int = STEPS) -> bool:
    batches = Batches()
    return all(compare(batches, dtype, steps) for dtype in dtypes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    ok = main((torch.float32, torch.float64), steps)
    dist.destroy_process_group()
    sys.exit(0 if ok else 1)
