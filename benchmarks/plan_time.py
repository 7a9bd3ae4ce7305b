"""How long `autotp plan` takes, and how much memory, on one core: a table over configs and degrees.

    python benchmarks/plan_time.py [--repeat 3]

Each row is a fresh process (imports and static verification included), the median of several. The last rows plan the
same model with 8 layers and with all: repeated layers are worked out once, so they should take about the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def measure(config: Path, tp: int) -> tuple[float, float]:
    """(seconds, MB) of one `autotp plan` in a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from autotp.cli import main; main()",
        "plan",
        str(config),
        "--tp",
        str(tp),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kB on Linux, in bytes on macOS
    return time.perf_counter() - start, usage.ru_maxrss * scale / 1e6


def with_layers(config: Path, layers: int, folder: Path) -> Path:
    """A copy of the config with another number of layers."""
    values = json.loads(config.read_text())
    values["num_hidden_layers"] = layers
    made = folder / f"{config.stem}-{layers}-layers.json"
    made.write_text(json.dumps(values))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    largest = CONFIGS / "llama-3.1-405b.json"
    with tempfile.TemporaryDirectory() as folder:
        rows = [(CONFIGS / name, tp) for name, tp in (("gpt2.json", 2), ("llama-3.1-8b.json", 8))]
        rows += [(with_layers(largest, 8, Path(folder)), 8), (largest, 8)]
        print(f"{'config':<32}{'tp':>4}{'seconds':>10}{'(min, max)':>16}{'peak MB':>10}")
        for config, tp in rows:
            runs = [measure(config, tp) for _ in range(repeat)]
            seconds = sorted(s for s, _ in runs)
            span = f"({seconds[0]:.1f}, {seconds[-1]:.1f})"
            memory = max(mb for _, mb in runs)
            print(
                f"{config.stem:<32}{tp:>4}{statistics.median(seconds):>10.1f}{span:>16}{memory:>10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
