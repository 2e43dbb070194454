"""One run at a time per output."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from mmcli.core.durable import make_folder, output_errors
from mmcli.core.errors import OutputError, TryAgain

# How long a run waits for a winner that is just removing its staging folder.
PATIENCE_S = 0.5


class Lock:
    """An exclusive flock on a file `lock` in the last of `folders`, which are created where needed.

    The system gives it back when the process dies, however it dies.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self.path = folders[-1] / "lock"
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises TryAgain within a second when another run holds it; OutputError when a folder cannot be made.
        """
        deadline = time.monotonic() + PATIENCE_S
        with output_errors(self.path.parent):
            while not self._try():
                if time.monotonic() > deadline:
                    raise TryAgain(
                        f"another run writes this output: {self._holder()}",
                        hint="wait for it to end; if it is stuck, stop it, and give the same command again",
                    )
                time.sleep(0.02)

    def _try(self) -> bool:
        try:
            for folder in self._folders:
                make_folder(folder)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if self._folders[0].parent.is_dir():
                return False  # a folder was removed by a finishing winner between two lines
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A finishing winner removes the lock file: then this is a lock on a file that nobody else sees.
            if os.fstat(descriptor).st_ino != os.stat(self.path).st_ino:
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise OutputError(
                    f"{self.path.parent} is on a file system without locks, so two runs could spoil each other",
                    hint="write to a local disk",
                ) from error
            raise
        self._descriptor = descriptor
        self._sign()
        return True

    def _sign(self) -> None:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def _holder(self) -> str:
        return holder(self.path) or "it does not say who it is"

    @property
    def held(self) -> bool:
        return self._descriptor >= 0

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        # Forgotten first: a signal that comes while it is closed ends in another release.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def holder(path: Path) -> str | None:
    """Who signed the lock file: `process 12 on host, since 2026-01-01T00:00:00+00:00`."""
    try:
        who = json.loads(path.read_bytes())
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
