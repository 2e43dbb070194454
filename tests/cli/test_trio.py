"""torch, torchvision and torchaudio that do not fit one another are named in one line, with the fix."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import COMMAND

RUN = "import sys; from mmcli.cli.boundary import guard; from mmcli.cli.trio import check_torch_trio as c\n"
RUN += "sys.exit(guard(lambda: c() or 0).exit_code)"


def installed(folder: Path, torch: str, torchvision: str, torchaudio: str) -> dict[str, str]:
    """An environment in which these seem to be installed."""
    for name, number in (("torch", torch), ("torchvision", torchvision), ("torchaudio", torchaudio)):
        info = folder / f"{name}-{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "versions",
    [
        ("2.11.0", "0.26.0", "2.11.0"),
        ("2.12.1", "0.27.1", "2.11.0"),
        ("2.12.1+cpu", "0.27.1+cpu", "2.11.0+cpu"),
        ("2.12.1+cu130", "0.27.1", "2.11.0"),
        ("2.99.0", "0.99.0", "2.99.0"),
    ],
)
def test_fitting(tmp_path: Path, versions: tuple[str, str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", RUN], env=installed(tmp_path, *versions), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("versions", "fix"),
    [
        (("2.12.1", "0.26.0", "2.11.0"), '"torch==2.12.*" "torchvision==0.27.*" "torchaudio==2.11.*"\n'),
        (("2.11.0", "0.27.1", "2.11.0"), '"torch==2.11.*" "torchvision==0.26.*" "torchaudio==2.11.*"\n'),
        (("2.11.0", "0.26.0", "2.10.0"), '"torchaudio==2.11.*"\n'),
        (("2.12.1+cpu", "0.27.1", "2.11.0"), "--index-url https://download.pytorch.org/whl/cpu\n"),
        (("2.12.1", "0.27.1+cpu", "2.11.0+cpu"), '"torchaudio==2.11.*"\n'),
    ],
)
def test_not_fitting(tmp_path: Path, versions: tuple[str, str, str], fix: str) -> None:
    if any("+cpu" in v for v in versions) and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("builds are told apart on x86-64 only")
    done = subprocess.run([sys.executable, "-c", RUN], env=installed(tmp_path, *versions), capture_output=True)
    assert done.returncode == 7
    said = done.stderr.decode()
    assert said.startswith(
        f"mmcli: error: these do not work together: torch {versions[0]}, torchvision {versions[1]}, "
        f"torchaudio {versions[2]}\n  try: python -m pip install "
    )
    assert said.endswith(fix)


def test_before_a_model_is_loaded(tmp_path: Path, sample_data: Path) -> None:
    """The command says so, and does not get as far as importing torch."""
    environment = installed(tmp_path / "site", "2.12.1", "0.26.0", "2.11.0")
    command = [*COMMAND, "embed", str(sample_data / "texts"), "-m", str(sample_data / "models" / "clip")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 7
    assert b"these do not work together" in done.stderr
