from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny checkpoints are built there.
sys.path.append(str(Path(__file__).resolve().parent.parent / "models"))


@pytest.fixture(scope="module", autouse=True)
def pack_small_layers() -> Iterator[None]:
    """Layers of tiny models are packed as those of real ones are: what learns must not be."""
    from mmcli.models import packed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed, "LEAST_WEIGHTS", 0)
        patched.setattr(packed, "LEAST_PATCH", 4)
        yield
