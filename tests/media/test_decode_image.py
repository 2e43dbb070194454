"""Pictures: right pixels for every kind of file that people have, an error for every broken one."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from media_helpers import code, encoded, noisy, picture, pixels
from PIL import Image, PngImagePlugin

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions
from mmcli.media.image import FORMATS

ORIENTATION = 0x0112
LOSSLESS = {
    "PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}, "PPM": {}, "QOI": {}, "JPEG2000": {},
    "ICO": {"sizes": [(64, 48)]},
}  # fmt: skip
# How each orientation is stored: the EXIF standard says what the 0th row and column of the file are on screen.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def exif(orientation):
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want.astype(int)).mean() < tolerance


# Real files


def test_every_odd_file_has_the_right_status(shared_data):
    statuses = {path.name: code(path) for path in sorted((shared_data / "images" / "odd").iterdir())}
    assert statuses == {
        "broken.png": "truncated",
        "broken_data_stream.png": "truncated",  # damaged, and its end is missing too
        "decompression_bomb.gif": "bomb",
        "decompression_bomb.ico": "bomb",
        "dispose_bgnd.gif": "image",
        "flower.webp": "image",
        "hopper.gif": "image",
        "hopper.jpg": "image",
        "hopper_gray.jpg": "image",
        "invalid-exif.jpg": "image",
        "pil_sample_cmyk.jpg": "image",
        "transparent.png": "image",
        "truncated_image.png": "truncated",
        "truncated_jpeg.jpg": "truncated",
    }


def test_odd_files_look_as_they_should(shared_data):
    odd = shared_data / "images" / "odd"
    jpeg, gif = pixels(odd / "hopper.jpg"), pixels(odd / "hopper.gif")
    close(jpeg, gif, 6)  # one photo, once with 256 colours
    luma = jpeg @ np.array([0.299, 0.587, 0.114])
    grey = pixels(odd / "hopper_gray.jpg")
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(grey[..., 0] - luma).mean() < 2
    cmyk = pixels(odd / "pil_sample_cmyk.jpg")  # the word RED in red on black; inverted it would be cyan on white
    assert np.all(cmyk[-20:] < 20)
    reds = cmyk[(cmyk[..., 0] > 150)]
    assert len(reds) > 500
    assert reds[:, 1:].mean() < 60
    with Image.open(odd / "transparent.png") as image:
        rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    assert alpha.min() < 0.1
    close(pixels(odd / "transparent.png"), np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)), 0.5)


def test_the_exif_pictures_agree(shared_data):
    pictures = [pixels(path) for path in sorted((shared_data / "images" / "exif").glob("*.jpg"))]
    assert len(pictures) == 4
    for other in pictures[1:]:
        close(other, pictures[0], 5)
    wrong = np.abs(pictures[0].astype(int) - pictures[1][::-1]).mean()
    assert wrong > 30  # the measure tells a turned picture apart


def test_sample_pictures_show_what_they_say(sample_data):
    """The palette, CMYK and progressive pictures of the sample world have their colours."""
    for name, colour in (
        ("44-yellow-square-palette.png", (1, 1, 0)),
        ("46-red-triangle-cmyk.jpg", (1, 0, 0)),
        ("47-blue-ring-progressive.jpg", (0, 0, 1)),
    ):
        shown = pixels(sample_data / "images" / name).astype(int)
        strong = shown[(shown.max(axis=2) - shown.min(axis=2)) > 100]
        assert len(strong) > 50, name
        middle = np.median(strong, axis=0)
        assert tuple((middle > 120).astype(int)) == colour, (name, middle)


# Formats and modes


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_their_very_pixels(kind):
    want = picture()
    options = {"irreversible": False} if kind == "JPEG2000" else LOSSLESS[kind]
    assert np.array_equal(pixels(encoded(want, kind, **options)), want)


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 4), ("WEBP", 4), ("AVIF", 6), ("GIF", 20)])
def test_lossy_formats_are_close(kind, tolerance):
    close(pixels(encoded(picture(), kind)), picture(), tolerance)


def test_the_list_of_formats_is_what_pillow_registers():
    from mmcli.media.image import load_plugins

    assert set(load_plugins()) == set(FORMATS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 512).round().astype(np.uint16)[None].repeat(3, 0)
    image = Image.fromarray(ramp.astype(np.int32)) if kind == "PPM" else Image.fromarray(ramp)
    got = pixels(encoded(image, kind))
    assert np.abs(got[0, :, 0] - ramp[0] / 257).max() <= 0.51
    assert np.array_equal(got[..., 0], got[..., 1])


def test_floats_and_integers_of_32_bits():
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(2, 0)
    want = np.arange(256)
    for values in (ramp, ramp * 255, ramp * 65535, ramp * 9e6 - 4e6):
        assert np.abs(pixels(encoded(values, "TIFF"))[1, :, 2] - want).max() <= 1
    assert np.array_equal(pixels(encoded(np.arange(256, dtype=np.int32)[None], "TIFF"))[0, :, 0], want)
    dark = pixels(encoded(ramp * 0.25, "TIFF"))
    assert dark.max() == 64  # not stretched
    assert pixels(encoded(0.5 + ramp / 2, "TIFF")).min() == 128
    broken = ramp.copy()
    broken[0, 0] = np.nan
    assert code(encoded(broken, "TIFF")) == "corrupt"


def test_sixteen_bit_colour():
    """Pillow writes none: a PNG made by hand, one pixel of (65535, 32896, 257)."""
    row = b"\0" + (65535).to_bytes(2, "big") + (32896).to_bytes(2, "big") + (257).to_bytes(2, "big")
    data = png(1, 1, 16, 2, zlib.compress(row))
    assert pixels(data).tolist() == [[[255, 128, 1]]]


def png(width, height, depth, colour, compressed):
    def chunk(name, body):
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def test_one_bit_and_grey():
    bits = np.zeros((4, 8), bool)
    bits[:, ::2] = True
    assert np.array_equal(pixels(encoded(bits, "PNG"))[..., 1], bits * 255)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pixels(encoded(grey, "PNG"))[..., 2], grey)


def test_transparency_is_put_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3] = (0, 128, 255)
    for kind in ("PNG", "TIFF", "WEBP"):
        got = pixels(encoded(rgba, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
        assert got[0, 0].tolist() == [255, 255, 255]
        assert np.abs(got[0, 1].astype(int) - [227, 127, 127]).max() <= 1
        assert got[0, 2].tolist() == [200, 0, 0]
    grey = Image.fromarray(rgba, "RGBA").convert("LA")
    assert pixels(encoded(grey, "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_transparent_colours_of_palette_grey_and_rgb_are_white_too():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(encoded(palette, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert pixels(encoded(palette, "PNG", transparency=bytes([255, 0])))[0, 1].tolist() == [255, 255, 255]
    assert pixels(encoded(palette, "GIF", transparency=0))[0, 0].tolist() == [255, 255, 255]
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    assert pixels(encoded(rgb, "PNG", transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [9, 9, 9]]]
    grey = Image.new("L", (2, 1), 7)
    assert pixels(encoded(grey, "PNG", transparency=7))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF"), ("LAB", "TIFF")])
def test_other_colour_spaces(mode, kind):
    close(pixels(encoded(Image.fromarray(picture()).convert(mode), kind)), picture(), 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (20, 10), (v, 0, 0)) for v in (200, 120, 40)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - [200, 0, 0]).max() < 4


# Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_all_orientations(orientation, kind):
    upright = picture(40, 24)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encoded(stored, kind, exif=exif(orientation))
    close(pixels(data), upright, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_orientation_in_xmp_counts_too(kind):
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    options = {"pnginfo": info} if kind == "PNG" else {"xmp": xmp.encode()}
    stored = np.ascontiguousarray(STORED[6](picture(40, 24)))
    close(pixels(encoded(stored, kind, **options)), picture(40, 24), 4)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    close(pixels(encoded(picture(), "JPEG", exif=exif(orientation))), picture(), 4)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"Exif\0\0MM\0*" * 9]
)
def test_a_broken_exif_block_does_not_cost_the_picture(block):
    close(pixels(encoded(picture(), "JPEG", exif=block)), picture(), 4)


# Reduced scale


def test_a_large_jpeg_is_reduced_but_never_below_twice_what_is_needed():
    data = encoded(picture(900, 1600), "JPEG", quality=95)
    assert pixels(data).shape == (900, 1600, 3)
    assert pixels(data, min_image_size=224).shape == (450, 800, 3)
    assert pixels(data, min_image_size=225).shape == (450, 800, 3)
    assert pixels(data, min_image_size=226).shape == (900, 1600, 3)
    assert pixels(data, min_image_size=32).shape == (113, 200, 3)
    assert pixels(data, min_image_size=224, exact_decode=True).shape == (900, 1600, 3)
    assert pixels(encoded(picture(900, 1600), "PNG"), min_image_size=32).shape == (900, 1600, 3)


def test_a_reduced_jpeg_is_upright_and_alike():
    upright = picture(1600, 900)
    data = encoded(np.ascontiguousarray(STORED[6](upright)), "JPEG", quality=95, exif=exif(6))
    got = pixels(data, min_image_size=100)
    assert got.shape == (400, 225, 3)
    want = np.asarray(Image.fromarray(upright).reduce(4))
    close(got, want, 3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_extreme_shapes(height, width):
    for kind in ("PNG", "JPEG"):
        assert pixels(encoded(picture(height, width), kind), min_image_size=224).shape == (height, width, 3)


# Bombs


def test_a_bomb_is_known_by_its_header():
    """A PNG of 100,000 x 100,000 pixels and 60 bytes: nothing is decompressed."""
    data = png(100_000, 100_000, 8, 2, zlib.compress(b""))
    with pytest.raises(RowError, match="10000000000 pixels") as caught:
        pixels(data)
    assert caught.value.code == "bomb"


def test_the_pixel_limit_is_exact():
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        data = encoded(picture(50, 61), kind)
        assert code(data, DecodeOptions(max_pixels=50 * 61)) == "image"
        assert code(data, DecodeOptions(max_pixels=50 * 61 - 1)) == "bomb"


# Damage


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("BMP", {}),
        ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("JPEG2000", {}),
        ("AVIF", {}), ("PPM", {}), ("ICO", {}), ("QOI", {}),
    ],
)  # fmt: skip
def test_a_truncated_file_is_an_error_never_another_picture(kind, options):
    data = encoded(noisy(), kind, **options)
    whole = pixels(data)
    for end in {*range(1, len(data), max(1, len(data) // 150)), *range(len(data) - 30, len(data))}:
        status = code(data[:end], modality="image")
        if status == "image":
            assert np.array_equal(pixels(data[:end], named="image"), whole), end
        elif end > 64 and kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
            assert status == "truncated", end
        else:
            assert status in ("truncated", "corrupt", "unsupported_format"), end


def test_a_jpeg_whose_tail_was_never_written_is_truncated():
    """An interrupted download into a preallocated file: libjpeg fills up with grey and only warns."""
    thumbnail = encoded(picture(16, 16), "JPEG")
    for options in ({}, {"exif": b"Exif\0\0" + thumbnail}):
        data = encoded(noisy(200, 300), "JPEG", quality=95, **options)
        assert code(data) == "image"
        half = len(data) * 2 // 3
        filled = data[:half] + bytes(len(data) - half)
        with Image.open(io.BytesIO(filled)) as image:
            image.load()  # Pillow alone says nothing
        assert code(filled) == "truncated"


def test_bytes_after_the_end_of_a_jpeg_are_harmless():
    """Motion photos and panoramas carry videos and more pictures there."""
    data = encoded(picture(), "JPEG")
    for tail in (b"\0" * 1000, b"ftypmp42" + bytes(range(256)), data):
        close(pixels(data + tail), picture(), 4)


def test_damage_that_a_checksum_shows_is_an_error():
    data = bytearray(encoded(picture(), "PNG"))
    at = data.index(b"IDAT") + 40
    data[at] ^= 1
    assert code(bytes(data)) == "corrupt"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n\xff\0", "known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
    ],
)
def test_what_is_not_supported_says_so(data, said):
    with pytest.raises(RowError, match=said) as caught:
        pixels(data, named="image")
    assert caught.value.code == "unsupported_format"


def test_warnings_of_pillow_stay_out_of_stderr(tmp_path):
    """A run over a million photos must not print a line for each that has a broken EXIF block."""
    broken = encoded(picture(), "JPEG", exif=b"Exif\0\0" + b"MM\0*" * 9)
    (tmp_path / "a.jpg").write_bytes(broken)
    script = (
        "import sys; from mmcli.media.decode import decode; from mmcli.core.records import DecodeOptions, Media\n"
        "decode(Media(file=sys.argv[1]), DecodeOptions(max_pixels=48 * 64))"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "a.jpg"], capture_output=True, check=True)
    assert run.stderr == b""
