from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import Cli, Ended

from mmcli.cli.boundary import run

# The tiny checkpoints that tests of models are made with.
sys.path.append(str(Path(__file__).resolve().parent.parent / "models"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No option from outside, and nothing that a run sets stays. Decoding in this process: no 0.3 s of start-up."""
    for name in [n for n in os.environ if n.startswith("MMCLI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MMCLI_NUM_WORKERS", "0")
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of five texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number}")
    return folder
