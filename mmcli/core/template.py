"""Texts with columns as variables: `a photo of {kind}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from mmcli.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Template:
    """A text whose variables are columns. A name is all that a variable can be: no attribute, index or format.

    parts  (text, the column whose value comes behind it or None)
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """`{title}` is the value of the column title; `{{` and `}}` are braces. Raises ConfigError."""
        parts = []
        try:
            for literal, name, form, conversion in Formatter().parse(text):
                if name is not None and (form or conversion or not name or name != name.strip()):
                    raise ValueError(f"{{{name}}} is no column's name alone" if name else "{} names no column")
                parts.append((literal, name))
        except ValueError as error:
            raise ConfigError(
                f"prompt {text!r}: {error}; a column is {{title}}, a brace itself is written twice: {{{{ or }}}}"
            ) from error
        return cls(tuple(parts))

    @classmethod
    def literal(cls, text: str) -> Template:
        """The text as it is, braces too."""
        return cls(((text, None),))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def render(self, values: Mapping[str, Any]) -> str:
        """The text with the values of its columns. Raises KeyError for a column without a value."""
        return "".join(text + (_shown(values[name]) if name is not None else "") for text, name in self.parts)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
