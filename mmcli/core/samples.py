"""Samples of one kind as columns: a block of texts is a few arrays instead of objects for each of its rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from mmcli.core.records import Modality, Sample


@dataclass(slots=True, eq=False)
class Column:
    """The arrays of one name, one for each of n samples.

    values   the numbers of all, one array behind the other; of no dimension: what all arrays are full of
    starts   int64 [n]: where in `values` each begins
    lengths  int64 [n]: how many numbers each has
    shape    of all; None: arrays of one dimension, each as long as it is
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start, length = int(self.starts[index]), int(self.lengths[index])
        if self.values.ndim == 0:
            return np.full(length, self.values)
        array = self.values[start : start + length]
        return array if self.shape is None else array.reshape(self.shape)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Views of what all of them share, to be read only."""
        lengths = self.lengths.tolist()
        if self.values.ndim == 0:
            longest = np.full(max(lengths, default=0), self.values)
            return iter([longest[:length] for length in lengths])
        values, starts = self.values, self.starts.tolist()
        arrays = [values[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return iter(arrays if self.shape is None else [array.reshape(self.shape) for array in arrays])

    def take(self, which: np.ndarray | slice) -> Column:
        """Some of them, in that order."""
        return Column(self.values, self.starts[which], self.lengths[which], self.shape)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Of all as one array: [n, the longest] or [n, *shape]."""
        return (len(self), *(self.shape if self.shape is not None else (int(self.lengths.max()),)))

    def pad_into(self, out: np.ndarray, fill: int) -> None:
        """All as one array of `padded_shape`; shorter ones are filled up behind.

        540 arrays of 120 numbers at most: 0.3 ms, where a copy for each takes as long and never lets go of the
        interpreter's lock.
        """
        count, longest = len(self), int(self.lengths.max())
        out = out.reshape(count, longest)
        short = int(self.lengths.min()) < longest
        if self.values.ndim == 0:
            out.fill(self.values)
        elif not short and (np.diff(self.starts) == longest).all():
            start = int(self.starts[0])
            out[:] = self.values[start : start + count * longest].reshape(count, longest)
        else:
            # Behind the end of `values` its last number is taken, and overwritten.
            np.take(self.values, self.starts[:, None] + np.arange(longest), out=out, mode="clip")
        if short:
            np.copyto(out, fill, where=np.arange(longest) >= self.lengths[:, None], casting="unsafe")

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Column | None:
        """As a column; None where they differ in dtype, or have several dimensions and differ in shape."""
        first = arrays[0]
        if {a.dtype for a in arrays} != {first.dtype}:
            return None
        flat = all(a.ndim == 1 for a in arrays)
        if not flat and {a.shape for a in arrays} != {first.shape}:
            return None
        lengths = np.array([a.size for a in arrays], np.int64)
        values = np.concatenate([a.reshape(-1) for a in arrays])
        starts = np.cumsum(lengths) - lengths
        # A text's mask is ones and its token types are zeros: a third is left to send.
        if flat and first.dtype.kind in "biu" and len(values) and (values == values[0]).all():
            values = values[0].reshape(())
        return cls(values, starts, lengths, None if flat else first.shape)

    @classmethod
    def join(cls, columns: Sequence[Column]) -> Column | None:
        """Several as one; None where they differ in dtype or shape."""
        first = columns[0]
        if len(columns) == 1:
            return first
        if any(c.shape != first.shape or c.values.dtype != first.values.dtype for c in columns):
            return None
        lengths = np.concatenate([c.lengths for c in columns])
        if all(c.values.ndim == 0 and c.values == first.values for c in columns):
            return cls(first.values, np.concatenate([c.starts for c in columns]), lengths, first.shape)
        columns = [c if c.values.ndim else c._written_out() for c in columns]
        sizes = np.array([len(c.values) for c in columns])
        offsets = np.cumsum(sizes) - sizes
        starts = np.concatenate([c.starts + offset for c, offset in zip(columns, offsets, strict=True)])
        return cls(np.concatenate([c.values for c in columns]), starts, lengths, first.shape)

    def _written_out(self) -> Column:
        return Column(
            np.full(int(self.lengths.sum()), self.values), np.cumsum(self.lengths) - self.lengths, self.lengths
        )


class Samples(Sequence[Sample]):
    """Samples that differ in their arrays and lengths alone, as columns.

    columns  arrays by name
    lengths  int64 [n]: `Sample.length` of each; `modality`, `group` and `cost` are those of all
    """

    __slots__ = ("columns", "cost", "group", "lengths", "modality")

    def __init__(
        self,
        modality: Modality,
        columns: dict[str, Column],
        lengths: np.ndarray,
        group: Hashable = (),
        cost: int = 1,
    ) -> None:
        self.modality, self.columns, self.lengths = modality, columns, lengths
        self.group, self.cost = group, cost

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.take(index)
        arrays = {name: column[index] for name, column in self.columns.items()}
        return Sample(self.modality, arrays, int(self.lengths[index]), self.group, self.cost)

    def __iter__(self) -> Iterator[Sample]:
        modality, names, group, cost = self.modality, list(self.columns), self.group, self.cost
        rows = zip(self.lengths.tolist(), *self.columns.values(), strict=True)
        for length, *arrays in rows:
            yield Sample(modality, dict(zip(names, arrays, strict=True)), length, group, cost)

    def take(self, which: np.ndarray | slice) -> Samples:
        """Some of them, in that order."""
        columns = {name: column.take(which) for name, column in self.columns.items()}
        return Samples(self.modality, columns, self.lengths[which], self.group, self.cost)

    def longest_first(self) -> np.ndarray:
        """In which order; equally long ones stay in theirs."""
        return np.argsort(-self.lengths, kind="stable")

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]: bytes of the arrays of each."""
        none = np.zeros_like(self.lengths)
        return sum([c.lengths * c.values.dtype.itemsize for c in self.columns.values()], none)

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Samples | None:
        """As columns; None where they cannot be."""
        first = samples[0]
        names, kind = first.arrays.keys(), (first.modality, first.group, first.cost)
        if not all(s.arrays.keys() == names and (s.modality, s.group, s.cost) == kind for s in samples):
            return None
        columns: dict[str, Column] = {}
        for name in names:
            if (column := Column.of([s.arrays[name] for s in samples])) is None:
                return None
            for other in columns.values():
                if other.shape == column.shape and np.array_equal(other.lengths, column.lengths):
                    # One array for both: it is pickled once.
                    column.starts, column.lengths = other.starts, other.lengths
            columns[name] = column
        lengths = np.array([s.length for s in samples], np.int64)
        return cls(first.modality, columns, lengths, first.group, first.cost)

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples | None:
        """Several as one; None where they are not of one kind."""
        first = parts[0]
        if len(parts) == 1:
            return first
        kind = first.modality, first.columns.keys(), first.group, first.cost
        if any((p.modality, p.columns.keys(), p.group, p.cost) != kind for p in parts):
            return None
        columns: dict[str, Column] = {}
        for name in first.columns:
            if (column := Column.join([part.columns[name] for part in parts])) is None:
                return None
            columns[name] = column
        return cls(first.modality, columns, np.concatenate([p.lengths for p in parts]), first.group, first.cost)


class Packed(Sequence[tuple[Sample, ...]]):
    """The outcomes of records with one Sample each (see mmcli.core.records.Decoded), all of one kind."""

    __slots__ = ("samples",)

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> tuple[Sample, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> Packed: ...

    def __getitem__(self, index: int | slice) -> tuple[Sample, ...] | Packed:
        return Packed(self.samples[index]) if isinstance(index, slice) else (self.samples[index],)

    def __iter__(self) -> Iterator[tuple[Sample, ...]]:
        return zip(self.samples)
