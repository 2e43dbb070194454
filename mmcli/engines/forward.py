"""Run batches through a Runner; running out of memory halves the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcli.core.errors import MmcliError, ModelError, RowError
from mmcli.core.protocols import Runner
from mmcli.core.records import Sample
from mmcli.core.report import Report

Output = Any | RowError


class Forward:
    """Calls a Runner, and isolates the one sample that it fails on.

    After running out of memory, batches stay at the size that last fitted.
    """

    def __init__(self, runner: Runner, report: Report) -> None:
        self._runner, self._report = runner, report
        self._limit: int | None = None
        self._succeeded = False

    def __call__(self, samples: Sequence[Sample]) -> list[Output]:
        """One output or RowError per sample, in order.

        Raises ModelError when the model gives another number of outputs, or fails before it ever worked.
        """
        size = min(len(samples), self._limit or len(samples))
        outputs: list[Output] = []
        for start in range(0, len(samples), size):
            outputs += self._attempt(samples[start : start + size])
        return outputs

    def _attempt(self, samples: Sequence[Sample]) -> list[Output]:
        try:
            return self._run(samples)
        except MmcliError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises on one sample costs that row
            failure = _failure(error)
        # Outside the except block: the traceback would keep the failed batch's tensors alive.
        if failure.code == "oom":
            self._report.oom_halvings += 1
            if len(samples) > 1:
                self._limit = len(samples) // 2
        if len(samples) > 1:
            middle = len(samples) // 2
            return self._attempt(samples[:middle]) + self._attempt(samples[middle:])
        if not self._succeeded and failure.code != "oom":
            raise ModelError(f"the model failed on its first inputs: {failure.message}")
        return [failure]

    def _run(self, samples: Sequence[Sample]) -> list[Output]:
        with self._report.timed("collate"):
            batch = self._runner.collate(samples)
        with self._report.timed("forward"):
            outputs = self._runner.forward(batch)
        if len(outputs) != len(samples):
            raise ModelError(f"the model gave {len(outputs)} outputs for {len(samples)} inputs")
        self._succeeded = True
        self._report.batches += 1
        return list(outputs)


def _failure(error: Exception) -> RowError:
    if is_out_of_memory(error):
        return RowError("oom", "not enough memory on the device for this input, even alone", stage="model")
    return RowError("invalid_output", f"the model failed: {type(error).__name__}: {error}", stage="model")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the host or on the device (torch raises several types)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
