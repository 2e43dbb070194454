"""JPEGs by torchvision and by Pillow: the same pixels, the same refusals, whatever the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions
from mmcli.media import image

pytest.importorskip("torchvision")
OPTIONS = DecodeOptions(modalities=frozenset({"image"}), exact_decode=True)

files = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 90), st.integers(1, 90)),
        "mode": st.sampled_from(["RGB", "L", "CMYK"]),
        "quality": st.integers(1, 100),
        "subsampling": st.integers(0, 2),
        "progressive": st.booleans(),
        "turn": st.integers(0, 9),
        "seed": st.integers(0, 99),
    }
)


def encoded(
    size: tuple[int, int], mode: str, turn: int, seed: int, *, quality: int, subsampling: int, progressive: bool
) -> bytes:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (max(1, size[1] // 6), max(1, size[0] // 6), 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality, subsampling=subsampling, progressive=progressive, exif=exif)
    return file.getvalue()


def decoded(data: bytes, options: DecodeOptions = OPTIONS) -> Any:
    """Pixels, or the code and the message of the error."""
    try:
        return image.decode_image(data, options)
    except RowError as error:
        return error.code, error.message


def both(data: bytes, options: DecodeOptions = OPTIONS) -> tuple[Any, Any]:
    """By torchvision, by Pillow."""
    fast = decoded(data, options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(image, "_fast_jpeg", lambda data: None)
        return fast, decoded(data, options)


@settings(max_examples=150, deadline=None)
@given(files)
def test_sound_files_have_the_same_pixels(what: dict[str, Any]) -> None:
    fast, pillow = both(encoded(**what))
    assert isinstance(fast, np.ndarray)
    assert np.array_equal(fast, pillow)
    assert fast.flags.c_contiguous
    assert fast.flags.writeable
    width, height = what["size"]
    assert fast.shape == ((width, height, 3) if what["turn"] in (5, 6, 7, 8) else (height, width, 3))


@settings(max_examples=200, deadline=None)
@given(files, st.sampled_from(["cut", "zeros", "flip"]), st.floats(0, 1), st.integers(1, 255))
def test_damaged_files_have_the_same_end(what: dict[str, Any], damage: str, where: float, bits: int) -> None:
    data = encoded(**what)
    at = min(len(data) - 1, int(where * len(data)))
    flipped = data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]
    data = {"cut": data[:at], "zeros": data[:at] + bytes(len(data) - at), "flip": flipped}[damage]
    fast, pillow = both(data)
    assert type(fast) is type(pillow)
    assert np.array_equal(fast, pillow) if isinstance(fast, np.ndarray) else fast == pillow


def test_photos_have_the_same_pixels(shared_data: Path) -> None:
    photos = sorted((shared_data / "images").rglob("*.jpg"))
    assert photos
    for photo in photos:
        fast, pillow = both(photo.read_bytes())
        assert np.array_equal(fast, pillow), photo.name


def test_the_fast_way_is_taken_where_nothing_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above compare Pillow with itself."""
    taken = []
    way = image._fast_jpeg
    monkeypatch.setattr(image, "_fast_jpeg", lambda data: taken.append(len(data)) or way(data))
    settings = {"quality": 90, "subsampling": 2, "progressive": False}
    large, small = (encoded((n, n), "RGB", 0, 0, **settings) for n in (80, 20))
    reduced = DecodeOptions(modalities=frozenset({"image"}), min_image_size=16)
    assert decoded(large, reduced).shape == (40, 40, 3)
    assert decoded(small, reduced).shape == (20, 20, 3)
    assert taken == [len(small)]
