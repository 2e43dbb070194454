"""Clips: a container -> frames sampled uniformly by time, uint8 [F, H, W, 3] RGB, upright."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions, Video
from mmcli.media.container import best_stream, decoded, open_container, prepare

# Where FFmpeg's seeking goes by an exact index. Elsewhere (MPEG-TS, AVI, ...) everything is decoded in order.
_INDEXED = ("mov", "matroska")
# Codecs whose packets are one shown frame each: those that no other frame needs are not decoded, unless wanted
# (40 % less time for H.264 and HEVC as x264 and x265 write them).
_SKIPPABLE = ("h264", "hevc", "mpeg2video", "mpeg4")
# AVI has no presentation times: FFmpeg's guesses are out of order for H.264 with B-frames.
_UNTIMED = ("avi",)


def decode_video(container: Any, file: io.FileIO | io.BytesIO, options: DecodeOptions) -> Video:
    """The best video stream (FFmpeg's choice), sampled at `options.num_frames` times.

    `container`: of `file`, newly opened.

    The clip's duration is cut into F equal segments; each gives the frame that is on the screen at its middle:
    t_i = (i + 1/2) / F * duration, whatever the frame rate, constant or not. A frame that appears less than a
    millisecond later counts as there: Matroska rounds to milliseconds, and middles often fall on the change from
    one frame to the next. With fewer frames than F, frames repeat. Timestamps are those at which the frames
    appear, from the clip's first frame on.

    Turned by the display matrix. Not stretched for non-square pixels, as no reference does. Colours by the
    stream's matrix and range; BT.601 where it does not say, as FFmpeg does. A frame much larger than needed
    (DecodeOptions.min_image_size) is reduced by a whole factor, each pixel the mean of those it covers.

    The times of all frames come from a pass over the packets without decoding (16 ms for 10 s of 720p);
    then only the groups of pictures that hold a wanted frame are decoded.

    Raises RowError: `truncated`, `corrupt` (also where FFmpeg had to conceal damage in a frame, or in one that
    it depends on), `bomb`, `unsupported_format` (no video stream).
    """
    timeline = _read_timeline(container, _stream(container, options))
    moments = timeline.moments(options.num_frames)
    for shortcuts in (True, False):
        with open_container(file) as again:
            player = _Player(again, _stream(again, options), timeline, moments, shortcuts)
            try:
                return _sample(player, moments, options)
            except _MissedError:
                continue
    raise RowError("corrupt", "no frame of the video could be decoded")


class _MissedError(Exception):
    """A wanted frame did not come."""


@dataclass(slots=True)
class _Timeline:
    """When the frames are shown, in units of `time_base`.

    shown     presentation times, sorted
    keys      those of them at which decoding can start
    end       when the last frame ends
    in_order  the times have no relation to the frames' own: the n-th frame decoded is the n-th shown
    """

    shown: list[int]
    keys: list[int]
    end: int
    time_base: Fraction
    seekable: bool
    in_order: bool

    def moments(self, count: int) -> list[int]:
        """The middles of `count` equal segments, and a millisecond. Floored: frames change at whole units."""
        length, start = self.end - self.shown[0], self.shown[0] + int(1 / (1000 * self.time_base))
        return [start + (2 * i + 1) * length // (2 * count) for i in range(count)]

    def latest(self, moment: int) -> int:
        """The time of the frame that is on the screen at `moment`."""
        return self.shown[max(0, bisect_right(self.shown, moment) - 1)]

    def key_before(self, time: int) -> int:
        return self.keys[max(0, bisect_right(self.keys, time) - 1)]


def _stream(container: Any, options: DecodeOptions) -> Any:
    stream = best_stream(container, "video")
    if stream is None:
        raise RowError("unsupported_format", "the file has no video stream")
    prepare(stream)
    codec = stream.codec_context
    _check_pixels(codec.width, codec.height, options)
    return stream


def _check_pixels(width: int, height: int, options: DecodeOptions) -> None:
    if width * height > options.max_pixels:
        raise RowError(
            "bomb", f"the video has {width} x {height} pixels, more than the limit of {options.max_pixels}"
        )


def _read_timeline(container: Any, stream: Any) -> _Timeline:
    """Read all packets of the stream, decode none."""
    form = container.format.name.split(",")[0]
    packets = [
        (p.pts, p.dts, p.duration or 0, p.is_keyframe)
        for p in container.demux(stream)
        if p.size and not p.is_discard
    ]
    # A broadcast recorded from its middle: nothing can be shown before the first key frame.
    first = next((i for i, p in enumerate(packets) if p[3]), 0)
    packets = packets[first:]
    in_order = form in _UNTIMED or any(p[0] is None for p in packets)
    if in_order:
        packets = [(dts if dts is not None else i, dts, d, k) for i, (_, dts, d, k) in enumerate(packets)]
    packets = [p for p in packets if p[0] >= packets[0][0]]
    if not packets:
        raise RowError("corrupt", "the video has no frames")
    shown = sorted(p[0] for p in packets)
    end = max(p[0] + p[2] for p in packets)
    if end <= shown[-1]:  # no durations: the last frame stays as long as the one before it
        end = 2 * shown[-1] - shown[-2] if len(shown) > 1 else shown[-1] + 1
    keys = sorted(p[0] for p in packets if p[3]) or shown[:1]
    seekable = form in _INDEXED and not in_order
    return _Timeline(shown, keys, end, stream.time_base, seekable, in_order)


class _Player:
    """Steps forward to moments with as little decoding as possible.

    `shortcuts`: seek to a key frame beyond what was decoded, and leave out frames that nothing depends on. They
    rest on what the container says; where a wanted frame then does not come, `at` raises _MissedError.
    """

    def __init__(
        self, container: Any, stream: Any, timeline: _Timeline, moments: list[int], shortcuts: bool
    ) -> None:
        self._container, self._stream, self.timeline = container, stream, timeline
        self._wanted = {timeline.latest(moment) for moment in moments}
        self._seek = shortcuts and timeline.seekable
        self._skip = shortcuts and not timeline.in_order and stream.codec_context.name in _SKIPPABLE
        self._frames = self._decode()
        self._now: tuple[int, Any] | None = None
        self._next: tuple[int, Any] | None = None

    def at(self, moment: int) -> tuple[int, Any]:
        """(time, frame) on the screen at `moment`; moments must not go back. The frame is None when damaged."""
        wanted = self.timeline.latest(moment)
        key = self.timeline.key_before(wanted)
        reached = self.timeline.shown[0] if self._now is None else self._now[0]
        if self._seek and key > reached:
            self._container.seek(key, stream=self._stream)
            self._frames, self._now, self._next = self._decode(), None, None
        while self._now is None or self._now[0] < wanted:
            self._next = self._next or next(self._frames, None)
            if self._next is None or self._next[0] > moment:
                break
            self._now, self._next = self._next, None
        if self._now is None or (self._skip and self._now[0] != wanted):
            raise _MissedError
        return self._now

    def _choose(self, packet: Any) -> None:
        self._stream.codec_context.skip_frame = "DEFAULT" if packet.pts in self._wanted else "NONREF"

    def _decode(self) -> Iterator[tuple[int, Any]]:
        shown, damaged = self.timeline.shown, False
        choose = self._choose if self._skip else None
        for position, frame in enumerate(decoded(self._container, self._stream, choose)):
            time = shown[min(position, len(shown) - 1)] if self.timeline.in_order else frame.pts
            # What depends on a concealed frame is wrong too, and not marked by FFmpeg: up to the next key frame.
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if time is not None and time >= shown[0]:
                yield time, None if damaged else frame


def _sample(player: _Player, moments: list[int], options: DecodeOptions) -> Video:
    timeline = player.timeline
    frames: np.ndarray | None = None
    times: list[int] = []
    for i, moment in enumerate(moments):
        time, frame = player.at(moment)
        if frame is None:
            raise RowError(
                "corrupt", f"the video is damaged at {float((time - timeline.shown[0]) * timeline.time_base):.2f} s"
            )
        if frames is not None and times[-1] == time:
            frames[i] = frames[i - 1]
        else:
            _check_pixels(frame.width, frame.height, options)
            size = None if frames is None else frames.shape[1:3]
            picture = _picture(frame, options, size)
            if frames is None:
                frames = np.empty((len(moments), *picture.shape), np.uint8)
            frames[i] = picture
        times.append(time)
    assert frames is not None
    start = timeline.shown[0]
    timestamps = np.array([float((time - start) * timeline.time_base) for time in times])
    return Video(frames, timestamps, float((timeline.end - start) * timeline.time_base))


def _picture(frame: Any, options: DecodeOptions, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, 3] RGB, upright, reduced; of the given (H, W), when the stream changes its size."""
    transposed, mirror_x, mirror_y = _turn(frame)
    if size is not None:
        height, width = size[::-1] if transposed else size
    else:
        factor = _reduction(min(frame.width, frame.height), options)
        height, width = -(-frame.height // factor), -(-frame.width // factor)
    rgb = frame.to_ndarray(width=width, height=height, format="rgb24", interpolation="AREA")
    if transposed:
        rgb = rgb.transpose(1, 0, 2)
    if mirror_x:
        rgb = rgb[:, ::-1]
    return rgb[::-1] if mirror_y else rgb  # type: ignore[no-any-return]


def _reduction(shortest: int, options: DecodeOptions) -> int:
    if options.exact_decode or not options.min_image_size:
        return 1
    return max(1, shortest // (2 * options.min_image_size))


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """(transposed, mirrored in x, mirrored in y) of the display matrix [a b u; c d v; x y w], ISO 14496-12.

    A point (p, q) is shown at (a p + c q, b p + d q). Rounded to whole quarter turns, as players do.
    """
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
    if abs(c) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0
