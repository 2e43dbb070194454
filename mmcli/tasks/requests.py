"""The task requests: what an OpenAI-compatible server would be asked of a record, and is not yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmcli.core.records import Modality, Record, Result


@dataclass(frozen=True, slots=True)
class Requests:
    """A column `request` for each question, `colour_request`: the JSON of its body.

    name       "caption" or "ask": what the requests are for
    questions  as of mmcli.tasks.write.Write
    """

    name: str
    questions: tuple[str, ...] = ("",)

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """Large strings: pictures are in them."""
        return [pa.field(f"{name}_request" if name else "request", pa.large_string()) for name in self.questions]

    def result(self, record: Record, modalities: Sequence[Modality], outputs: Sequence[bytes]) -> Result:
        """A record's requests, one for each question -> its row."""
        return Result(record, modalities[0], values=tuple(body.decode() for body in outputs))

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """One array per column; null where the result is an error."""
        values = [r.values for r in results]
        return [pa.array([v and v[i] for v in values], f.type) for i, f in enumerate(fields)]

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        return list(zip(*(table.column(f.name).to_pylist() for f in fields), strict=True))
