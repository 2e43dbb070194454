"""Results -> the output's Arrow schema and record batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.protocols import Source, Task
from mmcli.core.records import Record, Result
from mmcli.core.texts import TextRecords


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of an output: `id`, `path`, `modality`, the task's, passthrough, status and error columns."""

    task: Task
    task_fields: tuple[pa.Field, ...]
    keep: pa.Schema

    @classmethod
    def of(cls, task: Task, source: Source) -> Layout:
        return cls(task, tuple(task.fields(source.slots)), source.keep)

    @property
    def schema(self) -> pa.Schema:
        """Known before the first row is read."""
        return pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("path", pa.string()),
                pa.field("modality", pa.string()),
                *self.task_fields,
                *self.keep,
                pa.field("status", pa.string(), nullable=False),
                pa.field("error_code", pa.string()),
                pa.field("error_stage", pa.string()),
                pa.field("error_message", pa.string()),
            ]
        )

    def batch(self, results: Sequence[Result]) -> pa.RecordBatch:
        """Consecutive results as one record batch."""
        modality = pa.array([r.modality for r in results], pa.string())
        columns = self.task.columns(results, self.task_fields)
        return self._batch([r.record for r in results], modality, columns, _states([r.error for r in results]))

    def whole(
        self,
        records: Sequence[Record],
        modality: str,
        failed: Mapping[int, tuple[str | None, RowError]],
        columns: Sequence[pa.Array],
    ) -> pa.RecordBatch:
        """Consecutive rows as one record batch: of one modality, but for those that have `failed`, by position.

        columns  the task's
        """
        count = len(records)
        if not failed:
            return self._batch(records, pa.repeat(pa.scalar(modality, pa.string()), count), columns, _all_ok(count))
        there: tuple[str | None, RowError | None] = (modality, None)
        known = [failed.get(i, there) for i in range(count)]
        modalities = pa.array([one for one, _ in known], pa.string())
        return self._batch(records, modalities, columns, _states([error for _, error in known]))

    def _batch(
        self, records: Sequence[Record], modality: pa.Array, columns: Sequence[pa.Array], states: Sequence[pa.Array]
    ) -> pa.RecordBatch:
        ids, paths, keep = self._described(records)
        arrays = [
            pa.array(ids, pa.string()),
            pa.array(paths, pa.string()),
            modality,
            *columns,
            *(pa.array(values, f.type) for values, f in zip(keep, self.keep, strict=True)),
            *states,
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _described(
        self, records: Sequence[Record]
    ) -> tuple[Sequence[str], Sequence[str | None], Sequence[Sequence[Any]]]:
        """Ids, paths, and each passthrough column."""
        if isinstance(records, TextRecords):
            return records.ids, [None] * len(records), records.keep
        keep = [[r.keep[i] for r in records] for i in range(len(self.keep))]
        return [r.id for r in records], [r.path for r in records], keep


def _states(errors: Sequence[RowError | None]) -> list[pa.Array]:
    """The columns status, error_code, error_stage and error_message."""
    if not any(errors):
        return _all_ok(len(errors))
    return [
        pa.array(["error" if e else "ok" for e in errors], pa.string()),
        pa.array([e.code if e else None for e in errors], pa.string()),
        pa.array([e.stage if e else None for e in errors], pa.string()),
        pa.array([e.message if e else None for e in errors], pa.string()),
    ]


def _all_ok(rows: int) -> list[pa.Array]:
    nothing = pa.nulls(rows, pa.string())
    return [pa.repeat(pa.scalar("ok", pa.string()), rows), nothing, nothing, nothing]
