"""The embed task: one vector per medium."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.records import Modality, Record, Result


@dataclass(frozen=True, slots=True)
class Embed:
    """Columns `embedding`, or `<slot>_embedding` for each of several slots: fixed_size_list<float>[D].

    embedding_size  D
    dtype           "float32" or "float16": how vectors are stored
    """

    embedding_size: int
    dtype: str = "float32"
    name: str = "embed"

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """One vector column per slot of the source."""
        vector = pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), self.embedding_size)
        return [pa.field(f"{slot}_embedding" if slot else "embedding", vector) for slot in slots]

    def result(self, record: Record, modalities: Sequence[Modality], outputs: Sequence[np.ndarray]) -> Result:
        """Vectors [D] of one record -> its row; NaN and Inf, also by overflow of float16, are `nonfinite`."""
        vectors = tuple([v if v.dtype == self.dtype else _cast(v, self.dtype) for v in outputs])
        modality = modalities[0] if len(modalities) == 1 else "+".join(modalities)
        for vector in vectors:
            # The sum of finite float64 values is finite; a third of the time of isfinite().all() for D=512.
            if not math.isfinite(np.add.reduce(vector, dtype=np.float64)):
                error = RowError("nonfinite", "the model gave NaN or infinite values", stage="model")
                return Result(record, modality, error=error)
        return Result(record, modality, values=vectors)

    def results(
        self, records: Sequence[Record], modalities: Sequence[Sequence[Modality]], outputs: Sequence[Sequence[Any]]
    ) -> list[Result]:
        """`result` of each record, none of which has failed; vectors are checked together, 2 us a row less."""
        vectors = [tuple(row) for row in outputs]
        flat = [v for row in vectors for v in row]
        if {v.dtype for v in flat} != {np.dtype(self.dtype)} or not math.isfinite(
            np.add.reduce(np.concatenate(flat), dtype=np.float64)
        ):
            return [self.result(*row) for row in zip(records, modalities, outputs, strict=True)]
        names = [m[0] if len(m) == 1 else "+".join(m) for m in modalities]
        return list(map(Result, records, names, vectors))

    def whole(
        self, outputs: np.ndarray, failed: Collection[int], fields: Sequence[pa.Field]
    ) -> list[pa.Array] | None:
        """See mmcli.core.protocols.Task: vectors [n, D] of rows of one medium."""
        vectors = outputs if outputs.dtype == self.dtype else _cast(outputs, self.dtype)
        if not math.isfinite(np.add.reduce(vectors, axis=None, dtype=np.float64)):
            return None
        missing = np.zeros(len(vectors), bool)
        missing[list(failed)] = True
        flat, mask = pa.array(vectors.reshape(-1)), pa.array(missing) if failed else None
        return [pa.FixedSizeListArray.from_arrays(flat, type=f.type, mask=mask) for f in fields]

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """Vectors as FixedSizeListArrays without Python lists; null where the result is an error."""
        missing = np.fromiter((r.values is None for r in results), bool, len(results))
        mask = pa.array(missing) if missing.any() else None
        columns = []
        for index, f in enumerate(fields):
            flat = np.zeros((len(results), self.embedding_size), dtype=self.dtype)
            for row, result in enumerate(results):
                if result.values is not None:
                    flat[row] = result.values[index]
            values = pa.array(flat.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(values, type=f.type, mask=mask))
        return columns

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        columns = []
        for f in fields:
            column = table.column(f.name).combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            columns.append(flat.reshape(len(table), self.embedding_size))
        return list(zip(*columns, strict=True))


def _cast(vector: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return vector.astype(dtype)
