"""Peak memory of each rank while a checkpoint is loaded: autotp.from_pretrained next to transformers' tp_plan="auto".

    python benchmarks/load_memory.py            # a Llama of 2 GB, on 2 and 4 ranks
    python benchmarks/load_memory.py --gb 0.2   # a quick look

The peak is of anonymous memory, sampled while the model loads; the interpreter and the libraries (the memory before)
are taken off. Pages of mapped files, which the system can drop, stand beside it: on a CPU transformers leaves weights
that it need not convert in the mapped file, so that there they take the place of the share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MB = 1 << 20
LIMIT_MB = 300


def write(folder: str, gb: float) -> int:
    """A random Llama in float32 of about this size, in files of 500 MB; its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = (
        2048,
        max(1, round((gb * 2**30 / 4 - 2 * 8192 * 2048) / (2048 * (2 * 2048 + 2 * 512 + 3 * 5504)))),
    )
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(p.nbytes for p in model.parameters())


def resident() -> tuple[int, int]:
    """Bytes of anonymous memory, and of mapped files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if "RssAnon" not in found:
        raise RuntimeError("no RssAnon: this benchmark runs on Linux")
    anonymous, mapped = (int(found[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


def measure(who: str, folder: str) -> None:
    """On each rank: load, and print what it took."""
    import torch
    import torch.distributed as dist
    import transformers

    import autotp

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _ = transformers.LlamaForCausalLM
    before, peak, stop = resident(), (0, 0), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            now = resident()
            peak = max(peak[0], now[0]), max(peak[1], now[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    if who == "autotp":
        model: Any = autotp.from_pretrained(folder)
        held = sum(p.nbytes for p in model.parameters())
        largest = max(p.nbytes for p in model.parameters())
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        held, largest = sum(p.nbytes for p in local), max(p.nbytes for p in local)
    seconds = time.monotonic() - start
    stop.set()
    watcher.join()
    mine = {
        "share": held,
        "slice": largest,
        "peak": peak[0] - before[0],
        "mapped": peak[1] - before[1],
        "seconds": seconds,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(max(everyone, key=lambda m: m["peak"] + m["mapped"])), flush=True)
    dist.destroy_process_group()


def run(who: str, folder: str, tp: int) -> dict[str, float] | str:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(tp),
        "--master-port",
        "0",
    ]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        __file__,
        "--measure",
        who,
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return found
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    return (errors or ["failed"])[0][:100]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        total = write(folder, arguments.gb)
        print(f"checkpoint of {total / 2**30:.2f} GiB; MiB of the rank that takes the most\n")
        print(f"{'tp':>2}  {'':14}{'share':>8}{'slice':>8}{'peak':>8}{'mapped':>8}{'seconds':>9}")
        for tp in arguments.tp:
            for who in ("autotp", "transformers"):
                found = run(who, folder, tp)
                if isinstance(found, str):
                    print(f"{tp:>2}  {who:14}{found}")
                    worst = float("inf") if who == "autotp" else worst
                    continue
                share, piece, peak, mapped = (found[k] / MB for k in ("share", "slice", "peak", "mapped"))
                figures = "".join(f"{n:8.0f}" for n in (share, piece, peak, mapped))
                print(f"{tp:>2}  {who:14}{figures}{found['seconds']:9.1f}", flush=True)
                if who == "autotp":
                    worst = max(worst, peak + max(mapped, 0) - share - piece)
    print(f"\nautotp: at most {worst:.0f} MiB beyond share and largest slice (limit {LIMIT_MB})")
    sys.exit(worst > LIMIT_MB)


if __name__ == "__main__":
    main()
