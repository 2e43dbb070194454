"""What a run of classify gives for payloads: processor, batches of mixed lengths, runner, joiner."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from model_runs import DEVICE, outputs_of

from mmcli.core.records import Classified, Modality, Payload, Sample
from mmcli.models import classifier, entailment
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.options import Classification, Label, ModelOptions, Ranking
from mmcli.models.plan import ClassificationPlan

ALL = 10_000


def asked(
    *labels: str, top_k: int = ALL, threshold: float | None = None, templates: tuple[str, ...] | None = None
) -> Classification:
    """What is asked, with all labels in the answer."""
    names = tuple(Label(name, (name,)) for name in labels)
    return Classification(names, templates, None, Ranking(top_k, threshold))


def plan_of(folder: Path | str, wanted: Classification | None = None, **options: Any) -> ClassificationPlan:
    """The plan of a checkpoint, as the command decides it."""
    given = ModelOptions(str(folder), device=DEVICE, **options)
    checkpoint, wanted = open_checkpoint(given), wanted or asked()
    if wanted.labels and (pairs := entailment.find(checkpoint)) is not None:
        return entailment.plan(checkpoint, given, "float32", pairs, wanted)
    head = classifier.find(checkpoint)
    assert head is not None
    return classifier.plan(checkpoint, given, "float32", head, wanted)


class ClassifyRun:
    """A loaded checkpoint and the processor of its workers."""

    def __init__(self, folder: Path | str, wanted: Classification | None = None, **options: Any) -> None:
        self.plan = plan_of(folder, wanted, **options)
        self.processor: Any = self.plan.open_processor()
        self.runner, self.joiner = self.plan.load(), self.plan.open_joiner()

    def __call__(
        self, modality: Modality, payloads: Sequence[Payload], batch_size: int, rows: int
    ) -> list[Classified]:
        """Of each row; row i is payload i % len(payloads)."""
        of_payloads = [self.samples(modality, payload) for payload in payloads]
        slots = [(row, sample) for row in range(rows) for sample in of_payloads[row % len(payloads)]]
        groups: dict[Hashable, list[int]] = {}
        for place, (_, sample) in enumerate(slots):
            groups.setdefault(sample.group, []).append(place)
        found: dict[int, Any] = {}
        for places in groups.values():
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                outputs = outputs_of(self.runner, [slots[place][1] for place in batch])
                outputs = outputs.result() if hasattr(outputs, "result") else outputs
                found.update(zip(batch, outputs, strict=True))
        of_rows: list[list[Any]] = [[] for _ in range(rows)]
        for place, (row, _) in enumerate(slots):
            of_rows[row].append(found[place])
        return [self.joiner(outputs) if self.joiner is not None else outputs[0] for outputs in of_rows]

    def samples(self, modality: Modality, payload: Payload) -> tuple[Sample, ...]:
        if hasattr(self.processor, "record"):
            made: tuple[Sample, ...] = self.processor.record([(modality, payload)], ())
            return made
        return (self.processor(modality, payload),)

    def scores(self, modality: Modality, payloads: Sequence[Payload], batch_size: int, rows: int) -> np.ndarray:
        """float [rows, L], in the order of the labels."""
        return as_array(self(modality, payloads, batch_size, rows), self.plan.labels)


def as_array(found: Sequence[Classified], labels: Sequence[str]) -> np.ndarray:
    """All scores, in the order of the labels."""
    return np.array([[dict(one.top_k)[label] for label in labels] for one in found])
