"""Inputs that wait for the model take open files: all that the system allows, and a clear end behind these."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Ended, finished
from PIL import Image

COUNT = 120


def run(tmp_path: Path, soft: int, hard: int) -> Ended:
    """Pictures that are a block each, all of which wait for one batch, with so many open files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.zeros((900, 900, 3), np.uint8)).save(folder / "0.bmp")
    for number in range(1, COUNT):
        (folder / f"{number}.bmp").hardlink_to(folder / "0.bmp")
    given = ("embed", folder, "-m", "fake:5000", "--batch-size", 200, "--num-workers", 2)
    given += ("-o", tmp_path / "out.parquet")
    limits = (soft, hard)
    return finished(*given, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="from Python 3.13 on they take no open files")
def test_too_few_open_files_end_the_run_with_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, 64, 64)
    assert done.code == 7, done.err
    assert "no room for more decoded inputs: Too many open files" in done.err
    assert "ulimit -n" in done.err


def test_the_limit_is_raised_where_it_can_be(tmp_path: Path) -> None:
    done = run(tmp_path, 64, 4096)
    assert done.code == 0, done.err
    assert f"{COUNT} rows, {COUNT} ok" in done.err
