"""The --config file: TOML whose keys are the long option names."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import typer

from mmcli.core.errors import ConfigError


def load_config(path: Path, context: typer.Context) -> dict[str, Any]:
    """Defaults for a command's options, from a TOML file with keys such as `batch-size` or `batch_size`.

    A table named like the command (`[embed]`) holds options of that command only.
    Raises ConfigError with all unknown keys at once, each with the nearest known one.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    content.update(content.pop(context.info_name or "", {}))
    known = {p.name for p in context.command.params if p.name}
    values, problems = {}, []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in known:
            values[name] = value
        elif not isinstance(value, dict):
            near = difflib.get_close_matches(name, known, 1)
            suggestion = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            problems.append(f"--config {path}: unknown option {key!r}{suggestion}")
    if problems:
        raise ConfigError(problems)
    return values
