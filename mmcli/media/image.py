"""Pictures: encoded bytes -> uint8 [H, W, 3] RGB, upright, first frame, on white where transparent.

Pillow decodes, from an explicit list of formats. It reports every truncation of these formats as an error
(tried at some 300 offsets of each); what it does not notice, a JPEG whose tail was overwritten, is noticed here.
"""

from __future__ import annotations

import io
import sys
import warnings
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions

if TYPE_CHECKING:
    from PIL import Image

# Each has a magic number. Not on the list: formats that run an interpreter (EPS), that name other files
# (FPX, MIC, WAL) or that are not pictures of their own (PDF, FITS, GRIB). MPO opens as JPEG, APNG as PNG.
FORMATS = {
    "JPEG": "Jpeg", "PNG": "Png", "GIF": "Gif", "WEBP": "WebP", "BMP": "Bmp", "TIFF": "Tiff", "AVIF": "Avif",
    "JPEG2000": "Jpeg2K", "PPM": "Ppm", "ICO": "Ico", "QOI": "Qoi",
}  # fmt: skip
# What nearly all pictures begin with, and Pillow's own tests say the same of.
_COMMON = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"))
_ORIENTATION = 0x0112
# Where Pillow's `getexif` looks, beside a TIFF's own tags.
_EXIF_SOURCES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_WHITE = (255, 255, 255, 255)


@cache
def load_plugins() -> dict[str, Any]:
    """Import Pillow and the plugins of FORMATS alone, once; gives the test of each on a file's first 16 bytes."""
    from PIL import Image

    for plugin in FORMATS.values():
        import_module(f"PIL.{plugin}ImagePlugin")
    # Pillow warns of what is an error row here (bombs) or does not matter (broken EXIF), on every file.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return {name: Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN}


def sniff(head: bytes) -> str | None:
    """The picture format, one of FORMATS, that these first bytes (64 are enough) begin; None for no picture.

    Raises RowError `unsupported_format` for HEIC and JPEG XL, which people have and Pillow does not decode.
    """
    for magic, name in _COMMON:
        if head.startswith(magic):
            return name
    brands = head[8:64] if head[4:8] == b"ftyp" else b""
    if b"avif" not in brands and any(b in brands for b in (b"heic", b"heix", b"heim", b"heis", b"hevc")):
        raise RowError("unsupported_format", "HEIC pictures are not supported; convert to JPEG or PNG")
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        raise RowError("unsupported_format", "JPEG XL pictures are not supported; convert to JPEG or PNG")
    for name, accept in load_plugins().items():
        if accept(head[:16]) is True:
            return name
    return None


def decode_image(data: bytes, options: DecodeOptions) -> np.ndarray:
    """Encoded picture -> uint8 [H, W, 3] RGB, C-contiguous and writable.

    - turned upright by its EXIF orientation; an EXIF block that cannot be read counts as none
    - transparency is put on white, which is how a picture looks on a page; `convert("RGB")` would show
      whatever colour the editor left beneath, mostly black
    - 16-bit and float greyscale is scaled to 8 bits, not clipped
    - the first frame of an animation
    - a JPEG may come at reduced scale (see DecodeOptions.min_image_size), by the DCT scaling of libjpeg

    Raises RowError: `unsupported_format`, `bomb`, `truncated`, `corrupt`.
    """
    kind = sniff(data[:64])
    if kind is None:
        raise RowError("unsupported_format", f"not a picture of a known format (begins with {data[:8]!r})")
    try:
        return _decode(data, kind, options)
    except (RowError, MemoryError):
        raise
    except Exception as error:
        raise _row_error(error, data, kind) from error


def _decode(data: bytes, kind: str, options: DecodeOptions) -> np.ndarray:
    from PIL import Image

    load_plugins()
    # For what is inside of a picture (a GIF's frames, an icon's PNG) Pillow checks, at twice this number.
    Image.MAX_IMAGE_PIXELS = max(1, options.max_pixels // 2)
    image: Image.Image
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        width, height = image.size
        if width * height > options.max_pixels:
            raise _bomb(f"{width} x {height} pixels, more than the limit of {options.max_pixels}")
        if kind == "JPEG":
            _check_jpeg_end(data)
            if options.min_image_size and not options.exact_decode:
                shortest = 2 * options.min_image_size
                image.draft(None, (shortest, shortest))
            if image.size == (width, height) and image.mode in ("RGB", "L"):
                pixels = _fast_jpeg(data)
                if pixels is not None:
                    return _turned(pixels, _turn(image))
        image.load()
        turn, rgb = _turn(image), _rgb(image)
        return np.array(rgb if turn is None else rgb.transpose(turn))


def _fast_jpeg(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3] by torchvision, where it is loaded anyhow, as in all workers of real models; else None.

    The same library beneath, the same pixels, but none of Pillow's copies: with all that a worker does 1.64 instead
    of 2.00 ms for 640 x 480; alone 61 instead of 117 for 12 megapixels. At reduced scale, which it does not offer,
    Pillow is as fast as simplejpeg. What it refuses, Pillow judges: its errors tell a row more.
    """
    if "torchvision" not in sys.modules:
        return None
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        found = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    pixels: np.ndarray = np.ascontiguousarray(found.permute(1, 2, 0).numpy())
    return pixels


def _turned(pixels: np.ndarray, turn: Image.Transpose | None) -> np.ndarray:
    """As Pillow's `transpose`."""
    if turn is None:
        return pixels
    from PIL import Image

    return np.array(Image.fromarray(pixels).transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the picture has to be turned (EXIF tag 274). Call after `load`: a PNG may have its EXIF block last."""
    if not hasattr(image, "tag_v2") and image.info.keys().isdisjoint(_EXIF_SOURCES):
        # 3 us less, of 30 for a tiny picture.
        return None
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - whatever is wrong with the EXIF block, the picture is fine
        return None
    if orientation == 1:
        return None
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }.get(orientation)  # fmt: skip


def _rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    from PIL import Image

    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if mode == "LAB":
        return _from_lab(image)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Greyscale of more than 8 bits -> uint8 [H, W], 0 for black and 255 for white.

    White is 65535 in 16-bit pictures. 32-bit integers and floats do not say: the smallest of 1 (floats), 255
    and 65535 that no value exceeds; values beyond, or below 0, are stretched from minimum to maximum, as
    viewers do.
    """
    grey = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey).all():
        raise RowError("corrupt", "the picture has values that are not finite")
    low, high = float(grey.min()), float(grey.max())
    whites = (65535,) if image.mode.startswith("I;16") or image.format == "PPM" else (255, 65535)
    whites = (1, *whites) if image.mode == "F" else whites
    if low >= 0 and high <= whites[-1]:
        low, high = 0.0, next(float(white) for white in whites if high <= white)
    return np.rint((grey - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # only with inPlace=True
    return converted


def _check_jpeg_end(data: bytes) -> None:
    """Refuse a JPEG without an end marker after its last scan.

    libjpeg paints what is missing grey with no more than a warning, when the tail of a file was filled with
    zeros (an interrupted download into a preallocated file). In a sound file `rfind` is answered at the end.
    """
    end = data.rfind(b"\xff\xd9")
    # A start of scan after the last end marker: that marker was the embedded thumbnail's.
    if end < 0 or data.find(b"\xff\xda", end) >= 0:
        raise RowError("truncated", "the JPEG has no end")


def _bomb(what: str) -> RowError:
    return RowError("bomb", f"the picture has {what}")


def _row_error(error: Exception, data: bytes, kind: str) -> RowError:
    """Any exception of Pillow -> the row's error. Its types tell little: OSError, SyntaxError, TypeError, ..."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        return _bomb("a frame with too many pixels: " + str(error).partition(",")[0])
    said = f"{kind}: {error}"
    if isinstance(error, UnidentifiedImageError):  # its message is the address of the BytesIO
        said = f"the header of the {kind} cannot be read"
    if "truncated" in str(error).lower() or not _complete(data, kind):
        return RowError("truncated", f"the file ends too early ({said})")
    return RowError("corrupt", f"broken picture ({said})")


def _complete(data: bytes, kind: str) -> bool:
    """Whether a broken file at least has its end, where its format can tell."""
    match kind:
        case "JPEG":
            return b"\xff\xd9" in data
        case "PNG":
            return b"IEND" in data[-64:]
        case "GIF":
            return data.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 <= len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") <= len(data)
        case _:
            return True
