"""From decoded rows to windows, and from windows to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmcli.core.errors import MmcliError, RowError
from mmcli.core.extensions import guess_modality
from mmcli.core.protocols import Task
from mmcli.core.records import Modality, Record, Result, Sample

# Rows of one length-bucketing window, in batches: what waits in memory, and until it can be committed, stays small.
WINDOW_BATCHES = 8
# Texts need next to no memory. Of texts of 1 to 120 words, 32 at once, padding makes 1.43 times as many tokens in
# windows of 256, 1.21 of 512, 1.10 of 1,024: not those, since a row is safe once its whole window is computed. The
# first windows are smaller: rows are there sooner.
TEXT_WINDOW_BATCHES = 16
# A window is cut early at so many bytes of model inputs: 256 sounds of 30 s are 490 MB.
WINDOW_BYTES = 256 * 1024 * 1024

# What a row is after decoding: one outcome per medium, or the row of an earlier output.
Outcomes = tuple[Sample | RowError, ...] | Result


@dataclass(slots=True)
class Slot:
    """A sample and where its output belongs: at `medium` of the outputs of its `row`."""

    row: int
    medium: int
    sample: Sample
    outputs: list[Any]


@dataclass(slots=True)
class Arrived:
    """A row after decoding. `nbytes`: size of its model inputs."""

    record: Record
    outcomes: Outcomes
    nbytes: int = 0


@dataclass(slots=True)
class Window:
    """Consecutive rows that are batched together.

    known    per row what each of its media is or why it is not there, or the finished Result. Not the samples:
             their memory goes with their batch.
    outputs  per row those of the model, one per medium; None until they are there
    nbytes   size of all model inputs
    """

    records: list[Record]
    known: list[tuple[Modality | RowError, ...] | Result]
    outputs: list[list[Any]]
    nbytes: int

    @classmethod
    def of(cls, rows: Sequence[Arrived]) -> tuple[Window, list[Slot]]:
        """The window, and the samples to compute: of rows whose media are all there."""
        window = cls([r.record for r in rows], [], [], sum([r.nbytes for r in rows]))
        slots: list[Slot] = []
        for row in rows:
            outcomes = row.outcomes
            outputs: list[Any] = []
            window.outputs.append(outputs)
            if type(outcomes) is tuple and len(outcomes) == 1 and isinstance(alone := outcomes[0], Sample):
                # As below, which takes three times as long: most rows are such.
                window.known.append((alone.modality,))
                outputs.append(None)
                slots.append(Slot(row.record.row, 0, alone, outputs))
                continue
            if isinstance(outcomes, Result):
                window.known.append(outcomes)
                continue
            window.known.append(tuple([o.modality if isinstance(o, Sample) else o for o in outcomes]))
            samples = [o for o in outcomes if isinstance(o, Sample)]
            if len(samples) == len(outcomes):
                outputs += [None] * len(samples)
                for medium, sample in enumerate(samples):
                    slots.append(Slot(row.record.row, medium, sample, outputs))
        return window, slots

    def results(self, task: Task, start_row: int) -> list[Result]:
        """The output rows from `start_row` on, once `outputs` is complete."""
        first = next((i for i, record in enumerate(self.records) if record.row >= start_row), len(self.records))
        rows = (self.records[first:], self.known[first:], self.outputs[first:])
        if hasattr(task, "results") and _plain(*rows[1:]):
            return list(task.results(*rows))
        results = []
        for record, known, outputs in zip(*rows, strict=True):
            if isinstance(known, Result):
                results.append(known)
                continue
            for one in (*known, *outputs):
                if isinstance(one, RowError):
                    results.append(Result(record, _modality(record, known), error=one))
                    break
            else:
                # No RowError is among `known`.
                results.append(task.result(record, known, outputs))  # type: ignore[arg-type]
        return results


def _plain(known: Sequence[Any], outputs: Sequence[Sequence[Any]]) -> bool:
    """Whether no row is finished already, or failed."""
    if {type(one) for one in known} != {tuple}:
        return False
    kinds = {type(one) for row in known for one in row} | {type(one) for row in outputs for one in row}
    return RowError not in kinds


@dataclass(frozen=True, slots=True)
class BatchSize:
    """How many samples go through a model at once.

    samples  of those for which nothing else is said; a clip of 8 frames is 8
    tokens   of a batch of texts, with its padding, whatever their number
    audio    bytes of the model inputs of a batch of sounds whose lengths vary, with its padding
    """

    samples: int
    tokens: int | None = None
    audio: int | None = None

    def most(self, longest: Sample) -> int:
        """What a batch that begins with its longest sample may cost (see Sample.cost)."""
        # What has no length has one shape: vectors; spectrograms, which no convolutions make larger.
        if longest.modality == "text" and self.tokens is not None and longest.length:
            return max(1, self.tokens // longest.length) * longest.cost
        if longest.modality == "audio" and self.audio is not None and longest.length:
            return max(1, self.audio // max(1, _nbytes(longest))) * longest.cost
        return self.samples


@dataclass(frozen=True, slots=True)
class WindowSizes:
    """Where windows begin and end, by the number of the row alone.

    size   rows of a window; it begins at a multiple of that
    first  rows of the first one, where that is less; the next ones are of 1, 2, 4, ... times as many until `size`
    """

    size: int
    first: int | None = None

    def around(self, row: int) -> range:
        """The rows of the window that a row is in."""
        start, stop = row - row % self.size, row - row % self.size + self.size
        if start or self.first is None:
            return range(start, stop)
        end = self.first
        while end <= row:
            start, end = end, 2 * end
        return range(start, min(end, stop))


class Windows:
    """Puts rows, which arrive in any order, into windows of consecutive rows.

    A window ends where `WindowSizes` says, or where its model inputs reach `max_bytes`: so a run that is resumed
    where a window begins forms the same windows, the same batches and the same rows to the last bit.
    """

    def __init__(self, first_row: int, sizes: WindowSizes, max_bytes: int = WINDOW_BYTES) -> None:
        self._next, self._sizes, self._max_bytes = first_row, sizes, max_bytes
        self._end = sizes.around(first_row).stop
        self._early: dict[int, Arrived] = {}
        self._rows: list[Arrived] = []
        self._bytes = 0

    def add(self, arrived: Sequence[Arrived]) -> Iterator[list[Arrived]]:
        """Take in rows; yields the windows that they complete."""
        for row in arrived:
            self._early[row.record.row] = row
        while (found := self._early.pop(self._next, None)) is not None:
            self._rows.append(found)
            self._bytes += found.nbytes
            self._next += 1
            if self._next == self._end or self._bytes >= self._max_bytes:
                self._end = self._sizes.around(self._next).stop
                yield self.flush()

    def flush(self) -> list[Arrived]:
        """The rows of the incomplete window, without a gap; those that come later make another window."""
        rows, self._rows, self._bytes = self._rows, [], 0
        return rows

    def check_empty(self) -> None:
        """At the end of the input: no row is missing before one that arrived."""
        if self._early:
            raise MmcliError(f"internal error: row {self._next} was read but never decoded")


def window_sizes(batch_size: int, lengths_vary: bool, texts: bool = False) -> WindowSizes:
    """Rows that are batched together; `texts`: all inputs are.

    Windows begin at the same rows, whatever row a run starts at: so a resumed run forms the same batches, and its
    rows are the same to the last bit.
    """
    if not lengths_vary:
        return WindowSizes(batch_size)
    several = batch_size * WINDOW_BATCHES
    return WindowSizes(batch_size * TEXT_WINDOW_BATCHES, several) if texts else WindowSizes(several)


def batches(slots: Sequence[Slot], max_cost: Callable[[Sample], int]) -> Iterator[list[Slot]]:
    """Cut one window's samples into batches: equal (modality, group) together, longest first.

    Longest first, so that running out of memory happens at once rather than after hours. `max_cost` says
    what a batch may cost that begins with a sample.
    """
    groups: dict[tuple[Modality, object], list[Slot]] = {}
    for slot in slots:
        key = slot.sample.modality, slot.sample.group
        if key not in groups:
            groups[key] = []
        groups[key].append(slot)
    for members in groups.values():
        members.sort(key=lambda s: -s.sample.length)
        samples = [slot.sample for slot in members]
        start = 0
        while start < len(members):
            stop = start + cut(samples[start:], max_cost(samples[start]))
            yield members[start:stop]
            start = stop


def cut(samples: Sequence[Sample], max_cost: int) -> int:
    """How many of `samples` make a batch: as many as cost at most `max_cost` together, but at least one."""
    cost = 0
    for count, sample in enumerate(samples):
        cost += sample.cost
        if cost > max_cost and count:
            return count
    return len(samples)


def _nbytes(sample: Sample) -> int:
    """Of its model inputs, without masks."""
    return sum(array.nbytes for array in sample.arrays.values() if array.dtype.kind == "f")


def _modality(record: Record, known: Sequence[Modality | RowError]) -> str | None:
    """What an error row's media are, as far as decoding, the manifest or the name tells."""
    names: list[str] = []
    for index, media in enumerate(record.media):
        one = known[index] if index < len(known) else None
        guess = media.modality if one is None or isinstance(one, RowError) else one
        guess = guess or (guess_modality(media.file) if media.file else None)
        if guess is None:
            return None
        names.append(guess)
    return "+".join(names) or None
