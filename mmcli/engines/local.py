"""The local engine: one process with a model, decode workers beside it.

supervisor thread: Source -> Records -> decode workers -> rows that have arrived       (engines.intake)
collate thread:    rows in order -> windows -> batches on the host, two ahead
main thread:       batches -> Runner                                                   (engines.forward)
writer thread:     finished windows -> Results -> parts                                (engines.writer)
"""

from __future__ import annotations

import gc
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmcli.core.errors import ErrorBudgetExceeded, ExitCode, Stopped, TryAgain
from mmcli.core.protocols import Decoder, ModelPlan, Output, Previous, Runner, Source, Task
from mmcli.core.report import Report
from mmcli.engines.batching import Arrived, Batch, BatchSize, Window, Windows, WindowSizes, batches
from mmcli.engines.forward import Collated, Forward, Launched
from mmcli.engines.intake import BLOCK_ROWS, Intake, Reuse
from mmcli.engines.table import Layout
from mmcli.engines.writer import PartLimits, PartWriter

# Batches that wait for the device: one would do if collating always took the same time.
READY_BATCHES = 2
# Where rows are wanted at once: when nothing has come for so long, what is there is computed.
IDLE_S = 0.05
# How long a thread keeps the interpreter's lock while others wait for it. The main thread gives it away with each
# operation that it starts on a device. 100,000 texts through a BERT on an H200, 16 cores: 10,800 rows/s with 500
# us, 12,300 with 100, 13,000 with 30. A null model on two cores without a GPU: 43,600 with 500, 47,900 with 200,
# 44,100 with 100, 35,900 with 50.
SWITCH_S, SWITCH_CUDA_S = 0.0002, 0.00005
# New objects after which cycles are looked for.
GC_OBJECTS = 20_000
# How long the main thread waits for one thing before it looks whether it is to stop.
POLL_S = 0.1
# Windows that wait until it is known whether their failed inputs or the model is at fault.
MAX_HELD = 32


@dataclass(slots=True)
class StopFlag:
    """Set from a signal handler: stop taking in work, commit what is done."""

    exit_code: ExitCode | None = None
    _at_once: bool = False

    def request(self, exit_code: ExitCode) -> None:
        self.exit_code = self.exit_code or exit_code
        if self._at_once:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, in the main thread, a request raises KeyboardInterrupt: for work that may be lost.

        A library may swallow it, so look at `exit_code` behind the block.
        """
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """`--max-errors N` or `P%` (of all rows). More error rows than that end the run."""

    count: int | None = None
    percent: float | None = None

    def check(self, report: Report) -> None:
        """Raise ErrorBudgetExceeded when there are more."""
        errors = report.error_rows
        # Without a total, a share of less than 100 rows would be noise.
        total = report.rows_total or max(100, report.done)
        allowed = self.count
        if self.percent is not None:
            allowed = int(total * self.percent / 100)
        if allowed is not None and errors > allowed:
            codes = ", ".join(f"{n} {c}" for c, n in report.errors.most_common())
            raise ErrorBudgetExceeded(
                f"{errors} error rows ({codes}) are more than --max-errors allows",
                hint="see error_message in the output; then raise --max-errors and run the same command again",
            )


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How to run; nothing here changes a row.

    batch_size    of a forward pass
    windows       which rows are batched together (see engines.batching.window_sizes)
    concurrency   batches that a model may compute at once, where it can (see mmcli.core.protocols.Runner)
    block_rows    at most so many are given to a decode worker at a time
    time_limit_s  stop, commit and raise TryAgain after this long
    """

    batch_size: BatchSize
    windows: WindowSizes
    concurrency: int = 1
    block_rows: int = BLOCK_ROWS
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
    rows that were complete are committed, except those that a failing model may have turned into errors.
    """
    with tuned():
        _Run(work, options).run()


@contextmanager
def tuned() -> Iterator[None]:
    """Settings of the interpreter for many small objects in several threads, while the block runs."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(SWITCH_S)
    # Rows make no cycles; looking for some every 700 objects takes 20 % of the time (40 -> 31 us a row).
    gc.set_threshold(GC_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)


@dataclass(slots=True)
class _Ready:
    """A batch of a window; the last one of a window may be no batch at all. `idle`: nothing else is on its way."""

    window: Window
    batch: Batch | None
    collated: Collated | None
    last: bool
    idle: bool


class _Run:
    def __init__(self, work: Work, options: LocalOptions) -> None:
        self.work, self.options, self.report = work, options, work.report
        self.first = options.windows.around(work.start_row).start
        # Two windows, so that one fills while the other is in the model; what waits in between; and enough to
        # keep the decode workers busy.
        ahead = 2 * options.windows.size + (READY_BATCHES + 1 + options.concurrency) * options.batch_size.samples
        reuse = Reuse(work.previous, work.task, work.source.slots) if work.previous is not None else None
        self.intake = Intake(
            work.source,
            work.decoder,
            work.report,
            self.first,
            max_rows=max(ahead, (work.decoder.num_workers + 1) * 2 * self.options.block_rows),
            block_rows=self.options.block_rows,
            reuse=reuse,
            want_signatures=work.want_signatures,
            live=work.output.immediate,
        )
        self.ready: queue.Queue[_Ready | BaseException | None] = queue.Queue(READY_BATCHES)
        self.runner: Runner | None = None
        self.held: list[Window] = []
        # Not freed before the run is: see mmcli.cli.boundary on devices that have failed.
        self.left: list[Any] = []
        self.ended = False
        self.closing = threading.Event()

    def run(self) -> None:
        work, report = self.work, self.report
        report.num_workers = work.decoder.num_workers
        report.begin()
        self.intake.start()
        writer: PartWriter | None = None
        try:
            with report.timed("load"):
                known_to_work = work.start_row > 0 or work.previous is not None
                self.runner = self._load()
                forward = Forward(self.runner, report, self.options.batch_size, known_to_work)
            layout = Layout.of(work.task, work.source)
            writer = PartWriter(work.output, layout, self.options.parts, report, work.start_row)
            threading.Thread(target=self._collate, args=(forward,), name="mmcli-collate", daemon=True).start()
            self._compute(forward, writer)
        finally:
            self.closing.set()
            try:
                if writer is not None:
                    writer.close()
            finally:
                # What could not be written is no reason to leave threads and processes behind.
                self.intake.close()
                if (close := getattr(self.runner, "close", None)) is not None:
                    close()
                report.end()
        self.options.budget.check(report)

    def _load(self) -> Runner:
        """The model. It can take minutes, or a download: who asks to stop does not wait for it."""
        try:
            with self.work.stop.at_once():
                runner = self.work.plan.load()
        except KeyboardInterrupt:
            self._check_stop()
            raise
        self._check_stop()
        self.report.device = device_of(runner)
        if (self.report.device or "").startswith("cuda"):
            sys.setswitchinterval(SWITCH_CUDA_S)
        several = getattr(runner, "concurrent", None)
        return runner if several is None or self.options.concurrency == 1 else several(self.options.concurrency)

    # -- collate thread ------------------------------------------------------------------------------------

    def _collate(self, forward: Forward) -> None:
        try:
            for blocks, idle in self._windows():
                with self.report.timed("collate"):
                    window, everything = Window.of(blocks)
                begun = window.position(self.work.start_row)
                waiting: Batch | None = None
                for batch in batches(everything, forward.max_cost):
                    # Of a window that an earlier run has begun: only batches that still matter.
                    if begun and max(batch.rows) < begun:
                        continue
                    if waiting is not None:
                        self._hand_on(forward, window, waiting, last=False, idle=False)
                    waiting = batch
                self._hand_on(forward, window, waiting, last=True, idle=idle)
            self._put(None)
        except BaseException as failure:  # noqa: BLE001 - raised in the main thread
            self._put(failure)

    def _hand_on(self, forward: Forward, window: Window, batch: Batch | None, last: bool, idle: bool) -> None:
        collated = None if batch is None else forward.collate(batch.samples)
        self._put(_Ready(window, batch, collated, last, idle))

    def _put(self, item: _Ready | BaseException | None) -> None:
        while not self.closing.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        self.left.append(item)

    def _windows(self) -> Iterator[tuple[list[Arrived], bool]]:
        """Windows in row order, and whether nothing was on its way when they were cut."""
        windows = Windows(self.first, self.options.windows)
        immediate = self.work.output.immediate
        while not self.closing.is_set():
            try:
                arrived = self.intake.get(timeout=IDLE_S if immediate else 0.1)
            except queue.Empty:
                if immediate and self.ready.empty() and ((blocks := windows.flush()) or self.held):
                    yield blocks, True
                continue
            if arrived is None:
                windows.check_empty()
                yield windows.flush(), False
                return
            for window in windows.add(arrived):
                yield window, False

    # -- main thread ---------------------------------------------------------------------------------------

    def _compute(self, forward: Forward, writer: PartWriter) -> None:
        """Where a batch is computed while the host goes on, the next one is started before it is waited for."""
        in_work: deque[tuple[_Ready, Launched]] = deque()

        def finish_first() -> None:
            ready, launched = in_work.popleft()
            with self.report.timed("forward"):
                while not _done(launched, POLL_S):
                    self._check_stop()
            self._complete(ready, forward.finish(launched), forward, writer)

        while not self.ended:
            first = in_work[0][1] if in_work else None
            ready = self._next(first, len(in_work) >= forward.concurrency)
            launched = None if ready is None or ready.collated is None else forward.launch(ready.collated)
            if in_work and (ready is None or len(in_work) >= forward.concurrency):
                finish_first()
            if ready is None:
                continue
            if launched is not None and launched.pending:
                in_work.append((ready, launched))
                continue
            while in_work:
                finish_first()
            self._complete(ready, [] if launched is None else forward.finish(launched), forward, writer)
        while in_work:
            finish_first()
        forward.settle(at_end=True)
        self._release_held(writer)

    def _next(self, first: Launched | None, busy: bool) -> _Ready | None:
        """The next batch; None when the first one in work is done before, or there are no more (`ended`).

        busy  the model has as much to do as it can
        """
        start = time.perf_counter()
        try:
            while True:
                self._check_stop()
                done = first is not None and _done(first, 0)
                try:
                    item = self.ready.get_nowait() if done else self.ready.get(timeout=POLL_S)
                except queue.Empty:
                    if done:
                        return None
                    continue
                if isinstance(item, BaseException):
                    raise item
                self.ended = item is None
                return item
        finally:
            self.report.add("forward" if busy else "wait", time.perf_counter() - start)

    def _complete(self, ready: _Ready, outputs: Sequence[Any], forward: Forward, writer: PartWriter) -> None:
        window = ready.window
        if ready.batch is not None:
            window.put(ready.batch, outputs)
        if not ready.last:
            return
        self.intake.release(len(window.records), window.nbytes)
        self.held.append(window)
        if ready.idle or len(self.held) > MAX_HELD:
            forward.settle()
        if not forward.failures:
            self._release_held(writer)
        self.options.budget.check(self.report)

    def _release_held(self, writer: PartWriter) -> None:
        held, self.held = self.held, []
        for window in held:
            writer.put(window)

    def _check_stop(self) -> None:
        if self.work.stop.exit_code is not None:
            name = "interrupted" if self.work.stop.exit_code == ExitCode.INTERRUPTED else "terminated"
            raise Stopped(name, self.work.stop.exit_code)
        limit = self.options.time_limit_s
        if limit is not None and self.report.wall_s > limit:
            raise TryAgain(f"--time-limit of {limit:g} s reached", hint="run the same command again to go on")


def device_of(runner: Runner) -> str | None:
    """Where a model is, as torch names it; None: nowhere that it could tell (a server, a fake one)."""
    # A fake model would import torch to say so.
    device = getattr(runner, "device", None) if "torch" in sys.modules else None
    return None if device is None else str(device)


def _done(launched: Launched, timeout: float) -> bool:
    """Whether its outputs are there within `timeout` seconds, or are best waited for in one go: a device's."""
    outputs = launched.outputs
    return not hasattr(outputs, "wait") or bool(outputs.wait(timeout))
