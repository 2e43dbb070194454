"""The signature of a record changes with everything that determines its row, and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmcli.core.errors import RowError
from mmcli.core.records import Media, Record
from mmcli.core.signature import signature

FILE = Record(3, "a", "in/a.jpg", (Media(None, "in/a.jpg", size=5, mtime_ns=7),), (1, "x"))
INLINE = Record(0, "a", None, (Media("image", data=b"abc"), Media("text", text="é")))


def media(**changes: Any) -> tuple[Media, ...]:
    return (replace(FILE.media[0], **changes),)


@pytest.mark.parametrize(
    "other",
    [
        replace(FILE, id="b"),
        replace(FILE, path="in/b.jpg"),
        replace(FILE, keep=(1, "y")),
        replace(FILE, keep=("1", "x")),
        replace(FILE, keep=()),
        replace(FILE, media=media(file="in/b.jpg")),
        replace(FILE, media=media(size=6)),
        replace(FILE, media=media(mtime_ns=8)),
        replace(FILE, media=media(size=None, mtime_ns=None)),
        replace(FILE, media=media(modality="image")),
        replace(FILE, media=FILE.media * 2),
        INLINE,
    ],
)
def test_what_counts(other: Record) -> None:
    assert signature(other) != signature(FILE)


def test_what_does_not_count() -> None:
    assert signature(replace(FILE, row=9, signature=b"x")) == signature(FILE)
    assert len(signature(FILE) or b"") == 16


def test_inline_content() -> None:
    image, text = INLINE.media
    others = [
        (replace(image, data=b"abd"), text),
        (image, replace(text, text="e")),
        (replace(image, data=b"ab"), replace(text, text="cé")),
        (replace(image, data=None, text="abc"), text),
        (Media("image", data=b""), text),
    ]
    found = {signature(replace(INLINE, media=m)) for m in others}
    assert len(found) == len(others)
    assert signature(INLINE) not in found
    assert signature(INLINE, digest_inline=False) == signature(
        replace(INLINE, media=others[0]), digest_inline=False
    )


def test_error_records_have_none() -> None:
    assert signature(replace(FILE, media=(), error=RowError("bad_row", "x", "source"))) is None


def test_any_name() -> None:
    assert signature(replace(FILE, media=media(file="\udcff.jpg"), id="\ud800")) is not None


def test_vectors() -> None:
    """Every number counts, and so do their shape and type; a long one too."""
    vector = np.arange(6000, dtype=np.float32)
    last = vector.copy()
    last[-1] += 1
    zeros = np.zeros(4, np.float32)
    others = [vector, last, vector[:512], vector.reshape(2, -1), zeros, zeros[:3], zeros.astype(np.float64)]
    found = {signature(replace(FILE, variables=(one,))) for one in others}
    assert len(found) == len(others)
    assert signature(replace(FILE, variables=(vector.copy(),))) in found
    assert signature(replace(FILE, variables=(zeros, vector))) != signature(
        replace(FILE, variables=(vector, zeros))
    )
