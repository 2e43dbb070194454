from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sink_rows import OUTPUTS


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: these tests sync some 10,000 times, 1 ms each on a disk."""
    folder = tempfile.mkdtemp(prefix="mmcli-sinks-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=OUTPUTS, ids=[f"{f}-{'folder' if o.endswith('/') else 'file'}" for o, f in OUTPUTS])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(output, format), for every kind of output."""
    out, format_name = request.param
    (tmp_path / "work").mkdir()
    return f"{tmp_path}/work/{out}", format_name
