"""File names as text, and the patterns that choose among them."""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAGIC = re.compile(r"[*?[]")


def shown(path: str | bytes) -> str:
    r"""A path as text for ids and the `path` column: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_url(text: str) -> bool:
    """Whether `text` names something by a URL scheme."""
    return _URL.match(text) is not None


def has_wildcard(text: str) -> bool:
    return _MAGIC.search(text) is not None


def split_pattern(pattern: str) -> tuple[str, str]:
    """`a/b/*.jpg` -> ("a/b", "*.jpg"): the folder without wildcards ("" is the current one), and the rest."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if has_wildcard(part))
    folder = "/".join(parts[:first])
    return (folder or "/") if first and pattern.startswith("/") else folder, "/".join(parts[first:])


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A shell pattern over a whole relative path: `*` and `?` stay within a folder, `**` crosses folders."""
    parts = pattern.split("/")
    translated = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            translated.append(".*" if last else "(?:.*/)?")
        else:
            translated.append(_translate(part) + ("" if last else "/"))
    return re.compile("".join(translated), re.DOTALL)


def compile_glob(pattern: str) -> re.Pattern[str]:
    """`--glob`: without a slash it matches the file's name, in whatever folder; else the relative path."""
    return compile_pattern(pattern if "/" in pattern else "**/" + pattern)


def _translate(part: str) -> str:
    out, at = [], 0
    while at < len(part):
        char = part[at]
        at += 1
        end = part.find("]", at + 1 + (part[at : at + 1] in ("!", "^"))) if char == "[" else -1
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif end > 0:
            body = part[at:end].replace("\\", r"\\").replace("[", r"\[")
            negated = body[0] in "!^"
            out.append(f"[{'^' if negated else ''}{body[1:] if negated else body}]")
            at = end + 1
        else:
            out.append(re.escape(char))
    return "".join(out)
