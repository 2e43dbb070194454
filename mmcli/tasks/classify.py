"""The task classify: which of a set of labels each medium has, and how far to trust that."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmcli.core.classified import ClassifiedRows
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

    def whole(
        self, outputs: ClassifiedRows, failed: Collection[int], fields: Sequence[pa.Field]
    ) -> list[pa.Array] | None:
        """See mmcli.core.protocols.Task."""
        if self.join is not None or not np.isfinite(outputs.scores[:, 0]).all():
            return None
        count, best = len(outputs), outputs.scores[:, 0]
        missing = np.zeros(count, bool)
        missing[list(failed)] = True
        # As one of Python's floats is compared.
        rejected = missing | (best.astype(np.float64) < self.min_score) if self.min_score is not None else missing
        names = pa.array(outputs.labels, pa.string())
        width = outputs.scores.shape[1]
        columns = {"label": names.take(pa.array(outputs.indices[:, 0], mask=rejected))}
        columns["score"] = pa.array(best, mask=missing)
        if self.multi_label:
            counts = np.zeros(count, np.int64) if outputs.counts is None else outputs.counts
            columns["labels"] = _lists(_labels(names, outputs.indices, counts), counts, missing)
        told = np.where(missing, 0, min(outputs.top_k, width))
        top = [_labels(names, outputs.indices, told), pa.array(_firsts(outputs.scores, told))]
        columns["top_k"] = _lists(pa.StructArray.from_arrays(top, fields=list(_TOP_K.value_type)), told, missing)
        nothing = pa.nulls(count, pa.float32())
        columns["margin"] = nothing if outputs.margin is None else pa.array(outputs.margin, mask=missing)
        columns["entropy"] = pa.array(outputs.entropy, mask=missing)
        if self.min_score is not None:
            columns["rejected"] = pa.array(rejected, mask=missing)
        return list(columns.values())

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """One array per column; null where the result is an error."""
        values = [r.values for r in results]
        return [pa.array([v and v[i] for v in values], f.type) for i, f in enumerate(fields)]

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        return list(zip(*(table.column(f.name).to_pylist() for f in fields), strict=True))


def _firsts(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each row of [n, k] the first so many, one behind the other."""
    found: np.ndarray = values[np.arange(values.shape[1]) < counts[:, None]]
    return found


def _labels(names: pa.Array, indices: np.ndarray, counts: np.ndarray) -> pa.Array:
    return names.take(pa.array(_firsts(indices, counts)))


def _lists(values: pa.Array, counts: np.ndarray, missing: np.ndarray) -> pa.ListArray:
    """So many of the values for each row; null where it is missing."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    mask = pa.array(missing) if missing.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)
