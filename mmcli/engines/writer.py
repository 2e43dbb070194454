"""The writer thread turns finished windows into rows and cuts them into parts; another one commits these.

Two threads, since a part of 50,000 vectors is encoded and made durable in some tenths of a second, in which a fast
model fills every window that may wait.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from mmcli.core.protocols import Output
from mmcli.core.records import Result
from mmcli.core.report import Report
from mmcli.core.texts import signatures_of
from mmcli.engines.batching import Window
from mmcli.engines.table import Layout

# Windows that wait for the writer.
QUEUE_WINDOWS = 4
# Results that are made into one Arrow batch: of 32 rows alone it costs three times as much a row.
TABLE_ROWS = 1024
# Fewer of long texts, such as requests with pictures in them.
TABLE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PartLimits:
    """A part is cut at whichever comes first. 30 s is what a crash may cost; a commit takes 2-3 ms."""

    rows: int = 50_000
    bytes: int = 128 * 1024 * 1024
    seconds: float = 30.0


class PartWriter:
    """Takes finished windows in row order, commits their rows from `start_row` on from a thread of its own."""

    def __init__(
        self, output: Output, layout: Layout, limits: PartLimits, report: Report, start_row: int = 0
    ) -> None:
        self._output, self._layout, self._limits, self._report = output, layout, limits, report
        self._queue: queue.Queue[Window | None] = queue.Queue(QUEUE_WINDOWS)
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="mmcli-commit")
        self._committing: Future[None] | None = None
        self._results: list[Result] = []
        self._batches: list[pa.RecordBatch] = []
        self._bytes = self._text_bytes = 0
        self._signatures: list[bytes | None] = []
        self._next_row = start_row
        self._last_commit = time.monotonic()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mmcli-writer", daemon=True)
        self._thread.start()

    def put(self, window: Window) -> None:
        """Hand over the next rows. Raises what the writer thread failed with."""
        start = time.perf_counter()
        while True:
            self._raise_failure()
            try:
                self._queue.put(window, timeout=0.1)
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
        self._committer.shutdown()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while True:
                try:
                    window = self._queue.get(timeout=max(0.05, min(1.0, self._limits.seconds)))
                except queue.Empty:
                    # Time to look at the clock.
                    self._cut(final=False)
                    continue
                if window is None:
                    break
                self._add(window)
                self._cut(final=False)
            self._cut(final=True)
            self._wait_for_commit()
        except BaseException as failure:  # noqa: BLE001 - raised in the main thread by put or close
            self._failure = failure

    def _add(self, window: Window) -> None:
        first = window.position(self._next_row + len(self._signatures))
        rows = len(window.records) - first
        if rows <= 0:
            return
        self._signatures += signatures_of(window.records[first:])
        if not self._add_whole(window, first):
            with self._report.timed("post"):
                results = window.results(self._layout.task, first)
            self._report.errors.update(r.error.code for r in results if r.error is not None)
            self._report.reused += len([k for k in window.known[first:] if isinstance(k, Result)])
            self._results += results
            self._text_bytes += _text_bytes(results)
            if len(self._results) >= TABLE_ROWS or self._text_bytes >= TABLE_BYTES:
                self._tabulate()
        self._report.done += rows
        self._report.first_result()

    def _add_whole(self, window: Window, first: int) -> bool:
        """A window whose outputs are columns, of which the task makes its own without looking at single rows."""
        whole = getattr(self._layout.task, "whole", None)
        with self._report.timed("post"):
            outputs = None if whole is None else window.together()
            if whole is None or outputs is None:
                return False
            failed = window.failed(first)
            columns = whole(outputs[first:], failed, self._layout.task_fields)
        if columns is None:
            return False
        self._tabulate()
        with self._report.timed("post"):
            self._keep(self._layout.whole(window.records[first:], str(window.modality), failed, columns))
        self._report.errors.update(error.code for _, error in failed.values())
        return True

    def _tabulate(self) -> None:
        if self._results:
            with self._report.timed("post"):
                batch = self._layout.batch(self._results)
            self._results, self._text_bytes = [], 0
            self._keep(batch)

    def _keep(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._bytes += batch.nbytes

    def _cut(self, final: bool) -> None:
        overdue = time.monotonic() - self._last_commit >= self._limits.seconds
        everything = final or overdue or self._output.immediate
        if self._committing is not None and self._committing.done():
            # A full disk is told now, not when the next part is.
            self._wait_for_commit()
        while rows := len(self._signatures):
            if not (everything or rows >= self._limits.rows or self._bytes >= self._limits.bytes):
                return
            self._commit(min(rows, self._limits.rows))
        self._last_commit = time.monotonic() if overdue else self._last_commit

    def _commit(self, rows: int) -> None:
        """Have the first rows committed; returns when the part before is safe: one at most is on its way."""
        self._tabulate()
        table = pa.Table.from_batches(self._batches, schema=self._layout.schema)
        self._wait_for_commit()
        part = table.slice(0, rows), self._next_row, self._signatures[:rows]
        self._committing = self._committer.submit(self._commit_part, *part)
        rest = table.slice(rows)
        self._batches = rest.to_batches() if len(rest) else []
        self._bytes = sum(b.nbytes for b in self._batches)
        del self._signatures[:rows]
        self._next_row += rows
        self._last_commit = time.monotonic()

    def _commit_part(self, table: pa.Table, start_row: int, signatures: Sequence[bytes | None]) -> None:
        with self._report.timed("write"):
            self._output.commit(table, start_row, signatures)
        self._report.committed += len(table)

    def _wait_for_commit(self) -> None:
        """Raises what it failed with."""
        if self._committing is not None:
            self._committing.result()


def _text_bytes(results: Sequence[Result]) -> int:
    return sum([len(v) for r in results if r.values is not None for v in r.values if isinstance(v, str)])
