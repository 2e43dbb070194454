"""What a run did: counts, errors by code, and where the time went."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Stages in the order of a row's way. decode and process are summed over all workers; they, forward and write
# overlap, so the stages add up to more than the run's wall time.
STAGES = ("list", "load", "decode", "process", "wait", "collate", "forward", "write", "finalise")


@dataclass(slots=True)
class Report:
    """Counts and seconds of a run. Written by the engine's threads, read by the progress display.

    rows_total  rows of the input, None for a live stream
    resumed     rows that an earlier, interrupted run had committed
    reused      rows taken over from the previous output (--update, --retry-errors)
    done        rows finished in this run (computed or reused)
    committed   rows safe on disk, resumed ones included
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
    started: float = field(default_factory=time.perf_counter)
    first_result_s: float | None = None
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
    def error_rows(self) -> int:
        return sum(self.errors.values())

    def limited_by(self) -> str | None:
        """Which stage the run waited for most: "decode", "model" or "write"; None when too short to tell."""
        busy = {
            "model": self.seconds["forward"] + self.seconds["collate"],
            "decode": float(self.seconds["wait"]),
            "write": float(self.seconds["write_wait"]),
        }
        # What is waited for before the first result is the start of processes and the model.
        if self.first_result_s is None or self.wall_s - self.first_result_s < 1 or not any(busy.values()):
            return None
        return max(busy, key=lambda k: busy[k])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values (the `--json` line)."""
        wall = self.wall_s
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
            "first_result_s": None if self.first_result_s is None else round(self.first_result_s, 3),
            "seconds": {s: round(self.seconds[s], 3) for s in STAGES if self.seconds[s]},
            "num_workers": self.num_workers,
            "batches": self.batches,
            "oom_halvings": self.oom_halvings,
            "limited_by": self.limited_by(),
            "notes": self.notes,
        }
