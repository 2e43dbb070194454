"""The supervisor thread: Source -> Records -> decode workers -> rows that have arrived.

It hands on rows in order and never more than the model can soon take, so that memory stays bounded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from mmcli.core.protocols import Decoder, Previous, Source, Task
from mmcli.core.records import Record, Result
from mmcli.core.report import Report
from mmcli.core.signature import signature
from mmcli.core.texts import TextRecords
from mmcli.engines.batching import WINDOW_BYTES, Arrived, Outcomes

# A block is what one worker is given at a time: at most this many records or encoded bytes. 64 tiny
# pictures amortise a message (about 0.1 ms); one large video does not wait behind others.
BLOCK_ROWS = 64
# Of texts, each of which takes 0.1 ms: a fifth less of the supervisor's time by 256 than by 64, and 9 % more rows a
# second by 512 than by 256 (1,024: the same).
TEXT_BLOCK_ROWS = 512
BLOCK_BYTES = 2 * 1024 * 1024
# Looked up together in a previous output.
LOOKUP_ROWS = 1024
# Model inputs in memory. Above WINDOW_BYTES, so that a window can always become complete.
MAX_BYTES = 2 * WINDOW_BYTES
# How long a live source may keep the decode workers from being looked after.
LIVE_POLL_S = 0.02

T = TypeVar("T")

# A row that needs no decoding, and what it is.
_Ready = tuple[Record, Outcomes]


class Intake:
    """Reads, looks up and decodes rows ahead of the model, in a thread of its own.

    first       the row to begin at
    max_rows    rows that may be on their way: handed on, but not released
    block_rows  at most so many are given to a worker at a time
    reuse       finished rows of an earlier output
    live        hand on rows as they come, however few
    """

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        report: Report,
        first: int,
        max_rows: int,
        block_rows: int = BLOCK_ROWS,
        reuse: Reuse | None = None,
        want_signatures: bool = True,
        live: bool = False,
    ) -> None:
        self._source, self._decoder, self._report = source, decoder, report
        self._first, self._max_rows, self._most, self._reuse = first, max_rows, block_rows, reuse
        self._live = live
        # To look rows up they are needed at once; else the decode workers have more time for them than this thread.
        self._sign_first = want_signatures and (reuse is not None or not hasattr(decoder, "signs"))
        self._sign = want_signatures
        if hasattr(decoder, "signs"):
            decoder.signs = want_signatures and not self._sign_first
        self._arrived: queue.Queue[list[Arrived] | BaseException | None] = queue.Queue()
        self._lock = threading.Lock()
        self._rows = self._bytes = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="mmcli-decode", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def get(self, timeout: float) -> list[Arrived] | None:
        """The next rows, in any order; None at the end. Raises queue.Empty, or what the thread failed with."""
        item = self._arrived.get(timeout=timeout)
        if isinstance(item, BaseException):
            raise item
        return item

    def release(self, rows: int, nbytes: int) -> None:
        """So many rows are finished, and their model inputs gone."""
        with self._lock:
            self._rows -= rows
            self._bytes -= nbytes

    def close(self) -> None:
        """Stop reading and give back the decode workers."""
        self._closing.set()
        if self._thread.ident is not None:
            # A decoder without processes may be in the middle of a long clip; the process ends soon anyway.
            self._thread.join(timeout=5)
        self._decoder.close()

    def _supervise(self) -> None:
        try:
            for decoded in self._decoder.run(self._blocks(), self._may_read):
                if self._closing.is_set():
                    return
                if decoded.records:
                    self._report.decoded(decoded.decode_s, decoded.process_s, decoded.cpu_s)
                    if self._sign:
                        _sign(decoded.records)
                    self._arrive(Arrived.of(decoded.records, decoded.outcomes))
            self._arrived.put(None)
        except BaseException as failure:  # noqa: BLE001 - raised where the rows are waited for
            self._arrived.put(failure)

    def _arrive(self, blocks: list[Arrived]) -> None:
        nbytes = sum(block.nbytes for block in blocks)
        if nbytes:
            with self._lock:
                self._bytes += nbytes
        self._arrived.put(blocks)

    def _may_read(self) -> bool:
        # Rows are handed on in order: all that a window lacks is on its way when this becomes false.
        return (self._rows < self._max_rows and self._bytes < MAX_BYTES) or self._closing.is_set()

    def _blocks(self) -> Iterator[Sequence[Record]]:
        """Records to decode, in blocks; rows that need no decoding arrive at once. Empty: none for now."""
        for chunk in self._chunks():
            if self._closing.is_set():
                return
            with self._report.timed("read"):
                ready, wanted = self._look_up(chunk)
            for direct, block in _split(ready, wanted, self._block_rows()):
                with self._lock:
                    self._rows += len(direct) + len(block)
                if direct:
                    direct.sort(key=lambda row: row[0].row)
                    self._arrive(Arrived.of([record for record, _ in direct], [outcomes for _, outcomes in direct]))
                yield block

    def _chunks(self) -> Iterator[Sequence[Record]]:
        if self._live:
            yield from _live_chunks(self._source.records(self._first))
            return
        if not hasattr(self._source, "blocks"):
            records = self._source.records(self._first)
            while chunk := self._read(lambda: list(islice(records, self._chunk_rows()))):
                yield chunk
            return
        blocks = self._source.blocks(self._first)
        while (block := self._read(lambda: next(blocks, None))) is not None:
            while block:
                size = self._chunk_rows()
                chunk, block = block[:size], block[size:]
                yield chunk

    def _read(self, read: Callable[[], T]) -> T:
        with self._report.timed("read"):
            return read()

    def _chunk_rows(self) -> int:
        # Asked each time: how many rows come may turn out as they do (see ceilings.measure_decoding).
        return LOOKUP_ROWS if self._reuse is not None else self._block_rows()

    def _block_rows(self) -> int:
        # Small inputs: spread them over the workers rather than give all to the first.
        share = (self._report.rows_total or BLOCK_ROWS * 64) // (4 * max(1, self._decoder.num_workers))
        return max(1, min(self._most, share))

    def _look_up(self, chunk: Sequence[Record]) -> tuple[list[_Ready], Sequence[Record]]:
        """Rows that need no decoding, and the others."""
        if isinstance(chunk, TextRecords):
            if self._reuse is None:
                return [], chunk
            chunk = list(chunk)
        if self._sign_first:
            _sign(chunk)
        ready: list[_Ready] = [(r, (r.error,)) for r in chunk if r.error is not None]
        wanted = [r for r in chunk if r.error is None] if ready else chunk
        if self._reuse is not None and wanted:
            found = self._reuse.take(wanted)
            if found:
                ready += [(result.record, result) for result in found.values()]
                wanted = [r for i, r in enumerate(wanted) if i not in found]
        return ready, wanted


class Reuse:
    """Finished rows of an earlier output as Results."""

    def __init__(self, previous: Previous, task: Task, slots: Sequence[str]) -> None:
        self._previous, self._task, self._fields = previous, task, task.fields(slots)

    def take(self, records: Sequence[Record]) -> dict[int, Result]:
        """position -> Result, for those records whose row is known."""
        positions, table = self._previous.take([r.signature for r in records])
        if not positions or table is None:
            return {}
        values = self._task.restore(table, self._fields)
        modalities = table.column("modality").to_pylist()
        return {
            position: Result(records[position], modality, values=row)
            for position, modality, row in zip(positions, modalities, values, strict=True)
        }


def _split(
    ready: list[_Ready], wanted: Sequence[Record], block_rows: int
) -> Iterator[tuple[list[_Ready], Sequence[Record]]]:
    """Consecutive rows, cut so that none is handed on before the rows in front of it. At least one piece."""
    texts = wanted.texts if isinstance(wanted, TextRecords) else None
    nbytes = sum(map(_encoded_bytes, wanted)) if texts is None else sum(map(len, texts))
    if not ready and len(wanted) <= block_rows and nbytes <= BLOCK_BYTES:
        yield ready, wanted
        return
    ready = sorted(ready, key=lambda row: row[0].row, reverse=True)
    block: list[Record] = []
    size = 0
    for record in wanted:
        weight = _encoded_bytes(record)
        if block and (len(block) >= block_rows or size + weight > BLOCK_BYTES):
            yield _pop_before(ready, record.row), block
            block, size = [], 0
        block.append(record)
        size += weight
    yield ready, block


def _pop_before(ready: list[_Ready], row: int) -> list[_Ready]:
    direct = []
    while ready and ready[-1][0].row < row:
        direct.append(ready.pop())
    return direct


def _live_chunks(records: Iterator[Record]) -> Iterator[Sequence[Record]]:
    """What has come so far, as soon as it comes; empty when nothing has come for a while.

    Reading waits in a thread of its own, which ends with its source or with the process.
    """
    pipe: queue.Queue[Record | BaseException | None] = queue.Queue(2 * BLOCK_ROWS)

    def read() -> None:
        try:
            for record in records:
                pipe.put(record)
            pipe.put(None)
        except BaseException as failure:  # noqa: BLE001 - raised where the records are waited for
            pipe.put(failure)

    threading.Thread(target=read, name="mmcli-read", daemon=True).start()
    end: Record | BaseException | None
    while True:
        chunk: list[Record] = []
        try:
            while isinstance(end := pipe.get(timeout=0 if chunk else LIVE_POLL_S), Record):
                chunk.append(end)
                if len(chunk) == BLOCK_ROWS:
                    break
        except queue.Empty:
            pass
        else:
            if not isinstance(end, Record):
                yield chunk
                if end is not None:
                    raise end
                return
        yield chunk


def _sign(records: Sequence[Record]) -> None:
    """Where that was not done before."""
    if isinstance(records, TextRecords):
        records.sign()
        return
    for record in records:
        if record.signature is None:
            record.signature = signature(record)


def _encoded_bytes(record: Record) -> int:
    total = 0
    for media in record.media:
        total += media.size or len(media.data or media.text or "")
    return total
