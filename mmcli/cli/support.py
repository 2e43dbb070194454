"""Solved examples of classes (--examples): which there are, and their vectors."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.cli.given import open_given
from mmcli.core.errors import ConfigError
from mmcli.core.protocols import Source
from mmcli.core.report import Report

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mmcli.cli.compose import Prepared
    from mmcli.cli.signals import Signals
    from mmcli.models.few_shot import Support
    from mmcli.models.vectors import Loaded, VectorPlan

# Vectors of all examples are in memory.
_MOST = 1_000_000
# Examples that messages name.
_NAMED = 3


@dataclass(slots=True)
class Examples:
    """Solved examples as they are listed.

    labels   names, each with an example
    classes  of each row, an index of labels
    digest   over all of it
    vectors  rows are vectors already; `model` is what identifies their model, None: the file does not say
    """

    name: str
    source: Source
    labels: tuple[str, ...]
    classes: list[int]
    digest: str
    vectors: bool
    model: dict[str, Any] | None
    folder: Any = field(repr=False)

    @property
    def counts(self) -> list[int]:
        """Examples of each label."""
        found = Counter(self.classes)
        return [found[index] for index in range(len(self.labels))]


def list_examples(path: Path, label_column: str, vector_column: str | None, labels: tuple[str, ...]) -> Examples:
    """Which examples there are, without opening them. `labels`: these and no others, in this order; (): any.

    Raises ConfigError.
    """
    name = str(path)
    if not path.exists():
        raise ConfigError(f"--examples: there is no {name}")
    try:
        source, kind, model = _open(name, label_column, vector_column)
        folder = tempfile.TemporaryDirectory(prefix="mmcli-", ignore_cleanup_errors=True)
        listed = source.snapshot(Path(folder.name))
        found = _labels_of(source, kind, name, label_column)
    except ConfigError as error:
        raise ConfigError(
            [p if p.startswith("--") else f"--examples: {p}" for p in error.problems], hint=error.hint
        ) from error
    names = _check_labels(name, found, labels, _folders(name) if kind == "folder" else ())
    index = {label: number for number, label in enumerate(names)}
    digest = f"{listed.digest} {_digest(found)}"
    return Examples(name, source, names, [index[one] for one in found], digest, kind == "vectors", model, folder)


def _digest(labels: list[str]) -> str:
    from hashlib import blake2b

    return blake2b("\0".join(labels).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _open(name: str, label_column: str, vector_column: str | None) -> tuple[Source, str, dict[str, Any] | None]:
    """The source, what it is (vectors, folder or manifest), and what identifies the model of vectors."""
    from mmcli.sources.open import SourceOptions, open_source

    given = open_given(name, _vector_column(name, vector_column), None, ())
    if given is not None:
        if label_column in _names(given):
            given = open_given(name, vector_column, None, (label_column,))
            assert given is not None
        return given.source, "vectors", given.model
    if os.path.isdir(name):
        return open_source(SourceOptions((name,))), "folder", None
    return (
        open_source(
            SourceOptions((name,), variables=(label_column,), variables_said=(f"--label-column {label_column}",))
        ),
        "manifest",
        None,
    )


def _vector_column(name: str, wanted: str | None) -> str | None:
    """--vector-column is of the inputs; examples that are no vectors have no such column."""
    if wanted is None or not name.endswith((".parquet", ".pq")):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return wanted if wanted in pq.read_schema(name).names else None
    except (OSError, pa.ArrowException):
        return None


def _names(given: Any) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(given.source._files[0]).names)


def _labels_of(source: Source, kind: str, name: str, label_column: str) -> list[str]:
    """The label of each row. Raises ConfigError for rows without one."""
    found, bad = [], []
    for number, record in enumerate(source.records()):
        if number == _MOST:
            raise ConfigError(f"{name} has more than {_MOST:,} rows; a fine-tuned model is better made of so many")
        label = label_of(record, kind)
        if label is None:
            bad.append(record.id)
        found.append(label or "")
    if not found:
        raise ConfigError(f"{name} holds no example")
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        where = "lie in no label's folder" if kind == "folder" else f"have no {label_column!r}"
        if kind == "folder" and len(bad) == len(found):
            raise ConfigError(f"{name} has no folders; give it one for each label, with the examples in it")
        raise ConfigError(f"{name}: {', '.join(bad[:_NAMED])}{more} {where}")
    return found


def label_of(record: Any, kind: str) -> str | None:
    """Of a manifest's column; of a folder, and of vectors without such a column, the first folder of the id."""
    if kind == "manifest":
        value = record.variables[0] if record.variables else None
    elif record.keep:
        value = record.keep[0]
    else:
        first, slash, _ = record.id.partition("/")
        value = first if slash else None
    return str(value) if value is not None and str(value).strip() else None


def _folders(name: str) -> tuple[str, ...]:
    """Folders right below, which stand for labels."""
    from mmcli.sources.names import shown

    entries = [one for one in os.scandir(os.fsencode(name)) if one.is_dir() and not one.name.startswith(b".")]
    return tuple(shown(one.name) for one in entries if not one.name.endswith(b".mmcli"))


def _check_labels(
    name: str, found: list[str], wanted: tuple[str, ...], folders: tuple[str, ...]
) -> tuple[str, ...]:
    """The labels in their order. Raises ConfigError for those without an example."""
    there = set(found)
    problems = [
        f"--examples {name}: there is no example in the folder {one}" for one in folders if one not in there
    ]
    if wanted:
        problems += [f"--examples {name}: there is no example of {one!r}" for one in wanted if one not in there]
        extra = sorted(there - set(wanted))
        problems += [f"--examples {name}: {one!r} is not among the labels" for one in extra]
    elif len(there) < 2:
        problems.append(
            f"--examples {name}: all have the label {found[0]!r}; two labels are needed to tell them apart"
        )
    if problems:
        raise ConfigError(problems)
    return wanted or tuple(sorted(there))


# ---------------------------------------------------------------------------------------- their vectors


def look_at(prepared: Prepared, examples: Examples, plan: VectorPlan, runner: Any) -> Support:
    """The vectors of the examples that can be read. Raises ConfigError when a label has none."""
    import numpy as np

    from mmcli.models.few_shot import Support

    vectors, failed = _given(examples) if examples.vectors else _embedded(prepared, examples, plan, runner)
    good = np.ones(len(examples.classes), dtype=bool)
    good[[row for row, _ in failed]] = False
    classes = np.array(examples.classes, dtype=np.int64)
    _report(prepared, examples, failed, classes[good])
    normalize = bool(getattr(plan.base, "normalize", False))
    return Support(vectors[good], classes[good], examples.labels, normalize)


def _report(prepared: Prepared, examples: Examples, failed: list[tuple[int, str]], classes: np.ndarray) -> None:
    if not failed:
        return
    shown = "; ".join(text for _, text in failed[:_NAMED])
    line = f"{len(failed)} of {len(examples.classes)} examples cannot be used: {shown}"
    there = set(classes.tolist())
    lost = [label for index, label in enumerate(examples.labels) if index not in there]
    if lost:
        raise ConfigError(
            f"--examples {examples.name}: no readable example of {', '.join(map(repr, lost))} ({line})"
        )
    prepared.messages.note(line)
    prepared.report.notes.append(line)


def _given(examples: Examples) -> tuple[np.ndarray, list[tuple[int, str]]]:
    import numpy as np

    size = examples.source.embedding_size  # type: ignore[attr-defined]
    vectors = np.zeros((len(examples.classes), size), dtype=np.float32)
    failed = []
    for row, record in enumerate(examples.source.records()):
        if record.error is not None:
            failed.append((row, f"{record.id}: {record.error.message}"))
        elif not np.isfinite(record.variables[-1]).all():
            failed.append((row, f"{record.id}: its vector is not finite"))
        else:
            vectors[row] = record.variables[-1]
    return vectors, failed


def _embedded(
    prepared: Prepared, examples: Examples, plan: VectorPlan, runner: Any
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    from mmcli.cli.run import auto_batch_size
    from mmcli.models.vectors import Loaded

    prepared.messages.note(f"{len(examples.classes):,} examples of {len(examples.labels):,} labels")
    limits = prepared.limits
    workers = min(2, len(examples.classes)) if limits.num_workers is None else limits.num_workers
    how = Embedding(limits.batch_size or auto_batch_size(prepared), workers, limits.timeout_s)
    return embedded(examples.source, Loaded(plan.base, runner), how, Report(), prepared.signals)


@dataclass(frozen=True, slots=True)
class Embedding:
    """How vectors are computed: see mmcli.cli.options.RunArguments."""

    batch_size: int
    num_workers: int
    timeout_s: float
    time_limit_s: float | None = None


def embedded(
    source: Source, base: Loaded, how: Embedding, report: Report, signals: Signals
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Vectors of all rows, float32 [N, D], zeros for those that cannot be read; and these, with what is wrong.

    By the engine that rows are computed by: in workers that may die, with the batches of any run. Raises Stopped,
    TryAgain, ModelError.
    """
    from mmcli.engines.batching import BatchSize, window_sizes
    from mmcli.engines.local import LocalOptions, StopFlag, Work, run
    from mmcli.media.pool import DecodePool, InlineDecoder
    from mmcli.tasks.embed import Embed

    decoder = (
        DecodePool(base, base.decode, how.num_workers, how.timeout_s)
        if how.num_workers
        else InlineDecoder(base, base.decode)
    )
    size = base.plan.embedding_size
    kept, stop, windows = _Collected(), StopFlag(), window_sizes(how.batch_size, lengths_vary=True)
    work = Work(source, decoder, base, Embed(size), kept, report, stop, want_signatures=False)
    with signals.asking(stop.request):
        run(work, LocalOptions(BatchSize(how.batch_size), windows, time_limit_s=how.time_limit_s))
    return kept.vectors(size), kept.failed


class _Collected:
    """An output in memory: see mmcli.core.protocols.Output."""

    immediate = False

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self.failed: list[tuple[int, str]] = []

    def commit(self, table: pa.Table, start_row: int, signatures: Any) -> None:
        """Keep the vectors, zeros for errors."""
        import numpy as np

        column = table.column("embedding").combine_chunks()
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        vectors = np.zeros((len(table), column.type.list_size), dtype=np.float32)
        vectors[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        self._parts.append(vectors)
        for row in np.flatnonzero(~valid):
            told = [table.column(name)[int(row)].as_py() for name in ("id", "error_code", "error_message")]
            self.failed.append((start_row + int(row), f"{told[0]}: {told[1]}, {told[2]}"))

    def vectors(self, size: int) -> np.ndarray:
        """float32 [N, D]"""
        import numpy as np

        return np.concatenate(self._parts) if self._parts else np.zeros((0, size), dtype=np.float32)
