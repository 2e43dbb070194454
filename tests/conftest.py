"""Shared fixtures."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test files run side by side, one process a core: threads of each would get in the others' way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


# Tests that kill copies of this process come first: once models were in it, a copy takes ten times as long (the
# tests of sinks 16 s, and 90 at the end).
ORDER = ["sinks", "core", "sources", "media", "engines", "tasks"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In order of folders; files stay together."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
        return ORDER.index(folder) if folder in ORDER else len(ORDER)

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _nothing_to_look_through() -> None:
    """What is there before a file's tests is looked through by none of their collections of garbage."""
    gc.collect()
    gc.freeze()


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
