"""Texts with times, as Whisper writes them: `<|0.40|> two words<|1.20|><|1.20|> more<|2.00|>`.

A timestamp stands before and behind each segment (Radford et al. 2023, "Robust Speech Recognition via Large-Scale
Weak Supervision", 2.3); of a segment that the end of the window cuts off only the one before, at the text's end.
`<|0.00|>` alone is silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_TIME = re.compile(r"<\|(\d+\.\d\d)\|>")


def has_times(text: str) -> bool:
    """Whether there is a timestamp."""
    return _TIME.search(text) is not None


def without_times(text: str) -> str:
    """The words alone."""
    return " ".join(_TIME.sub(" ", text).split())


def split_times(text: str) -> list[tuple[float, str]]:
    """Each timestamp in seconds, with the words up to the next.

    Raises ValueError for words without a time on both sides, and times that fall.
    """
    before, *parts = _TIME.split(text)
    found = [(float(time), words.strip()) for time, words in zip(parts[::2], parts[1::2], strict=True)]
    if before.strip():
        raise ValueError("words stand before the first time")
    if any(later < time for (time, _), (later, _) in pairwise(found)):
        raise ValueError("a time is earlier than the one before")
    if found and found[-1][1]:
        raise ValueError("words have no time behind")
    return found


def joined_segments(cell: Sequence[Any]) -> str | None:
    """One text of {start, end, text}, as `mmcli caption` gives them, times in seconds; None of anything else."""
    if not cell or not all(isinstance(one, dict) and {"start", "end", "text"} <= one.keys() for one in cell):
        return None
    try:
        return "".join(f"<|{one['start']:.2f}|> {one['text'].strip()}<|{one['end']:.2f}|>" for one in cell)
    except (TypeError, ValueError, AttributeError):
        return None
