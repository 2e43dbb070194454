"""What the rooms offer one another, so that no room needs to import its sibling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmcli.core.records import Decoded, DecodeOptions, Modality, Payload, Record, Result, Sample

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class Source(Protocol):
    """Where Records come from. Rows are numbered from 0 in a fixed order.

    slots      names of the media of each record: ("",) for one medium, else e.g. ("image", "text")
    keep       schema of the passthrough columns

    It may have `blocks(start) -> Iterator[Sequence[Record]]`: what `records` gives, some at a time, not empty.
    """

    slots: tuple[str, ...]
    keep: pa.Schema

    def snapshot(self, folder: Path) -> Snapshot:
        """List the inputs (ids, paths, sizes, times) into `folder`; call before `records`.

        Raises ConfigError when an input cannot be listed at all.
        """
        ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from row `start` on, in order, read lazily."""
        ...


class Snapshot(Protocol):
    """The resolved inputs of a run.

    rows        how many records there will be; None for a live stream
    digest      hex digest over everything listed: equal digests mean equal inputs
    modalities  how many records look like each modality by name; None counts those that cannot be told
    notes       lines worth telling the user (skipped files, ...)
    """

    rows: int | None
    digest: str
    modalities: dict[Modality | None, int]
    notes: list[str]


class Processor(Protocol):
    """The processor of a checkpoint, opened in a decode worker."""

    def __call__(self, modality: Modality, payload: Payload) -> Sample:
        """Decoded medium -> model inputs. Raises RowError for an input that the model cannot take."""
        ...


class RecordProcessor(Protocol):
    """A processor that takes all media of a record together, for models that read them beside a prompt.

    One that shows solved examples before each question also has `show(decode)`: called once, before the first
    record, with what decodes a Media as a record's are decoded.
    """

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """A record's decoded media and `Record.variables` -> its Samples, one for each question or window of sound.

        Raises RowError for a record that the model cannot take.
        """
        ...


class Decoder(Protocol):
    """Decodes records and runs the processor on them, in whatever processes.

    One that can compute the signatures of records meanwhile has `signs: bool`, to be set before `run`.
    """

    num_workers: int

    def run(self, blocks: Iterator[Sequence[Record]], may_read: Callable[[], bool]) -> Iterator[Decoded]:
        """Decode `blocks`, yielding answers as they come, in any order; reads none while `may_read` is false.

        An empty block says that there is nothing to decode at the moment: it is asked again soon. An answer
        without records is a sign of life: the caller may stop iterating, and then close, at each answer.
        """
        ...

    def close(self) -> None:
        """Give back the processes."""
        ...


class ModelPlan(Protocol):
    """A cheap, picklable description of a model: knows its output before any weight is loaded.

    modalities  what it takes
    decode      what its processor needs from the decoder
    """

    @property
    def modalities(self) -> frozenset[Modality]: ...

    @property
    def decode(self) -> DecodeOptions: ...

    def describe(self) -> dict[str, Any]:
        """What identifies the model in the fingerprint and the output's metadata."""
        ...

    def open_processor(self) -> Processor | RecordProcessor:
        """Called once in every decode worker."""
        ...

    def load(self) -> Runner:
        """Load the weights on the device. Raises ModelError."""
        ...


class EmbeddingModelPlan(ModelPlan, Protocol):
    """The plan of a model whose runner gives vectors: float32 [n, D]. `embedding_size`: D."""

    @property
    def embedding_size(self) -> int: ...


class WriterPlan(ModelPlan, Protocol):
    """The plan of a model that writes.

    output  what a Sample's output is: "text": Generated; "json": likewise, JSON; "scores": Scored; "speech": Heard;
            "requests": the body of a request, bytes
    """

    @property
    def output(self) -> Literal["text", "json", "scores", "speech", "requests"]: ...


class ClassifierPlan(ModelPlan, Protocol):
    """The plan of a model that classifies: its runner gives a Classified for each Sample.

    labels  all that it can give, all different
    """

    @property
    def labels(self) -> tuple[str, ...]: ...

    def open_joiner(self) -> Callable[[Sequence[Any]], Any] | None:
        """Where a record has several Samples, what makes one Classified of their outputs; else None."""
        ...


class Runner(Protocol):
    """A loaded model on a device.

    `collate` runs in a thread of its own, one or two batches ahead of `forward`; two calls never overlap.

    One that may compute several batches at once has a method `concurrent(most: int) -> Runner`: itself, or one that
    does, with `concurrency`, how many, and `close()`, which ends its threads.
    """

    def collate(self, samples: Sequence[Sample]) -> Any:
        """Samples of one (modality, group) -> a Batch on the host: padded, stacked, pinned where it helps."""
        ...

    def forward(self, batch: Any) -> Sequence[Any] | np.ndarray | Pending:
        """Batch -> one output per sample, in order: vectors float32 [n, D], or a list of Generated or
        Scored.

        On a device that computes while the host goes on, returns the Pending outputs at once: the engine then
        starts the next batch before it waits for this one. What the batch holds must not be kept after a failure.

        Raises torch.OutOfMemoryError or MemoryError, which the engine answers by halving the batch.
        """
        ...


class Pending(Protocol):
    """Outputs that a device is still computing, or a server.

    Where that can take more than a second, it has a method `wait(timeout: float) -> bool`: are they there, or has
    it failed, within so many seconds?
    """

    def result(self) -> Sequence[Any] | np.ndarray:
        """Wait for them: one per sample, as `Runner.forward` returns them, and raises."""
        ...


class Task(Protocol):
    """What the user asks for: which columns a Result has.

    One that makes many rows faster than one at a time also has `results(records, samples, outputs)`: what `result`
    gives for each of several records, none of which has failed before. One that makes columns of a whole
    array (or ClassifiedRows) has `whole(outputs, failed, fields)`: outputs of n rows, zeros where one has failed ->
    what `columns` gives of their Results, or None where a row has to be looked at for itself.
    """

    @property
    def name(self) -> str: ...

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """The task's own columns, known before the first row is read."""
        ...

    def result(self, record: Record, samples: Sequence[Modality], outputs: Sequence[Any]) -> Result:
        """One record's model outputs (one per Sample) -> its Result; a bad output becomes an error."""
        ...

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """Values of many results as Arrow columns; null for errors."""
        ...

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        ...


class Output(Protocol):
    """Where the engine's finished rows go.

    immediate  rows are wanted as soon as they are ready (a stream), not in large parts
    """

    immediate: bool

    def commit(self, table: pa.Table, start_row: int, signatures: Sequence[bytes | None]) -> None:
        """Make consecutive rows durable, all or none. Raises OutputError, or Stopped for a closed pipe."""
        ...


class Previous(Protocol):
    """Finished rows of an earlier output (--update, --retry-errors)."""

    def take(self, signatures: Sequence[bytes | None]) -> tuple[list[int], pa.Table | None]:
        """Which of `signatures` have a finished row (positions), and those rows in that order."""
        ...


class Format(Protocol):
    """How a finished output is laid out. The staged parts are always Parquet."""

    name: str
    suffixes: tuple[str, ...]

    def write(self, parts: Sequence[Path], schema: pa.Schema, target: Path) -> int:
        """Stream the parts, in order, into the new file or folder `target`; returns the rows written."""
        ...
