"""Clips: the frames that are on the screen at the middle of each part, whatever the frame rate and the format."""

from __future__ import annotations

import csv
import io

import av
import numpy as np
import pytest
from media_helpers import clip, code, decoded, level, noisy, numbered, numbers, picture

from mmcli.core.records import DecodeOptions
from mmcli.media import video

FORMATS = [
    ("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9"), ("mp4", "libx265"),
    ("mp4", "libsvtav1"), ("avi", "mpeg4"), ("avi", "libx264"), ("mpegts", "libx264"), ("mpegts", "mpeg2video"),
    ("mpeg", "mpeg2video"), ("flv", "libx264"), ("flv", "flv"), ("asf", "wmv2"), ("mov", "mpeg4"),
]  # fmt: skip


def watch(data, **options):
    modality, seen = decoded(data, DecodeOptions(**options), "video")
    assert modality == "video"
    assert seen.frames.dtype == np.uint8
    assert seen.frames.ndim == 4
    assert seen.frames.flags.c_contiguous
    assert seen.timestamps.dtype == np.float64
    assert len(seen.timestamps) == len(seen.frames)
    return seen


def every_frame(data):
    """(times in s from the first frame, pictures) by plain sequential decoding, independently of mmcli."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.best("video")
        frames = [(f.pts, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        base = float(stream.time_base)
    start = min(t for t, _ in frames)
    return np.array([(t - start) * base for t, _ in frames]), [p for _, p in frames]


def expected(times, duration, count):
    """By the definition: which frame is on the screen at the middle of each of `count` equal segments, give or
    take the millisecond to which Matroska rounds."""
    middles = (np.arange(count) + 0.5) / count * duration
    return [int(np.flatnonzero(times <= m + 0.001001)[-1]) for m in middles]


# Which frames


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_frames_are_sampled_at_the_middles(container, codec):
    data = clip(numbered(40), container, codec)
    # FFmpeg's MPEG-PS writer gives two frames the same time and leaves one time out.
    times = every_frame(data)[0] if container == "mpeg" else np.arange(40) / 12
    for count in (1, 3, 8, 40):
        seen = watch(data, num_frames=count)
        want = expected(times, 40 / 12, count)
        assert container == "mpeg" or numbers(seen.frames) == want
        assert seen.duration == pytest.approx(40 / 12, abs=0.01)
        assert seen.timestamps == pytest.approx(times[want], abs=0.002)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx")])
def test_variable_frame_rate(container, codec):
    """A screen recording: bursts, and pictures that stay for seconds."""
    gaps = [1, 1, 1, 30, 2, 50, 1, 1, 1, 1, 40, 7, 1, 90, 3, 3, 3, 60, 1]
    times = [0, *np.cumsum(gaps).tolist()]
    data = clip(numbered(len(times)), container, codec, times=times, rate=30)
    shown, pictures = every_frame(data)
    assert shown == pytest.approx(np.array(times) / 30, abs=0.002)
    for count in (1, 4, 8, 16, 33):
        seen = watch(data, num_frames=count)
        want = expected(np.array(times) / 30, seen.duration, count)
        assert numbers(seen.frames) == want
        for frame, index in zip(seen.frames, want, strict=True):
            assert np.array_equal(frame, pictures[index])
    assert len({*numbers(watch(data, num_frames=8).frames)}) < 8  # long pictures are seen more than once


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {}), ("libx264", {"x264-params": "open-gop=1:bframes=3"}), ("libx264", {"gop": 1}),
        ("libx264", {"gop": 250}), ("libx265", {}), ("libvpx-vp9", {}), ("libsvtav1", {}), ("mpeg4", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_seeking_gives_the_frames_of_sequential_decoding(container, codec, options, monkeypatch):
    moving = [np.ascontiguousarray(np.roll(noisy(64, 96), (n, 2 * n), (0, 1))) for n in range(90)]
    data = clip(moving, container, codec, **options)
    sought = watch(data, num_frames=6)
    _, pictures = every_frame(data)
    for frame, index in zip(sought.frames, expected(np.arange(90) / 12, 90 / 12, 6), strict=True):
        assert np.array_equal(frame, pictures[index])


def test_seeking_skips_most_of_the_decoding(monkeypatch):
    data = clip(numbered(240), gop=12)
    count = 0
    original = video.decoded

    def counting(container, stream, before):
        nonlocal count
        for frame in original(container, stream, before):
            count += 1
            yield frame

    monkeypatch.setattr(video, "decoded", counting)
    watch(data, num_frames=4)
    assert count <= 20  # 18; with seeking alone 28, decoding everything up to the last one 211


def test_a_seek_that_misses_falls_back_to_sequential_decoding(monkeypatch):
    """An index that lies: every seek goes to the end."""
    data = clip(numbered(60), gop=10)
    want = watch(data, num_frames=5)
    original = video._Player.at

    def astray(player, moment):
        container = player._container

        class Astray:
            def demux(self, stream):
                return container.demux(stream)

            def seek(self, time, stream):
                container.seek(player.timeline.shown[-1], stream=stream)

        if not isinstance(container, Astray) and hasattr(container, "duration"):
            player._container = Astray()
        return original(player, moment)

    monkeypatch.setattr(video._Player, "at", astray)
    got = watch(data, num_frames=5)
    assert np.array_equal(got.frames, want.frames)
    assert np.array_equal(got.timestamps, want.timestamps)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_clips_repeat_frames(count):
    seen = watch(clip(numbered(count)), num_frames=8)
    assert seen.frames.shape[0] == 8
    assert numbers(seen.frames) == expected(np.arange(count) / 12, count / 12, 8)


def test_a_clip_that_does_not_start_at_zero():
    times = [100 + n for n in range(24)]
    for container, codec in (("matroska", "libx264"), ("mpegts", "libx264"), ("mp4", "libx264")):
        seen = watch(clip(numbered(24), container, codec, times=times), num_frames=4)
        assert numbers(seen.frames) == [3, 9, 15, 21]
        assert seen.timestamps == pytest.approx(np.array([3, 9, 15, 21]) / 12, abs=0.002)
        assert seen.duration == pytest.approx(2.0, abs=0.01)


def test_a_broadcast_recorded_from_its_middle():
    """MPEG-TS cut within a group of pictures: sampled from the first frame that can be shown."""
    data = clip(numbered(48), "mpegts", "mpeg2video", gop=12, bf="0", sc_threshold="1000000000")
    with av.open(io.BytesIO(data)) as container:
        packets = [(p.pos, p.is_keyframe) for p in container.demux(video=0) if p.size]
    keys = [pos for pos, key in packets if key]
    cut = packets[3][0] // 188 * 188
    assert keys[0] < cut < keys[1]
    seen = watch(data[cut:], num_frames=6)
    assert numbers(seen.frames) == [15, 21, 27, 33, 39, 45]  # of 12 ... 47


# Which stream, which way up, which colours


def test_the_best_of_several_video_streams(shared_data):
    seen = watch(shared_data / "video" / "nasa_13013.mp4")
    assert seen.frames.shape == (8, 270, 480, 3)  # the other one is 320 x 180
    assert seen.duration == pytest.approx(13.013, abs=0.01)
    times, pictures = every_frame((shared_data / "video" / "nasa_13013.mp4").read_bytes())
    want = expected(times, seen.duration, 8)
    assert seen.timestamps == pytest.approx(times[want])
    for frame, index in zip(seen.frames, want, strict=True):
        assert np.array_equal(frame, pictures[index])


@pytest.mark.parametrize("name", ["chaplin.mp4", "big_buck_bunny_432_433.webm"])
def test_real_videos(shared_data, name):
    data = (shared_data / "video" / name).read_bytes()
    seen = watch(data, num_frames=5)
    times, pictures = every_frame(data)
    want = expected(times, seen.duration, 5)
    for frame, index in zip(seen.frames, want, strict=True):
        assert np.array_equal(frame, pictures[index])
    assert seen.duration == pytest.approx({"c": 9.64, "b": 1.0}[name[0]], abs=0.05)


def test_sample_clips_move_where_they_say(sample_data):
    with open(sample_data / "videos.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        seen = watch(sample_data / row["video"])
        assert seen.frames.shape == (8, 96, 96, 3)
        assert seen.duration == pytest.approx(1.5)
        centres = []
        for frame in seen.frames.astype(int):
            y, x = np.nonzero(frame.max(axis=2) - frame.min(axis=2) > 60)
            centres.append((x.mean(), y.mean()))
        (x, y) = np.array(centres[-1]) - np.array(centres[0])
        moved = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
        assert moved == row["direction"]
        assert max(abs(x), abs(y)) > 20


@pytest.mark.parametrize(("degrees", "turn"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_rotation_metadata_is_applied(degrees, turn):
    """As phones write it. 90: shown turned counterclockwise."""
    stored = picture(48, 80)
    data = clip([stored] * 6, rotation=degrees)
    seen = watch(data, num_frames=2)
    want = np.rot90(stored, turn)
    assert seen.frames.shape[1:] == want.shape
    for frame in seen.frames:
        assert np.abs(frame.astype(int) - want).mean() < 6


def test_mirrored_video():
    """A front camera's display matrix mirrors; written into the file by hand."""
    stored = picture(48, 80)
    data = bytearray(clip([stored] * 6, rotation=180))
    matrix = np.array([-65536, 0, 0, 0, -65536], ">i4").tobytes()
    at = bytes(data).index(matrix)
    data[at : at + 20] = np.array([-65536, 0, 0, 0, 65536], ">i4").tobytes()
    seen = watch(bytes(data), num_frames=1)
    assert np.abs(seen.frames[0].astype(int) - stored[:, ::-1]).mean() < 6


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (5, False), (1, True), (5, True)])
def test_colours_by_the_streams_matrix_and_range(matrix, full):
    colours = np.zeros((48, 96, 3), np.uint8)
    for i, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128), (255, 255, 255)]):
        colours[:, i * 18 : (i + 1) * 18] = colour
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=12, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(to_yuv(colours, matrix, full), "yuv420p")
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    seen = watch(buffer.getvalue(), num_frames=1).frames[0]
    middles = [9 + 18 * i for i in range(5)]
    assert np.abs(seen[24, middles].astype(int) - colours[24, middles]).max() <= 6


def to_yuv(rgb, matrix, full):
    """Planar 4:2:0 by the formulas of BT.709 (1) or BT.601 (5), without swscale."""
    red, blue = (0.2126, 0.0722) if matrix == 1 else (0.299, 0.114)
    r, g, b = (rgb[..., i] / 255 for i in range(3))
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    if full:
        y, u, v = 255 * y, 255 * u + 128, 255 * v + 128
    else:
        y, u, v = 16 + 219 * y, 224 * u + 128, 224 * v + 128
    planes = [y, u[::2, ::2], v[::2, ::2]]
    packed = np.concatenate([p.reshape(-1) for p in planes]).round().clip(0, 255).astype(np.uint8)
    return packed.reshape(-1, rgb.shape[1])


# Sizes


def test_large_frames_are_reduced_but_never_below_twice_what_is_needed():
    data = clip([picture(360, 640)] * 4, num_threads="1")
    for needed, shape in (
        (None, (360, 640)),
        (90, (180, 320)),
        (91, (360, 640)),
        (60, (120, 214)),
        (32, (72, 128)),
    ):
        seen = watch(data, num_frames=2, min_image_size=needed)
        assert seen.frames.shape == (2, *shape, 3), needed
        assert needed is None or min(shape) >= 2 * needed
    assert watch(data, num_frames=2, min_image_size=32, exact_decode=True).frames.shape == (2, 360, 640, 3)
    reduced = watch(data, num_frames=1, min_image_size=90).frames[0].astype(float)
    whole = picture(360, 640).astype(float).reshape(180, 2, 320, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced - whole).mean() < 4


def test_the_pixel_limit():
    data = clip(numbered(3))
    assert code(data, DecodeOptions(max_pixels=48 * 64)) == "video"
    assert code(data, DecodeOptions(max_pixels=48 * 64 - 1)) == "bomb"


def test_odd_sizes():
    for height, width in ((2, 2), (50, 38), (16, 514)):
        seen = watch(clip([picture(height, width)] * 3, codec="libx264"), num_frames=2)
        assert seen.frames.shape == (2, height, width, 3)


# Damage


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"),
    ("mov", "mpeg4"), ("asf", "wmv2")],
)  # fmt: skip
def test_a_truncated_video_is_truncated(container, codec):
    moving = [np.roll(noisy(), n, 1) for n in range(30)]
    data = clip(moving, container, codec)
    ends = [*range(200, len(data), len(data) // 25), len(data) - 1]
    statuses = {end: code(data[:end], modality="video") for end in ends}
    assert set(statuses.values()) <= {"truncated", "corrupt"}
    assert sum(s == "truncated" for s in statuses.values()) >= len(ends) - 2, statuses


def test_a_frame_that_ffmpeg_had_to_conceal_is_an_error():
    """FFmpeg paints over what it cannot decode; a player may, a table of vectors may not."""
    moving = [np.ascontiguousarray(np.roll(noisy(96, 96), (n, 2 * n), (0, 1))) for n in range(24)]
    data = clip(moving, codec="mpeg4", gop=24)
    whole = watch(data, num_frames=24).frames
    rng = np.random.default_rng(2)
    statuses = []
    for _ in range(40):
        broken = bytearray(data)
        at = int(rng.integers(len(data) // 8, len(data) * 3 // 4))
        broken[at : at + 12] = rng.bytes(12)
        concealed = any_concealed(bytes(broken))
        status = code(bytes(broken), DecodeOptions(num_frames=24), "video")
        statuses.append(status)
        if concealed:
            assert status in ("corrupt", "truncated")
    assert whole.shape[0] == 24
    assert statuses.count("corrupt") > 10


def any_concealed(data):
    try:
        with av.open(io.BytesIO(data)) as container:
            return any(frame.is_corrupt for frame in container.decode(video=0))
    except av.error.FFmpegError:
        return True


def test_no_video_stream(sample_data):
    assert code(next((sample_data / "sounds").glob("*.wav")), modality="video") == "unsupported_format"


def test_helpers_can_tell_numbers_apart():
    assert numbers([np.full((2, 2), level(n)) for n in range(56)]) == list(range(56))
