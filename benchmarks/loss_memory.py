"""Peak memory and time of a loss over a large vocabulary: gathered logits against the ranks' parts.

    python benchmarks/loss_memory.py [--tokens 2048] [--vocabulary 128256] [--width 256] [--ranks 2]

Each way runs in processes of its own, on the CPU; a head is applied to hidden states in bfloat16, the loss is taken in
float32 as transformers does it, and gradients flow back to both. Prints the peak of one rank's memory above what it
held before.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from autotp.runtime import mesh, ops
from autotp.runtime.lazy_gather import gather_when_needed


def run(rank: int, how: str, options: argparse.Namespace, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    prefix = mesh.connect(mesh.default_mesh("cpu"), {"": (tuple(range(options.ranks)),)})
    base, extra = divmod(options.vocabulary, options.ranks)
    sizes = [base + (r < extra) for r in range(options.ranks)]
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, dtype=torch.bfloat16, requires_grad=True)
    head = (0.02 * torch.randn(sizes[rank], options.width)).bfloat16().requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,))
    gather = ops.gather if how == "gathered" else gather_when_needed
    before = resident()
    for _ in range(2):
        began = time.perf_counter()
        logits = gather(F.linear(ops.enter(hidden, prefix), head), -1, sizes, (), (), prefix)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        took = time.perf_counter() - began
        del logits
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if rank == 0:
        with open(out, "w") as f:
            f.write(f"{peak - before} {took} {loss.item()}")
    dist.destroy_process_group()


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.tokens} tokens, {options.vocabulary} classes, {options.ranks} ranks")
    for how in ("gathered", "parts"):
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/out"
            mp.spawn(run, (how, options, f"{folder}/store", out), nprocs=options.ranks)
            with open(out) as f:
                peak, took, loss = f.read().split()
        print(f"{how:>9}: peak {int(peak) / 1e6:8.0f} MB, {float(took):6.2f} s a step, loss {float(loss):.6f}")


if __name__ == "__main__":
    main()
