"""Signals at moments that are no good ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import time
from mmcli.cli.signals import Signals
from mmcli.core.errors import Stopped

signals = Signals()
with signals.catching():
    try:
        with signals.heard():
            import torch
            time.sleep(30)
    except Stopped as stopped:
        print(torch.whole, int(stopped.exit_code))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_while_torch_is_imported_waits_for_its_end(tmp_path: Path, number: signal.Signals) -> None:
    """Its C++ calls Python there: an exception would end the process with an abort."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(number)})\nwhole = True\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout) == (0, f"True {128 + number}\n"), done.stderr
