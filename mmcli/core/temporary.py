"""Temporary folders that other processes of a run may read, too: they stay until the main process ends."""

from __future__ import annotations

import atexit
import os
from pathlib import Path

_folders: list[tuple[int, Path]] = []


def temporary_folder(name: str) -> Path:
    """A new folder, removed when this process ends; not by the children that are forked from it."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix=f"mmcli-{name}-"))
    _folders.append((os.getpid(), folder))
    return folder


@atexit.register
def remove_temporary() -> None:
    """Remove them; for who ends without Python's own exit."""
    if _folders:
        import shutil

        while _folders:
            process, folder = _folders.pop()
            if process == os.getpid():
                shutil.rmtree(folder, ignore_errors=True)
