"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the workers
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Workers import `tests` by name. At the end of the path, so that an installed autotp comes before this
# checkout.
sys.path.append(str(Path(__file__).parents[1]))

import pytest

from tests.dist.pool import Pool, shared
from tests.dist.worker import COLLECT_AFTER

gc.set_threshold(COLLECT_AFTER)


@pytest.fixture(scope="session")
def dist() -> Iterator[Pool]:
    """``dist.run(world, fn, *args)`` runs a module-level function on several ranks."""
    pool = shared()
    yield pool
    pool.close()
