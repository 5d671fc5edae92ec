"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HANMO_LANG", "en")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HANMO_QUIET", "1")
# Tests run side by side: more threads than cores wait for each other in busy loops and take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HANMO_THREADS", "1")

collect_ignore = ["trainer_kills.py"]  # a script that a test runs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real test data that lies beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
