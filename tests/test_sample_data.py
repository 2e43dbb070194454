"""The sample files are what their generator makes, agree with one another, and the model knows them."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

MEDIA = {"images": "images.jsonl", "sounds": "sounds.csv", "videos": "videos.csv"}
TABLES = ("images.jsonl", "questions.jsonl", "sounds.csv", "videos.csv", "texts.csv", "labels.txt")


@pytest.fixture(scope="module")
def world(sample_data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_world", sample_data / "make_world.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_world"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made_again(world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write_world(folder)
    return folder


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pixels(source: Path | bytes) -> np.ndarray:
    """Decode as a viewer shows it: upright, and transparency on white."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(opened) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode == "RGBA":
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.asarray(upright.convert("RGB")).astype(int)


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def samples(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert (stream.rate, stream.channels) == (16_000, 1)
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(stream)]).astype(int)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- the generator


def test_tables_come_out_the_same(sample_data: Path, made_again: Path) -> None:
    texts = sorted(name for name in names(made_again) if name.startswith("texts/"))
    for name in (*TABLES, "images/metadata.jsonl", *texts):
        assert (made_again / name).read_bytes() == (sample_data / name).read_bytes(), name


@pytest.mark.parametrize("kind", [*MEDIA, "texts"])
def test_no_file_is_missing_or_left_over(sample_data: Path, made_again: Path, kind: str) -> None:
    assert names(sample_data / kind) == names(made_again / kind)


def test_pictures_come_out_the_same(sample_data: Path, made_again: Path) -> None:
    for path in sorted((sample_data / "images").glob("*.[jp][pn]g")):
        difference = np.abs(pixels(path) - pixels(made_again / "images" / path.name))
        # JPEG decoders may differ by a level or two from one release to the next.
        assert difference.max() <= (0 if path.suffix == ".png" else 4), path.name


def test_sounds_and_clips_come_out_the_same(sample_data: Path, made_again: Path) -> None:
    for path in sorted((sample_data / "sounds").iterdir()):
        again = samples(made_again / "sounds" / path.name)
        np.testing.assert_allclose(samples(path), again, atol=1, err_msg=path.name)
    for path in sorted((sample_data / "videos").iterdir()):
        assert np.abs(frames(path) - frames(made_again / "videos" / path.name)).mean() < 2, path.name


def test_pictures_show_their_scene_upright(sample_data: Path, world: ModuleType) -> None:
    for index, scene in enumerate(world.sample_scenes()):
        (path,) = (sample_data / "images").glob(f"{index:02d}-*")
        shown = pixels(path)
        side = min(shown.shape[:2])
        left = (shown.shape[1] - side) // 2
        coloured = np.ptp(shown[:, left : left + side], axis=2) > 50
        wanted = np.ptp(np.asarray(world.render(scene, side)).astype(int), axis=2) > 50
        # Measured: 0.86 or more (JPEG blurs the colour of small rings); 0.0 for the EXIF ones left unturned.
        assert (coloured & wanted).sum() > 0.8 * (coloured | wanted).sum(), path.name


def test_clips_move_as_their_caption_says(sample_data: Path) -> None:
    for row in read_rows(sample_data / "videos.csv"):
        clip = frames(sample_data / row["video"])
        assert clip.shape == (18, 96, 96, 3)
        colourful = np.ptp(clip[[0, -1]], axis=3) > 60
        (y0, x0), (y1, x1) = (np.argwhere(frame).mean(axis=0) for frame in colourful)
        moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
        assert max(moved, key=lambda name: moved[name]) == row["direction"], row


def test_splits_do_not_overlap(world: ModuleType) -> None:
    rng = random.Random(5)
    shown = {}
    for split in ("train", "heldout", "unseen"):
        scenes = [world.random_scene(rng, split) for _ in range(400)]
        assert {world.split_of(scene) for scene in scenes} == {split}
        shown[split] = {world.caption(scene) for scene in scenes}
    assert not shown["train"] & (shown["heldout"] | shown["unseen"])
    assert {world.split_of(scene) for scene in world.sample_scenes()} == {"heldout"}


def test_questions_are_answered_by_the_scene(world: ModuleType) -> None:
    scene = world.Scene("red", "star", "small", "left", "black", seed=3)
    answers = dict(world.questions(scene))
    assert answers["what colour is the star?"] == "red"
    assert answers["where is the star?"] == "left"
    assert world.caption(scene) == "a small red star on the left of a black background"
    several = world.Scene("blue", "cross", "large", None, "grey", count=3)
    assert dict(world.questions(several))["how many shapes are there?"] == "three"
    assert world.caption(several) == "three large blue crosses on a grey background"


# ------------------------------------------------------------------------------------------- the manifests


@pytest.mark.parametrize("kind", MEDIA)
def test_manifests_list_every_file_once(sample_data: Path, kind: str) -> None:
    listed = [row[kind.removesuffix("s").replace("sound", "audio")] for row in read_rows(sample_data / MEDIA[kind])]
    present = {f"{kind}/{name}" for name in names(sample_data / kind)} - {"images/metadata.jsonl"}
    assert sorted(listed) == sorted(present)


def test_tables_agree_with_one_another(sample_data: Path) -> None:
    labels = (sample_data / "labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(set(labels)) == 48
    manifest = {row["image"]: row for row in read_rows(sample_data / "images.jsonl")}
    for row in read_rows(sample_data / "images" / "metadata.jsonl"):
        listed = manifest[f"images/{row['file_name']}"]
        assert (row["caption"], row["label"]) == (listed["caption"], listed["label"])
        assert row["label"] == f"{row['colour']} {row['shape']}"
        assert row["label"] in labels
    assert {row["image"] for row in read_rows(sample_data / "questions.jsonl")} == set(manifest)


def test_parquet_holds_the_pictures(sample_data: Path) -> None:
    table = pq.read_table(sample_data / "images.parquet")
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}
    metadata = read_rows(sample_data / "images" / "metadata.jsonl")
    for row, listed in zip(table.to_pylist(), metadata, strict=True):
        assert row["image"]["path"] == listed["file_name"]
        assert (row["caption"], row["label"]) == (listed["caption"], listed["label"])
        assert row["image"]["bytes"] == (sample_data / "images" / listed["file_name"]).read_bytes()


def test_sample_data_is_small(sample_data: Path) -> None:
    sizes = {path: path.stat().st_size for path in sample_data.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if "models" not in path.parts) < 4e6
    for folder in (sample_data / "models").iterdir():
        assert sum(size for path, size in sizes.items() if folder in path.parents) < 6e6, folder.name


# ------------------------------------------------------------------------------------------ the checkpoint


@pytest.fixture(scope="module")
def clip(sample_data: Path) -> tuple:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = sample_data / "models" / "clip"
    return (
        AutoModel.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )


def text_vectors(clip: tuple, texts: list[str]) -> np.ndarray:
    import torch

    model, _, tokenizer = clip
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        vectors = model.get_text_features(**tokens).pooler_output.numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def picture_vectors(clip: tuple, pictures: list[Image.Image]) -> np.ndarray:
    import torch

    model, processor, _ = clip
    with torch.no_grad():
        vectors = model.get_image_features(**processor(pictures, return_tensors="pt")).pooler_output.numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_checkpoint_is_complete(sample_data: Path, clip: tuple) -> None:
    from transformers import AutoProcessor

    folder = sample_data / "models" / "clip"
    model, image_processor, tokenizer = clip
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "CLIPModel"
    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.float32"}
    assert processor.image_processor.crop_size == image_processor.crop_size
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert (folder / "model.safetensors").stat().st_size < 5e6


@pytest.mark.parametrize("template", ["a photo of a {}", "{}"])
def test_zero_shot_names_new_scenes(world: ModuleType, clip: tuple, template: str) -> None:
    rng = random.Random("scenes that only this test draws")
    scenes = [world.random_scene(rng, "heldout") for _ in range(200)]
    classes = text_vectors(clip, [template.format(label) for label in world.LABELS])
    chosen = (picture_vectors(clip, [world.render(s) for s in scenes]) @ classes.T).argmax(axis=1)
    right = [world.LABELS[index] == scene.label for index, scene in zip(chosen, scenes, strict=True)]
    assert np.mean(right) >= 0.9


def test_zero_shot_names_the_sample_pictures(sample_data: Path, world: ModuleType, clip: tuple) -> None:
    rows = read_rows(sample_data / "images.jsonl")
    pictures = [Image.fromarray(pixels(sample_data / row["image"]).astype(np.uint8)) for row in rows]
    classes = text_vectors(clip, [f"a photo of a {label}" for label in world.LABELS])
    chosen = (picture_vectors(clip, pictures) @ classes.T).argmax(axis=1)
    right = [world.LABELS[index] == row["label"] for index, row in zip(chosen, rows, strict=True)]
    assert np.mean(right) >= 0.9


def test_padding_and_case_leave_text_vectors_alone(clip: tuple) -> None:
    long = "a photo of a large green cross on the left of a white background, and words that it never saw"
    alone = text_vectors(clip, ["red circle"])[0]
    padded = text_vectors(clip, ["red circle", long, "RED  Circle"])
    np.testing.assert_allclose(padded[0], alone, atol=1e-5)
    np.testing.assert_allclose(padded[2], alone, atol=1e-5)
    assert padded[1] @ alone < 0.9


def test_no_text_holds_an_end_token_inside(clip: tuple) -> None:
    # The text vector is read at the first end token, which is also this tokenizer's unknown token.
    model, _, tokenizer = clip
    end = tokenizer.eos_token_id
    assert model.config.text_config.eos_token_id == end
    for text in ("red circle", "naïve café, 漢字!", "emoji \U0001f534 42 %", ""):
        assert tokenizer(text)["input_ids"].count(end) == 1, text
