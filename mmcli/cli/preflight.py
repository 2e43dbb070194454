"""Before the first step: is every row readable, and is nothing in both the training and the validation rows?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from mmcli.cli.messages import Messages
from mmcli.core.errors import ConfigError, RowError
from mmcli.core.protocols import ModelPlan
from mmcli.core.records import Record

_NAMED = 3
_BLOCK = 16


@dataclass(slots=True)
class Preflight:
    """Reads rows as training will, in processes that may die."""

    plan: ModelPlan
    num_workers: int
    timeout_s: float
    messages: Messages

    def check(self, listed: dict[str, Sequence[Record]], *, read: bool, drop: bool) -> dict[str, list[int]]:
        """The rows to use of each list.

        Raises ConfigError for rows that cannot be read, unless they are to `drop`.
        """
        failed = self._read(listed) if read else {what: _known(records) for what, records in listed.items()}
        problems = []
        for what, errors in failed.items():
            if errors and not drop:
                problems.append(
                    f"{what}: {_described(listed[what], errors)} cannot be read; "
                    "--missing-policy drop leaves such rows out"
                )
            elif errors:
                self.messages.note(f"{what}: left out, since it cannot be read: {_described(listed[what], errors)}")
            if drop and len(errors) == len(listed[what]):
                problems.append(f"{what}: no row can be read")
        if problems:
            raise ConfigError(problems)
        used = {what: [n for n in range(len(records)) if n not in failed[what]] for what, records in listed.items()}
        self._tell_leaks(listed)
        return used

    def _read(self, listed: dict[str, Sequence[Record]]) -> dict[str, dict[int, RowError]]:
        from mmcli.media.pool import DecodePool, InlineDecoder

        names, cut = list(listed), 0
        texts = getattr(getattr(self.plan, "inputs", None), "text", None)
        limit = None if texts is None or texts.padding == "max_length" else texts.max_length
        self.messages.note(f"reading {sum(map(len, listed.values())):,} rows once, before the first step")
        rows = [(what, number, record) for what in names for number, record in enumerate(listed[what])]
        failed: dict[str, dict[int, RowError]] = {what: _known(listed[what]) for what in names}
        where = {id(record): (what, number) for what, number, record in rows}
        decoder = (
            DecodePool(self.plan, self.plan.decode, self.num_workers, self.timeout_s)
            if self.num_workers
            else InlineDecoder(self.plan, self.plan.decode)
        )
        good = [record for _, _, record in rows if record.error is None]
        blocks: Iterator[list[Record]] = (good[at : at + _BLOCK] for at in range(0, len(good), _BLOCK))
        try:
            for decoded in decoder.run(blocks, lambda: True):
                for record, outcomes in zip(decoded.records, decoded.outcomes, strict=True):
                    for outcome in outcomes:
                        if isinstance(outcome, RowError):
                            what, number = where[id(record)]
                            failed[what][number] = outcome
                        elif outcome.modality == "text" and limit and outcome.length >= limit:
                            cut += 1
        finally:
            decoder.close()
        if cut:
            self.messages.note(
                f"{cut} texts fill all {limit} tokens that the model takes; what is behind them is cut"
            )
        return failed

    def _tell_leaks(self, listed: dict[str, Sequence[Record]]) -> None:
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
