"""The decode worker processes: a nursery that opens the processor once, and the workers it forks.

    supervisor --control socket--> nursery --fork--> worker 1, worker 2, ...
                                                 ^ each with its own socket to the supervisor

The nursery imports what decoding needs and opens the model's processor, then only forks: a fresh worker is
ready in milliseconds and shares that memory. Nothing computes in the nursery, so no thread exists at a fork.
A worker tells what it is doing through a Cell in shared memory, which survives its crash.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmcli.core.errors import RowError
from mmcli.core.protocols import ModelPlan, Processor, RecordProcessor
from mmcli.core.records import DecodeOptions, Media, Modality, Record, Sample
from mmcli.core.signature import signature
from mmcli.core.texts import TextRecords, rows_of
from mmcli.media import transport
from mmcli.media.packing import Outcomes, pack

Outcome = Sample | RowError


@dataclass(slots=True)
class Jobs:
    """What a worker is told of a block of records.

    number     of the block
    media      of each record; of records with one inline text each, all of one `modality`, these texts alone
    variables  `Record.variables` of each; None: no record has any
    described  the ids, paths and `keep` of all, where their signatures are wanted; else None
    """

    number: int
    media: list[tuple[Media, ...]] | list[str]
    modality: Modality | None = None
    variables: list[tuple[Any, ...]] | None = None
    described: tuple[Iterable[str], Iterable[str | None], Iterable[tuple[Any, ...]]] | None = None

    @classmethod
    def of(cls, number: int, records: Sequence[Record], sign: bool) -> Jobs:
        """Of so many records. Texts alone: a fifth of the time to pickle."""
        if isinstance(records, TextRecords):
            jobs = cls(number, list(records.texts), records.modality, rows_of(records.variables))
            if sign:
                keep = rows_of(records.keep) or [()] * len(records)
                jobs.described = records.ids, [None] * len(records), keep
            return jobs
        media = [r.media for r in records]
        variables = [r.variables for r in records] if any(r.variables for r in records) else None
        jobs = cls(number, media, None, variables)
        if sign:
            jobs.described = [r.id for r in records], [r.path for r in records], [r.keep for r in records]
        texts = [m[0].text for m in media if len(m) == 1 and m[0].text is not None]
        modalities = {m[0].modality for m in media if m}
        if len(texts) == len(media) and len(modalities) == 1:
            jobs.media, jobs.modality = texts, modalities.pop()
        return jobs

    def unpacked(self) -> list[tuple[Media, ...]]:
        """The media of each record."""
        return [(Media(self.modality, text=m),) if isinstance(m, str) else m for m in self.media]

    def signatures(self, media: Sequence[tuple[Media, ...]]) -> bytes | None:
        """Those of the records (mmcli.core.signature), one behind the other."""
        if self.described is None:
            return None
        variables = self.variables or [()] * len(media)
        records = [
            Record(0, id, path, one, keep, values)
            for id, path, keep, one, values in zip(*self.described, media, variables, strict=True)
        ]
        return b"".join([signature(record) or b"" for record in records])


class Cell:
    """What a worker is busy with: 16 bytes of shared memory, written by the worker, read by the supervisor.

    Both halves are written whole, the time first: so whoever reads in between sees a time that is too late, never
    one that is too early and makes a worker look hung.
    """

    SIZE = 16

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.SIZE)
        view = memoryview(self._memory)
        # Native 8-byte stores; struct with a byte order would write byte by byte.
        self._index, self._started = view[:8].cast("q"), view[8:].cast("d")
        view.release()

    @classmethod
    def create(cls) -> tuple[Cell, int]:
        """A new idle cell and the descriptor that another process opens it by."""
        descriptor = transport.anonymous_file()
        os.ftruncate(descriptor, cls.SIZE)
        cell = cls(descriptor)
        cell.idle()
        return cell, descriptor

    def begin(self, index: int) -> None:
        """The worker starts with the `index`-th record of its block."""
        self._started[0] = time.monotonic()
        self._index[0] = index

    def idle(self) -> None:
        self._index[0] = -1

    def read(self) -> tuple[int, float]:
        """(index or -1 when idle, monotonic seconds at which that record was begun)"""
        return self._index[0], self._started[0]

    def close(self) -> None:
        self._index.release()
        self._started.release()
        self._memory.close()


@dataclass(slots=True)
class Answer:
    """A worker's answer to one block: for each record one outcome per Sample, and the seconds that it took.

    cpu_s       processor seconds of the worker since its last answer, the messages included
    signatures  16 bytes for each record, where they were wanted
    """

    block: int
    outcomes: Outcomes
    decode_s: float
    process_s: float
    cpu_s: float = 0.0
    signatures: bytes | None = None


class BlockDecoder:
    """Decode and process, one record at a time. Any exception becomes a RowError of that record."""

    def __init__(self, processor: Processor | RecordProcessor, options: DecodeOptions) -> None:
        from mmcli.media.decode import decode

        self._decode: Callable[[Media, DecodeOptions], tuple[Any, Any]] = decode
        self._processor: Any = processor
        # Whether it takes all media of a record together.
        self._whole = hasattr(processor, "record")
        self._options = options
        if hasattr(processor, "show"):
            processor.show(partial(decode, options=options))
        self.decode_s = self.process_s = 0.0

    def block(self, jobs: Jobs, cell: Cell | None = None) -> Answer:
        """Outcomes of all records of a block."""
        self.decode_s = self.process_s = 0.0
        outcomes: list[tuple[Outcome, ...]] = []
        records = jobs.unpacked()
        for index, media in enumerate(records):
            if cell is not None:
                cell.begin(index)
            if self._whole:
                outcomes.append(self._timed(media, jobs.variables[index] if jobs.variables else ()))
            else:
                outcomes.append(tuple([self._timed((m,))[0] for m in media]))
        if cell is not None:
            cell.idle()
        signatures = None
        # What fails here fails once more in the main process, where it can be told.
        with contextlib.suppress(Exception):
            signatures = jobs.signatures(records)
        return Answer(jobs.number, outcomes, self.decode_s, self.process_s, signatures=signatures)

    def _timed(self, media: Sequence[Media], variables: Sequence[Any] = ()) -> tuple[Outcome, ...]:
        start, decoded = time.perf_counter(), 0.0
        try:
            payloads = [self._decode(one, self._options) for one in media]
            decoded = time.perf_counter()
            if self._whole:
                return tuple(self._processor.record(payloads, variables))
            return (self._processor(*payloads[0]),)
        except RowError as error:
            return (error,)
        except MemoryError:
            return (RowError("oom", "not enough memory to decode this input"),)
        except Exception as error:  # noqa: BLE001 - a library that fails on one input must cost one row
            return (RowError("corrupt", f"{type(error).__name__}: {error}"),)
        finally:
            end = time.perf_counter()
            self.decode_s += (decoded or end) - start
            self.process_s += end - (decoded or end)


def main(control: socket.socket, imports: Sequence[str] = ()) -> None:
    """The nursery: receive (plan, options, expected modalities), answer None or an error, then fork on demand.

    imports  modules that the plan will need, to be imported before it comes
    """
    _quiet()
    for name in imports:
        # What cannot be imported is told where it is needed.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    try:
        decoder = _open(*transport.receive(control))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - the supervisor raises it where the user sees it
        transport.send(control, f"{type(error).__name__}: {error}")
        return
    transport.send(control, None)
    while True:
        try:
            request = transport.receive(control)
        except (EOFError, OSError):
            return
        if request == "fork":
            worker, cell = transport.receive_descriptors(control, 2)
            nursery = os.getpid()
            pid = os.fork()
            if pid == 0:
                control.close()
                die_with_parent(nursery)
                _serve(decoder, socket.socket(fileno=worker), Cell(cell))
                os._exit(0)
            os.close(worker)
            os.close(cell)
            transport.send(control, pid)
        else:
            transport.send(control, os.waitpid(request, 0)[1])


def _open(plan: ModelPlan, options: DecodeOptions, expected: frozenset[Modality]) -> BlockDecoder:
    from mmcli.media.decode import warm_up

    warm_up(options, expected)
    return BlockDecoder(plan.open_processor(), options)


def _serve(decoder: BlockDecoder, sock: socket.socket, cell: Cell) -> None:
    """A worker: answer blocks until the supervisor closes the socket."""
    # What the nursery made stays, shared with it, and rows make no cycles.
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    used = time.process_time()
    while True:
        try:
            answer = decoder.block(transport.receive(sock), cell)
            before, used = used, time.process_time()
            transport.send(sock, replace(answer, outcomes=pack(answer.outcomes), cpu_s=used - before))
        except (EOFError, OSError):
            return


def _quiet() -> None:
    """No signal of the terminal, no core file; what a library prints must not reach the data on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with_parent()


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the parent dies, even while a decoder hangs (Linux; elsewhere the closed socket ends us).

    parent  its process id; one that has died already tells nobody
    """
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
