"""What becomes of errors and signals while something is written."""

from __future__ import annotations

import errno
import os

import pytest

from mmcli.core.durable import output_errors
from mmcli.core.errors import OutputError


def test_a_descriptor_that_is_closed_again_because_of_a_signal_is_no_failure_to_write() -> None:
    def interrupted() -> None:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        try:
            os.close(descriptor)
            raise KeyboardInterrupt
        finally:
            os.close(descriptor)

    with pytest.raises(KeyboardInterrupt), output_errors("out.parquet"):
        interrupted()


def test_a_full_disk_is_one_also_behind_a_signal() -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OutputError, match=r"out\.parquet: No space left"), output_errors("out.parquet"):
        interrupted()


def test_a_closed_descriptor_alone_is_told() -> None:
    with pytest.raises(OutputError, match="Bad file descriptor"), output_errors("out.parquet"):
        os.close(os.dup(0) + 1000)
