"""Option strings -> values. Each raises ConfigError that names the option, the value and what would do."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from typing import TypeVar

from mmcli.core.errors import ConfigError

T = TypeVar("T")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Problems:
    """Collects configuration errors, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.hint: str | None = None

    def collect(self, function: Callable[..., T], *arguments: object) -> T | None:
        """The function's value, or None when it raised a ConfigError, whose problems are kept."""
        try:
            return function(*arguments)
        except ConfigError as error:
            self.lines += error.problems
            self.hint = self.hint or error.hint
            return None

    def add(self, line: str) -> None:
        self.lines.append(line)

    def check(self) -> None:
        """Raise all that was collected."""
        if self.lines:
            raise ConfigError(list(dict.fromkeys(self.lines)), hint=self.hint)


def duration(option: str, text: str) -> float:
    """`90`, `90s`, `1.5m`, `8h` -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r} is not a time; type e.g. 90s, 30m or 8h")
    return float(match[1]) * _UNITS[match[2]]


def count_or_auto(option: str, text: str, minimum: int) -> int | None:
    """`auto` -> None, `12` -> 12."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise ConfigError(f"{option} {text!r} is neither auto nor a number from {minimum} up")
    return int(text)


def number(option: str, text: str, minimum: int) -> int:
    """A whole number from `minimum` up."""
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise ConfigError(f"{option} {text!r} is not a number from {minimum} up")
    return int(text)


def decimal(option: str, text: str) -> float:
    """A finite number from 0 up, as in 0.7."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{option} {text!r} is not a number from 0 up, such as 0.7")
    return value


def share(option: str, text: str) -> float:
    """A number from 0 to 1, as in 0.5."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{option} {text!r} is not a number from 0 to 1, such as 0.5")
    return value


def choice(option: str, text: str, choices: tuple[str, ...]) -> str:
    """`text`, when it is one of `choices`."""
    if text not in choices:
        near = difflib.get_close_matches(text, choices, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{option} {text!r} is not one of {', '.join(choices)}{meant}")
    return text


def max_errors(option: str, text: str | None) -> tuple[int | None, float | None]:
    """`10` -> (10, None), `2.5%` -> (None, 2.5)"""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text.strip())
    if match is None:
        raise ConfigError(f"{option} {text!r} is neither a number nor a share; type e.g. 10 or 1%")
    return (int(match[1]), None) if match[1] else (None, float(match[2]))


def split_names(values: list[str] | None) -> tuple[str, ...]:
    """`["a,b", "c"]` -> `("a", "b", "c")`"""
    return tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
