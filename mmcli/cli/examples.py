"""Solved examples for chat models: read whole, and chosen anew for each record where that is asked."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mmcli.cli.options import GenerationArguments
from mmcli.core.errors import ConfigError, RowError, StateMismatch
from mmcli.core.protocols import Snapshot, Source
from mmcli.core.records import Media, Record

if TYPE_CHECKING:
    import pyarrow as pa

    from mmcli.models.options import Example, Generation
    from mmcli.sinks.outputs import OutputInfo

# Examples are sent to the decode workers, and stand in the fingerprint by their content.
_MOST_BYTES = 64 * 1024 * 1024


def read_examples(manifest: str, most: int) -> tuple[Example, ...]:
    """The solved cases of a manifest: its media, `answer` and, if it has one, `question`. Raises ConfigError."""
    from mmcli.models.options import Example

    examples = []
    with tempfile.TemporaryDirectory(prefix="mmcli-") as folder:
        source, named = _open(manifest)
        source.snapshot(Path(folder))
        for record in islice(source.records(), most + 1):
            if record.error is not None:
                raise ConfigError(f"--examples {manifest}: {record.id}: {record.error.message}")
            values = dict(zip(named, record.variables, strict=True))
            if not str(values["answer"] or "").strip():
                raise ConfigError(f"--examples {manifest}: {record.id} has no answer")
            question = values.get("question")
            media = tuple(_inline(one, manifest) for one in record.media)
            examples.append(Example(media, None if question is None else str(question), str(values["answer"])))
    if not 0 < len(examples) <= most:
        raise ConfigError(f"--examples {manifest}: it has {'no' if not examples else 'too many'} rows")
    return tuple(examples)


def _open(manifest: str) -> tuple[Source, tuple[str, ...]]:
    from mmcli.sources.open import SourceOptions, open_source

    named: tuple[str, ...] = ("answer", "question")
    try:
        return open_source(SourceOptions((manifest,), variables=named)), named
    except ConfigError:
        pass
    try:
        return open_source(SourceOptions((manifest,), variables=named[:1])), named[:1]
    except ConfigError as error:
        raise ConfigError([f"--examples: {problem}" for problem in error.problems]) from error


def _inline(media: Media, manifest: str) -> Media:
    """With its content, so that it is the same one whenever a worker reads it."""
    if media.file is None:
        return media
    try:
        data = Path(media.file).read_bytes()
    except OSError as error:
        raise ConfigError(f"--examples {manifest}: cannot read {media.file}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"--examples {manifest}: {media.file} has more than {_MOST_BYTES} bytes")
    return replace(media, file=None, data=data, size=None, mtime_ns=None)


def choose_examples(source: Source, generation: Generation, how: GenerationArguments) -> ChosenExamples:
    """The source with a tuple of indices of examples as the last variable of each record. Raises ConfigError."""
    count, pool = int(how.num_examples), len(generation.examples)
    if how.examples_select == "random":
        return ChosenExamples(source, RandomChoice(generation.seed, pool, count))
    assert how.embeddings is not None
    assert how.examples_embeddings is not None
    inputs, examples = read_vectors(how.embeddings), read_vectors(how.examples_embeddings)
    if inputs.model != examples.model:
        raise ConfigError(
            f"{how.embeddings} and {how.examples_embeddings} are of different models; embed both alike"
        )
    if examples.info.rows != pool:
        raise ConfigError(
            f"{how.examples_embeddings} has {examples.info.rows} rows, {how.examples} {pool}; embed it again"
        )
    return ChosenExamples(source, SimilarChoice(inputs, examples, count))


class ExampleChoice(Protocol):
    """Which examples records are shown. `identity`: what tells this choice from others, for the fingerprint."""

    @property
    def identity(self) -> str: ...

    def start(self, row: int) -> Callable[[Record], tuple[int, ...]]:
        """For the records from `row` on, in order: indices, the best one last. What it gives raises RowError."""
        ...


@dataclass(frozen=True, slots=True)
class RandomChoice:
    """Drawn anew for each record, by --seed and its id alone: whatever its neighbours, and whenever it is run."""

    seed: int
    pool: int
    count: int
    identity: str = "random"

    def start(self, row: int) -> Callable[[Record], tuple[int, ...]]:
        return self._draw

    def _draw(self, record: Record) -> tuple[int, ...]:
        return tuple(random.Random(f"{self.seed} {record.id}").sample(range(self.pool), self.count))


@dataclass(frozen=True, slots=True)
class Vectors:
    """A Parquet output of `mmcli embed`."""

    path: Path
    info: OutputInfo

    @property
    def model(self) -> object:
        """Equal for vectors that can be compared."""
        return self.info.metadata.get("model")

    def rows(self, start: int = 0) -> Iterator[tuple[str, np.ndarray | None]]:
        """(id, vector [D] or None for an error row) from row `start` on."""
        from mmcli.sinks.rows import read_rows

        skip = start
        for batch in read_rows(self.info, ["id", "embedding"]):
            if skip >= len(batch):
                skip -= len(batch)
                continue
            batch, skip = batch.slice(skip), 0
            for name, vector in zip(batch.column("id").to_pylist(), batch.column("embedding"), strict=True):
                values = vector.values
                yield name, None if values is None else values.to_numpy(zero_copy_only=False).astype(np.float32)


def read_vectors(path: Path) -> Vectors:
    """The vectors in an output of `mmcli embed`. Raises ConfigError for what is none, or not finished."""
    from mmcli.core.errors import MmcliError
    from mmcli.sinks.outputs import read_output

    try:
        info = read_output(path)
    except MmcliError as error:
        raise ConfigError(f"{path}: {error.message}") from error
    if info.format != "parquet" or "embedding" not in info.schema.names or not info.complete:
        raise ConfigError(f"{path} is not a complete Parquet file of mmcli embed with one medium a row")
    return Vectors(path, info)


class SimilarChoice:
    """The nearest by cosine, the most similar one last: next to the question."""

    def __init__(self, inputs: Vectors, examples: Vectors, count: int) -> None:
        self._inputs, self._count = inputs, count
        self.identity = f"similar {inputs.info.fingerprint} {examples.info.fingerprint}"
        found = [vector for _, vector in examples.rows()]
        missing = [number for number, vector in enumerate(found) if vector is None]
        if missing:
            raise ConfigError(f"{examples.path}: row {missing[0]} has no vector; examples must all have one")
        matrix = np.stack([vector for vector in found if vector is not None])
        self._unit = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)

    def start(self, row: int) -> Callable[[Record], tuple[int, ...]]:
        """Row for row as the vectors are: those of the same inputs, in the same order."""
        rows = self._inputs.rows(row)

        def choose(record: Record) -> tuple[int, ...]:
            name, vector = next(rows, (None, None))
            if name != record.id:
                raise StateMismatch(
                    f"{self._inputs.path} has {name} where the inputs have {record.id}",
                    hint="mmcli embed of the same inputs, with --update",
                )
            if vector is None:
                raise RowError("bad_row", f"{self._inputs.path} has no vector for this input", stage="source")
            # The length of the input's own vector changes no order. Stable: ties by the order of the examples.
            best = np.argsort(-(self._unit @ vector), kind="stable")[: self._count]
            return tuple(int(index) for index in best[::-1])

        return choose


class ChosenExamples:
    """A source whose records know which examples they are shown."""

    def __init__(self, source: Source, choice: ExampleChoice) -> None:
        self._source, self.choice = source, choice
        self.slots = source.slots
        self.keep: pa.Schema = source.keep

    def snapshot(self, folder: Path) -> Snapshot:
        """That of the source."""
        return self._source.snapshot(folder)

    def records(self, start: int = 0) -> Iterator[Record]:
        """As the source's; a record for which nothing can be chosen is an error. Raises StateMismatch."""
        choose = self.choice.start(start)
        for record in self._source.records(start):
            try:
                chosen = choose(record)
            except RowError as error:
                record.media, record.error = (), record.error or error
            else:
                record.variables = (*record.variables, chosen)
            yield record
