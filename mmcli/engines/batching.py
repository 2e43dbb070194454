"""From decoded samples to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmcli.core.records import Sample

# Rows of one length-bucketing window, in batches. Sorting 8 batches of 32 texts by length removes most of the
# padding, and what waits in memory stays small.
WINDOW_BATCHES = 8


@dataclass(slots=True, frozen=True)
class Slot:
    """A sample and where its output belongs: `row` and the number of the medium in that row's record."""

    row: int
    medium: int
    sample: Sample


def window_rows(batch_size: int, lengths_vary: bool) -> int:
    """Rows that are batched together.

    Windows begin at multiples of this, whatever row a run starts at: so a resumed run forms the same batches,
    and its rows are the same to the last bit.
    """
    return batch_size * (WINDOW_BATCHES if lengths_vary else 1)


def batches(slots: Sequence[Slot], batch_size: int) -> Iterator[list[Slot]]:
    """Cut one window's samples into batches: equal (modality, group) together, longest first.

    Longest first, so that running out of memory happens at once rather than after hours.
    """
    groups: dict[tuple[object, object], list[Slot]] = {}
    for slot in slots:
        groups.setdefault((slot.sample.modality, slot.sample.group), []).append(slot)
    for members in groups.values():
        members.sort(key=lambda s: -s.sample.length)
        batch: list[Slot] = []
        cost = 0
        for slot in members:
            if batch and cost + slot.sample.cost > batch_size:
                yield batch
                batch, cost = [], 0
            batch.append(slot)
            cost += slot.sample.cost
        yield batch
