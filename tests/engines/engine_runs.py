"""Runs of the engine on inputs whose rows are known: a simple oracle beside the real thing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.protocols import Decoder, ModelPlan
from mmcli.core.records import DecodeOptions, Media, Record
from mmcli.core.report import Report
from mmcli.core.texts import TextRecords
from mmcli.engines import batching
from mmcli.engines.batching import BatchSize, WindowSizes, window_sizes
from mmcli.engines.intake import BLOCK_ROWS
from mmcli.engines.local import ErrorBudget as ErrorBudget
from mmcli.engines.local import LocalOptions, StopFlag, Work, run
from mmcli.engines.writer import PartLimits as PartLimits
from mmcli.media.pool import DecodePool, InlineDecoder
from mmcli.models.fake import FakePlan, fake_vector
from mmcli.tasks.embed import Embed

D = 4
# (id, error code or None, vectors)
Row = tuple[str, str | None, tuple[tuple[float, ...] | None, ...]]


class ListSource:
    """Records from a list; knows how far it was read."""

    def __init__(self, records: Sequence[Record], slots: tuple[str, ...] = ("",)) -> None:
        self.slots, self.keep = slots, pa.schema([pa.field("number", pa.int64())])
        self._records, self.read = records, 0

    def records(self, start: int = 0) -> Iterator[Record]:
        for record in self._records[start:]:
            self.read = record.row + 1
            yield record


class TextSource(ListSource):
    """Also has its records some at a time; as columns where they are texts without errors."""

    def __init__(self, records: Sequence[Record], size: int) -> None:
        super().__init__(records)
        self._size = size

    def blocks(self, start: int = 0) -> Iterator[Sequence[Record]]:
        for at in range(start, len(self._records), self._size):
            block = self._records[at : at + self._size]
            self.read = block[-1].row + 1
            if any(record.error for record in block):
                yield block
                continue
            texts = [record.media[0].text or "" for record in block]
            keep = [[record.keep[0] for record in block]]
            yield TextRecords(block[0].row, [record.id for record in block], texts, "text", keep)


@dataclass
class Collected:
    """An output that keeps its rows; fails at commit number `fail_at`."""

    fail_at: int | None = None
    immediate: bool = False
    tables: list[pa.Table] = field(default_factory=list)
    signatures: list[bytes | None] = field(default_factory=list)
    committed: int = 0
    error: BaseException = field(default_factory=lambda: OSError("disk full"))

    def commit(self, table: pa.Table, start_row: int, signatures: Sequence[bytes | None]) -> None:
        if self.fail_at is not None and len(self.tables) == self.fail_at:
            raise self.error
        assert start_row == self.committed, "rows missing or twice"
        assert len(signatures) == len(table)
        self.tables.append(table)
        self.signatures += signatures
        self.committed += len(table)

    def rows(self) -> list[Row]:
        return [row for table in self.tables for row in table_rows(table)]


def table_rows(table: pa.Table) -> list[Row]:
    names = [n for n in table.column_names if n.endswith("embedding")]
    rows = []
    for row in table.to_pylist():
        vectors = tuple(None if row[n] is None else tuple(row[n]) for n in names)
        assert (row["status"] == "error") == (row["error_code"] is not None) == (vectors[0] is None)
        rows.append((row["id"], row["error_code"], vectors))
    return rows


def text_record(row: int, *texts: str | RowError) -> Record:
    """A record with one inline text per slot, or one that the source could not read."""
    if texts and isinstance(texts[0], RowError):
        return Record(row, f"id{row}", None, (), keep=(row,), error=texts[0])
    return Record(row, f"id{row}", None, tuple(Media("text", text=t) for t in texts), keep=(row,))


def expected_row(record: Record) -> Row:
    """What the fake model with `obey` makes of a text record, whatever else is in the run."""
    texts = [m.text for m in record.media]
    # In the order of the stages.
    codes = {"raise": "corrupt", "fail": "invalid_output", "nan": "nonfinite"}
    found = [code for order, code in codes.items() if order in texts]
    code = record.error.code if record.error else found[0] if found else None
    vectors = [tuple(fake_vector("text", text, D).tolist()) for text in texts]
    return (record.id, code, (None,) * max(1, len(record.media)) if code else tuple(vectors))


def plan(**options: Any) -> FakePlan:
    # Without sound and clips: decode processes start 1.8 s sooner.
    return FakePlan(D, DecodeOptions(modalities=frozenset({"text", "image"})), obey=True, **options)


def decoder_of(model: ModelPlan, num_workers: int, timeout_s: float = 30.0) -> Decoder:
    if num_workers == 0:
        return InlineDecoder(model, model.decode)
    return DecodePool(model, model.decode, num_workers, timeout_s)


@contextmanager
def patched(module: Any, **values: Any) -> Iterator[None]:
    """Other constants for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def run_engine(
    source: Any,
    output: Any,
    model: Any = None,
    *,
    workers: int = 0,
    batch_size: int = 4,
    window: int | None = None,
    first: int | None = None,
    parts: PartLimits | None = None,
    **work: Any,
) -> Report:
    """Run, from the first row that `output` does not have; raises what the engine raises."""
    model = model or plan()
    timeout_s = work.pop("timeout_s", 30.0)
    options = {n: work.pop(n) for n in ("time_limit_s", "budget") if n in work}
    column_rows = work.pop("column_rows", 1)
    blocks = {"block_rows": work.pop("block_rows", None) or BLOCK_ROWS}
    size = BatchSize(batch_size, work.pop("tokens", None), work.pop("audio", None))
    report = work.pop("report", None) or Report()
    with patched(batching, COLUMN_ROWS=column_rows):
        run(
            Work(
                source=source,
                decoder=decoder_of(model, workers, timeout_s),
                plan=model,
                task=work.pop("task", None) or Embed(D),
                output=output,
                report=report,
                stop=work.pop("stop", None) or StopFlag(),
                start_row=getattr(output, "committed", 0),
                **work,
            ),
            LocalOptions(
                batch_size=size,
                windows=WindowSizes(window, first) if window else window_sizes(batch_size, lengths_vary=True),
                # As many as the model says.
                concurrency=9,
                parts=parts or PartLimits(),
                **blocks,
                **options,
            ),
        )
    return report
