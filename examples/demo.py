"""Two unmodified models, sharded over the ranks that torchrun started, each against itself unsharded.

    make demo

Exit code 0 only if every number agrees within the stated tolerance on every rank.
"""

from __future__ import annotations

import sys

import embed_sentences
import torch.distributed as dist
import train_gpt
from ranks import say


def main() -> bool:
    say(f"1. all-MiniLM-L6-v2, a real model with its real weights, over {dist.get_world_size()} processes\n")
    same_embeddings = embed_sentences.main()
    say(f"\n2. a nanoGPT-style model, trained {train_gpt.STEPS} steps on the King James Bible\n")
    same_training = train_gpt.main()
    ok = same_embeddings and same_training
    say("\nAll numbers agree." if ok else "\nThe numbers do NOT agree.")
    return ok


if __name__ == "__main__":
    dist.init_process_group("gloo")
    ok = main()
    dist.destroy_process_group()
    sys.exit(0 if ok else 1)
