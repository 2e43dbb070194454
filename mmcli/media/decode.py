"""One medium -> what it is and its decoded content. Goes by content; a name only breaks ties."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

from mmcli.core.errors import RowError
from mmcli.core.extensions import guess_modality
from mmcli.core.records import DecodeOptions, Media, Modality, Payload
from mmcli.media.files import open_media

# The decoders are imported where they are first used: a run over texts starts without Pillow and FFmpeg.

File = io.FileIO | io.BytesIO
# Enough for every magic number, and to tell text from binary.
_HEAD = 4096


def warm_up(options: DecodeOptions, expected: frozenset[Modality]) -> None:
    """Import what decoding `expected` media needs: called before workers are forked, which then share it."""
    wanted = options.modalities & expected
    if "image" in wanted:
        from mmcli.media import image

        image.load_plugins()
    if wanted & {"audio", "video"}:
        from mmcli.media import audio, container, video  # noqa: F401

        container.load_library()
    if "audio" in wanted and options.sampling_rate is not None:
        # 2 s, with torch: not for a model that takes sound at any rate.
        import torchaudio.functional  # noqa: F401


def decode(media: Media, options: DecodeOptions) -> tuple[Modality, Payload]:
    """What the medium is, and its content: a str, uint8 [H, W, 3] RGB, an Audio or a Video.

    A modality that the manifest gives is obeyed. Otherwise the content decides: a text, unless it is named as
    another medium; a picture (an animation too, by its first frame); a video (a file with moving pictures); or
    audio (cover art is no video). A model that takes audio and no video gets a video's sound track.
    Of a medium that the record lacks (Media.missing) the content is None.

    Raises RowError with the codes of contracts.md section 3; `unsupported_format` for a modality that the
    model does not take.
    """
    if media.text is not None:
        _require("text", options)
        return "text", media.text
    if media.modality is not None:
        _require(media.modality, options)
        if media.missing:
            return media.modality, None
    if (
        media.data
        and media.modality == "image"
        and len(media.data) <= min(options.max_bytes, options.max_whole_bytes)
    ):
        # As below, without a file: 5 us less for each of many tiny pictures.
        return media.modality, _image_decoder()(media.data, options)
    with open_media(media, options.max_bytes) as file:
        try:
            return _decode(media, file, options)
        except OSError as error:
            raise RowError("io", f"cannot read the file: {error.strerror or error}") from error


@cache
def _image_decoder() -> Callable[[bytes, DecodeOptions], Payload]:
    from mmcli.media.image import decode_image

    return decode_image


def _decode(media: Media, file: File, options: DecodeOptions) -> tuple[Modality, Payload]:
    head = file.read(_HEAD)
    file.seek(0)
    modality = media.modality or _modality(media, head)
    if modality is not None:
        modality = _taken(modality, options)
        if not head and modality != "text":
            raise RowError("truncated", "the file is empty")
    match modality:
        case "text":
            from mmcli.media.text import decode_text

            return modality, decode_text(_read_whole(file, options))
        case "image":
            from mmcli.media.image import decode_image

            return modality, decode_image(_read_whole(file, options), options)
    return _decode_container(modality, file, options)


def _decode_container(modality: Modality | None, file: File, options: DecodeOptions) -> tuple[Modality, Payload]:
    """Sound or a clip. Opened once, to see which it is and to decode it: to open 10 s of WAV takes 3 of 7 ms."""
    from mmcli.media import container

    with container.open_container(file) as opened:
        modality = modality or _taken(container.modality(opened), options)
        if modality == "audio":
            from mmcli.media.audio import decode_audio

            return modality, decode_audio(opened, file, options)
        from mmcli.media.video import decode_video

        return modality, decode_video(opened, file, options)


def _read_whole(file: File, options: DecodeOptions) -> bytes:
    size = file.seek(0, io.SEEK_END)
    if size > options.max_whole_bytes:
        limit = options.max_whole_bytes
        raise RowError("too_large", f"{size} bytes, more than the limit of {limit} for a picture or a text")
    file.seek(0)
    return file.read()


def _modality(media: Media, head: bytes) -> Modality | None:
    """What the file is, as far as its first bytes tell; None: sound or a clip, which its container tells.

    Text comes first: no picture, sound or video is UTF-8 (or UTF-16) without NUL.
    """
    from mmcli.media import complete, image, text

    named = guess_modality(media.file or "")
    if named in (None, "text") and text.looks_like_text(head) and (head or named):
        return "text"
    if not head:
        raise RowError("truncated", "the file is empty")
    if image.sniff(head):
        return "image"
    if named == "text" and not complete.known_magic(head):
        return "text"  # whose decoder says what is wrong with it
    return None


def _taken(modality: Modality, options: DecodeOptions) -> Modality:
    """What the model takes of it: of a video also its sound track alone. Raises RowError."""
    if modality == "video" and "video" not in options.modalities and "audio" in options.modalities:
        return "audio"
    _require(modality, options)
    return modality


def _require(modality: Modality, options: DecodeOptions) -> None:
    if modality not in options.modalities:
        takes = " and ".join(sorted(options.modalities)) or "nothing"
        raise RowError("unsupported_format", f"this is {modality}; the model takes {takes}")
