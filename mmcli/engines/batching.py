"""From decoded rows to windows, and from windows to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmcli.core.errors import MmcliError, RowError
from mmcli.core.extensions import guess_modality
from mmcli.core.protocols import Task
from mmcli.core.records import Modality, Record, Result, Sample

# Rows of one length-bucketing window, in batches. Sorting 8 batches of 32 texts by length removes most of the
# padding, and what waits in memory stays small.
WINDOW_BATCHES = 8
# A window is cut early at so many bytes of model inputs: 256 sounds of 30 s are 490 MB.
WINDOW_BYTES = 256 * 1024 * 1024

# What a row is after decoding: one outcome per medium, or the row of an earlier output.
Outcomes = tuple[Sample | RowError, ...] | Result


@dataclass(slots=True)
class Slot:
    """A sample and where its output belongs: `row` and the number of the medium in that row's record."""

    row: int
    medium: int
    sample: Sample


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
    outputs  of the model, by (row, medium)
    nbytes   size of all model inputs
    """

    records: list[Record]
    known: list[tuple[Modality | RowError, ...] | Result]
    nbytes: int
    outputs: dict[tuple[int, int], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Arrived]) -> tuple[Window, list[Slot]]:
        """The window, and the samples to compute: of rows whose media are all there."""
        slots: list[Slot] = []
        known: list[tuple[Modality | RowError, ...] | Result] = []
        for row in rows:
            outcomes = row.outcomes
            if isinstance(outcomes, Result):
                known.append(outcomes)
                continue
            mine = []
            for medium, outcome in enumerate(outcomes):
                if isinstance(outcome, Sample):
                    mine.append(Slot(row.record.row, medium, outcome))
            if len(mine) == len(outcomes):
                slots += mine
            known.append(tuple([o.modality if isinstance(o, Sample) else o for o in outcomes]))
        return cls([r.record for r in rows], known, sum(r.nbytes for r in rows)), slots

    def results(self, task: Task, start_row: int) -> list[Result]:
        """The output rows from `start_row` on, once `outputs` is complete."""
        results = []
        for record, known in zip(self.records, self.known, strict=True):
            if record.row >= start_row:
                results.append(known if isinstance(known, Result) else self._result(task, record, known))
        return results

    def _result(self, task: Task, record: Record, known: tuple[Modality | RowError, ...]) -> Result:
        modalities: list[Modality] = []
        for one in known:
            if isinstance(one, RowError):
                return Result(record, _modality(record, known), error=one)
            modalities.append(one)
        outputs = []
        for medium in range(len(known)):
            output = self.outputs[record.row, medium]
            if isinstance(output, RowError):
                return Result(record, _modality(record, known), error=output)
            outputs.append(output)
        return task.result(record, modalities, outputs)


class Windows:
    """Puts rows, which arrive in any order, into windows of consecutive rows.

    A window ends before a multiple of `size`, or where its model inputs reach `max_bytes`: so a run that is
    resumed at a multiple of `size` forms the same windows, the same batches and the same rows to the last bit.
    """

    def __init__(self, first_row: int, size: int, max_bytes: int = WINDOW_BYTES) -> None:
        self._next, self._size, self._max_bytes = first_row, size, max_bytes
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
            if self._next % self._size == 0 or self._bytes >= self._max_bytes:
                yield self.flush()

    def flush(self) -> list[Arrived]:
        """The rows of the incomplete window, without a gap; those that come later make another window."""
        rows, self._rows, self._bytes = self._rows, [], 0
        return rows

    def check_empty(self) -> None:
        """At the end of the input: no row is missing before one that arrived."""
        if self._early:
            raise MmcliError(f"internal error: row {self._next} was read but never decoded")


def window_rows(batch_size: int, lengths_vary: bool) -> int:
    """Rows that are batched together.

    Windows begin at multiples of this, whatever row a run starts at: so a resumed run forms the same batches,
    and its rows are the same to the last bit.
    """
    return batch_size * (WINDOW_BATCHES if lengths_vary else 1)


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
