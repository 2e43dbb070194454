"""What a run did: counts, errors by code, and where the time went."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Where the stages of a row's way are done. Lanes work at the same time, so their seconds add up to more than the
# wall time; the stages of one lane follow one another. decode: --num-workers processes; the others: a thread each.
LANES: dict[str, tuple[str, ...]] = {
    "read": ("read",),
    "decode": ("decode", "process"),
    "collate": ("collate",),
    "model": ("transfer", "forward"),
    "post": ("post",),
    "write": ("write",),
}
# All stages, in the order of a row's way. list and load come before the lanes are at work, finalise behind.
STAGES = ("list", "load", *(stage for lane in LANES.values() for stage in lane), "finalise")
# Shares are of the time after the first result, unless that is less: what came before is the start.
STEADY_S = 1.0
# What the model's thread waits for: inputs, and the writer.
WAITS = ("wait", "write_wait")


@dataclass(slots=True)
class Mark:
    """What a run had used at a moment: wall seconds since it began, rows done, seconds of stages and waits, and
    processor seconds of all its processes."""

    wall_s: float = 0.0
    done: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0


@dataclass(slots=True)
class Report:
    """Counts and seconds of a run. Written by the engine's threads, read by the progress display.

    rows_total  rows of the input, None for a live stream
    resumed     rows that an earlier, interrupted run had committed
    reused      rows taken over from the previous output (--update, --retry-errors)
    done        rows finished in this run (computed or reused)
    committed   rows safe on disk, resumed ones included
    seconds     wall seconds by stage; decode and process: of all workers together. `wait`: the model waited for
                inputs, `write_wait`: for the writer
    workers_cpu_s  processor seconds of the decode workers
    num_workers    decode processes; 0: a thread decodes
    first_decoded_s  when the first inputs began to be decoded; first_result_s: when the first rows were done
    device, cores  where the model is, and how many cores the run may use
    """

    rows_total: int | None = None
    resumed: int = 0
    reused: int = 0
    done: int = 0
    committed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    batches: int = 0
    oom_halvings: int = 0
    num_workers: int = 0
    workers_cpu_s: float = 0.0
    device: str | None = None
    cores: int = 1
    started: float = field(default_factory=time.perf_counter)
    first_decoded_s: float | None = None
    first_result_s: float | None = None
    _begun: Mark | None = None
    _fed: Mark | None = None
    _first: Mark | None = None
    _ended: Mark | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall seconds of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds  # type: ignore[assignment]

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self.started

    @property
    def cpu_s(self) -> float:
        """Processor seconds: of this process since it began, and of the workers' answers."""
        return time.process_time() + self.workers_cpu_s

    @property
    def error_rows(self) -> int:
        return sum(self.errors.values())

    def begin(self) -> None:
        """The lanes are about to start."""
        self._begun = self.mark()

    def decoded(self, decode_s: float, process_s: float, cpu_s: float) -> None:
        """A worker has decoded some inputs, in so many seconds."""
        if self.first_decoded_s is None:
            self._fed = self.mark()
            self._fed.wall_s = self.first_decoded_s = self.wall_s - decode_s - process_s
        self.add("decode", decode_s)
        self.add("process", process_s)
        self.workers_cpu_s += cpu_s

    def first_result(self) -> None:
        """Rows are done; only the first call counts."""
        if self.first_result_s is None:
            self._first = self.mark()
            self.first_result_s = self._first.wall_s

    def end(self) -> None:
        """The lanes have ended."""
        self._ended = self.mark()

    def mark(self) -> Mark:
        """How far the run is now."""
        with self._lock:
            seconds = self.seconds.copy()
        return Mark(self.wall_s, self.done, seconds, self.cpu_s)

    def span(self) -> tuple[Mark, Mark]:
        """What shares are of: the time after the first result, if that is STEADY_S; else after the first input."""
        end = self._ended or self.mark()
        if self._first is not None and end.wall_s - self._first.wall_s >= STEADY_S:
            return self._first, end
        return self._fed or self._begun or Mark(), end

    def shares(self) -> dict[str, dict[str, float]]:
        """lane -> stage -> share of the wall time in which it was busy; of decode: each of the workers."""
        start, end = self.span()
        wall = max(end.wall_s - start.wall_s, 1e-9)
        return {
            lane: {
                stage: (end.seconds[stage] - start.seconds[stage])
                / (wall * (max(1, self.num_workers) if lane == "decode" else 1))
                for stage in stages
            }
            for lane, stages in LANES.items()
        }

    def cores_busy(self) -> float:
        """The share of the machine's processor time that the run has used."""
        start, end = self.span()
        return (end.cpu_s - start.cpu_s) / (max(end.wall_s - start.wall_s, 1e-9) * max(1, self.cores))

    def steady(self) -> tuple[int, float] | None:
        """(rows, seconds) after the first result; None when that was less than STEADY_S."""
        start, end = self.span()
        return (end.done - start.done, end.wall_s - start.wall_s) if start is self._first else None

    def limited_by(self) -> str | None:
        """The lane that the run waited for most; None when it was too short to tell.

        The model's thread computes, waits for inputs or waits for the writer. Where inputs are waited for, it is
        the busiest of the lanes that make them; "transport", messages between processes and threads, when none of
        these was busy for half of the time. Where the writer is waited for, the busier of its two lanes.
        """
        if self.steady() is None:
            return None
        start, end = self.span()
        used = {what: end.seconds[what] - start.seconds[what] for what in ("transfer", "forward", *WAITS)}
        spent = {
            "model": used["transfer"] + used["forward"],
            "decode": used["wait"],
            "write": used["write_wait"],
        }
        if not any(spent.values()):
            return None
        longest = max(spent, key=lambda lane: spent[lane])
        busy = {lane: sum(stages.values()) for lane, stages in self.shares().items()}
        if longest == "write":
            return max("write", "post", key=lambda lane: busy[lane])
        if longest != "decode":
            return longest
        busiest = max("decode", "read", "collate", key=lambda lane: busy[lane])
        return busiest if busy[busiest] >= 0.5 else "transport"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values (the `--json` line)."""
        wall, steady = self.wall_s, self.steady()
        return {
            "rows": self.done + self.resumed,
            "ok": self.done + self.resumed - self.error_rows,
            "errors": self.error_rows,
            "errors_by_code": dict(sorted(self.errors.items())),
            "resumed": self.resumed,
            "reused": self.reused,
            "computed": self.done - self.reused,
            "committed": self.committed,
            "wall_s": round(wall, 3),
            "rows_per_s": round(self.done / wall, 2) if wall else None,
            "first_decoded_s": None if self.first_decoded_s is None else round(self.first_decoded_s, 3),
            "first_result_s": None if self.first_result_s is None else round(self.first_result_s, 3),
            "seconds": {s: round(self.seconds[s], 3) for s in STAGES if self.seconds[s]},
            "busy": {lane: _rounded(stages) for lane, stages in self.shares().items()},
            "cpu_s": self._cpu_by_process(),
            "cores_busy": round(self.cores_busy(), 3),
            "steady_rows_per_s": None if steady is None else round(steady[0] / steady[1], 2),
            "waited": {"input": round(self.seconds["wait"], 3), "writer": round(self.seconds["write_wait"], 3)},
            "num_workers": self.num_workers,
            "cores": self.cores,
            "device": self.device,
            "batches": self.batches,
            "oom_halvings": self.oom_halvings,
            "limited_by": self.limited_by(),
            "notes": self.notes,
        }

    def _cpu_by_process(self) -> dict[str, float]:
        """Processor seconds: of this process, before the lanes began and in all, and of the workers since then."""
        start = None if self._begun is None else self._begun.cpu_s
        found = {"start": start, "main": time.process_time(), "workers": self.workers_cpu_s}
        return {what: round(seconds, 4) for what, seconds in found.items() if seconds is not None}


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {stage: round(share, 3) for stage, share in shares.items()}
