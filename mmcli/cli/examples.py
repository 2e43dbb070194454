"""Solved examples for chat models: read whole, and chosen anew for each record where that is asked."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mmcli.cli.options import GenerationArguments
from mmcli.core.errors import ConfigError, RowError
from mmcli.core.protocols import Snapshot, Source
from mmcli.core.records import Media, Record

if TYPE_CHECKING:
    import pyarrow as pa

    from mmcli.models.options import Example, Generation

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


def choose_examples(source: Source, generation: Generation, how: GenerationArguments) -> Source:
    """The source with a tuple of indices of examples as the last variable of each record. Raises ConfigError."""
    count, pool = int(how.num_examples), len(generation.examples)
    if how.examples_select == "random":
        return ChosenExamples(source, RandomChoice(generation.seed, pool, count))
    raise ConfigError("--examples-select similar: not there yet")


class ExampleChoice:
    """Which examples a record is shown."""

    def __call__(self, record: Record) -> tuple[int, ...]:
        """Indices, the last one nearest to the question. Raises RowError."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RandomChoice(ExampleChoice):
    """Drawn anew for each record, by --seed and its id alone: whatever its neighbours, and whenever it is run."""

    seed: int
    pool: int
    count: int

    def __call__(self, record: Record) -> tuple[int, ...]:
        return tuple(random.Random(f"{self.seed} {record.id}").sample(range(self.pool), self.count))


class ChosenExamples:
    """A source whose records know which examples they are shown."""

    def __init__(self, source: Source, choice: ExampleChoice) -> None:
        self._source, self._choice = source, choice
        self.slots = source.slots
        self.keep: pa.Schema = source.keep

    def snapshot(self, folder: Path) -> Snapshot:
        return self._source.snapshot(folder)

    def records(self, start: int = 0) -> Iterator[Record]:
        """As the source's; a record for which nothing can be chosen is an error."""
        for record in self._source.records(start):
            if record.error is None:
                try:
                    record.variables = (*record.variables, self._choice(record))
                except RowError as error:
                    record.media, record.error = (), error
            yield record
