"""Before the first step: is every row readable, and is nothing in both the training and the validation rows?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from mmcli.cli.messages import Messages
from mmcli.core.errors import ConfigError, RowError
from mmcli.core.protocols import ModelPlan
from mmcli.core.records import Record, Sample

_NAMED = 3
_BLOCK = 16


@dataclass(slots=True)
class Preflight:
    """Reads rows as training will, in processes that may die."""

    plan: ModelPlan
    num_workers: int
    timeout_s: float
    messages: Messages

    def check(self, listed: dict[str, list[Record]], *, read: bool, policy: str) -> dict[str, dict[int, Record]]:
        """The rows to use of each list, by their number, as they are to be used.

        policy  of rows that cannot be read: "error"; "drop" leaves them out; "mask" takes those of their media that
                can be read, and leaves out rows that have none
        Raises ConfigError for what cannot be read under "error", and for lists and modalities without a row.
        """
        failed = self._read(listed) if read else {what: _known(records) for what, records in listed.items()}
        masked = self._mask(listed, failed) if policy == "mask" else {}
        problems = []
        for what, errors in failed.items():
            if errors and policy == "error":
                also = ", mask takes their other media" if getattr(self.plan, "missing", False) else ""
                problems.append(
                    f"{what}: {_described(listed[what], errors)} cannot be read; "
                    f"--missing-policy drop leaves such rows out{also}"
                )
            elif errors:
                rows = f"{len(errors)} rows that cannot be read" if len(errors) > 1 else "1 row that cannot be read"
                self.messages.note(f"{what}: left out {rows}: {_described(listed[what], errors)}")
            if policy != "error" and len(errors) == len(listed[what]):
                problems.append(f"{what}: no row can be read")
        if problems:
            raise ConfigError(problems)
        used = {
            what: {n: masked.get((what, n), one) for n, one in enumerate(records) if n not in failed[what]}
            for what, records in listed.items()
        }
        self._count_missing(used)
        self.tell_leaks(listed)
        return used

    def _read(self, listed: dict[str, list[Record]]) -> dict[str, dict[int, RowError]]:
        cut = 0
        texts = getattr(getattr(self.plan, "inputs", None), "text", None)
        limit = None if texts is None or texts.padding == "max_length" else texts.max_length
        self.messages.note(f"reading {sum(map(len, listed.values())):,} rows once, before the first step")
        failed: dict[str, dict[int, RowError]] = {what: _known(records) for what, records in listed.items()}
        where = {id(record): (what, n) for what, records in listed.items() for n, record in enumerate(records)}
        for record, outcomes in self._decoded([one for one in chain(*listed.values()) if one.error is None]):
            for outcome in outcomes:
                if isinstance(outcome, RowError):
                    what, number = where[id(record)]
                    failed[what][number] = outcome
                elif outcome.modality == "text" and limit and outcome.length >= limit:
                    cut += 1
        if cut:
            self.messages.note(
                f"{cut} texts fill all {limit} tokens that the model takes; what is behind them is cut"
            )
        return failed

    def _decoded(self, records: Sequence[Record]) -> Iterator[tuple[Record, Sequence[Sample | RowError]]]:
        """Each record with what its media are decoded to."""
        from mmcli.media.pool import DecodePool, InlineDecoder

        decoder = (
            DecodePool(self.plan, self.plan.decode, self.num_workers, self.timeout_s)
            if self.num_workers
            else InlineDecoder(self.plan, self.plan.decode)
        )
        blocks = (list(records[at : at + _BLOCK]) for at in range(0, len(records), _BLOCK))
        try:
            for decoded in decoder.run(blocks, lambda: True):
                yield from zip(decoded.records, decoded.outcomes, strict=True)
        finally:
            decoder.close()

    def _mask(
        self, listed: dict[str, list[Record]], failed: dict[str, dict[int, RowError]]
    ) -> dict[tuple[str, int], Record]:
        """Rows without those of their media that cannot be read, which are `failed` no more where any is left.

        Each medium of a failed row is read alone: so it is known which of them killed a worker, or timed out.
        """
        from mmcli.training.data import each_alone, masked

        alone: dict[int, tuple[str, int, int]] = {}
        tried = []
        for what, errors in failed.items():
            for n in errors:
                for place, media in each_alone(listed[what][n].media):
                    tried.append(replace(listed[what][n], media=media))
                    alone[id(tried[-1])] = what, n, place
        lost: dict[tuple[str, int], dict[int, RowError]] = {}
        for record, outcomes in self._decoded(tried) if tried else ():
            what, n, place = alone[id(record)]
            if (error := next((one for one in outcomes if isinstance(one, RowError)), None)) is not None:
                lost.setdefault((what, n), {})[place] = error
        found: dict[tuple[str, int], Record] = {}
        for (what, n), errors in lost.items():
            record = listed[what][n]
            media = masked(record.media, errors)
            if any(not one.missing for one in media):
                found[what, n] = replace(record, media=media)
                del failed[what][n]
        self._tell_masked(listed, {where: lost[where] for where in found})
        return found

    def _tell_masked(
        self, listed: dict[str, list[Record]], lost: dict[tuple[str, int], dict[int, RowError]]
    ) -> None:
        for what, records in listed.items():
            named = [
                f"{records[n].media[place].modality} of {records[n].id} ({error.code}: {error.message})"
                for (where, n), errors in lost.items()
                if where == what
                for place, error in errors.items()
            ]
            if named:
                more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
                shown = ", ".join(named[:_NAMED])
                self.messages.note(f"{what}: {len(named)} media cannot be read and count as missing: {shown}{more}")

    def _count_missing(self, used: dict[str, dict[int, Record]]) -> None:
        """Tell how many rows lack what. Raises ConfigError for a modality that no training row has."""
        for what, records in used.items():
            lacking = Counter(
                str(one.modality) for record in records.values() for one in record.media if one.missing
            )
            if lacking:
                counts = ", ".join(f"{count:,} have no {modality}" for modality, count in lacking.items())
                self.messages.note(f"{what}: of {len(records):,} rows, {counts}")
            if what == "INPUT" and (none := [name for name, count in lacking.items() if count == len(records)]):
                raise ConfigError(
                    f"{what}: no row has {' or '.join(none)}; leave out --encoder {none[0]}=... and its column"
                )

    def tell_leaks(self, listed: dict[str, list[Record]]) -> None:
        """Say which files are, byte for byte, in both lists: then validation measures what was learned by heart."""
        train, val = listed.values()
        sizes = {media.size for record in train for media in record.media if media.size}
        suspects = [record for record in val if any(media.size in sizes for media in record.media)]
        if not suspects:
            return
        wanted = {media.size for record in suspects for media in record.media}
        seen = {digest for record in train for digest in _digests(record, wanted)}
        both = [record.id for record in suspects if any(digest in seen for digest in _digests(record, wanted))]
        if both:
            shown = ", ".join(both[:_NAMED]) + (f" and {len(both) - _NAMED} more" if len(both) > _NAMED else "")
            self.messages.note(
                f"{len(both)} validation rows are training rows, too, byte for byte: {shown}; what is measured on "
                "them says nothing about new ones"
            )


def _digests(record: Record, sizes: set[int | None]) -> Iterator[bytes]:
    for media in record.media:
        if media.file is not None and media.size in sizes:
            try:
                yield blake2b(Path(media.file).read_bytes(), digest_size=16).digest()
            except OSError:
                continue


def _known(records: Sequence[Record]) -> dict[int, RowError]:
    return {number: record.error for number, record in enumerate(records) if record.error is not None}


def _described(records: Sequence[Record], errors: dict[int, RowError]) -> str:
    shown = [f"{records[n].id} ({e.code}: {e.message})" for n, e in list(errors.items())[:_NAMED]]
    more = f" and {len(errors) - _NAMED} more rows" if len(errors) > _NAMED else ""
    return ", ".join(shown) + more
