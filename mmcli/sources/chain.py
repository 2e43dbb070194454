"""Several sources as one, rows numbered throughout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import cast

from mmcli.core.protocols import Snapshot, Source
from mmcli.core.records import Modality, Record
from mmcli.core.texts import TextRecords, blocks_of
from mmcli.sources.snapshot import ResolvedInputs, add_counts, combine


class ChainedSource:
    """One source after the other; all have the same slots and passthrough columns."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.slots = sources[0].slots
        self.keep = sources[0].keep
        self._rows: list[int] | None = None

    def snapshot(self, folder: Path) -> Snapshot:
        """Each source lists into a folder of its own below `folder`."""
        found = [s.snapshot(folder / f"input-{i:06d}") for i, s in enumerate(self.sources)]
        # Only a lone stdin list is live.
        self._rows = rows = [cast(int, f.rows) for f in found]
        counts: Counter[Modality | None] = Counter()
        for one in found:
            add_counts(counts, one.modalities)
        digest = combine([f.digest for f in found])
        notes = list(dict.fromkeys(note for f in found for note in f.notes))
        return ResolvedInputs(sum(rows), digest, dict(counts), notes)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from row `start` of all on. Raises RuntimeError when there is no snapshot."""
        return chain.from_iterable(self.blocks(start))

    def blocks(self, start: int = 0) -> Iterator[Sequence[Record]]:
        """As `records`, some at a time (see Source.blocks)."""
        if self._rows is None:
            raise RuntimeError("call snapshot() before records()")
        first = 0
        for source, rows in zip(self.sources, self._rows, strict=True):
            if start < first + rows:
                for block in blocks_of(source, max(0, start - first)):
                    if isinstance(block, TextRecords):
                        block.first += first
                    else:
                        for record in block:
                            record.row += first
                    yield block
            first += rows
