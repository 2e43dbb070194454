"""Memory does not grow with the number of inputs, nor with the size of a row group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# Peak of one pass, MB, over what the same pass needs for the file's first tenth.
PASS = """
import resource, sys
from pathlib import Path
from mmcli.sources.open import SourceOptions, open_source
source = open_source(SourceOptions((sys.argv[1],), input_format=sys.argv[3] or None))
source.snapshot(Path(sys.argv[2]))
n = sum(1 for _ in source.records())
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(path: Path, scratch: Path, kind: str = "") -> tuple[int, float]:
    out = subprocess.check_output([sys.executable, "-c", PASS, str(path), str(scratch / "s"), kind], text=True)
    rows, megabytes = out.split()
    return int(rows), float(megabytes)


@pytest.mark.parametrize(
    "suffix", ["jsonl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("parquet", "txt"))]
)
def test_many_rows(tmp_path: Path, suffix: str) -> None:
    for name, rows in (("few", 30_000), ("many", 300_000)):
        paths = [f"gone/{i:08}.jpg" for i in range(rows)]
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"image": paths}), path)
        else:
            line = '{{"image": "{}"}}\n' if suffix == "jsonl" else "{}\n"
            path.write_text("".join(line.format(one) for one in paths))
    few, many = (
        peak(tmp_path / f"{name}.{suffix}", tmp_path, "paths" if suffix == "txt" else "")
        for name in ("few", "many")
    )
    assert (few[0], many[0]) == (30_000, 300_000)
    assert many[1] - few[1] < 30, f"{few[1]:.0f} -> {many[1]:.0f} MB"


def test_a_large_row_group_of_pictures(tmp_path: Path) -> None:
    """400 MB of bytes in one row group."""
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(tmp_path / "m.parquet", schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(
            pa.table({"image": [b"%08d" % i + b"x" * 200_000 for i in range(2000)]}), row_group_size=2000
        )
    small = pq.ParquetFile(tmp_path / "m.parquet").read_row_group(0).slice(0, 20)
    pq.write_table(small, tmp_path / "small.parquet")
    rows, megabytes = peak(tmp_path / "m.parquet", tmp_path)
    assert rows == 2000
    assert megabytes - peak(tmp_path / "small.parquet", tmp_path)[1] < 100
