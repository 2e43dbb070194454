"""Results as evaluation servers and their code read them: COCO captions and VQA v2, one JSON list each."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from mmcli.core.errors import ConfigError, OutputError
from mmcli.sinks.parquet import batches

# `391895`, and COCO's own file names: 000000391895.jpg, COCO_val2014_000000391895.jpg. Not any name that ends in a
# number: a_1.jpg and b_1.jpg would be one picture. Larger numbers are not exact everywhere.
_NUMBER = re.compile(r"(?:COCO_[A-Za-z0-9]+_)?([0-9]{1,15})(?:\.[A-Za-z0-9]+)?")


@dataclass(frozen=True, slots=True)
class Results:
    """A JSON list with an object for each good row. Error rows are left out, so that nothing can be updated.

    key     of the id: a number where the id is one, or is COCO's name of a file; else the id itself
    column  of the text, and its key
    """

    name: str
    key: str
    column: str
    suffixes: tuple[str, ...] = ()
    lossless: bool = False

    def check(self, schema: pa.Schema) -> None:
        """Raise ConfigError for a task that has another text, several, or none."""
        if self.column not in schema.names or schema.field(self.column).type != pa.string():
            raise ConfigError(
                f"--format {self.name} holds one {self.column} a row, as text; choose parquet or jsonl for this"
            )

    def write(self, parts: Sequence[Path], schema: pa.Schema, target: Path) -> int:
        """Stream the good rows into the new file `target`; returns the rows, error rows included.

        Raises OutputError where two rows have the same id.
        """
        rows, known = 0, array("Q")
        with target.open("wb") as file:
            start = b"["
            for batch in batches(parts, ["id", self.column, "status"]):
                rows += batch.num_rows
                good = batch.filter(pc.equal(batch.column("status"), "ok"))
                for row in good.to_pylist():
                    number = result_id(row["id"])
                    known.append(_digest(number))
                    file.write(start + b"\n" + orjson.dumps({self.key: number, self.column: row[self.column]}))
                    start = b","
            file.write(b"\n]\n" if known else b"[]\n")
        self._check_unique(known)
        return rows

    def read(self, out: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Raises ConfigError: these files do not hold the rows."""
        raise ConfigError(f"{out} is of format {self.name}, which holds no rows, only the good ones' {self.column}")

    def _check_unique(self, known: array[int]) -> None:
        values, counts = np.unique(np.frombuffer(known, np.uint64), return_counts=True)
        if (counts > 1).any():
            twice = int(values[counts > 1][0])
            which = f" {twice}" if twice < 10**15 else ""
            raise OutputError(
                f"--format {self.name}: two inputs have the same {self.key}{which}",
                hint="give the same command with -o NAME.parquet or --format parquet: the committed rows are kept",
            )


def coco() -> Results:
    """COCO caption results: `[{"image_id": 391895, "caption": "..."}, ...]`."""
    return Results("coco", "image_id", "caption")


def vqa() -> Results:
    """VQA v2 results: `[{"question_id": 262148000, "answer": "..."}, ...]`; ids by --id-column."""
    return Results("vqa", "question_id", "answer")


def result_id(name: str) -> int | str:
    """A row's id as results name it."""
    match = _NUMBER.fullmatch(name.rpartition("/")[2])
    return name if match is None else int(match[1])


def _digest(value: int | str) -> int:
    """Itself, or 64 bits above all such numbers."""
    if isinstance(value, int):
        return value
    digest = blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") | 1 << 63
