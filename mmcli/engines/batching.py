"""From decoded rows to windows, and from windows to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np

from mmcli.core.classified import ClassifiedRows
from mmcli.core.errors import MmcliError, RowError
from mmcli.core.extensions import guess_modality
from mmcli.core.protocols import Task
from mmcli.core.records import Modality, Record, Result, Sample
from mmcli.core.samples import Packed, Samples
from mmcli.core.texts import joined

# Rows of one length-bucketing window, in batches: what waits in memory, and until it can be committed, stays small.
WINDOW_BATCHES = 8
# Texts need next to no memory. Of texts of 1 to 120 words, 32 at once, padding makes 1.43 times as many tokens in
# windows of 256, 1.21 of 512, 1.10 of 1,024: not those, since a row is safe once its whole window is computed. The
# first windows are smaller: rows are there sooner.
TEXT_WINDOW_BATCHES = 16
# A window is cut early at so many bytes of model inputs: 256 sounds of 30 s are 490 MB.
WINDOW_BYTES = 256 * 1024 * 1024
# Columns of fewer rows take longer than these rows one by one: 30,000 texts, one at once, 4.1 to 5.1 s by rows, 4.8
# to 6.3 by columns, eight at once the same.
COLUMN_ROWS = 128

# What a row is after decoding: one outcome per medium, or the row of an earlier output.
Outcomes = tuple[Sample | RowError, ...] | Result


@dataclass(slots=True)
class Arrived:
    """Consecutive rows after decoding. `sizes`: bytes of the model inputs of each; a list or int64 [n]."""

    records: Sequence[Record]
    outcomes: Sequence[Outcomes]
    sizes: Sequence[int] | np.ndarray
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = int(sum(self.sizes) if isinstance(self.sizes, list) else np.sum(self.sizes))

    def __len__(self) -> int:
        return len(self.records)

    def part(self, start: int, stop: int | None = None) -> Arrived:
        """Some of the rows, by their position here."""
        return Arrived(self.records[start:stop], self.outcomes[start:stop], self.sizes[start:stop])

    @classmethod
    def of(cls, records: Sequence[Record], outcomes: Sequence[Outcomes]) -> list[Arrived]:
        """Rows in their order, as few pieces as can be."""
        if not records:
            return []
        if isinstance(outcomes, Packed):
            whole = cls(records, outcomes, outcomes.samples.sizes)
        else:
            whole = cls(records, outcomes, [_sample_bytes(one) for one in outcomes])
        if records[-1].row - records[0].row == len(records) - 1:
            return [whole]
        ends = [i for i in range(1, len(records)) if records[i].row != records[i - 1].row + 1]
        return [whole.part(start, stop) for start, stop in pairwise([0, *ends, len(records)])]


@dataclass(slots=True)
class Batch:
    """Samples that go through the model together, and where in their window its outputs belong.

    rows   the position of each sample's row
    media  which sample of its row it is; None: every row has one
    """

    samples: Sequence[Sample]
    rows: Sequence[int] | np.ndarray
    media: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, which: Sequence[int] | np.ndarray) -> Batch:
        """Some of it, in that order."""
        if isinstance(self.samples, Samples):
            chosen = np.asarray(which)
            return Batch(self.samples.take(chosen), np.asarray(self.rows)[chosen])
        media = None if self.media is None else [self.media[i] for i in which]
        return Batch([self.samples[i] for i in which], [self.rows[i] for i in which], media)

    def part(self, start: int, stop: int) -> Batch:
        """Some of it, one behind the other."""
        media = None if self.media is None else self.media[start:stop]
        return Batch(self.samples[start:stop], self.rows[start:stop], media)


@dataclass(slots=True)
class Window:
    """Consecutive rows that are batched together.

    nbytes    size of all model inputs
    known     per row what each of its media is or why it is not there, or the finished Result. Not the samples:
              their memory goes with their batch
    outputs   per row those of the model, one per medium; None until they are there. Where there is a `modality`,
              those of whole batches instead, each with the positions of its rows
    modality  of a window of samples in columns: every row has one, of this modality, or has failed
    """

    records: Sequence[Record]
    nbytes: int
    known: list[tuple[Modality | RowError, ...] | Result]
    outputs: list[Any]
    modality: Modality | None = None

    @classmethod
    def of(cls, blocks: Sequence[Arrived]) -> tuple[Window, Batch]:
        """The window, and the samples to compute: of rows whose media are all there."""
        records = joined([block.records for block in blocks]) if blocks else []
        nbytes = sum([block.nbytes for block in blocks])
        packed = [block.outcomes.samples for block in blocks if isinstance(block.outcomes, Packed)]
        others = [row for block in blocks if not isinstance(block.outcomes, Packed) for row in block.outcomes]
        failed = all(type(row) is tuple and row and isinstance(row[0], RowError) for row in others)
        if len(records) >= COLUMN_ROWS and packed and failed and (samples := Samples.join(packed)) is not None:
            return cls._by_columns(records, nbytes, blocks, samples)
        return cls._by_rows(records, nbytes, chain.from_iterable([block.outcomes for block in blocks]))

    @classmethod
    def _by_columns(
        cls, records: Sequence[Record], nbytes: int, blocks: Sequence[Arrived], samples: Samples
    ) -> tuple[Window, Batch]:
        there: tuple[Modality | RowError, ...] = (samples.modality,)
        known: list[tuple[Modality | RowError, ...] | Result] = []
        places: list[range] = []
        for block in blocks:
            if isinstance(block.outcomes, Packed):
                places.append(range(len(known), len(known) + len(block)))
                known += [there] * len(block)
            else:
                known += block.outcomes  # type: ignore[arg-type] # errors alone
        rows = np.concatenate([np.arange(place.start, place.stop) for place in places])
        return cls(records, nbytes, known, [], samples.modality), Batch(samples, rows)

    @classmethod
    def _by_rows(cls, records: Sequence[Record], nbytes: int, rows: Iterable[Outcomes]) -> tuple[Window, Batch]:
        known: list[tuple[Modality | RowError, ...] | Result] = []
        outputs: list[list[Any]] = []
        samples: list[Sample] = []
        places: list[int] = []
        media: list[int] = []
        for row, outcomes in enumerate(rows):
            if type(outcomes) is tuple and len(outcomes) == 1 and isinstance(alone := outcomes[0], Sample):
                # As below, which takes three times as long: most rows are such.
                known.append((alone.modality,))
                outputs.append([None])
                samples.append(alone)
                places.append(row)
                media.append(0)
                continue
            outputs.append([])
            if isinstance(outcomes, Result):
                known.append(outcomes)
                continue
            known.append(tuple([o.modality if isinstance(o, Sample) else o for o in outcomes]))
            there = [o for o in outcomes if isinstance(o, Sample)]
            if len(there) == len(outcomes):
                outputs[row] += [None] * len(there)
                samples += there
                places += [row] * len(there)
                media += range(len(there))
        return cls(records, nbytes, known, outputs), Batch(samples, places, media)

    def put(self, batch: Batch, outputs: Sequence[Any]) -> None:
        """The outputs of a batch of this window are there."""
        if self.modality is not None:
            self.outputs.append((batch.rows, outputs))
            return
        for row, medium, output in zip(batch.rows, batch.media or (), outputs, strict=True):
            self.outputs[row][medium] = output

    def position(self, row: int) -> int:
        """Of that row of the run, or of the first one behind it that is here."""
        return max(0, row - self.records[0].row) if self.records else 0

    def together(self) -> np.ndarray | ClassifiedRows | None:
        """The outputs of all rows as one, zeros where a row could not be read; None where they are single ones."""
        count = len(self.records)
        kinds = {type(outputs) for _, outputs in self.outputs} if self.modality is not None else set()
        if kinds == {ClassifiedRows}:
            return ClassifiedRows.scatter(self.outputs, count)
        if kinds != {np.ndarray}:
            return None
        _, one = self.outputs[0]
        array = np.zeros((count, *one.shape[1:]), one.dtype)
        for rows, outputs in self.outputs:
            array[rows] = outputs
        return array

    def results(self, task: Task, first: int = 0) -> list[Result]:
        """The output rows from that position on, once `outputs` is complete."""
        known, outputs = self._by_row()
        rows = (self.records[first:], known[first:], outputs[first:])
        if hasattr(task, "results") and _plain(*rows[1:]):
            return list(task.results(*rows))
        results = []
        for record, media, made in zip(*rows, strict=True):
            if isinstance(media, Result):
                results.append(media)
                continue
            for one in (*media, *made):
                if isinstance(one, RowError):
                    results.append(Result(record, _modality(record, media), error=one))
                    break
            else:
                # No RowError is among `media`.
                results.append(task.result(record, media, made))
        return results

    def failed(self, first: int = 0) -> dict[int, tuple[str | None, RowError]]:
        """Rows from that position on that could not be read: by position behind it, their modality and why."""
        there = (self.modality,)
        found = {}
        for i, known in enumerate(self.known[first:]):
            if known != there and isinstance(known, tuple):
                error = next(one for one in known if isinstance(one, RowError))
                found[i] = _modality(self.records[first + i], known), error
        return found

    def _by_row(self) -> tuple[list[Any], list[list[Any]]]:
        if self.modality is None:
            return self.known, self.outputs
        by_row: list[list[Any]] = [[None] for _ in self.records]
        for rows, outputs in self.outputs:
            for row, output in zip(rows.tolist(), outputs, strict=True):
                by_row[row][0] = output
        return self.known, by_row


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
        self._blocks: list[Arrived] = []
        self._bytes = 0

    def add(self, arrived: Sequence[Arrived]) -> Iterator[list[Arrived]]:
        """Take in rows; yields the windows that they complete."""
        for block in arrived:
            self._early[block.records[0].row] = block
        while (found := self._early.pop(self._next, None)) is not None:
            taken = 0
            while taken < len(found):
                rest = found.part(taken) if taken else found
                count = self._room(rest)
                piece = rest if count == len(rest) else rest.part(0, count)
                self._blocks.append(piece)
                self._bytes += piece.nbytes
                self._next += count
                taken += count
                if self._next == self._end or self._bytes >= self._max_bytes:
                    self._end = self._sizes.around(self._next).stop
                    yield self.flush()

    def _room(self, block: Arrived) -> int:
        """How many of its rows belong to the window."""
        count = min(len(block), self._end - self._next)
        if self._bytes + block.nbytes < self._max_bytes:
            return count
        reached = np.flatnonzero(self._bytes + np.cumsum(block.sizes) >= self._max_bytes)
        return min(count, int(reached[0]) + 1)

    def flush(self) -> list[Arrived]:
        """The rows of the incomplete window, without a gap; those that come later make another window."""
        blocks, self._blocks, self._bytes = self._blocks, [], 0
        return blocks

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


def batches(everything: Batch, max_cost: Callable[[Sample], int]) -> Iterator[Batch]:
    """Cut one window's samples into batches: equal (modality, group) together, longest first.

    Longest first, so that running out of memory happens at once rather than after hours. `max_cost` says
    what a batch may cost that begins with a sample.
    """
    for order in _groups(everything.samples):
        members = everything.take(order)
        start = 0
        while start < len(members):
            stop = start + cut(members.samples[start:], max_cost(members.samples[start]))
            yield members.part(start, stop)
            start = stop


def _groups(samples: Sequence[Sample]) -> Iterator[Sequence[int] | np.ndarray]:
    """Positions of the samples that may be together, longest first."""
    if isinstance(samples, Samples):
        yield samples.longest_first()
        return
    groups: dict[tuple[Modality, object], list[int]] = {}
    for i, sample in enumerate(samples):
        key = sample.modality, sample.group
        if key not in groups:
            groups[key] = []
        groups[key].append(i)
    for members in groups.values():
        members.sort(key=lambda i: -samples[i].length)
        yield members


def cut(samples: Sequence[Sample], max_cost: int) -> int:
    """How many of `samples` make a batch: as many as cost at most `max_cost` together, but at least one."""
    if isinstance(samples, Samples):
        return min(len(samples), max(1, max_cost // samples.cost))
    cost = 0
    for count, sample in enumerate(samples):
        cost += sample.cost
        if cost > max_cost and count:
            return count
    return len(samples)


def _nbytes(sample: Sample) -> int:
    """Of its model inputs, without masks."""
    return sum(array.nbytes for array in sample.arrays.values() if array.dtype.kind == "f")


def _sample_bytes(outcomes: Outcomes) -> int:
    """Of all model inputs of a row."""
    if isinstance(outcomes, Result):
        return 0
    # Loops: a third of the time of nested generators, and this is run for every row.
    total = 0
    for outcome in outcomes:
        if isinstance(outcome, Sample):
            for array in outcome.arrays.values():
                total += array.nbytes
    return total


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
