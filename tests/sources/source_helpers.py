"""What the tests of sources share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.protocols import Snapshot
from mmcli.core.records import Record
from mmcli.sources.open import SourceOptions, open_source

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def listed(folder: Path, *inputs: str | Path, stdin: Any = None, **options: Any) -> tuple[Snapshot, list[Record]]:
    """Snapshot and records of a source; `folder` is scratch."""
    source = open_source(SourceOptions(tuple(map(str, inputs)), **options), stdin)
    snapshot = source.snapshot(folder / "snapshot")
    return snapshot, list(source.records())


def digest(folder: Path, *inputs: str | Path, **options: Any) -> str:
    return listed(folder, *inputs, **options)[0].digest


def ids(records: list[Record]) -> list[str]:
    return [r.id for r in records]


def codes(records: list[Record]) -> list[str | None]:
    return [r.error.code if r.error else None for r in records]


def write_files(root: Path, *names: str | bytes) -> None:
    """Files that hold their own names."""
    import os

    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path
