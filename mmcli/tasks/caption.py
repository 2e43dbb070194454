"""The caption task: one text per medium, and what tells whether to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.records import Generated, Modality, Record, Result

# The columns of one medium, as mmcli.core.records.Generated has them.
COLUMNS = {
    "caption": pa.string(),
    "finish_reason": pa.string(),
    "n_tokens": pa.int32(),
    "mean_logprob": pa.float32(),
    "repetition": pa.bool_(),
}


@dataclass(frozen=True, slots=True)
class Caption:
    """Columns `caption`, `finish_reason`, `n_tokens`, `mean_logprob` and `repetition`; `<slot>_...` of a slot."""

    name: str = "caption"

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """The columns of every slot of the source."""
        return [pa.field(f"{slot}_{name}" if slot else name, t) for slot in slots for name, t in COLUMNS.items()]

    def result(self, record: Record, modalities: Sequence[Modality], outputs: Sequence[Generated]) -> Result:
        """Texts of one record -> its row; NaN scores are `nonfinite`, a text without a character `empty_output`."""
        modality = modalities[0] if len(modalities) == 1 else "+".join(modalities)
        values: list[Any] = []
        for one in outputs:
            if not math.isfinite(one.mean_logprob):
                error = RowError("nonfinite", "the model gave NaN or infinite scores", stage="model")
                return Result(record, modality, error=error)
            if not one.text.strip():
                error = RowError("empty_output", f"no text among {one.n_tokens} tokens", stage="post")
                return Result(record, modality, error=error)
            values += [one.text, one.finish_reason, one.n_tokens, one.mean_logprob, one.repetition]
        return Result(record, modality, values=tuple(values))

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """One array per column; null where the result is an error."""
        values = [r.values for r in results]
        return [pa.array([v and v[i] for v in values], f.type) for i, f in enumerate(fields)]

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        return list(zip(*(table.column(f.name).to_pylist() for f in fields), strict=True))
