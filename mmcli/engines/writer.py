"""The writer thread: cuts finished rows into parts and commits them, off the critical path."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from mmcli.core.protocols import Output
from mmcli.core.records import Result
from mmcli.core.report import Report
from mmcli.engines.table import Layout

# Results that wait for the writer, in lists of up to one window.
QUEUE_LISTS = 4


@dataclass(frozen=True, slots=True)
class PartLimits:
    """A part is cut at whichever comes first. 30 s is what a crash may cost; a commit takes 2-3 ms."""

    rows: int = 50_000
    bytes: int = 128 * 1024 * 1024
    seconds: float = 30.0


class PartWriter:
    """Takes Results in row order, commits them as parts from a thread of its own."""

    def __init__(self, output: Output, layout: Layout, limits: PartLimits, report: Report) -> None:
        self._output, self._layout, self._limits, self._report = output, layout, limits, report
        self._queue: queue.Queue[Sequence[Result] | None] = queue.Queue(QUEUE_LISTS)
        self._batches: list[pa.RecordBatch] = []
        self._signatures: list[bytes | None] = []
        self._start_row = -1
        self._last_commit = time.monotonic()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mmcli-writer", daemon=True)
        self._thread.start()

    def put(self, results: Sequence[Result]) -> None:
        """Hand over the next rows. Raises what the writer thread failed with."""
        start = time.perf_counter()
        while True:
            self._raise_failure()
            try:
                self._queue.put(results, timeout=0.1)
                break
            except queue.Full:
                continue
        self._report.add("write_wait", time.perf_counter() - start)

    def close(self) -> None:
        """Commit what is left. Raises what the writer thread failed with."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while (results := self._next()) is not None:
                if results:
                    self._add(results)
                self._cut(final=False)
            self._cut(final=True)
        except BaseException as failure:  # noqa: BLE001 - raised in the main thread by put or close
            self._failure = failure

    def _next(self) -> Sequence[Result] | None:
        """The next results; empty when it is time to look at the clock; None at the end."""
        try:
            return self._queue.get(timeout=max(0.05, min(1.0, self._limits.seconds)))
        except queue.Empty:
            return ()

    def _add(self, results: Sequence[Result]) -> None:
        if not self._batches:
            self._start_row = results[0].record.row
        with self._report.timed("write"):
            self._batches.append(self._layout.batch(results))
            self._signatures += [r.record.signature for r in results]

    def _cut(self, final: bool) -> None:
        overdue = time.monotonic() - self._last_commit >= self._limits.seconds
        everything = final or overdue or self._output.immediate
        while rows := len(self._signatures):
            size = sum(b.nbytes for b in self._batches)
            if not (everything or rows >= self._limits.rows or size >= self._limits.bytes):
                return
            self._commit(min(rows, self._limits.rows))
        self._last_commit = time.monotonic() if overdue else self._last_commit

    def _commit(self, rows: int) -> None:
        table = pa.Table.from_batches(self._batches, schema=self._layout.schema)
        with self._report.timed("write"):
            self._output.commit(table.slice(0, rows), self._start_row, self._signatures[:rows])
        rest = table.slice(rows)
        self._batches = rest.to_batches() if len(rest) else []
        del self._signatures[:rows]
        self._start_row += rows
        self._last_commit = time.monotonic()
        self._report.committed += rows
