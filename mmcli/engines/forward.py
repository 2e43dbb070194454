"""Run batches through a Runner; running out of memory halves the batch."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmcli.core.errors import MmcliError, ModelError, RowError, device_lost
from mmcli.core.protocols import Runner
from mmcli.core.records import Modality, Sample
from mmcli.core.report import Report
from mmcli.engines.batching import BatchSize, cut

Output = Any | RowError

# After so many failed inputs in a row the model has to show that it still works. A CUDA error, for one, makes
# all that follows fail: without this a broken device would turn the rest of the inputs into error rows.
PROBE_AFTER = 8
# A model that has never worked: so many inputs may fail before it is the model. More than a few, since windows
# are sorted by length, and the longest inputs may be the only ones that it cannot take.
UNPROVEN_FAILURES = 256


@dataclass(slots=True)
class Collated:
    """Samples and their batch on the host, or why there is none."""

    samples: Sequence[Sample]
    batch: Any = None
    failure: RowError | None = None


@dataclass(slots=True)
class Launched:
    """Samples and what `Runner.forward` returned, or why there is nothing; neither: too large, not tried.

    shared  another batch was computed at the same time, and had a part of the memory
    """

    samples: Sequence[Sample]
    outputs: Any = None
    failure: RowError | None = None
    shared: bool = False

    @property
    def pending(self) -> bool:
        """Whether the device may still be computing."""
        return hasattr(self.outputs, "result")


class Forward:
    """Calls a Runner, and isolates the inputs that it fails on.

    After running out of memory, batches of that modality stay at the size that fitted: their cost, times the
    length of the longest sample, so that one long sound does not make batches of short ones small. Samples come
    longest first. `collate` may be called from another thread; everything else belongs to one thread.

    known_to_work  an earlier run has finished rows with this model
    concurrency    how many batches the runner computes at once
    failures       inputs that have failed since the model last worked: until it works again, or `settle` returns,
                   it is not known whether they or the model are at fault
    """

    def __init__(self, runner: Runner, report: Report, batch_size: BatchSize, known_to_work: bool = False) -> None:
        self._runner, self._report, self._batch_size = runner, report, batch_size
        self._known_to_work = known_to_work
        self._limits: dict[Modality, int] = {}
        self._collating = threading.Lock()
        self._pending: list[Launched] = []
        self._good: Sample | None = None
        self._last: RowError | None = None
        self._moved_s = getattr(runner, "transfer_s", 0.0)
        self.concurrency: int = getattr(runner, "concurrency", 1)
        self.failures = 0

    def max_cost(self, longest: Sample) -> int:
        """What a batch that begins with this sample may cost (see Sample.cost)."""
        most, limit = self._batch_size.most(longest), self._limits.get(longest.modality)
        return most if limit is None else min(most, limit // max(1, longest.length))

    def collate(self, samples: Sequence[Sample]) -> Collated:
        """The batch of `samples`. An input that cannot be collated is found out by `finish`."""
        try:
            with self._collating, self._report.timed("collate"):
                return Collated(samples, self._runner.collate(samples))
        except MmcliError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises on one sample costs that row
            failure = _failure(error)
        return Collated(samples, failure=failure)

    def launch(self, collated: Collated) -> Launched:
        """Start the forward pass; `collated` gives up its batch, so that nothing else keeps its memory."""
        samples, batch = collated.samples, collated.batch
        collated.batch = None
        if collated.failure is not None:
            return Launched(samples, failure=collated.failure)
        if cut(samples, self.max_cost(samples[0])) < len(samples):
            return Launched(samples)
        try:
            with self._timed():
                launched = Launched(samples, self._runner.forward(batch))
            if launched.pending:
                self._pending.append(launched)
                if len(self._pending) > 1:
                    for one in self._pending:
                        one.shared = True
            return launched
        except MmcliError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            failure = _failure(error)
        # Outside the except block: the traceback would keep the failed batch's tensors alive.
        return Launched(samples, failure=failure)

    def finish(self, launched: Launched) -> Sequence[Output]:
        """Wait for the outputs: one output or RowError per sample, in order. An array, where the runner gives one.

        Raises ModelError when the model gives another number of outputs, never worked, or stopped working.
        """
        samples, failure = launched.samples, launched.failure
        self._pending = [other for other in self._pending if other is not launched]
        if failure is None and launched.outputs is None:
            return self._in_pieces(samples)
        if failure is None:
            try:
                outputs = self._fetch(launched)
            except MmcliError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                failure = _failure(error)
            else:
                self.failures = 0
                self._good = self._good or samples[0]
                return outputs
        return self._failed(samples, failure, launched.shared)

    def settle(self, at_end: bool = False) -> None:
        """Find out whether the latest failures are the inputs' fault. Raises ModelError when they are not.

        A model that has failed on all inputs until the end is at fault, unless it is known to work.
        """
        if self._good is not None:
            if self.failures:
                self._probe()
        elif at_end and self._last is not None and self._last.code != "oom" and not self._known_to_work:
            raise ModelError(f"the model failed on all its inputs: {self._last.message}")
        self.failures = 0

    def _fetch(self, launched: Launched) -> Sequence[Output]:
        outputs = launched.outputs
        with self._timed():
            rows: Sequence[Output] = outputs.result() if launched.pending else outputs
        launched.outputs = None
        if len(rows) != len(launched.samples):
            raise ModelError(f"the model gave {len(rows)} outputs for {len(launched.samples)} inputs")
        self._report.batches += 1
        return rows

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """The seconds of the block are those of the forward pass, less what the runner says that copying took."""
        moved = self._moved_s
        try:
            with self._report.timed("forward"):
                yield
        finally:
            self._moved_s = getattr(self._runner, "transfer_s", 0.0)
            self._report.add("transfer", self._moved_s - moved)
            self._report.add("forward", moved - self._moved_s)

    def _failed(self, samples: Sequence[Sample], failure: RowError, shared: bool) -> list[Output]:
        if failure.code == "oom":
            self._report.oom_halvings += 1
            # A model may have left tensors in cycles.
            gc.collect()
            self._wait_for_others()
            if shared and len(samples) == 1:
                return self._again(samples)
        if len(samples) == 1:
            return [self._failed_alone(failure)]
        if failure.code == "oom":
            cost = max(1, sum(s.cost for s in samples) // 2)
            self._limits[samples[0].modality] = cost * max(1, samples[0].length)
            return self._in_pieces(samples)
        middle = len(samples) // 2
        return self._again(samples[:middle]) + self._again(samples[middle:])

    def _wait_for_others(self) -> None:
        """Until no other batch needs memory."""
        others, self._pending = self._pending, []
        for launched in others:
            while not getattr(launched.outputs, "wait", lambda _: True)(1.0):
                pass

    def _in_pieces(self, samples: Sequence[Sample]) -> list[Output]:
        outputs: list[Output] = []
        while rest := samples[len(outputs) :]:
            # Asked each time: a piece may lower the limit for the next ones.
            outputs += self._again(rest[: cut(rest, self.max_cost(rest[0]))])
        return outputs

    def _again(self, samples: Sequence[Sample]) -> list[Output]:
        return list(self.finish(self.launch(self.collate(samples))))

    def _failed_alone(self, failure: RowError) -> RowError:
        self.failures += 1
        self._last = failure
        if self._good is None and self.failures >= UNPROVEN_FAILURES:
            raise ModelError(f"the model failed on its first {self.failures} inputs: {failure.message}")
        if self._good is not None and self.failures % PROBE_AFTER == 0:
            self.settle()
        return failure

    def _probe(self) -> None:
        """Compute once more what has worked before."""
        assert self._good is not None
        try:
            outputs = self._runner.forward(self._runner.collate([self._good]))
            if hasattr(outputs, "result"):
                outputs.result()
        except Exception as error:
            raise ModelError(
                f"the model has stopped working: {_failure(error).message}",
                hint="run the same command again: it goes on after the last committed row",
            ) from error


def _failure(error: Exception) -> RowError:
    """Raises DeviceLost where it is no failure of these inputs alone."""
    if (lost := device_lost(error)) is not None:
        raise lost from error
    if is_out_of_memory(error):
        return RowError("oom", "not enough memory on the device for this input, even alone", stage="model")
    return RowError("invalid_output", f"the model failed: {type(error).__name__}: {error}", stage="model")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the host or on the device (torch raises several types)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
