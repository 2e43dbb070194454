"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test files run side by side, one process a core: threads of each would get in the others' way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data (photos, speech, video, checkpoints) beside the checkout."""
    folder = Path(os.environ.get("MMCLI_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder}; set MMCLI_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def sample_data() -> Path:
    return REPOSITORY / "sample_data"
