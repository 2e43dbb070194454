"""The task classify: which of a set of labels each medium has, and how far to trust that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.records import Classified, Modality, Record, Result

_TOP_K = pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float32())]))


@dataclass(frozen=True, slots=True)
class Classify:
    """Columns `label`, `score`, `top_k`, `margin`, `entropy`; of each of several slots, `<slot>_label` and so on.

    multi_label  a column `labels` too: all that reach the threshold
    min_score    below it `label` is null, and a column `rejected` says so; None: no such column
    join         makes one Classified of all outputs of a record; None: each slot has its own
    """

    multi_label: bool = False
    min_score: float | None = None
    join: Callable[[Sequence[Any]], Classified] | None = None
    name: str = "classify"

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """The columns of every slot; one set of them where all media of a record are read together."""
        columns = {"label": pa.string(), "score": pa.float32()}
        if self.multi_label:
            columns["labels"] = pa.list_(pa.string())
        columns |= {"top_k": _TOP_K, "margin": pa.float32(), "entropy": pa.float32()}
        if self.min_score is not None:
            columns["rejected"] = pa.bool_()
        prefixes = [f"{slot}_" if slot and len(slots) > 1 else "" for slot in slots]
        return [
            pa.field(prefix + name, kind)
            for prefix in ([""] if self.join is not None else prefixes)
            for name, kind in columns.items()
        ]

    def result(self, record: Record, modalities: Sequence[Modality], outputs: Sequence[Any]) -> Result:
        """A record's outputs -> its row; scores that are not finite are `nonfinite`."""
        modality = modalities[0] if len(modalities) == 1 else "+".join(dict.fromkeys(modalities))
        values: list[Any] = []
        try:
            for one in outputs if self.join is None else [self.join(outputs)]:
                values += self._values(one)
        except RowError as error:
            return Result(record, modality, error=error)
        return Result(record, modality, values=tuple(values))

    def _values(self, one: Classified) -> list[Any]:
        label, score = one.top_k[0]
        if score is not None and not math.isfinite(score):
            raise RowError("nonfinite", "the model gave NaN or infinite scores", stage="model")
        rejected = self.min_score is not None and score is not None and score < self.min_score
        values: list[Any] = [None if rejected else label, score]
        if self.multi_label:
            values.append(list(one.labels or ()))
        values += [[{"label": name, "score": s} for name, s in one.top_k], one.margin, one.entropy]
        return values if self.min_score is None else [*values, rejected]

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """One array per column; null where the result is an error."""
        values = [r.values for r in results]
        return [pa.array([v and v[i] for v in values], f.type) for i, f in enumerate(fields)]

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        return list(zip(*(table.column(f.name).to_pylist() for f in fields), strict=True))
