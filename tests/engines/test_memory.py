"""Memory does not grow with the number of inputs. benchmarks/pipeline.py does the same with millions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def peak_mb(folder: Path, rows: int, workers: int) -> float:
    """The most resident memory of the main process of a run over so many texts."""
    manifest = folder / f"{rows}.parquet"
    if not manifest.exists():
        pq.write_table(pa.table({"text": [f"text number {i}" for i in range(rows)]}), manifest, row_group_size=5000)
    out = folder / f"{rows}-{workers}.out.parquet"
    command = [sys.executable, "-m", "mmcli", "embed", str(manifest), "-m", "fake:8", "-o", str(out), "--quiet"]
    process = subprocess.Popen([*command, "--part-rows", "2000", "--num-workers", str(workers)])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert pq.read_metadata(out).num_rows == rows
    return usage.ru_maxrss / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux only")
def test_memory_of_80_000_rows_is_that_of_30_000(tmp_path: Path) -> None:
    small, large = peak_mb(tmp_path, 30_000, 0), peak_mb(tmp_path, 80_000, 0)
    # 50,000 rows that stayed would be at least 50 MB.
    assert large < small + 16
