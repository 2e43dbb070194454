"""`mmcli finetune --objective probe`: vectors of a model that stays as it is, and a linear head on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.messages import Messages
from mmcli.cli.options import OptimizationArguments, TrainingArguments
from mmcli.cli.parse import Problems
from mmcli.cli.signals import Signals
from mmcli.core.durable import output_errors, swap_folder, write_durably
from mmcli.core.errors import ConfigError
from mmcli.core.ranks import launched
from mmcli.core.records import Record

if TYPE_CHECKING:
    import numpy as np

    from mmcli.cli.objectives import Given, Listed
    from mmcli.cli.support import Embedding
    from mmcli.cli.training import Command
    from mmcli.models.options import ModelOptions
    from mmcli.training.options import TrainOptions
    from mmcli.training.probe import Probe

# Vectors of a run that is not complete; their names tell what they are of.
FEATURES = "features"
_NAMED = 3
# Options of steps that a probe heeds, too.
_HEEDED = ("batch_size", "metric")
_IDLE_OF_TRAINING = ("from_config", "freeze", "augment")


class ProbeRecipe:
    """Of *probe*."""

    labelled = True
    metrics: tuple[str, ...] = ("accuracy", "mean_per_class", "log_loss")

    def columns(self, training: TrainingArguments) -> dict[str, str]:
        """The label's."""
        return {training.label_column: "--label-column"}

    def check(self, train: Listed, val: Listed | None, messages: Messages, problems: Problems) -> None:
        """Two labels at least, none that only validation rows have, and one medium in a row."""
        from mmcli.cli.objectives import check_classes

        check_classes(train, val, messages, problems)
        if len(train.slots) > 1:
            problems.add(
                f"INPUT: rows have {' and '.join(train.slots)}, and a probe reads the vector of one; name one "
                "column, or learn from both by --objective classify --encoder ..."
            )

    def make(self, given: Given, model: ModelOptions, train: Listed, options: TrainOptions, metric: str) -> Any:
        """The plan of the vectors, as `mmcli embed` has it."""
        from mmcli.models.resolve import resolve
        from mmcli.training.probe import Probe

        problems = Problems()
        for flag in _idle(given):
            problems.add(f"{flag}: a probe is solved, not trained by steps, on vectors that stay as they are")
        if launched(os.environ)[1] > 1:
            problems.add("--objective probe is of one process; start it without torchrun or accelerate launch")
        plan = problems.collect(resolve, model)
        if plan is not None:
            there = {modality for modality, count in train.modalities.items() if modality is not None and count}
            if other := sorted(there - plan.modalities):
                takes = ", ".join(sorted(plan.modalities))
                problems.add(f"INPUT: rows have {other[0]}; -m {model.model} takes {takes}")
        problems.check()
        assert plan is not None
        return Probe(plan, model, tuple(sorted(set(train.labels))), metric, options.balance)

    def targets(self, listed: Listed, objective: Any) -> list[Any]:
        """Indices of labels."""
        index = {label: number for number, label in enumerate(objective.labels)}
        return [index[label] for label in listed.labels]


def _idle(given: Given) -> Iterator[str]:
    """Options that nothing would heed."""
    names = [one.name for one in fields(OptimizationArguments) if one.name not in _HEEDED]
    for group, wanted in ((given.optimization, names), (given.training, _IDLE_OF_TRAINING)):
        for one in fields(group):
            if one.name in wanted and one.default is not MISSING and getattr(group, one.name) != one.default:
                yield f"--{one.name.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that are listed already, as an engine reads them (mmcli.core.protocols.Source)."""

    rows: Sequence[Record]
    slots: tuple[str, ...]

    @property
    def keep(self) -> Any:
        import pyarrow as pa

        return pa.schema([])

    def records(self, start: int = 0) -> Iterator[Record]:
        return iter(self.rows[start:])


def train_probe(given: Given, command: Command, messages: Messages, signals: Signals) -> dict[str, Any]:
    """Write RUN/best; returns what run.json says of it. Raises ConfigError, Stopped, TryAgain, ModelError."""
    from mmcli.cli.preflight import Preflight
    from mmcli.models.classify import head_base
    from mmcli.models.few_shot import Support
    from mmcli.models.head import write_head
    from mmcli.models.options import Ranking
    from mmcli.models.vectors import VectorPlan
    from mmcli.training.log import MetricsLog
    from mmcli.training.probe import fit

    probe: Probe = command.objective  # type: ignore[assignment]
    listed = {"INPUT": command.train.records, "--val": command.val.records}
    Preflight(probe.plan, command.num_workers, command.timeout_s, messages).tell_leaks(listed)
    features = _Features(given, command, messages, signals)
    train, train_classes = features.of("INPUT", command.train)
    val, val_classes = features.of("--val", command.val)
    support = Support(train, train_classes, probe.labels, bool(getattr(probe.plan, "normalize", False)))
    log = MetricsLog(command.run, 0)

    def told(line: dict[str, Any]) -> None:
        log.write(**line)
        shown = ", ".join(
            f"{name.removeprefix('val_').replace('_', ' ')} {line[name]:.4g}" for name in list(line)[2:]
        )
        messages.note(f"C {line['C']:g}: {shown}")

    with signals.heard():
        found = fit(probe, support, val, val_classes, told)
    log.close()
    plan = VectorPlan(probe.plan, probe.labels, Ranking(), found.head.method, head=found.head)
    best, base = command.run / "best", head_base(probe.options, plan)
    with output_errors(best):
        swap_folder(best, lambda folder: write_head(found.head, base, folder))
    messages.note(f"{best}: {probe.metric} {found.best:.4f} with C {found.head.method['C']:g}")
    return {"best": found.best, "best_step": found.step, "steps": found.steps, "C": found.head.method["C"]}


class _Features:
    """Vectors of the rows of a run, computed once: an interrupted run keeps those that it has finished."""

    def __init__(self, given: Given, command: Command, messages: Messages, signals: Signals) -> None:
        self._given, self._command, self._messages, self._signals = given, command, messages, signals
        self._runner: Any = None

    def of(self, what: str, listed: Listed) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows that can be read: float32 [N, D], int64 [N]. Raises ConfigError for others, as asked for."""
        import numpy as np

        from mmcli.cli.objectives import RECIPES

        identity = json.dumps([self._command.objective.plan.describe(), listed.digest], sort_keys=True)
        path = self._command.run / FEATURES / f"{blake2b(identity.encode(), digest_size=16).hexdigest()}.npz"
        known = _read(path)
        vectors, failed = known or self._embed(listed)
        if known is None:
            _write(path, vectors, failed)
        probe = self._command.objective
        classes = np.array(RECIPES["probe"].targets(listed, probe), dtype=np.int64)
        good = np.ones(len(classes), dtype=bool)
        good[[row for row, _ in failed]] = False
        self._check(what, listed, failed, classes[good])
        return vectors[good], classes[good]

    def _embed(self, listed: Listed) -> tuple[np.ndarray, list[tuple[int, str]]]:
        from mmcli.cli.support import embedded
        from mmcli.core.report import Report
        from mmcli.models.vectors import Loaded

        plan: Any = self._command.objective.plan
        with self._signals.heard():
            self._runner = self._runner or plan.load()
        report = Report(cores=parse.available_cores(), rows_total=len(listed.records))
        self._messages.note(f"vectors of {len(listed.records):,} rows")
        with self._messages.progress(report):
            source: Any = _Rows(listed.records, listed.slots)
            return embedded(source, Loaded(plan, self._runner), self._how(), report, self._signals)

    def _how(self) -> Embedding:
        from mmcli.cli.run import AUTO_BATCH_CPU, AUTO_BATCH_GPU
        from mmcli.cli.support import Embedding
        from mmcli.models.device import choose_device

        command = self._command
        device = choose_device(self._given.model.device)[0]
        automatic = AUTO_BATCH_GPU if device.startswith("cuda") else AUTO_BATCH_CPU
        asked = self._given.optimization.batch_size != OptimizationArguments().batch_size
        size = command.options.batch_size if asked else automatic
        return Embedding(size, command.num_workers, command.timeout_s, command.time_limit_s)

    def _check(self, what: str, listed: Listed, failed: list[tuple[int, str]], classes: np.ndarray) -> None:
        if not failed:
            return
        shown = "; ".join(text for _, text in failed[:_NAMED])
        shown += f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        count = "1 row" if len(failed) == 1 else f"{len(failed)} rows"
        if self._given.training.missing_policy == "error":
            raise ConfigError(
                f"{what}: {count} cannot be read ({shown}); --missing-policy drop leaves such rows out"
            )
        probe: Any = self._command.objective
        there = {probe.labels[one] for one in classes.tolist()}
        if lost := sorted(set(listed.labels) - there):
            raise ConfigError(f"{what}: no readable row of {', '.join(map(repr, lost[:_NAMED]))} ({shown})")
        self._messages.note(f"{what}: left out {count} that cannot be read: {shown}")


def _read(path: Path) -> tuple[np.ndarray, list[tuple[int, str]]] | None:
    """Vectors that an earlier run of this command has finished; None: none."""
    import numpy as np

    if not path.is_file():
        return None
    with np.load(path) as file:
        return file["vectors"], [(int(row), str(text)) for row, text in json.loads(str(file["failed"]))]


def _write(path: Path, vectors: np.ndarray, failed: list[tuple[int, str]]) -> None:
    import numpy as np

    def save(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, vectors=vectors, failed=json.dumps(failed))

    with output_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_durably(path, save)
