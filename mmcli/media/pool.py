"""The supervisor of the decode workers: keeps them busy, and replaces those that crash or hang."""

from __future__ import annotations

import errno
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mmcli.core.errors import MmcliError, ModelError, RowError
from mmcli.core.protocols import ModelPlan
from mmcli.core.records import Decoded, DecodeOptions, Modality, Record
from mmcli.core.signature import SIGNATURE_BYTES
from mmcli.core.texts import TextRecords
from mmcli.media import transport
from mmcli.media.packing import pack
from mmcli.media.worker import Answer, BlockDecoder, Cell, Jobs

# One block in work and one waiting: a worker never idles while its answer is on the way.
BLOCKS_PER_WORKER = 2
# How often hung workers are looked for, in seconds.
POLL_S = 0.2
# How often the source is asked again while a worker has nothing to do.
STARVED_S = 0.001
# glibc returns freed memory above 128 KiB to the kernel, and every picture pays for fresh pages: with these a
# 2000 x 1500 JPEG is decoded to an array in 16 ms instead of 36.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024**2)}
# Some systems allow without end, and some libraries close all that there may be.
MAX_OPEN_FILES = 65_536
# Workers that die without having begun with an input, no answer in between: the machine is at fault.
MAX_BARREN_DEATHS = 20


@dataclass(slots=True)
class _Block:
    number: int
    records: Sequence[Record]
    crashed_before: bool = False


@dataclass(slots=True)
class _Worker:
    pid: int
    sock: socket.socket
    cell: Cell
    blocks: deque[_Block] = field(default_factory=deque)
    hung: bool = False
    late_with: tuple[int, float] | None = None


class Nursery:
    """The process that decode workers are forked from.

    May be started before there is a plan: it then imports `imports` (names of modules) at once, while the caller
    imports its own: 48 pictures through a small model take 7.4 s instead of 10.0 on two cores (medians of 3).
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self.control, theirs = socket.socketpair()
        # A session of its own: Ctrl-C at the terminal reaches only the main process, which decides what to do.
        # What a library prints there is nobody's data: stdout is ours alone, and on stderr libtiff would talk.
        # It imports from where we do: `-P` keeps modules that lie in the current folder out of it.
        start = (
            "import sys, json, socket; sys.path[:] = json.loads(sys.argv[2]); from mmcli.media.worker import main; "
            "main(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[3]))"
        )
        arguments = [str(theirs.fileno()), json.dumps(sys.path), json.dumps(list(imports))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", start, *arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("MMCLI_DEBUG") else subprocess.DEVNULL,
            start_new_session=True,
            env={**MALLOC, **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Kill it. May be called twice."""
        self.control.close()
        self._process.kill()
        self._process.wait()


class InlineDecoder:
    """`--num-workers 0`: decode in this process. No protection from decoders that crash or hang."""

    num_workers = 0

    def __init__(self, plan: ModelPlan, options: DecodeOptions) -> None:
        self._plan, self._options = plan, options

    def run(self, blocks: Iterator[Sequence[Record]], may_read: Callable[[], bool]) -> Iterator[Decoded]:
        """Decode `blocks` in order; waits while `may_read` is false."""
        decoder = BlockDecoder(self._plan.open_processor(), self._options)
        while True:
            while not may_read():
                time.sleep(STARVED_S)
            records = next(blocks, None)
            if records is None:
                return
            if not records:
                yield Decoded((), ())
                continue
            answer = decoder.block(Jobs.of(0, records, sign=False))
            yield Decoded(records, pack(answer.outcomes), answer.decode_s, answer.process_s)

    def close(self) -> None:
        """Nothing to release."""


class DecodePool:
    """Decode in `num_workers` processes that may crash or hang, at the cost of one row each time.

    A record in whose decoding a worker dies is tried once more, alone, in a fresh worker; when that dies
    too, the record is a `worker_crash`. A record that takes longer than `timeout_s` is a `timeout`.

    expected  modalities whose libraries are loaded before workers are forked; others are when they turn up
    signs     whether the workers also compute the signatures of records, as far as they get to them
    """

    def __init__(
        self,
        plan: ModelPlan,
        options: DecodeOptions,
        num_workers: int,
        timeout_s: float,
        nursery: Nursery | None = None,
        expected: frozenset[Modality] | None = None,
    ) -> None:
        self.num_workers, self._timeout_s = num_workers, timeout_s
        self.signs = False
        _allow_open_files()
        self._workers: list[_Worker] = []
        self._again: deque[_Block] = deque()
        self._ready: deque[Decoded] = deque()
        self._barren_deaths = 0
        self._numbers = 0
        self._selector = selectors.DefaultSelector()
        self._nursery = nursery or Nursery()
        self._control = self._nursery.control
        transport.send(self._control, (plan, options, options.modalities if expected is None else expected))
        self._opened = False

    def run(self, blocks: Iterator[Sequence[Record]], may_read: Callable[[], bool]) -> Iterator[Decoded]:
        """Decode `blocks`, yielding answers as they come (not in order); reads no more while `may_read` is false.

        Raises ModelError when the processor cannot be opened, and when workers die without end.
        """
        self._open()
        exhausted = False
        while True:
            exhausted = self._dispatch(blocks, may_read, exhausted)
            while self._ready:
                yield self._ready.popleft()
            busy = any(w.blocks for w in self._workers)
            if exhausted and not busy and not self._again:
                return
            # When workers want for work, the gate or the source may open at any moment: look again soon.
            starved = not busy or (not exhausted and self._worker_with_room() is not None)
            self._wait(STARVED_S if starved else POLL_S)
            if not self._ready:
                yield Decoded((), ())

    def close(self) -> None:
        """Kill all workers and the nursery."""
        for worker in self._workers:
            # Gone already when the nursery was killed.
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            self._release(worker)
        self._workers.clear()
        self._nursery.close()
        self._selector.close()

    def _open(self) -> None:
        if self._opened:
            return
        try:
            failure = transport.receive(self._control)
        except (EOFError, OSError):
            failure = "the decode process ended while it started"
        if failure is not None:
            raise ModelError(f"cannot open the model's processor: {failure}")
        self._opened = True
        for _ in range(self.num_workers):
            self._spawn()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        cell, descriptor = Cell.create()
        try:
            transport.send(self._control, "fork")
            transport.send_descriptors(self._control, [theirs.fileno(), descriptor])
            pid = transport.receive(self._control)
        except (EOFError, OSError) as error:
            raise _killed() from error
        finally:
            theirs.close()
            os.close(descriptor)
        worker = _Worker(pid, ours, cell)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _dispatch(self, blocks: Iterator[Sequence[Record]], may_read: Callable[[], bool], exhausted: bool) -> bool:
        """Give every worker that has room a block; returns whether the source is exhausted."""
        while worker := self._worker_with_room():
            if self._again:
                block = self._again.popleft()
            elif exhausted or not may_read():
                break
            else:
                records = next(blocks, None)
                if records is None:
                    return True
                if not records:
                    break
                self._numbers += 1
                block = _Block(self._numbers, records)
            self._give(worker, block)
        return exhausted

    def _worker_with_room(self) -> _Worker | None:
        worker = min(self._workers, key=lambda w: len(w.blocks))
        return worker if len(worker.blocks) < BLOCKS_PER_WORKER else None

    def _give(self, worker: _Worker, block: _Block) -> None:
        worker.blocks.append(block)
        try:
            transport.send(worker.sock, Jobs.of(block.number, block.records, self.signs))
        except OSError as error:
            _check_resources(error)
            self._bury(worker)

    def _wait(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            worker: _Worker = key.data
            try:
                self._accept(worker, transport.receive(worker.sock))
            except (EOFError, OSError) as error:
                _check_resources(error)
                self._bury(worker)
        now = time.monotonic()
        for worker in self._workers:
            busy_with = worker.cell.read()
            late = busy_with[0] >= 0 and worker.blocks and now - busy_with[1] > self._timeout_s
            # Seen twice: what another processor writes may show up in another order.
            if late and busy_with == worker.late_with and not worker.hung:
                worker.hung = True
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            worker.late_with = busy_with if late else None

    def _accept(self, worker: _Worker, answer: Answer) -> None:
        block = worker.blocks.popleft()
        if answer.block != block.number or len(answer.outcomes) != len(block.records):
            raise MmcliError(f"decode worker answered block {answer.block} instead of {block.number}")
        self._barren_deaths = 0
        if (signatures := answer.signatures) is not None:
            if isinstance(block.records, TextRecords):
                block.records.signatures = signatures
            else:
                for i, record in enumerate(block.records):
                    record.signature = signatures[SIGNATURE_BYTES * i : SIGNATURE_BYTES * (i + 1)]
        decoded = Decoded(block.records, answer.outcomes, answer.decode_s, answer.process_s, answer.cpu_s)
        self._ready.append(decoded)

    def _bury(self, worker: _Worker) -> None:
        """A worker died: blame the record that it was busy with, give the rest of its blocks to a new one."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        index, _ = worker.cell.read()
        # Its status is waited for: one that has only closed its socket, or that we cannot talk to, has to end, too.
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        status = self._exit_status(worker.pid)
        self._release(worker)
        blocks = list(worker.blocks)
        if blocks and index >= 0:
            # Not barren: no record is blamed more than twice. 32 workers may all crash before one answers.
            self._blame(blocks.pop(0), index, worker.hung, status)
        else:
            self._barren_deaths += 1
        if self._barren_deaths > MAX_BARREN_DEATHS:
            raise ModelError(
                f"{MAX_BARREN_DEATHS} decode workers died before they began ({_cause(status)})",
                hint="a smaller --num-workers, when memory is short",
            )
        self._again.extend(blocks)
        self._spawn()

    def _blame(self, block: _Block, index: int, hung: bool, status: int) -> None:
        records = list(block.records)
        culprit = records.pop(index)
        if hung or block.crashed_before:
            error = (
                RowError("timeout", f"decoding took longer than {self._timeout_s:g} s")
                if hung
                else RowError("worker_crash", f"the decoder process died: {_cause(status)}")
            )
            self._ready.append(Decoded([culprit], [tuple(error for _ in culprit.media)]))
        else:
            self._requeue([culprit], crashed_before=True)
        if records:
            self._requeue(records, crashed_before=False)

    def _requeue(self, records: Sequence[Record], crashed_before: bool) -> None:
        self._numbers += 1
        self._again.append(_Block(self._numbers, records, crashed_before))

    def _exit_status(self, pid: int) -> int:
        try:
            transport.send(self._control, pid)
            return int(transport.receive(self._control))
        except (EOFError, OSError) as error:
            raise _killed() from error

    def _release(self, worker: _Worker) -> None:
        self._selector.unregister(worker.sock)
        worker.sock.close()
        worker.cell.close()


def _allow_open_files() -> None:
    """As many as the system lets us have: Python keeps one for each mapping, that is each block that is waiting."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_resources(error: BaseException) -> None:
    """Raise ModelError where this process has no room for what workers send: they are well."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise ModelError(
            f"no room for more decoded inputs: {os.strerror(error.errno)}",
            hint="raise the limit (ulimit -n 65536), or take a smaller --batch-size and --num-workers",
        ) from error


def _killed() -> ModelError:
    return ModelError(
        "the process that decode workers come from was killed; is the machine out of memory?",
        hint="run the same command again to go on; a smaller --num-workers needs less memory",
    )


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        extra = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"{signal.Signals(number).name}{extra}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
