"""Makes small pictures, sounds and clips whose right content is known, and the calls that tests make on them."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions, Media
from mmcli.media.decode import decode

ANY = DecodeOptions()


def decoded(data, options=ANY, modality=None):
    """(modality, payload) of encoded bytes or of the file of that path."""
    media = Media(modality, data=data) if isinstance(data, bytes) else Media(modality, file=str(data))
    return decode(media, options)


def pixels(data, named=None, **options):
    modality, picture = decoded(data, DecodeOptions(**options), named)
    assert modality == "image"
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.flags.c_contiguous
    return picture


def code(data, options=ANY, modality=None):
    """The error code of the row, or the modality when it decodes."""
    try:
        return decoded(data, options, modality)[0]
    except RowError as error:
        return error.code if error.stage == "decode" and error.message else "an error without stage or message"


def picture(height=48, width=64):
    """uint8 [H, W, 3]: smooth, and different at every corner."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    return np.stack([red, green, 255 - red / 2 - green / 2], axis=2).round().astype(np.uint8)


def noisy(height=48, width=64):
    """`picture` with noise, as photos have: more bytes, and no two alike."""
    noise = np.random.default_rng(5).integers(-20, 20, (height, width, 3))
    return (picture(height, width).astype(int) + noise).clip(0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tone(seconds=1.0, rate=16000, hertz=440.0, loudness=0.5):
    return loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def pitch(sound):
    """The strongest frequency of an Audio, in Hz."""
    window = sound.waveform * np.hanning(len(sound.waveform))
    spectrum = np.abs(np.fft.rfft(window, 1 << 18))
    return np.argmax(spectrum) * sound.sampling_rate / (1 << 18)


def encoded_sound(
    samples,
    rate,
    container="wav",
    codec="pcm_s16le",
    layout="mono",
    sample_format="s16",
    bit_rate=128_000,
    **options,
):
    """`samples`: [channels, n], of the type that `sample_format` (planar or not) asks for."""
    samples = np.atleast_2d(samples)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.codec_context.layout = layout
        stream.codec_context.bit_rate = bit_rate
        stream.codec_context.format = sample_format
        data = samples if sample_format.endswith("p") else samples.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format=sample_format, layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        size = stream.codec_context.frame_size or 4096
        while chunk := fifo.read(size, partial=True):
            output.mux(stream.encode(chunk))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def clip(
    pictures, container="mp4", codec="libx264", times=None, rate=12, gop=12, rotation=None, sound=None, **options
):
    """`pictures`: uint8 [H, W, 3] each. `times`: when each is shown, in units of 1/rate s; default 0, 1, 2, ..."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options={"crf": "12", **options})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if not codec.startswith("lib"):  # the others go by crf
            stream.codec_context.bit_rate = 8_000_000
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        audio = None if sound is None else output.add_stream("aac", rate=16000, layout="mono")
        for time, rgb in zip(times or range(len(pictures)), pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            output.mux(audio.encode(frame))
            output.mux(audio.encode(None))
    return buffer.getvalue()


# Frame n of `numbered` has this grey level; far enough apart to survive any codec.
def level(number):
    return 16 + 4 * (number % 56)


def numbered(count, height=48, width=64):
    return [np.full((height, width, 3), level(n), np.uint8) for n in range(count)]


def numbers(frames):
    """The frame numbers that `numbered` frames show."""
    return [round((float(f.mean()) - 16) / 4) for f in frames]
