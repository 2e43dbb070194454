"""JSONL on stdout: rows in order as they are finished, no resume."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa

from mmcli.core.errors import ExitCode, OutputError, Stopped
from mmcli.sinks.jsonl import json_lines
from mmcli.sinks.parquet import READ_ROWS


class StreamOutput:
    """Writes rows to a binary stream (stdout) and flushes after every batch."""

    immediate = True

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def commit(self, table: pa.Table, start_row: int, signatures: Sequence[bytes | None]) -> None:
        """Write the rows. Raises Stopped (exit 141) when the reader has gone, OutputError for other failures."""
        try:
            for batch in table.to_batches(READ_ROWS):
                self._stream.write(json_lines(batch))
            self._stream.flush()
        except BrokenPipeError:
            self._discard_rest()
            raise Stopped("the reader of stdout has gone", ExitCode.BROKEN_PIPE) from None
        except OSError as error:
            self._discard_rest()
            reason = os.strerror(error.errno) if error.errno else str(error)
            hint = "free some space and start again" if error.errno == errno.ENOSPC else None
            raise OutputError(f"cannot write to stdout: {reason}", hint=hint) from error

    def _discard_rest(self) -> None:
        # Python flushes stdout again at exit, and would print a traceback and exit with 120.
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            return
