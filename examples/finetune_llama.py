"""Fine-tune a Llama of transformers on real text, sharded, against the same training unsharded.

    torchrun --nproc-per-node 2 examples/finetune_llama.py [--model DIRECTORY] [--steps 50]

Without a model it is a tiny Llama with random weights, so that nothing is downloaded. The text is read as bytes: the
vocabulary has to have 256 entries at least. As in any training script of transformers, the model is given ``labels=``
and returns the loss; the logits stay sharded over the vocabulary. At the end the weights are put together again and
loaded into an ordinary model.

It is trained in float32 and in float64. transformers takes a Llama's loss in float32 whatever the weights are, so in
float64 the model is given another one by its own setting for that, ``loss_function``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import agree, every_rank_holds, same_curves
from torch import Tensor, nn

import autotp

TEXT = Path(__file__).parent / "text" / "king_james.txt"
STEPS, BATCH, BLOCK, LEARNING_RATE, CLIP = 50, 4, 96, 1e-3, 1.0
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative, of each loss


def loss_in_float64(logits: Tensor, labels: Tensor, **_: object) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def build(directory: str | None, dtype: torch.dtype) -> nn.Module:
    model = load(directory).to(dtype)
    if dtype is torch.float64:
        model.loss_function = loss_in_float64
    return model


def load(directory: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if directory is not None:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=BLOCK,
        use_cache=False,
    )
    torch.manual_seed(1611)
    return LlamaForCausalLM(config)


def draw(step: int) -> dict[str, Tensor]:
    """Random pieces of the text, the same ones on every rank."""
    data = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - BLOCK, (BATCH,), generator=torch.Generator().manual_seed(step))
    ids = torch.stack([data[i : i + BLOCK] for i in starts.tolist()])
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, steps: int) -> Tensor:
    """The loss of every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        loss = model(**draw(step)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def compare(directory: str | None, dtype: torch.dtype, steps: int) -> bool:
    """Train both in this dtype."""
    unsharded, model = build(directory, dtype), autotp.parallelize(build(directory, dtype))
    ok = every_rank_holds(model, unsharded)
    expected, found = train(unsharded, steps), train(model, steps)
    ok &= same_curves(f"{dtype}".removeprefix("torch."), found, expected, TOLERANCE[dtype])
    restored = build(directory, dtype)
    restored.load_state_dict(autotp.full_state_dict(model))
    mine, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (restored, unsharded))
    return agree("trained weights", mine, theirs, 10 * TOLERANCE[dtype]) and ok


def main(directory: str | None, steps: int) -> bool:
    return all(compare(directory, dtype, steps) for dtype in TOLERANCE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory with a Llama of transformers")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    ok = main(arguments.model, arguments.steps)
    dist.destroy_process_group()
    sys.exit(0 if ok else 1)
