"""Vectors of payloads as a run computes them: processor, batches of mixed lengths, runner."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmcli.core.records import Modality, Payload
from mmcli.models.options import ModelOptions
from mmcli.models.plan import EmbeddingPlan
from mmcli.models.resolve import resolve

# Where the model under test is; the reference stays on the CPU.
DEVICE = os.environ.get("MMCLI_TEST_DEVICE", "cpu")


def plan_of(folder: Path | str, **options: Any) -> EmbeddingPlan:
    plan = resolve(ModelOptions(str(folder), **{"device": DEVICE, **options}))
    assert isinstance(plan, EmbeddingPlan)
    return plan


def outputs_of(runner: Any, samples: Sequence[Any]) -> Any:
    """Those of one batch; of a device that goes on by itself, once they are there."""
    outputs = runner.forward(runner.collate(samples))
    return outputs.result() if hasattr(outputs, "result") else outputs


class Run:
    """A loaded checkpoint and the processor of its workers."""

    def __init__(self, folder: Path | str, **options: Any) -> None:
        self.plan = plan_of(folder, **options)
        self.processor, self.runner = self.plan.open_processor(), self.plan.load()

    def __call__(self, modality: Modality, payloads: Sequence[Payload], batch_size: int, rows: int) -> np.ndarray:
        """[rows, D]: row i is the vector of payload i % len(payloads)."""
        samples = [self.processor(modality, payload) for payload in payloads]
        groups: dict[Hashable, list[int]] = {}
        for row in range(rows):
            groups.setdefault(samples[row % len(samples)].group, []).append(row)
        found: dict[int, np.ndarray] = {}
        for members in groups.values():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                vectors = outputs_of(self.runner, [samples[row % len(samples)] for row in batch])
                found.update(zip(batch, vectors, strict=True))
        return np.stack([found[row] for row in range(rows)])


def assert_same(found: np.ndarray, wanted: np.ndarray, limit: float = 1e-5) -> float:
    """Each row of `found` is that of `wanted` (cycled): cosine >= 0.99999, error <= `limit` of its norm."""
    wanted = wanted[np.arange(len(found)) % len(wanted)]
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    norms = np.linalg.norm(wanted, axis=1)
    assert (norms > 0).all()
    error = float((np.abs(found - wanted).max(axis=1) / norms).max())
    cosine = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / norms
    assert error <= limit, f"max error {error:.1e} of the norm"
    assert cosine.min() >= 0.99999
    return error


def assert_distinct(vectors: np.ndarray) -> None:
    """The vectors tell the inputs apart: else equality with a reference would say nothing."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    assert distances[~np.eye(len(vectors), dtype=bool)].min() > 1e-3
