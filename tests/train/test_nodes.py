"""Two nodes: two torchruns that find each other by a rendezvous, each with one rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 150


def test_two_nodes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two-nodes"]
    command += ["--local-addr", "127.0.0.1"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    nodes = [
        subprocess.Popen(
            [*command, "--rdzv-conf", f"is_host={int(node == 0)}", "-m", "tests.train.nodes"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # torchrun ends its ranks then
            node.wait(20)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    text = "".join(outputs)
    assert "rank 0 of 2: trained alike" in text
    assert "rank 1 of 2: trained alike" in text
