"""Fine-tune a Llama of transformers on real text, sharded, against the same training unsharded.

    torchrun --nproc-per-node 2 examples/finetune_llama.py [--model DIRECTORY] [--steps 50]

Without a model it is a tiny Llama with random weights, so that nothing is downloaded. The text is read as bytes: the
vocabulary has to have 256 entries at least. As in any training script of transformers, the model is given ``labels=``
and returns the loss; the logits stay sharded over the vocabulary. At the end the weights are put together again and
loaded into an ordinary model.

transformers takes its norms and losses in float32, whatever the weights are, so that is how it is trained here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import agree, every_rank_holds, same_curves
from torch import Tensor, nn

import autotp

TEXT = Path(__file__).parent / "text" / "king_james.txt"
STEPS, BATCH, BLOCK, LEARNING_RATE, CLIP, TOLERANCE = 50, 4, 96, 1e-3, 1.0, 1e-4


def build(directory: str | None) -> nn.Module:
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


def main(directory: str | None, steps: int) -> bool:
    unsharded, model = build(directory), autotp.parallelize(build(directory))
    ok = every_rank_holds(model, unsharded)
    expected, found = train(unsharded, steps), train(model, steps)
    ok &= same_curves("float32", found, expected, TOLERANCE)
    restored = build(directory)
    restored.load_state_dict(autotp.full_state_dict(model))
    mine, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (restored, unsharded))
    return agree("trained weights", mine, theirs, 10 * TOLERANCE) and ok


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory with a Llama of transformers")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    ok = main(arguments.model, arguments.steps)
    dist.destroy_process_group()
    sys.exit(0 if ok else 1)
