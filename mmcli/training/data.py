"""Rows -> model inputs in the workers of a torch DataLoader, the same ones whenever a run goes on.

Which rows a step has, and how they are augmented, follow from (seed, epoch, row) alone: no state of a generator has
to be kept for that, and any number of workers gives the same batches.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcli.core.errors import MmcliError, ModelError, RowError
from mmcli.core.protocols import ModelPlan
from mmcli.core.records import Media, Modality, Payload, Sample
from mmcli.media.worker import die_with_parent

# (epoch, row): what a worker needs to know to make an item.
Key = tuple[int, int]
# (modality, payload, generator) -> payload
Augment = Callable[[Modality, Payload, np.random.Generator], Payload]
# Media that are told by name.
_NAMED = 3


@dataclass(slots=True)
class Row:
    """A row to learn from.

    target     what an objective makes of its label
    auxiliary  its indices of auxiliary labels, see mmcli.training.auxiliary
    """

    id: str
    media: tuple[Media, ...]
    target: Any = None
    variables: tuple[Any, ...] = ()
    auxiliary: tuple[int, ...] = ()


@dataclass(slots=True)
class Item:
    """A Row that was decoded and processed. `lost`: its media that could not be read, and count as missing."""

    row: int
    samples: tuple[Sample, ...]
    target: Any
    lost: tuple[tuple[str, RowError], ...] = ()
    auxiliary: tuple[int, ...] = ()


class UnreadableRow(MmcliError):
    """A row that could be read before the run, and cannot be now."""

    exit_code = ModelError.exit_code


@dataclass(slots=True)
class MaskedMedia:
    """What could not be read while a model learned, and counted as missing: the first are told, all are counted."""

    note: Callable[[str], None]
    seen: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, row: str, what: str, why: str) -> None:
        """`what`: its modality, or "row" for all of it. Each one counts once, however often it is read."""
        if (row, what) in self.seen:
            return
        self.seen[row, what] = why
        if len(self.seen) <= _NAMED:
            how = "cannot be read and is left out" if what == "row" else f"has no {what} that can be read"
            self.note(f"{row} {how}: {why}")

    def summary(self) -> None:
        """Tell how many there were beyond those that were named."""
        if len(self.seen) > _NAMED:
            self.note(f"{len(self.seen)} media or rows could not be read in training and counted as missing")


def each_alone(media: Sequence[Media]) -> Iterator[tuple[int, tuple[Media, ...]]]:
    """Of each medium that a row has: its place, and the row's media without all others."""
    for place, one in enumerate(media):
        if not one.missing:
            yield place, masked(media, [n for n in range(len(media)) if n != place])


def masked(media: Sequence[Media], places: Collection[int]) -> tuple[Media, ...]:
    """Without those at some places, which the row then lacks."""
    return tuple(Media(one.modality) if n in places else one for n, one in enumerate(media))


class Rows(Dataset[Any]):
    """Items by (epoch, row). A row that cannot be read comes as its RowError: raised where it is used.

    masked  media that cannot be read count as missing, and are told here in the main process; a row that then has
            none is left out of its batch. None: nothing does
    """

    def __init__(
        self,
        rows: Sequence[Row],
        plan: ModelPlan,
        seed: int,
        augment: Augment | None = None,
        modality_dropout: float = 0.0,
        masked: MaskedMedia | None = None,
    ) -> None:
        self.rows, self._plan, self._seed, self._augment = rows, plan, seed, augment
        self._dropout, self.masked = modality_dropout, masked
        self._decoder: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Item | tuple[int, RowError]:
        index = key[1]
        if self._decoder is None:
            self._open()
        row, lost = self.rows[index], ()
        found = self._read(key, row.media)
        if isinstance(found, RowError) and self.masked is not None:
            found, lost = self._without_unreadable(key, found)
        return (
            (index, found) if isinstance(found, RowError) else Item(index, found, row.target, lost, row.auxiliary)
        )

    def drawn(self, most: int) -> Rows:
        """All of them, or so many, drawn at random but always the same, in order."""
        if len(self.rows) <= most:
            return self
        places = np.sort(np.random.default_rng(self._seed).permutation(len(self.rows))[:most])
        rows = [self.rows[int(place)] for place in places]
        return Rows(rows, self._plan, self._seed, self._augment, self._dropout, self.masked)

    def _read(self, key: Key, media: tuple[Media, ...]) -> tuple[Sample, ...] | RowError:
        from mmcli.media.worker import Jobs

        epoch, index = key
        if self._processor is not None:
            self._processor.generator = np.random.default_rng((self._seed, epoch, index))
        outcomes = self._decoder.block(Jobs(0, [media], variables=[self.rows[index].variables])).outcomes[0]
        return next((one for one in outcomes if isinstance(one, RowError)), tuple(outcomes))

    def _without_unreadable(self, key: Key, error: RowError) -> tuple[tuple[Sample, ...] | RowError, Any]:
        """A row that failed, of those of its media that can be read alone, and why the others cannot."""
        media = self.rows[key[1]].media
        tried = {place: self._read(key, alone) for place, alone in each_alone(media)}
        lost = {place: found for place, found in tried.items() if isinstance(found, RowError)}
        if not lost or len(lost) == len(tried):
            return error, ()
        named = tuple((str(media[place].modality), why) for place, why in lost.items())
        return self._read(key, masked(media, lost)), named

    def _open(self) -> None:
        """In the worker that needs it."""
        from mmcli.media.worker import BlockDecoder

        # Processors set it to 1, as is right in a worker: without workers the model needs all of them.
        threads = torch.get_num_threads()
        processor: Any = self._plan.open_processor()
        torch.set_num_threads(threads)
        if self._augment is not None or self._dropout:
            self._processor = _Augmented(processor, self._augment or _as_it_is, self._dropout)
        self._decoder = BlockDecoder(self._processor or processor, self._plan.decode)

    _processor: Any = None


def _as_it_is(modality: Modality, payload: Payload, generator: np.random.Generator) -> Payload:
    return payload


class _Augmented:
    """A Processor whose payloads are augmented first.

    dropout  share of the media of a record that are left out; one stays (modality dropout: Neverova et al. 2016,
             ModDrop). Drawn by row, so that it does not depend on how batches are cut.
    """

    def __init__(self, processor: Any, augment: Augment, dropout: float) -> None:
        self._processor, self._augment, self._dropout = processor, augment, dropout
        self.generator = np.random.default_rng(0)
        if hasattr(processor, "record"):
            self.record = self._record

    def __call__(self, modality: Modality, payload: Payload) -> Sample:
        made: Sample = self._processor(modality, self._augment(modality, payload, self.generator))
        return made

    def _record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        changed = [
            (modality, payload if payload is None else self._augment(modality, payload, self.generator))
            for modality, payload in media
        ]
        if self._dropout:
            changed = self._without_some(changed)
        made: tuple[Sample, ...] = self._processor.record(changed, variables)
        return made

    def _without_some(self, media: list[tuple[Modality, Payload]]) -> list[tuple[Modality, Payload]]:
        drawn = self.generator.random(len(media))
        drawn[[payload is None for _, payload in media]] = -1.0
        kept = drawn >= self._dropout
        if not kept.any():
            kept[drawn.argmax()] = True
        return [(modality, payload if k else None) for (modality, payload), k in zip(media, kept, strict=True)]


class Batches(Sampler[list[Key]]):
    """The rows of each step of an epoch: a permutation by (seed, epoch), cut into batches.

    start    the first step
    weights  rows are drawn with replacement by these, as many as there are; None: each comes once
    rank, world  this process takes every `world`-th row of a batch; none of one with fewer rows than processes
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        weights: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows, self._size, self._seed, self._weights = rows, batch_size, seed, weights
        self._rank, self._world = rank, world
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def order(self) -> np.ndarray:
        """Row numbers of the epoch, in order."""
        generator = np.random.default_rng((self._seed, self.epoch, 7))
        if self._weights is None:
            return generator.permutation(self._rows)
        return generator.choice(self._rows, self._rows, p=self._weights / self._weights.sum())

    def batch(self, step: int) -> list[int]:
        """The rows of a step, of all processes."""
        found: list[int] = self.order()[step * self._size : (step + 1) * self._size].tolist()
        return found

    def rows_of(self, step: int) -> int:
        """How many rows a step has, those of all processes."""
        return min(self._size, self._rows - step * self._size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self.order()
        for step in range(self.start, len(self)):
            rows = order[step * self._size : (step + 1) * self._size]
            yield [(self.epoch, int(row)) for row in rows[self._rank :: self._world]]


def in_pieces(items: Sequence[Item], pieces: int) -> list[Sequence[Item]]:
    """The rows of a batch in at most so many pieces of about equal size."""
    size = -(-len(items) // pieces)
    return [items[start : start + size] for start in range(0, len(items), size)]


class InOrder(Sampler[list[Key]]):
    """All rows, in order, for evaluation. Of several processes each takes every `world`-th batch."""

    def __init__(self, rows: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self._rows, self._size = rows, batch_size
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(range(self._rank, -(-self._rows // self._size), self._world))

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(self._rank * self._size, self._rows, self._size * self._world):
            yield [(0, row) for row in range(start, min(start + self._size, self._rows))]


class Collate(Protocol):
    """Items -> what the main process gets; runs in the workers."""

    def __call__(self, items: Sequence[Item]) -> Any: ...


@dataclass(slots=True)
class _Masked:
    """A batch, and which media or rows it lacks: (id, what, why)."""

    batch: Any
    lost: list[tuple[str, str, str]]


@dataclass(slots=True)
class _Checked:
    """Raises for a row that cannot be read, in the words of its error; leaves it out where that is asked for."""

    rows: Rows
    collate: Collate

    def __call__(self, items: Sequence[Item | tuple[int, RowError]]) -> Any:
        if not items:
            # This process's part of a batch with fewer rows than processes.
            return []
        good = [item for item in items if isinstance(item, Item)]
        bad = [(self.rows.rows[item[0]].id, item[1]) for item in items if isinstance(item, tuple)]
        if bad and (self.rows.masked is None or not good):
            row, error = bad[0]
            # As a value: an exception of a worker arrives as the text of its traceback.
            return UnreadableRow(f"{row}: {error.code}: {error.message}")
        lost = [(row, "row", f"{error.code}: {error.message}") for row, error in bad]
        lost += [
            (self.rows.rows[item.row].id, what, f"{error.code}: {error.message}")
            for item in good
            for what, error in item.lost
        ]
        batch = self.collate(good)
        return _Masked(batch, lost) if lost else batch


def load(rows: Rows, batches: Sampler[list[Key]], collate: Collate, num_workers: int) -> Iterator[Any]:
    """Collated batches, made by workers ahead of time. Raises UnreadableRow, ModelError for a worker that died."""
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_Checked(rows, collate),
        # Of its own: the global one is the model's (dropout), and belongs to the checkpoint.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if num_workers else None,
    )
    try:
        for found in loader:
            if isinstance(found, UnreadableRow):
                raise found
            if isinstance(found, _Masked):
                assert rows.masked is not None
                for row, what, why in found.lost:
                    rows.masked.add(row, what, why)
                found = found.batch
            yield found
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ModelError(
            f"a worker that reads rows died: {str(error).splitlines()[0]}",
            hint="the same command goes on from the last checkpoint; --num-workers 1 needs less memory",
        ) from error


def _init_worker(number: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal, and torchrun's SIGTERM those of a group; the main one decides what
    # to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()


def class_weights(targets: Sequence[int]) -> np.ndarray:
    """float64 [N]: of each row 1 / how often its class comes."""
    counts = np.bincount(targets)
    weights: np.ndarray = 1.0 / counts[np.asarray(targets)]
    return weights
