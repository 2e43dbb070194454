"""Settings that heavy libraries read when they are imported, in one place; what the user has set stays."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

# PASSIVE keeps two users of OpenMP (torch, and a resampler) from spinning on each other's cores.
DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# What keeps libraries from talking on stderr, which is for our lines; --debug leaves it out.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def prepare_environment(*, offline: bool, debug: bool, log_file: Path | None) -> None:
    """Call before torch, transformers or the hub's library is imported. Decode processes inherit it."""
    for name, value in {**DEFAULTS, **({} if debug else QUIET)}.items():
        os.environ.setdefault(name, value)
    if offline:
        # Asked for in words on the command line: stronger than a variable that says otherwise.
        os.environ["HF_HUB_OFFLINE"] = "1"
    _route_logging(debug, log_file)


def _route_logging(debug: bool, log_file: Path | None) -> None:
    """Python's warnings and log records go to --log-file, with --debug to stderr, else nowhere."""
    root = logging.getLogger()
    for old in [h for h in root.handlers if getattr(h, "of_mmcli", False)]:
        root.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if debug:
        handlers.append(logging.StreamHandler())
    if log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", delay=True))
    for handler in handlers:
        handler.of_mmcli = True  # type: ignore[attr-defined]
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        root.addHandler(handler)
    if debug or log_file is not None:
        warnings.simplefilter("default")
        logging.captureWarnings(True)
    else:
        warnings.simplefilter("ignore")
