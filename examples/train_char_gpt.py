"""Train a nanoGPT-style character model on real text, sharded, against the same training unsharded.

    torchrun --nproc-per-node 2 examples/train_char_gpt.py

The model is written as people write it and knows nothing of tensor parallelism. Training runs in float64, so
that a sharded and an unsharded run that compute the same function stay together to the last digits. Half way the
sharded run is saved and taken up by a new model, as after a crash, at this degree or any other. At the end the
weights are saved in the ordinary layout, for the plain model to load.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import agree, every_rank_holds, say, shared_folder
from safetensors.torch import load_file
from torch import Tensor, nn

import autotp

TEXT = Path(__file__).parent / "text" / "king_james.txt"
STEPS, BATCH, BLOCK, LEARNING_RATE = 100, 8, 64, 2e-3
TOLERANCE = 1e-8  # of each loss and of each trained weight


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


def build(batches: Batches) -> CharGPT:
    torch.manual_seed(1611)
    return CharGPT(len(batches.characters)).double()


def train(model: nn.Module, batches: Batches, stop: int = STEPS, state: Path | None = None) -> Tensor:
    """The loss of every step up to ``stop``: from the one that ``state`` was saved at, and saved there in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    start = 0
    if state is not None and state.exists():
        start = autotp.load_training_state(state, model, optimizer)["step"]
    losses = []
    for step in range(start, stop):
        _, loss = model(**batches.draw(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if state is not None:
        autotp.save_training_state(state, model, optimizer, extra={"step": stop})
    return torch.stack(losses)


def main() -> bool:
    batches = Batches()
    unsharded = build(batches)
    expected = train(unsharded, batches)

    with shared_folder() as folder:
        losses = []
        for stop in (STEPS // 2, STEPS):
            model = autotp.parallelize(build(batches), example_inputs=batches.draw(0))
            losses.append(train(model, batches, stop, folder / "state"))
        found = torch.cat(losses)
        autotp.save_pretrained(model, folder / "weights")
        plain = build(batches)
        # a tied weight is saved once, under its first name
        other = plain.load_state_dict(load_file(folder / "weights" / "model.safetensors"), strict=False)

    sharded = every_rank_holds(model, unsharded)
    say(f"  {'step':>6} {'unsharded loss':>18} {'sharded loss':>18}")
    for step in (*range(0, STEPS, 20), STEPS - 1):
        say(f"  {step:>6} {expected[step].item():>18.12f} {found[step].item():>18.12f}")
    learned = bool(expected[-1] < 0.7 * expected[0])
    if not learned:
        say("  the loss did not fall: the comparison would say little")
    same_losses = agree("losses", found, expected, TOLERANCE)

    if other.unexpected_keys or other.missing_keys != ["lm_head.weight"]:
        say(f"  what was saved has other names: {other}")
        return False
    trained, whole = plain.state_dict(), unsharded.state_dict()
    found, expected = (torch.cat([state[name].flatten() for name in whole]) for state in (trained, whole))
    same_weights = agree("trained weights, saved and loaded", found, expected, TOLERANCE)
    return sharded and learned and same_losses and same_weights


if __name__ == "__main__":
    dist.init_process_group("gloo")
    ok = main()
    dist.destroy_process_group()
    sys.exit(0 if ok else 1)
