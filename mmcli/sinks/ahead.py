"""The finished file of a run, put together while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from mmcli.sinks.parquet import Assembly, ParquetFormat


class Ahead:
    """Copies parts into the finished file as they are committed, in a thread of its own.

    It only saves time at the end, and holds nothing that the parts do not: where anything fails, what is there is
    thrown away, and the file is made of the parts.
    """

    def __init__(self, made: ParquetFormat, target: Path, schema: pa.Schema) -> None:
        self._format, self._target, self._schema = made, target, schema
        self._assembly: Assembly | None = None
        self._added: list[Path] = []
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="mmcli-ahead")

    def add(self, part: Path) -> None:
        """The next part is there."""
        if self._thread is not None:
            self._thread.submit(self._add, part)

    def take(self, parts: Sequence[Path], schema: pa.Schema, target: Path) -> int | None:
        """Finish it as the file `target`, with the metadata of `schema`; returns its rows.

        None when it does not hold these parts.
        """
        if self._thread is not None:
            self._thread.shutdown()
        if self._assembly is None or self._added != list(parts):
            self.discard()
            return None
        try:
            rows = self._assembly.finish(schema)
            self._target.replace(target)
        except Exception:  # noqa: BLE001 - it is tried from the parts, and told there
            self.discard()
            return None
        self._assembly = None
        return rows

    def discard(self) -> bool:
        """Throw it away, and begin no other. Returns whether there was anything, which is so once.

        Also where the thread has thrown it away by itself: on a full disk it fails as the commit beside it does.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return False
        thread.shutdown(cancel_futures=True)
        self._drop()
        return bool(self._added)

    def _drop(self) -> None:
        assembly, self._assembly = self._assembly, None
        if assembly is not None:
            with suppress(OSError):
                assembly.discard()

    def _add(self, part: Path) -> None:
        if self._added and self._assembly is None:
            # One before has failed.
            return
        self._added.append(part)
        try:
            if self._assembly is None:
                self._assembly = self._format.assembly(self._target, self._schema)
            self._assembly.add([part])
            # At the end there would be more to wait for: of a fast run on a large machine half a minute's writing.
            self._assembly.sync()
        except Exception:  # noqa: BLE001 - as above
            self._drop()
