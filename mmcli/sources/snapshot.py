"""The input snapshot: what was listed, in a file, so that listing happens once and memory stays flat."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmcli.core.records import Modality, mtime_ns

# Rows of a record batch. Batches are equally long, so that the one with row N is known.
BATCH_ROWS = 8192
FILE_NAME = "inputs.arrow"
# Smaller manifests are identified by content: 64 MiB take 0.07 s to digest.
DIGEST_LIMIT = 64 * 1024 * 1024
# In a `size` column: there is something, but not a regular file (a folder, a pipe).
NOT_A_FILE = -1


@dataclass(slots=True)
class ResolvedInputs:
    """What `Source.snapshot` gives: see mmcli.core.protocols.Snapshot."""

    rows: int | None
    digest: str
    modalities: dict[Modality | None, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def stat_file(path: str | bytes) -> tuple[int | None, int | None]:
    """(bytes, mtime in ns) of a file; (None, None) when it cannot be found, (NOT_A_FILE, mtime) of others."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        # Missing, a name that is too long, or one with NUL: the decoder gives this row its error.
        return None, None
    return (status.st_size if stat.S_ISREG(status.st_mode) else NOT_A_FILE), mtime_ns(status)


def file_identity(path: str) -> str:
    """Hex digest that tells whether a manifest is the same file as before.

    Up to 64 MiB: over its content, so that a copy of it resumes; larger: over size, mtime and last 64 KiB
    (a Parquet footer). Raises OSError.
    """
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= DIGEST_LIMIT:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            file.seek(-65536, os.SEEK_END)
            digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns) + file.read())
    return digest.hexdigest()


class SnapshotWriter:
    """Streams rows into `folder`/inputs.arrow (Arrow IPC, lz4) and digests them.

    The file appears under its name, replacing an earlier one, when `close` is called. The digest covers the
    values of every column, not the bytes of the file, so it does not depend on the version of Arrow.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._target = folder / FILE_NAME
        self._temporary = folder / f".{FILE_NAME}.tmp"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._file = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._file, schema, options=options)
        self._pending: list[tuple[Any, ...]] = []
        self._digest = blake2b(digest_size=16)
        self.rows = 0

    def add(self, row: tuple[Any, ...]) -> None:
        """One row, its values in the order of the schema."""
        self._pending.append(row)
        if len(self._pending) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._pending, strict=True)
        arrays = [pa.array(values, f.type) for values, f in zip(columns, self._schema, strict=True)]
        for array in arrays:
            _digest_values(self._digest, array)
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self.rows += len(self._pending)
        self._pending.clear()

    def close(self) -> str:
        """Finish the file; returns the hex digest."""
        if self._pending:
            self._flush()
        self._writer.close()
        self._file.close()
        os.replace(self._temporary, self._target)
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Leave an earlier snapshot as it was."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abort()


def _digest_values(digest: Any, array: pa.Array) -> None:
    """Feed a flat array's values: where it is null, how long its strings are, and their bytes."""
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_integer(array.type):
        digest.update(array.fill_null(0).to_numpy().tobytes())
        return
    values = array.cast(pa.large_binary()).fill_null(b"")
    offsets = np.frombuffer(values.buffers()[1], np.int64)[: len(values) + 1]
    digest.update((offsets[1:] - offsets[:-1]).tobytes())
    if values.buffers()[2] is not None:
        digest.update(memoryview(values.buffers()[2])[offsets[0] : offsets[-1]])


def read_rows(folder: Path, start: int) -> Iterator[dict[str, pa.Array]]:
    """The columns of the snapshot from row `start` on, batch by batch."""
    with pa.OSFile(str(folder / FILE_NAME), "rb") as file:
        reader = pa.ipc.open_file(file)
        for index in range(start // BATCH_ROWS, reader.num_record_batches):
            batch = reader.get_batch(index)
            skip = max(0, start - index * BATCH_ROWS)
            yield dict(zip(batch.schema.names, batch.slice(skip).columns, strict=True))


def combine(parts: Mapping[str, str] | list[str]) -> str:
    """One hex digest from several named or ordered ones."""
    return blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def add_counts(total: Counter[Modality | None], more: Mapping[Modality | None, int]) -> None:
    """Add `more` to `total`, leaving out zeros."""
    total.update({k: n for k, n in more.items() if n})
