"""Requests as OpenAI's batch API takes them: https://platform.openai.com/docs/guides/batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa

from mmcli.core.errors import ConfigError
from mmcli.core.openai_batch import URL, custom_id
from mmcli.sinks.parquet import batches

# As mmcli.tasks.requests names them.
_COLUMN = re.compile(r"(?:.+_)?request")


@dataclass(frozen=True, slots=True)
class OpenAIBatchFormat:
    """A line for each request of the good rows; error rows have none, so that nothing can be updated.

    OpenAI takes 50,000 lines and 200 MB at a time: `split -l 50000` makes such files.
    """

    name: str = "openai-batch"
    suffixes: tuple[str, ...] = ()
    lossless: bool = False

    def check(self, schema: pa.Schema) -> None:
        """Raise ConfigError for a task that makes no requests."""
        if not _columns(schema):
            raise ConfigError("--format openai-batch holds requests to a server: it needs -m openai:NAME")

    def write(self, parts: Sequence[Path], schema: pa.Schema, target: Path) -> int:
        """Stream the requests into the new file `target`; returns the rows, error rows included."""
        rows, columns = 0, _columns(schema)
        with target.open("wb") as file:
            for batch in batches(parts, columns):
                for number, row in enumerate(zip(*(batch.column(c) for c in columns), strict=True), rows):
                    for question, body in enumerate(row):
                        if body.is_valid:
                            file.write(_line(number, question, body.as_buffer().to_pybytes()))
                rows += batch.num_rows
        return rows

    def read(self, out: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Raises ConfigError: these files do not hold the rows."""
        raise ConfigError(f"{out} is of format {self.name}, which holds no rows, only their requests")


def _columns(schema: pa.Schema) -> list[str]:
    return [f.name for f in schema if f.type == pa.large_string() and _COLUMN.fullmatch(f.name)]


def _line(row: int, question: int, body: bytes) -> bytes:
    head = {"custom_id": custom_id(row, question, body), "method": "POST", "url": URL}
    return orjson.dumps(head)[:-1] + b',"body":' + body + b"}\n"
