"""Opening a medium, and telling what it is: by content, whatever its name."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from media_helpers import clip, code, decoded, encoded, encoded_sound, numbered, picture, tone

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions, Media
from mmcli.media.decode import decode

ANY = DecodeOptions()
JPEG = encoded(picture(), "JPEG")
SOUND = (tone() * 32767).astype(np.int16)


def error(media, options=ANY):
    with pytest.raises(RowError) as caught:
        decode(media, options)
    assert caught.value.stage == "decode"
    return caught.value


# Opening


def test_what_cannot_be_opened(tmp_path):
    assert error(Media(file=str(tmp_path / "absent.jpg"))).code == "not_found"
    (tmp_path / "file").write_bytes(JPEG)
    assert error(Media(file=str(tmp_path / "file" / "below.jpg"))).code == "not_found"
    assert error(Media(file="a\0b")).code == "bad_row"
    assert error(Media(file=str(tmp_path / ("x" * 300)))).code == "io"
    os.symlink("loop", tmp_path / "loop")
    assert error(Media(file=str(tmp_path / "loop"))).code == "io"


def test_no_permission(tmp_path):
    """Root may read everything: the file is opened as nobody."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    secret.chmod(0)
    script = (
        "import os, sys; from mmcli.media.decode import decode; from mmcli.core.records import *\n"
        "from mmcli.core.errors import RowError\n"
        "os.geteuid() or os.setresuid(65534, 65534, 65534)\n"
        "try: decode(Media(file=sys.argv[1]), DecodeOptions())\n"
        "except RowError as error: print(error.code)"
    )
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    run = subprocess.run([sys.executable, "-c", script, str(secret)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "permission"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for a writer for ever
    assert error(Media(file=str(tmp_path / "pipe.jpg"))).code == "bad_row"
    assert "pipe" in error(Media(file=str(tmp_path / "pipe.jpg"))).message
    assert error(Media(file=str(tmp_path))).code == "bad_row"
    assert "folder" in error(Media(file=str(tmp_path))).message
    assert error(Media(file="/dev/zero")).code == "bad_row"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(tmp_path / "socket"))
        assert error(Media(file=str(tmp_path / "socket"))).code == "bad_row"


def test_a_file_that_changed_since_it_was_listed(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    found = path.stat()
    listed = Media(file=str(path), size=found.st_size, mtime_ns=found.st_mtime_ns)
    assert decode(listed, ANY)[0] == "image"
    os.utime(path, ns=(0, found.st_mtime_ns + 1))
    assert error(listed).code == "input_changed"
    path.write_bytes(JPEG + b"more")
    os.utime(path, ns=(0, found.st_mtime_ns))
    assert error(listed).code == "input_changed"


def test_too_large(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    assert decode(Media(file=str(path)), DecodeOptions(max_bytes=len(JPEG)))[0] == "image"
    for media in (Media(file=str(path)), Media(data=JPEG)):
        assert error(media, DecodeOptions(max_bytes=len(JPEG) - 1)).code == "too_large"


def test_a_huge_picture_file_is_not_read_into_memory(tmp_path):
    path = tmp_path / "huge.jpg"
    path.write_bytes(JPEG)
    # Sparse: takes no space on the disk, but would take 3 GB of memory.
    os.truncate(path, 3 * 1024**3)
    problem = error(Media(file=str(path)))
    assert problem.code == "too_large"
    assert "3221225472 bytes" in problem.message


def test_a_name_that_is_not_utf8(tmp_path):
    for name, data in ((b"caf\xe9.jpg", JPEG), (b"caf\xe9.wav", encoded_sound(SOUND, 16000))):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(data)
        assert decode(Media(file=os.fsdecode(path)), ANY)[0] in ("image", "audio")


@pytest.mark.parametrize("modality", ["image", "audio", "video", None])
def test_an_empty_file_is_a_truncated_one(tmp_path, modality):
    """It is what an interrupted copy leaves. Only a text may be empty."""
    (tmp_path / "empty.bin").write_bytes(b"")
    assert error(Media(modality, file=str(tmp_path / "empty.bin"))).code == "truncated"
    assert error(Media(modality, data=b"")).code == "truncated"


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip(numbered(5)))
    (tmp_path / "b.mp4").write_bytes(clip(numbered(5))[:-50])
    (tmp_path / "c.jpg").write_bytes(JPEG[:-50])
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a.mp4", "b.mp4", "c.jpg") * 3:
        code(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


# What it is


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files by what they hold."""
    folder = tmp_path_factory.mktemp("media")
    held = {
        "photo": JPEG,
        "drawing": encoded(picture(), "PNG"),
        "animation": encoded(picture(), "GIF", save_all=True, append_images=[]),
        "sound": encoded_sound(SOUND, 16000),
        "flac": encoded_sound(SOUND, 16000, "flac", "flac"),
        "mp3": encoded_sound(SOUND, 16000, "mp3", "libmp3lame", sample_format="s16p"),
        "opus": encoded_sound((tone(rate=48000) * 32767).astype(np.int16), 48000, "ogg", "libopus"),
        "m4a": encoded_sound(tone().astype(np.float32), 16000, "mp4", "aac", sample_format="fltp"),
        "clip": clip(numbered(6)),
        "talkie": clip(numbered(12), sound=tone()),
        "webm": clip(numbered(6), "webm", "libvpx"),
        "words": "a naïve café\n".encode(),
    }
    for name, data in held.items():
        (folder / name).write_bytes(data)
    return folder


HELD = {
    "photo": "image", "drawing": "image", "animation": "image", "sound": "audio", "flac": "audio", "mp3": "audio",
    "opus": "audio", "m4a": "audio", "clip": "video", "talkie": "video", "webm": "video", "words": "text",
}  # fmt: skip


@pytest.mark.parametrize("name", ["", ".jpg", ".png", ".txt", ".mp3", ".wav", ".mp4", ".webm", ".json"])
@pytest.mark.parametrize("held", HELD)
def test_the_content_decides_whatever_the_name_says(media, tmp_path, held, name):
    path = tmp_path / f"x{name}"
    shutil.copyfile(media / held, path)
    if held == "words" and name not in ("", ".txt", ".json"):
        assert code(path) == "unsupported_format"  # an error page saved as photo.jpg is not a caption
    else:
        assert code(path) == HELD[held]
        assert code(path.read_bytes()) == HELD[held]


def test_cover_art_is_no_video(tmp_path):
    """FFmpeg shows the picture of an mp3 or m4a as a video stream."""
    mp3 = encoded_sound(SOUND, 16000, "mp3", "libmp3lame", sample_format="s16p")
    body = b"\0image/jpeg\0\x03\0" + JPEG
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes([len(frame) >> 21 & 127, len(frame) >> 14 & 127, len(frame) >> 7 & 127, len(frame) & 127])
    covered = b"ID3\x03\0\0" + size + frame + mp3[mp3.index(b"\xff\xf3") if b"\xff\xf3" in mp3[:200] else 0 :]
    modality, sound = decoded(covered)
    assert modality == "audio"
    assert len(sound.waveform) == pytest.approx(16000, abs=2000)
    assert code(covered, modality="video") == "unsupported_format"


def test_a_modality_of_the_manifest_is_obeyed(media):
    assert code(media / "words", modality="text") == "text"
    assert code(media / "photo", modality="text") == "corrupt"
    assert code(media / "photo", modality="audio") == "unsupported_format"
    assert code(media / "sound", modality="image") == "unsupported_format"
    assert code(media / "sound", modality="video") == "unsupported_format"
    assert code(media / "clip", modality="audio") == "unsupported_format"
    for still in ("photo", "drawing", "animation"):  # FFmpeg would play each of them
        assert code(media / still, modality="video") == "unsupported_format"
    modality, sound = decoded(media / "talkie", modality="audio")
    assert modality == "audio"
    assert sound.sampling_rate == 16000


def test_what_the_model_does_not_take_is_named(media):
    takes = DecodeOptions(modalities=frozenset({"image", "text"}))
    for held in ("sound", "talkie"):
        failure = error(Media(file=str(media / held)), takes)
        assert failure.code == "unsupported_format"
        assert f"this is {HELD[held]}" in failure.message
        assert "image and text" in failure.message
    assert error(Media("audio", file="not/even/opened"), takes).code == "unsupported_format"
    assert error(Media(text="words"), DecodeOptions(modalities=frozenset({"image"}))).code == "unsupported_format"


def test_a_video_is_audio_to_a_model_that_only_hears(media):
    hears = DecodeOptions(modalities=frozenset({"audio", "text"}))
    modality, sound = decode(Media(file=str(media / "talkie")), hears)
    assert modality == "audio"
    assert len(sound.waveform) == pytest.approx(16000, abs=1100)
    silent = error(Media(file=str(media / "clip")), hears)
    assert silent.code == "unsupported_format"
    assert "no sound" in silent.message


PLAYLISTS = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nsecret.wav\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile secret.wav\n",
    b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>secret.wav</BaseURL></MPD>",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    b"[InternetShortcut]\nURL=http://127.0.0.1/secret.wav\n",
]


@pytest.mark.parametrize("playlist", PLAYLISTS)
def test_a_playlist_opens_nothing(tmp_path, monkeypatch, playlist):
    (tmp_path / "secret.wav").write_bytes(encoded_sound(SOUND, 16000))
    monkeypatch.chdir(tmp_path)
    for name in ("list.mp4", "list.m3u8", "list"):
        (tmp_path / name).write_bytes(playlist)
        for modality in ("audio", "video"):
            assert code(tmp_path / name, modality=modality) == "unsupported_format"


def test_inline_text_stays_as_it_is():
    for text in ("", " a\r\n", "\ufeffb", "nul \0"):
        assert decode(Media(text=text), ANY) == ("text", text)


# Texts


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""), (b"\n", ""), (b"a\n", "a"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b" a ", " a "),
        (b"a\r\nb\r\n", "a\r\nb"), ("naïve 日本".encode(), "naïve 日本"), (b"\xef\xbb\xbfbom\n", "bom"),
        ("née\n".encode("utf-16"), "née"), ("né".encode("utf-16-be").join([b"\xfe\xff", b""]), "né"),
    ],
)  # fmt: skip
def test_texts(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert decoded(tmp_path / "a.txt") == ("text", text)
    assert decoded(data, modality="text") == ("text", text)


def test_what_is_not_text_says_where(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    failure = error(Media(file=str(tmp_path / "latin.txt")))
    assert failure.code == "corrupt"
    assert "byte 3" in failure.message
    assert "0xe9" in failure.message
    late = b"a" * 10_000 + b"\xff"  # beyond what is looked at first
    assert error(Media(data=late)).code == "corrupt"
    assert "byte 10000" in error(Media(data=late)).message
    assert error(Media("text", data=b"a\0b")).code == "unsupported_format"
    assert decode(Media(data="é".encode() * 4096), ANY)[0] == "text"  # one is cut in two by the first look


def test_a_text_that_begins_like_a_picture(tmp_path):
    for words in (b"BMW is a car", b"P6 is a size", b"II*", b"GIF89a is a format"):
        (tmp_path / "a.txt").write_bytes(words)
        assert decoded(tmp_path / "a.txt") == ("text", words.decode())


def test_importing_the_entry_point_is_cheap():
    script = (
        "import sys, mmcli.media.decode; print(*(m for m in ('PIL', 'av', 'torch', 'numpy') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_noise_of_every_size_is_an_error():
    rng = np.random.default_rng(1)
    for size in (1, 2, 3, 10, 100, 5000, 100_000):
        for _ in range(5):
            assert code(b"\xff\0" + rng.bytes(size)) in ("unsupported_format", "corrupt", "truncated")
    assert code(bytes(5000)) == "unsupported_format"


def test_a_time_beyond_64_bits(tmp_path):
    """Such times come from broken clocks and archives."""
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    os.utime(path, (13_569_465_600, 13_569_465_600))  # 2400
    if os.stat(path).st_mtime_ns < 2**63:
        pytest.skip("this file system does not know the year 2400")
    assert decode(Media(file=str(path), size=len(JPEG), mtime_ns=2**63 - 1), ANY)[0] == "image"
    assert error(Media(file=str(path), size=len(JPEG), mtime_ns=0)).code == "input_changed"


def test_a_medium_that_the_record_lacks_has_no_content():
    assert decode(Media("audio"), DecodeOptions()) == ("audio", None)
    with pytest.raises(RowError, match="the model takes image"):
        decode(Media("audio"), DecodeOptions(frozenset(["image"])))
    # A file may be empty; that is not the same.
    with pytest.raises(RowError, match="the file is empty"):
        decode(Media("audio", data=b""), DecodeOptions())
