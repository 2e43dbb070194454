"""Parameters that are tried in the long run alone: `python -m pytest -m slow`.

What each family of models gives is compared with its reference every time. What is built on that, and goes one way
for all of them, is tried with a kind of each every time, and with all in the long run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def rarely(values: Iterable[Any], often: Callable[[Any], bool] = lambda _: False) -> list[Any]:
    """Values for `pytest.mark.parametrize`: those that are not needed `often` are slow ones."""
    return [value if often(value) else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    several = value if isinstance(value, tuple) else (value,)
    return pytest.param(*several, marks=pytest.mark.slow)
