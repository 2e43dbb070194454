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

    A table named like the command (`[embed]`) holds options of that command only; those of other commands are
    not looked at. Raises ConfigError with everything that is wrong, unknown keys with the nearest known one.
    """
    content = _load(path)
    commands = set(getattr(context.parent.command, "commands", {})) if context.parent is not None else set()
    own = content.pop(context.info_name or "", {})
    parameters = {p.name: p for p in context.command.params if p.name not in (None, "config", "help")}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in [*content.items(), *(own.items() if isinstance(own, dict) else [])]:
        name = key.replace("-", "_")
        if name in parameters:
            try:
                values[name] = _value(parameters[name], value)
            except ValueError as error:
                problems.append(f"--config {path}: {key} = {value!r} is not {error}")
        elif not (isinstance(value, dict) and key in commands):
            what = "table" if isinstance(value, dict) else "option"
            known = sorted(commands) if isinstance(value, dict) else list(parameters)
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            problems.append(f"--config {path}: unknown {what} {key}{meant}")
    if problems:
        raise ConfigError(problems)
    return values


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def _value(parameter: Any, value: Any) -> Any:
    """As the option wants it. Raises ValueError that says what it should be."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if getattr(parameter, "multiple", False) or parameter.nargs == -1:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError('a list of strings, as in ["a", "b"]')
        return values
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError('a string or a number, as in "auto" or 32')
    return str(value)
