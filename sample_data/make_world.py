"""A small world of coloured shapes, tones and moving shapes, and the sample files made from it.

    python sample_data/make_world.py            # writes the media and manifests beside this file

Everything follows from fixed seeds: with the same library versions the files come out byte for byte
the same. The training scripts learn from the same world through `random_scene`, `render` and `caption`.

The world is split so that "not trained on" can be checked instead of believed: `split_of(scene)`
is a function of what the scene shows, so a held-out scene differs from every training scene in at least
one of its attributes, and not only in its jitter.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import random
import wave
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 220, 40),
    "green": (35, 155, 60),
    "cyan": (50, 205, 215),
    "blue": (35, 70, 215),
    "purple": (125, 45, 165),
    "pink": (250, 135, 195),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
SHAPES = tuple(PLURALS)
SIZES = ("small", "large")
POSITIONS = {
    "left": "on the left of",
    "right": "on the right of",
    "top": "at the top of",
    "bottom": "at the bottom of",
    "centre": "in the centre of",
}
BACKGROUNDS = {"white": 240, "grey": 128, "black": 22}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

# One pair of every shape, each of another colour, is never shown and never named in training.
UNSEEN_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "ring"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("pink", "circle"),
    }
)
HELD_OUT_OF = 6  # one combination of attributes in six is kept from training

_CENTRES = {"left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72)}
_QUADRANTS = ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72))
_RADII = {"small": 0.11, "large": 0.2}


# ---------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """One picture's content. `position` is None when several shapes share the picture; `seed` picks jitter."""

    colour: str
    shape: str
    size: str
    position: str | None
    background: str
    count: int = 1
    seed: int = 0

    @property
    def label(self) -> str:
        """The class name, such as "red circle"."""
        return f"{self.colour} {self.shape}"


def split_of(scene: Scene) -> str:
    """Say which split a scene belongs to: "train", "heldout" or "unseen". Jitter plays no part in it."""
    if (scene.colour, scene.shape) in UNSEEN_PAIRS:
        return "unseen"
    shown = "|".join(str(value) for value in asdict(replace(scene, seed=0)).values())
    return "heldout" if zlib.crc32(shown.encode()) % HELD_OUT_OF == 0 else "train"


def random_scene(rng: random.Random, split: str = "train") -> Scene:
    """Draw a scene of a split; three in four show one shape, the others two to four alike."""
    while True:
        count = 1 if rng.random() < 0.75 else rng.choice((2, 3, 4))
        position = rng.choice(tuple(POSITIONS))
        scene = Scene(
            colour=rng.choice(tuple(COLOURS)),
            shape=rng.choice(SHAPES),
            size=rng.choice(SIZES),
            position=position if count == 1 else None,
            background=rng.choice(tuple(BACKGROUNDS)),
            count=count,
            seed=rng.randrange(2**31),
        )
        if split_of(scene) == split:
            return scene


def caption(scene: Scene) -> str:
    """Describe all that a scene shows: "a large red circle on the left of a white background"."""
    if scene.position is None:
        things = f"{NUMBERS[scene.count]} {scene.size} {scene.colour} {PLURALS[scene.shape]}"
        return f"{things} on a {scene.background} background"
    where = POSITIONS[scene.position]
    return f"a {scene.size} {scene.colour} {scene.shape} {where} a {scene.background} background"


def article(words: str) -> str:
    """Put "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Ask all that a scene can answer: a list of (question, answer)."""
    many = scene.count > 1
    name = PLURALS[scene.shape] if many else scene.shape
    verb, the = ("are", f"the {name}") if many else ("is", f"the {name}")
    other = SHAPES[(SHAPES.index(scene.shape) + 1 + scene.seed % (len(SHAPES) - 1)) % len(SHAPES)]
    asked = [
        (f"what colour {verb} {the}?", scene.colour),
        (f"what shape {verb} the {scene.colour} {'things' if many else 'thing'}?", scene.shape),
        ("how many shapes are there?", NUMBERS[scene.count]),
        (f"{verb} {the} small or large?", scene.size),
        ("what colour is the background?", scene.background),
        (f"is there a {scene.shape}?", "yes"),
        (f"is there a {other}?", "no"),
    ]
    if scene.position is not None:
        asked.append((f"where is the {scene.shape}?", scene.position))
    return asked


# --------------------------------------------------------------------------------------------- pictures


def render(scene: Scene, size: int = 128) -> Image.Image:
    """Draw a scene as a square RGB picture; the same scene always gives the same pixels."""
    rng = random.Random(f"place {scene}")
    if scene.position is None:
        places = rng.sample(_QUADRANTS, scene.count)
    else:
        places = [_CENTRES.get(scene.position, (0.5, 0.5))]
    jitter = 0.04
    centres = [(x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)) for x, y in places]
    return _paint(scene, centres, size)


def render_clip(scene: Scene, direction: str, frames: int = 18, size: int = 96) -> list[Image.Image]:
    """Draw a shape that moves "left", "right", "up" or "down" through the picture."""
    pictures = []
    for index in range(frames):
        along = 0.22 + 0.56 * index / (frames - 1)
        if direction in ("left", "up"):
            along = 1 - along
        centre = (along, 0.5) if direction in ("left", "right") else (0.5, along)
        pictures.append(_paint(scene, [centre], size))
    return pictures


def _paint(scene: Scene, centres: list[tuple[float, float]], size: int) -> Image.Image:
    """Put the shapes at their centres, with a jitter that depends on the scene alone."""
    rng = random.Random(f"paint {scene}")
    picture = _backdrop(BACKGROUNDS[scene.background], rng, size)
    base = COLOURS[scene.colour]
    colour = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in base)
    big = 2 * size  # drawn twice as large and halved: smooth edges without noise, so that PNG stays small
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    for x, y in centres:
        # Several large shapes must not touch: quadrants are 0.44 apart.
        radius = _RADII[scene.size] * rng.uniform(0.92, 1.08) * (0.85 if scene.count > 1 else 1.0)
        _draw_shape(draw, scene.shape, (x * big, y * big), radius * big, rng.uniform(-0.26, 0.26))
    picture.paste(colour, (0, 0), mask.reduce(2))
    return picture


def _backdrop(level: int, rng: random.Random, size: int) -> Image.Image:
    """Make a nearly plain ground, lit a little from one side."""
    level += rng.randint(-8, 8)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 14)
    axis = (np.arange(size) + 0.5) / size - 0.5
    light = level + slope * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])
    return Image.fromarray(np.clip(np.rint(light), 0, 255).astype(np.uint8)).convert("RGB")


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, turn: float
) -> None:
    x, y = centre
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = 0.55 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    points = []
    for angle, length in _outline(shape):
        points.append((x + radius * length * math.sin(angle + turn), y - radius * length * math.cos(angle + turn)))
    draw.polygon(points, fill=255)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Give a polygon's corners as (angle from the top, distance in radii)."""
    if shape == "triangle":
        return [(2 * math.pi * k / 3, 1.1) for k in range(3)]
    if shape == "square":
        return [(math.pi * (2 * k + 1) / 4, 1.1) for k in range(4)]
    if shape == "star":
        return [(math.pi * k / 5, 0.45 if k % 2 else 1.15) for k in range(10)]
    arm = 0.34  # half the width of a cross's arm
    inner, tip = math.hypot(arm, arm), math.hypot(arm, 1)
    corners = []
    for k in range(4):
        side = math.pi * k / 2
        corners += [(side - math.atan(arm), tip), (side + math.atan(arm), tip), (side + math.pi / 4, inner)]
    return corners


# ----------------------------------------------------------------------------------------- sample pictures


def sample_scenes() -> list[Scene]:
    """List the scenes in `images/`: held-out ones, each seen pair once, then six for the odd encodings."""
    rng = random.Random("sample pictures")
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS]
    scenes = [_draw_until(rng, lambda s, pair=pair: (s.colour, s.shape) == pair) for pair in pairs]
    scenes += [_draw_until(rng, lambda s, place=place: s.position == place) for place in ("left", "top")]
    plain = {"background": "white", "count": 1}
    scenes += [_draw_until(rng, lambda s: plain.items() <= asdict(s).items()) for _ in range(4)]
    return scenes


def _draw_until(rng: random.Random, wanted: Any) -> Scene:
    while True:
        scene = random_scene(rng, "heldout")
        if wanted(scene):
            return scene


def encode_picture(index: int, scene: Scene) -> tuple[str, bytes]:
    """Give a sample picture's file name and bytes. The last six are encoded as cameras and editors do it."""
    plain = len(LABELS) - len(UNSEEN_PAIRS)
    name = f"{index:02d}-{scene.colour}-{scene.shape}"
    if index < plain:
        picture = render(scene)
        if index % 2:
            return f"{name}.jpg", _encoded(picture, "JPEG", quality=92)
        return f"{name}.png", _encoded(picture, "PNG", optimize=True)
    variant = ("turned", "turned-wide", "palette", "alpha", "cmyk", "progressive")[index - plain]
    return _encode_variant(variant, name, scene)


def _encode_variant(variant: str, name: str, scene: Scene) -> tuple[str, bytes]:
    picture = render(scene)
    if variant.startswith("turned"):
        if variant == "turned-wide":
            picture = _widened(render(scene, 240))
        # Stored on its side; EXIF orientation 6 says "turn a quarter clockwise to view".
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = picture.transpose(Image.Transpose.ROTATE_90)
        return f"{name}-{variant}.jpg", _encoded(turned, "JPEG", quality=92, exif=exif)
    if variant == "palette":
        picture = picture.quantize(64, dither=Image.Dither.NONE)
        return f"{name}-palette.png", _encoded(picture, "PNG", optimize=True)
    if variant == "alpha":
        # Transparent where the white ground was, and white beneath: flattened or dropped, it looks the same.
        drawn = np.asarray(picture).astype(int)
        coloured = drawn.max(axis=2) - drawn.min(axis=2) > 0
        pixels = np.full((*coloured.shape, 4), (255, 255, 255, 0), np.uint8)
        pixels[coloured] = np.dstack([drawn, np.full(coloured.shape, 255)])[coloured]
        return f"{name}-alpha.png", _encoded(Image.fromarray(pixels), "PNG", optimize=True)
    if variant == "cmyk":
        return f"{name}-cmyk.jpg", _encoded(picture.convert("CMYK"), "JPEG", quality=92)
    return f"{name}-progressive.jpg", _encoded(picture, "JPEG", quality=85, progressive=True)


def _widened(picture: Image.Image) -> Image.Image:
    """Continue the ground to both sides, so that a centre crop gives the square picture back."""
    side = picture.width // 6
    pixels = np.pad(np.asarray(picture), ((0, 0), (side, side), (0, 0)), mode="edge")
    return Image.fromarray(pixels)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(folder: Path) -> None:
    """Write `images/`, `images.parquet`, `images.jsonl` and `questions.jsonl`."""
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    metadata, manifest, asked, stored = [], [], [], []
    for index, scene in enumerate(sample_scenes()):
        name, data = encode_picture(index, scene)
        (pictures / name).write_bytes(data)
        attributes = asdict(scene)
        del attributes["seed"]
        text = caption(scene)
        metadata.append({"file_name": name, "caption": text, "label": scene.label, **attributes})
        stored.append({"image": {"bytes": data, "path": name}, "caption": text, "label": scene.label})
        pairs = questions(scene)
        first = {"image": f"images/{name}", "caption": text, "label": scene.label}
        question, answer = pairs[index % len(pairs)]
        manifest.append({"id": f"picture-{index:02d}", **first, "question": question, "answer": answer})
        for step in range(3):
            question, answer = pairs[(index + 2 * step) % len(pairs)]
            asked.append({"image": f"images/{name}", "question": question, "answer": answer})
    _write_jsonl(pictures / "metadata.jsonl", metadata)
    _write_jsonl(folder / "images.jsonl", manifest)
    _write_jsonl(folder / "questions.jsonl", asked)
    write_typed_parquet(folder / "images.parquet", stored)


def write_typed_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with an `image` column that `datasets` recognises as pictures."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    # Only the media column is annotated: the types of the others are plain in Parquet itself.
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema(
        [("image", image), ("caption", pa.string()), ("label", pa.string())],
        metadata={b"huggingface": json.dumps(features).encode()},
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    # Pictures are compressed already, and a dictionary of unique bytes only costs time.
    pq.write_table(table, path, compression="none", use_dictionary=["label"])


# ------------------------------------------------------------------------------------------------- sounds

RATE = 16_000
PITCHES = {"low": 220.0, "middle": 660.0, "high": 1760.0}
TIMBRES = ("sine tone", "square tone", "sawtooth tone", "noise")
MANNERS = ("steady", "pulsing")


def sample_sounds() -> Iterator[tuple[str, str, str, str]]:
    """List the sounds as (file name, pitch, manner, timbre); wav and flac by turns."""
    every = [(pitch, manner, timbre) for pitch in PITCHES for manner in MANNERS for timbre in TIMBRES]
    for index, (pitch, manner, timbre) in enumerate(every):
        ending = "flac" if index % 2 else "wav"
        yield f"{index:02d}-{pitch}-{manner}-{timbre.replace(' ', '-')}.{ending}", pitch, manner, timbre


def synthesise(pitch: str, manner: str, timbre: str, rng: random.Random | None = None) -> np.ndarray:
    """Make a mono sound of int16 samples at 16 kHz, half a second to a second long; `rng` draws another one."""
    rng = rng or random.Random(f"{pitch} {manner} {timbre}")
    samples = int(RATE * rng.uniform(0.5, 0.9))
    hertz = PITCHES[pitch] * rng.uniform(0.97, 1.03)
    time = np.arange(samples) / RATE
    turns = hertz * time
    if timbre == "sine tone":
        sound = np.sin(2 * np.pi * turns)
    elif timbre == "square tone":
        sound = np.where(turns % 1 < 0.5, 0.6, -0.6)
    elif timbre == "sawtooth tone":
        sound = 1.4 * (turns % 1) - 0.7
    else:
        sound = _band_of_noise(rng, samples, hertz)
    if manner == "pulsing":
        sound = sound * (time * 8 % 1 < 0.5)
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.01)  # 10 ms, so that no click starts or ends it
    return np.rint(sound * fade * 0.5 * 32767).astype(np.int16)


def _band_of_noise(rng: random.Random, samples: int, hertz: float) -> np.ndarray:
    """Add sines at random frequencies within a third of an octave around a pitch."""
    time = np.arange(samples) / RATE
    total = np.zeros(samples)
    for _ in range(60):
        frequency = hertz * 2 ** rng.uniform(-1 / 3, 1 / 3)
        total += np.sin(2 * np.pi * (frequency * time + rng.random()))
    return total / np.abs(total).max()


def write_sounds(folder: Path) -> None:
    """Write `sounds/` and `sounds.csv`."""
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, pitch, manner, timbre in sample_sounds():
        path = folder / "sounds" / name
        sound = synthesise(pitch, manner, timbre)
        if path.suffix == ".wav":
            write_sound(path, sound)
        else:
            _write_flac(path, sound)
        rows.append(
            {
                "audio": f"sounds/{name}",
                "caption": f"a {pitch} {manner} {timbre}",
                "label": timbre,
                "pitch": pitch,
                "manner": manner,
            }
        )
    _write_csv(folder / "sounds.csv", rows)


def write_sound(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.astype("<i2").tobytes())


def _write_flac(path: Path, sound: np.ndarray) -> None:
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=RATE)
        stream.codec_context.layout = "mono"
        stream.codec_context.format = "s16"
        frame = av.AudioFrame.from_ndarray(sound[None, :], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ------------------------------------------------------------------------------------------- videos, texts

FRAME_RATE = 12


def sample_clips() -> list[tuple[str, Scene, str]]:
    """List the clips as (file name, scene, direction)."""
    rng = random.Random("sample clips")
    clips = []
    for index, direction in enumerate(("left", "right", "up", "down", "right", "up")):
        scene = _draw_until(rng, lambda s: s.position == "centre" and s.size == "large")
        name = f"{index:02d}-{scene.colour}-{scene.shape}-{direction}.mp4"
        clips.append((name, scene, direction))
    return clips


def write_videos(folder: Path) -> None:
    """Write `videos/` and `videos.csv`."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, scene, direction in sample_clips():
        _write_mp4(folder / "videos" / name, render_clip(scene, direction))
        text = f"{article(scene.label)} moving {direction} on a {scene.background} background"
        rows.append({"video": f"videos/{name}", "caption": text, "label": scene.label, "direction": direction})
    _write_csv(folder / "videos.csv", rows)


def _write_mp4(path: Path, pictures: list[Image.Image]) -> None:
    # With x264's assembly, 11 of 720 files came out different; without it and on one thread, none of 1,080.
    encoder = {"crf": "20", "x264-params": "no-asm=1"}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=encoder)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))


def write_texts(folder: Path) -> None:
    """Write `labels.txt`, `texts/` and `texts.csv`."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS), encoding="utf-8")
    rng = random.Random("sample texts")
    rows = []
    for index in range(12):
        scene = random_scene(rng, "heldout")
        rows.append({"id": f"text-{index:02d}", "text": caption(scene), "label": scene.label})
    for row in rows[:6]:
        (folder / "texts" / f"{row['id']}.txt").write_text(row["text"] + "\n", encoding="utf-8")
    _write_csv(folder / "texts.csv", rows)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode())


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_world(folder: Path) -> None:
    """Write every sample file except the trained checkpoint."""
    write_pictures(folder)
    write_sounds(folder)
    write_videos(folder)
    write_texts(folder)


def main() -> None:
    """Parse the command line and write the world."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    write_world(parser.parse_args().out)


if __name__ == "__main__":
    main()
