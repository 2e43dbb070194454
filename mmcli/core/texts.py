"""Records of one inline text each as columns: no objects for each row on its way to the workers and the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any, overload

from mmcli.core.records import Media, Modality, Record
from mmcli.core.signature import SIGNATURE_BYTES, signature

# Of a source that has them one by one.
BLOCK_ROWS = 256


class TextRecords(Sequence[Record]):
    """Consecutive records, without errors and paths. One that is looked at is made then: a change to it is lost.

    first       row of the first one
    ids, texts  of each
    modality    of all
    keep        one column for each passthrough column; variables: likewise
    signatures  of all, SIGNATURE_BYTES each, one behind the other; None: not known yet
    """

    __slots__ = ("first", "ids", "keep", "modality", "signatures", "texts", "variables")

    def __init__(
        self,
        first: int,
        ids: Sequence[str],
        texts: Sequence[str],
        modality: Modality | None,
        keep: Sequence[Sequence[Any]] = (),
        variables: Sequence[Sequence[Any]] = (),
        signatures: bytes | None = None,
    ) -> None:
        self.first, self.ids, self.texts, self.modality = first, ids, texts, modality
        self.keep, self.variables, self.signatures = keep, variables, signatures

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> TextRecords: ...

    def __getitem__(self, index: int | slice) -> Record | TextRecords:
        if isinstance(index, slice):
            return self._part(*index.indices(len(self))[:2])
        at = range(len(self))[index]
        return next(iter(self._part(at, at + 1)))

    def _part(self, start: int, stop: int) -> TextRecords:
        keep, variables = ([c[start:stop] for c in columns] for columns in (self.keep, self.variables))
        known = self.signatures
        if known is not None:
            known = known[SIGNATURE_BYTES * start : SIGNATURE_BYTES * stop]
        ids, texts = self.ids[start:stop], self.texts[start:stop]
        return TextRecords(self.first + start, ids, texts, self.modality, keep, variables, known)

    def __iter__(self) -> Iterator[Record]:
        modality = self.modality
        media = [(Media(modality, None, None, text),) for text in self.texts]
        rows = range(self.first, self.first + len(self))
        columns = (rows_of(one) or repeat(()) for one in (self.keep, self.variables))
        return map(Record, rows, self.ids, repeat(None), media, *columns, repeat(None), self.each_signature())

    def each_signature(self) -> list[bytes | None]:
        """Of each record; None where it is not known yet."""
        known, size = self.signatures, SIGNATURE_BYTES
        if known is None:
            return [None] * len(self)
        return [known[at : at + size] for at in range(0, len(known), size)]

    def sign(self) -> None:
        """Compute the signatures, where they are not known."""
        if self.signatures is None:
            self.signatures = b"".join([signature(record) or b"" for record in self])


def rows_of(columns: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]] | None:
    """Columns as a tuple for each row; None where there are no columns."""
    return list(zip(*columns, strict=True)) if columns else None


def joined(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """Consecutive records as one sequence; as columns where all parts are, and of one kind."""
    if len(parts) == 1:
        return parts[0]
    texts = [part for part in parts if isinstance(part, TextRecords)]
    if len(texts) < len(parts) or len({(t.modality, len(t.keep), len(t.variables)) for t in texts}) != 1:
        return list(chain.from_iterable(parts))
    signatures = [t.signatures for t in texts]
    keep, variables = (
        [list(chain.from_iterable(pieces)) for pieces in zip(*columns, strict=True)]
        for columns in ([t.keep for t in texts], [t.variables for t in texts])
    )
    return TextRecords(
        texts[0].first,
        list(chain.from_iterable([t.ids for t in texts])),
        list(chain.from_iterable([t.texts for t in texts])),
        texts[0].modality,
        keep,
        variables,
        None if None in signatures else b"".join(signatures),  # type: ignore[arg-type]
    )


def numbered(records: Sequence[Record], first: int) -> Sequence[Record]:
    """The same records as other rows: copies."""
    if isinstance(records, TextRecords):
        same = records[:]
        same.first = first
        return same
    return [
        Record(row, one.id, one.path, one.media, one.keep, one.variables, one.error)
        for row, one in enumerate(records, first)
    ]


def blocks_of(source: Any, start: int = 0) -> Iterator[Sequence[Record]]:
    """The records of a source (mmcli.core.protocols.Source), some at a time."""
    if hasattr(source, "blocks"):
        yield from source.blocks(start)
        return
    records = source.records(start)
    while block := list(islice(records, BLOCK_ROWS)):
        yield block


def signatures_of(records: Sequence[Record]) -> list[bytes | None]:
    """Of each record."""
    if isinstance(records, TextRecords):
        return records.each_signature()
    return [record.signature for record in records]
