"""Each rank plans for itself: whatever the hashes of strings are in its process, it finds the same plan."""

from __future__ import annotations

import subprocess
import sys

from tests.fuzz.models import draw_model

TIMEOUT_S = 240
SEEDS = range(6)


def print_plans() -> None:
    """Of some random models, everything that is planned."""
    from autotp.errors import AutoTPError
    from autotp.prepare import prepare

    for seed in SEEDS:
        drawn = draw_model(seed)
        try:
            plan = prepare(drawn.build(), drawn.tp, example_inputs=drawn.inputs()).plan
        except AutoTPError as error:
            print(seed, error)
        else:
            print(seed, plan.fingerprint, plan.to_yaml())


def test_one_plan_in_every_process() -> None:
    run = "from tests.plan.test_one_plan import print_plans; print_plans()"
    said = [
        subprocess.run(
            [sys.executable, "-c", run],
            env={"PYTHONHASHSEED": hashes, "PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        ).stdout
        for hashes in ("1", "2")
    ]
    assert said[0] == said[1]
    assert said[0].count("\ntp:") > len(SEEDS) // 2
