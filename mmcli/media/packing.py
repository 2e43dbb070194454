"""Small samples of a block as columns: for a worker's answer, which then has a tenth of the objects to pickle."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmcli.core.errors import RowError
from mmcli.core.records import Modality, Sample

# Larger arrays travel without a copy as they are (see transport).
SMALL = 4096

Outcomes = Sequence[tuple[Sample | RowError, ...]]


@dataclass(slots=True)
class Column:
    """The arrays of one name.

    values  of all, one behind the other; of no dimension: the one value that they are full of
    shapes  one where all have it; else of each, as its length where it has but one dimension
    """

    values: np.ndarray
    shapes: tuple[int, ...] | list[int] | list[tuple[int, ...]]


@dataclass(slots=True)
class Packed:
    """Records with one Sample each, of one modality, with the same arrays."""

    modality: Modality
    columns: dict[str, Column]
    lengths: list[int]
    groups: list[Hashable]
    costs: list[int]


def pack(outcomes: Outcomes | Packed) -> Outcomes | Packed:
    """As columns, where the samples are small and alike. 64 vectors of 8 numbers: 1.6 instead of 5.5 us each."""
    if isinstance(outcomes, Packed):
        return outcomes
    samples = [one[0] for one in outcomes if len(one) == 1 and isinstance(one[0], Sample)]
    if len(samples) < max(2, len(outcomes)):
        return outcomes
    first = samples[0]
    names = first.arrays.keys()
    if not all(s.modality == first.modality and s.arrays.keys() == names for s in samples):
        return outcomes
    columns: dict[str, Column] = {}
    for name in names:
        if (column := _column([s.arrays[name] for s in samples], columns.values())) is None:
            return outcomes
        columns[name] = column
    return Packed(
        first.modality, columns, [s.length for s in samples], [s.group for s in samples], [s.cost for s in samples]
    )


def _column(arrays: list[np.ndarray], others: Iterable[Column]) -> Column | None:
    first = arrays[0]
    if sum([a.nbytes for a in arrays]) > SMALL * len(arrays) or {a.dtype for a in arrays} != {first.dtype}:
        return None
    shapes: tuple[int, ...] | list[int] | list[tuple[int, ...]] = [a.shape for a in arrays]
    # Rows of an array of numbers would be numbers, not arrays.
    flat = all(a.ndim == 1 for a in arrays)
    if first.ndim > 0 and all(a.shape == first.shape for a in arrays):
        shapes = first.shape
    elif flat:
        shapes = [len(a) for a in arrays]
    values = np.concatenate([a.reshape(-1) for a in arrays])
    # A text's mask is ones and its token types are zeros: a third is left to send, and to cut up there.
    if flat and first.dtype.kind in "biu" and len(values) and (values == values[0]).all():
        values = values[0].reshape(())
    # One list for all that have it: it is pickled once.
    shapes = next((other.shapes for other in others if other.shapes == shapes), shapes)
    return Column(values, shapes)


def unpack(packed: Outcomes | Packed) -> Outcomes:
    """What was packed; the arrays are views of what all of them share, to be read only."""
    if not isinstance(packed, Packed):
        return packed
    names = list(packed.columns)
    arrays = [_rows(column, len(packed.lengths)) for column in packed.columns.values()]
    modality = packed.modality
    rows = zip(zip(*arrays, strict=True), packed.lengths, packed.groups, packed.costs, strict=True)
    return [
        (Sample(modality, dict(zip(names, row, strict=True)), length, group, cost),)
        for row, length, group, cost in rows
    ]


def _rows(column: Column, count: int) -> Sequence[np.ndarray]:
    values, shapes = column.values, column.shapes
    if isinstance(shapes, tuple):
        return [np.full(shapes, values)] * count if values.ndim == 0 else list(values.reshape(count, *shapes))
    if values.ndim == 0:
        longest = np.full(max(shapes), values)
        return [longest[:length] for length in shapes]
    rows, stop = [], 0
    for shape in shapes:
        if isinstance(shape, int):
            start, stop = stop, stop + shape
            rows.append(values[start:stop])
        else:
            start, stop = stop, stop + math.prod(shape)
            rows.append(values[start:stop].reshape(shape))
    return rows
