"""What decoding alone and the model alone reach over the same inputs: no run over them can be faster."""

from __future__ import annotations

import queue
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmcli.core.errors import RowError
from mmcli.core.protocols import Decoder, Runner, Snapshot, Source
from mmcli.core.records import Record, Result
from mmcli.core.report import Report
from mmcli.core.samples import Packed
from mmcli.core.texts import blocks_of, numbered
from mmcli.engines.batching import WINDOW_BYTES, Arrived, Batch, Window, batches
from mmcli.engines.forward import Collated, Forward, Launched
from mmcli.engines.intake import BLOCK_ROWS, TEXT_BLOCK_ROWS, Intake
from mmcli.engines.local import LocalOptions

# Batches that are made ready, before the clock runs, and computed one behind the other.
READY = 8
# The share of a measurement's time that is spent on warming up.
WARM_UP = 0.25
# Decoded rows that are kept for the model, in windows.
KEPT_WINDOWS = 4
# So many records, which hold their bytes where these are inline, are read once.
FEW = 256
# And of texts so many blocks less one.
FEW_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Rate:
    """What was measured. `cpu_s`: processor seconds of all processes."""

    rows: float
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        """Rows a second."""
        return self.rows / max(self.seconds, 1e-9)

    @property
    def cpu_per_row(self) -> float:
        """Processor seconds of one row."""
        return self.cpu_s / max(self.rows, 1e-9)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What decoding and the model reach, each alone on `cores` cores.

    greedy  both use all cores that they can get: what they had was all that other work has left
    """

    decode: Rate
    model: Rate
    cores: float
    greedy: bool = False

    @property
    def slower(self) -> float:
        """Rows a second of the slower of the two."""
        return min(self.decode.per_s, self.model.per_s)

    @property
    def shared(self) -> float:
        """Rows a second of both at once, when they use the same cores.

        A row takes the processor time of both, and there are `cores` seconds of it in a second. Where each alone
        keeps all cores busy that is 1 / (1 / decode + 1 / model); where the model is on a GPU, hardly less than
        `decode`. On a machine with other work it is what there was for them.
        """
        cores = self.cores
        if self.greedy:
            cores = min(cores, max(rate.cpu_s / max(rate.seconds, 1e-9) for rate in (self.decode, self.model)))
        return cores / max(self.decode.cpu_per_row + self.model.cpu_per_row, 1e-12)

    @property
    def highest(self) -> float:
        """Rows a second that a run can reach."""
        return min(self.slower, self.shared)

    @property
    def limit(self) -> str:
        """ "decode" or "model": the slower one; where the cores are too few for both, what takes more of them."""
        if self.shared < self.slower:
            return "decode" if self.decode.cpu_per_row > self.model.cpu_per_row else "model"
        return "decode" if self.decode.per_s < self.model.per_s else "model"


class RepeatedSource:
    """The rows of a source, over and over: `rows` of them, or as many as come before `seconds` are over.

    Rows are numbered on; ids come again. The clock starts with the first row.
    """

    def __init__(self, source: Source, rows: int | None = None, seconds: float | None = None) -> None:
        self.slots, self.keep = source.slots, source.keep
        self._source, self._rows, self._seconds = source, rows, seconds

    def expected(self, rows: int, seconds: float) -> int:
        """How many rows will come, where `rows` took `seconds`."""
        if self._rows is not None or self._seconds is None:
            return self._rows or rows
        return int(rows * max(1.0, self._seconds / max(seconds, 1e-9)))

    def snapshot(self, folder: Path) -> Snapshot:
        """That of the source, with the number of rows that will come."""
        return replace(self._source.snapshot(folder), rows=self._rows)  # type: ignore[type-var]

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from row `start` on."""
        end = None if self._seconds is None else time.perf_counter() + self._seconds
        for row, record in enumerate(self._endless()):
            if row == self._rows or (end is not None and time.perf_counter() >= end):
                return
            if row >= start:
                # `replace` takes four times as long, which a run does not.
                one = record
                yield Record(row, one.id, one.path, one.media, one.keep, one.variables, one.error)

    def _endless(self) -> Iterator[Record]:
        """A few are kept: to open their list again for each 20 rows would be what is measured."""
        few: list[Record] = []
        for record in self._source.records():
            if len(few) <= FEW:
                few.append(record)
            yield record
        while True:
            yield from few if len(few) <= FEW else self._source.records()


class RepeatedTexts(RepeatedSource):
    """As RepeatedSource, of texts that come some at a time: as a run gets them."""

    def blocks(self, start: int = 0) -> Iterator[Sequence[Record]]:
        """As `records`; few at a time, so that the clock is looked at often."""
        end = None if self._seconds is None else time.perf_counter() + self._seconds
        row = 0
        for block in self._endless_blocks():
            for at in range(0, len(block), TEXT_BLOCK_ROWS):
                rest = TEXT_BLOCK_ROWS if self._rows is None else min(TEXT_BLOCK_ROWS, self._rows - row)
                if rest <= 0 or (end is not None and time.perf_counter() >= end):
                    return
                here = numbered(block[at : at + rest], row)
                row += len(here)
                if row > start:
                    yield here[max(0, start - here[0].row) :]

    def _endless_blocks(self) -> Iterator[Sequence[Record]]:
        """The first ones are kept where they are all."""
        first: list[Sequence[Record]] = []
        for block in blocks_of(self._source):
            if len(first) < FEW_BLOCKS:
                first.append(block)
            yield block
        while True:
            yield from first if len(first) < FEW_BLOCKS else blocks_of(self._source)


@dataclass(slots=True)
class Decoding:
    """How decoding went: its rate, the stages of all `rows` in `report`, errors, and the first rows decoded."""

    rate: Rate
    report: Report
    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    kept: list[Arrived] = field(default_factory=list)


def measure_decoding(
    source: RepeatedSource, decoder: Decoder, report: Report, keep: int, block_rows: int = BLOCK_ROWS
) -> Decoding:
    """Read and decode all of `source`, with nothing else at work; keeps the first `keep` decoded rows.

    Blocks are as large as in a run over so many rows. The clock runs from the first block of each worker on, and
    until the first worker has nothing left to do.
    """
    report.num_workers, workers = decoder.num_workers, max(1, decoder.num_workers)
    intake = Intake(source, decoder, report, 0, max_rows=4 * workers * block_rows, block_rows=block_rows)
    done = Decoding(Rate(0, 0, 0), report)
    kept = nbytes = 0
    marks = [(0, time.perf_counter(), report.cpu_s)]
    intake.start()
    try:
        while (arrived := _next(intake)) is not None:
            rows = sum(map(len, arrived))
            done.rows += rows
            marks.append((done.rows, time.perf_counter(), report.cpu_s))
            took = report.wall_s - (report.first_decoded_s or report.wall_s)
            report.rows_total = source.expected(done.rows, took)
            intake.release(rows, sum(block.nbytes for block in arrived))
            for block in arrived:
                found = _errors(block)
                done.errors.update(filter(None, found))
                if kept < keep and nbytes < WINDOW_BYTES:
                    good = _without_errors(block, found).part(0, keep - kept)
                    done.kept += [good] if len(good) else []
                    kept += len(good)
                    nbytes += good.nbytes
    finally:
        intake.close()
    done.rate = _between(marks, workers)
    return done


def _next(intake: Intake) -> list[Arrived] | None:
    while True:
        try:
            return intake.get(timeout=0.1)
        except queue.Empty:
            continue


def _between(marks: Sequence[tuple[int, float, float]], workers: int) -> Rate:
    """Without the start of the workers, and without the end, where they have less and less to do."""
    if len(marks) > 4 * workers:
        marks = marks[workers:-workers]
    elif len(marks) > 2:
        marks = marks[1:]
    (first_rows, first, first_cpu), (last_rows, last, last_cpu) = marks[0], marks[-1]
    return Rate(last_rows - first_rows, last - first, last_cpu - first_cpu)


def _errors(block: Arrived) -> list[str | None]:
    """The error of each row: the first one that it has."""
    if isinstance(block.outcomes, Packed):
        return [None] * len(block)
    found: list[str | None] = []
    for row in block.outcomes:
        outcomes = () if isinstance(row, Result) else row
        found.append(next((o.code for o in outcomes if isinstance(o, RowError)), None))
    return found


def _without_errors(block: Arrived, errors: Sequence[str | None]) -> Arrived:
    if not any(errors):
        return block
    good = [i for i, error in enumerate(errors) if error is None]
    outcomes = [block.outcomes[i] for i in good]
    return Arrived([block.records[i] for i in good], outcomes, [int(block.sizes[i]) for i in good])


def measure_model(runner: Runner, blocks: Sequence[Arrived], options: LocalOptions, seconds: float) -> Rate:
    """The forward pass alone, over batches of these rows as a run forms them, again and again for `seconds`.

    Batches are made ready while the clock stands still, and a quarter of the time goes to warming up before. A
    slow model takes longer: one batch to warm up, one to measure.
    """
    forward = Forward(runner, Report(), options.batch_size, known_to_work=True)
    formed = formed_batches(blocks, forward, options.windows.size)
    several = forward.concurrency
    warm = _computed(forward, formed, seconds * WARM_UP, group=several)
    samples = sum(map(len, formed))
    waves = int(warm.rows * seconds / max(warm.seconds, 1e-9) / (samples / len(formed) * several))
    group = several * max(1, min(READY // several, waves))
    found = _computed(forward, formed, seconds, group)
    samples_per_row = samples / sum(map(len, blocks))
    return replace(found, rows=found.rows / samples_per_row)


def formed_batches(blocks: Sequence[Arrived], forward: Forward, window: int) -> list[Batch]:
    """Those of a run, in an order of no meaning: a run begins each window with its longest inputs, and of a slow
    model a few seconds would be of these alone.
    """
    formed = [batch for rows in _windows(blocks, window) for batch in batches(Window.of(rows)[1], forward.max_cost)]
    random.Random(0).shuffle(formed)
    return formed


def _windows(blocks: Sequence[Arrived], size: int) -> Iterator[list[Arrived]]:
    """So many rows each, whatever their numbers."""
    window: list[Arrived] = []
    room = size
    for block in blocks:
        start = 0
        while start < len(block):
            piece = block.part(start, start + room)
            window.append(piece)
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield window
                window, room = [], size
    if window:
        yield window


def _computed(forward: Forward, formed: Sequence[Batch], seconds: float, group: int) -> Rate:
    """Batches over and over until the clock shows `seconds`, `group` at a time; rows of the Rate are samples."""
    samples, clock, cpu, at = 0, 0.0, 0.0, 0
    while clock < seconds:
        chosen = [formed[(at + i) % len(formed)] for i in range(group)]
        at += group
        ready = [forward.collate(batch.samples) for batch in chosen]
        start, used = time.perf_counter(), time.process_time()
        _compute(forward, ready)
        clock += time.perf_counter() - start
        cpu += time.process_time() - used
        samples += sum(map(len, chosen))
    return Rate(samples, clock, cpu)


def _compute(forward: Forward, ready: Sequence[Collated]) -> None:
    """As the engine does: the next batch is started before one is waited for."""
    in_work: deque[Launched] = deque()
    for collated in ready:
        in_work.append(forward.launch(collated))
        if len(in_work) > forward.concurrency:
            forward.finish(in_work.popleft())
    for launched in in_work:
        forward.finish(launched)
