"""Results -> the output's Arrow schema and record batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.protocols import Source, Task
from mmcli.core.records import Result


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
        columns = [
            pa.array([r.record.id for r in results], pa.string()),
            pa.array([r.record.path for r in results], pa.string()),
            pa.array([r.modality for r in results], pa.string()),
            *self.task.columns(results, self.task_fields),
            *(pa.array([r.record.keep[i] for r in results], f.type) for i, f in enumerate(self.keep)),
            *_states([r.error for r in results]),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _states(errors: Sequence[RowError | None]) -> list[pa.Array]:
    """The columns status, error_code, error_stage and error_message."""
    if not any(errors):
        nothing = pa.nulls(len(errors), pa.string())
        return [pa.repeat(pa.scalar("ok", pa.string()), len(errors)), nothing, nothing, nothing]
    return [
        pa.array(["error" if e else "ok" for e in errors], pa.string()),
        pa.array([e.code if e else None for e in errors], pa.string()),
        pa.array([e.stage if e else None for e in errors], pa.string()),
        pa.array([e.message if e else None for e in errors], pa.string()),
    ]
