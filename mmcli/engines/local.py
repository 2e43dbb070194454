"""The local engine: one process with a model, decode workers beside it, a writer thread behind it.

supervisor thread: Source -> Records -> decode workers -> decoded queue
main thread:       decoded queue -> windows in row order -> batches -> Runner -> Results
writer thread:     Results -> parts
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmcli.core.errors import ErrorBudgetExceeded, ExitCode, RowError, Stopped, TryAgain
from mmcli.core.extensions import guess_modality
from mmcli.core.protocols import Decoder, ModelPlan, Output, Previous, Source, Task
from mmcli.core.records import Decoded, Record, Result, Sample
from mmcli.core.report import Report
from mmcli.core.signature import signature
from mmcli.engines.batching import Slot, batches
from mmcli.engines.forward import Forward
from mmcli.engines.table import Layout
from mmcli.engines.writer import PartLimits, PartWriter

# A block is what one worker is given at a time: at most this many records or encoded bytes. 64 tiny
# pictures amortise a message (about 0.1 ms); one large video does not wait behind others.
BLOCK_ROWS = 64
BLOCK_BYTES = 2 * 1024 * 1024
# Looked up together in a previous output.
LOOKUP_ROWS = 1024


@dataclass(slots=True)
class StopFlag:
    """Set from a signal handler: stop taking in work, commit what is done."""

    exit_code: ExitCode | None = None

    def request(self, exit_code: ExitCode) -> None:
        self.exit_code = self.exit_code or exit_code


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """`--max-errors N` or `P%` (of all rows). More error rows than that end the run."""

    count: int | None = None
    percent: float | None = None

    def exceeded(self, report: Report) -> bool:
        errors = report.error_rows
        if self.count is not None:
            return errors > self.count
        if self.percent is not None:
            # Without a total, a share of less than 100 rows would be noise.
            total = report.rows_total or max(100, report.done)
            return errors > total * self.percent / 100
        return False


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How to run; nothing here changes a row.

    batch_size    samples per forward pass
    window        rows that are batched together (see engines.batching.window_rows)
    time_limit_s  stop, commit and raise TryAgain after this long
    """

    batch_size: int
    window: int
    time_limit_s: float | None = None
    budget: ErrorBudget = field(default_factory=ErrorBudget)
    parts: PartLimits = field(default_factory=PartLimits)


@dataclass(slots=True)
class Work:
    """What to run: the rooms' parts, composed. `start_row`: first row that is not committed yet."""

    source: Source
    decoder: Decoder
    plan: ModelPlan
    task: Task
    output: Output
    report: Report
    stop: StopFlag
    start_row: int = 0
    previous: Previous | None = None
    want_signatures: bool = True


def run(work: Work, options: LocalOptions) -> None:
    """Compute all rows from `work.start_row` on and commit them in order.

    Raises ErrorBudgetExceeded, Stopped, TryAgain (time limit), ModelError or OutputError; in each case the
    rows that were complete are committed.
    """
    _Run(work, options).run()


_Row = tuple[Record, tuple[Sample | RowError, ...]]


class _Run:
    def __init__(self, work: Work, options: LocalOptions) -> None:
        self.work, self.options, self.report = work, options, work.report
        self.layout = Layout.of(work.task, work.source)
        self.first = work.start_row - work.start_row % options.window
        self.decoded: queue.Queue[Decoded | BaseException | None] = queue.Queue()
        self.lock = threading.Lock()
        self.in_flight = 0
        # Two windows, so that one decodes while the other is in the model, and enough to keep workers busy.
        self.max_in_flight = max(2 * options.window, (work.decoder.num_workers + 1) * 2 * BLOCK_ROWS)
        self.closing = threading.Event()
        self.restored: dict[int, Result] = {}

    def run(self) -> None:
        report = self.report
        report.num_workers = self.work.decoder.num_workers
        supervisor = threading.Thread(target=self._supervise, name="mmcli-decode", daemon=True)
        supervisor.start()
        writer: PartWriter | None = None
        try:
            with report.timed("load"):
                forward = Forward(self.work.plan.load(), report)
            writer = PartWriter(self.work.output, self.layout, self.options.parts, report)
            for window in self._windows():
                results = self._compute(window, forward)
                writer.put([r for r in results if r.record.row >= self.work.start_row])
                self._account(results)
                self._check_limits()
        finally:
            self.closing.set()
            if writer is not None:
                writer.close()
            supervisor.join(timeout=5)
            self.work.decoder.close()

    # -- supervisor thread ---------------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            for decoded in self.work.decoder.run(self._blocks(), self._may_read):
                self.report.add("decode", decoded.decode_s)
                self.report.add("process", decoded.process_s)
                self.decoded.put(decoded)
                if self.closing.is_set():
                    return
            self.decoded.put(None)
        except BaseException as failure:  # noqa: BLE001 - raised in the main thread
            self.decoded.put(failure)

    def _may_read(self) -> bool:
        return self.in_flight < self.max_in_flight or self.closing.is_set()

    def _blocks(self) -> Iterator[list[Record]]:
        """Records to decode, in blocks; those that need no decoding go straight to the decoded queue."""
        block: list[Record] = []
        size = 0
        for record in self._records():
            if self.closing.is_set():
                return
            weight = _encoded_bytes(record)
            if block and (len(block) >= self._block_rows() or size + weight > BLOCK_BYTES):
                yield block
                block, size = [], 0
            block.append(record)
            size += weight
        if block:
            yield block

    def _block_rows(self) -> int:
        # Small inputs: spread them over the workers rather than give all to the first.
        share = (self.report.rows_total or BLOCK_ROWS * 64) // (4 * max(1, self.work.decoder.num_workers))
        return max(1, min(BLOCK_ROWS, share))

    def _records(self) -> Iterator[Record]:
        records = self.work.source.records(self.first)
        while chunk := self._chunk(records):
            with self.lock:
                self.in_flight += len(chunk)
            if self.work.want_signatures:
                for record in chunk:
                    record.signature = signature(record)
            failed = [r for r in chunk if r.error is not None]
            if failed:
                self.decoded.put(Decoded(failed, [(r.error,) for r in failed if r.error]))
            wanted = [r for r in chunk if r.error is None]
            yield from self._take_previous(wanted) if self.work.previous else wanted

    def _chunk(self, records: Iterator[Record]) -> list[Record]:
        limit = LOOKUP_ROWS if self.work.previous else 1
        chunk = []
        for record in records:
            chunk.append(record)
            if len(chunk) >= limit:
                break
        return chunk

    def _take_previous(self, records: Sequence[Record]) -> list[Record]:
        """Hand over the rows that an earlier output has finished; returns the others."""
        assert self.work.previous is not None
        found, table = self.work.previous.take([r.signature for r in records])
        if not found or table is None:
            return list(records)
        values = self.work.task.restore(table, self.layout.task_fields)
        modalities = table.column("modality").to_pylist()
        reused = [records[i] for i in found]
        for record, modality, row in zip(reused, modalities, values, strict=True):
            self.restored[record.row] = Result(record, modality, values=row)
        self.decoded.put(Decoded(reused, [() for _ in reused]))
        self.report.reused += len(found)
        taken = set(found)
        return [r for i, r in enumerate(records) if i not in taken]

    # -- main thread ---------------------------------------------------------------------------------------

    def _windows(self) -> Iterator[list[_Row]]:
        """Complete windows of (record, outcomes), in row order."""
        size = self.options.window
        pending: dict[int, _Row] = {}
        counts: dict[int, int] = {}
        next_window = self.first // size
        for decoded in self._arrivals():
            for record, outcomes in zip(decoded.records, decoded.outcomes, strict=True):
                pending[record.row] = (record, outcomes)
                counts[record.row // size] = counts.get(record.row // size, 0) + 1
            while counts.get(next_window, 0) == size:
                rows = range(next_window * size, (next_window + 1) * size)
                yield [pending.pop(row) for row in rows]
                del counts[next_window]
                next_window += 1
        if pending:
            yield [pending[row] for row in sorted(pending)]

    def _arrivals(self) -> Iterator[Decoded]:
        while True:
            self._check_stop()
            start = time.perf_counter()
            try:
                item = self.decoded.get(timeout=0.1)
            except queue.Empty:
                continue
            finally:
                self.report.add("wait", time.perf_counter() - start)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _compute(self, window: list[_Row], forward: Forward) -> list[Result]:
        slots = [
            Slot(record.row, medium, outcome)
            for record, outcomes in window
            if all(isinstance(o, Sample) for o in outcomes)
            for medium, outcome in enumerate(outcomes)
            if isinstance(outcome, Sample)
        ]
        outputs: dict[tuple[int, int], object] = {}
        for batch in batches(slots, self.options.batch_size):
            self._check_stop()
            for slot, output in zip(batch, forward([s.sample for s in batch]), strict=True):
                outputs[slot.row, slot.medium] = output
        with self.report.timed("post"):
            return [self._result(record, outcomes, outputs) for record, outcomes in window]

    def _result(
        self, record: Record, outcomes: tuple[Sample | RowError, ...], outputs: dict[tuple[int, int], object]
    ) -> Result:
        if restored := self.restored.pop(record.row, None):
            return restored
        mine = [outputs.get((record.row, medium)) for medium in range(len(outcomes))]
        for problem in (*outcomes, *mine):
            if isinstance(problem, RowError):
                return Result(record, _modality(record, outcomes), error=problem)
        modalities = [o.modality for o in outcomes if isinstance(o, Sample)]
        return self.work.task.result(record, modalities, mine)

    def _account(self, results: Sequence[Result]) -> None:
        report = self.report
        new = [r for r in results if r.record.row >= self.work.start_row]
        for result in new:
            if result.error is not None:
                report.errors[result.error.code] += 1
        report.done += len(new)
        if report.first_result_s is None and new:
            report.first_result_s = report.wall_s
        with self.lock:
            self.in_flight -= len(results)

    def _check_limits(self) -> None:
        if self.options.budget.exceeded(self.report):
            codes = ", ".join(f"{n} {c}" for c, n in self.report.errors.most_common())
            raise ErrorBudgetExceeded(
                f"{self.report.error_rows} error rows ({codes}) are more than --max-errors allows",
                hint="see error_message in the output; then raise --max-errors and run the same command again",
            )

    def _check_stop(self) -> None:
        if self.work.stop.exit_code is not None:
            name = "interrupted" if self.work.stop.exit_code == ExitCode.INTERRUPTED else "terminated"
            raise Stopped(name, self.work.stop.exit_code)
        limit = self.options.time_limit_s
        if limit is not None and self.report.wall_s > limit:
            raise TryAgain(f"--time-limit of {limit:g} s reached", hint="run the same command again to go on")


def _encoded_bytes(record: Record) -> int:
    return sum(m.size or (len(m.data) if m.data is not None else 0) for m in record.media)


def _modality(record: Record, outcomes: Sequence[Sample | RowError]) -> str | None:
    """What an error row's media are, as far as decoding, the manifest or the name tells."""
    known: list[str] = []
    for index, media in enumerate(record.media):
        outcome = outcomes[index] if index < len(outcomes) else None
        guess = outcome.modality if isinstance(outcome, Sample) else media.modality
        guess = guess or (guess_modality(media.file) if media.file else None)
        if guess is None:
            return None
        known.append(guess)
    return "+".join(known) or None
