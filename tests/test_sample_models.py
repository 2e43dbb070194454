"""The small captioner is right about pictures that it was not trained on."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

SCRIPTS = {"captioner": "train_captioner"}
CLASSES = {"captioner": "BlipForConditionalGeneration"}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(path: Path) -> Image.Image:
    """Open a picture as a viewer does: upright, and transparency on white."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode == "RGBA":
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


@pytest.fixture(scope="module")
def scripts(sample_data: Path) -> Iterator[Any]:
    """Import the modules of sample_data, which is a folder of scripts and no package."""
    sys.path.insert(0, str(sample_data))
    yield importlib.import_module
    sys.path.remove(str(sample_data))


@pytest.fixture(scope="module")
def world(scripts: Any) -> ModuleType:
    return scripts("make_world")


@pytest.fixture(scope="module")
def captioner(sample_data: Path) -> tuple:
    return opened(sample_data / "models" / "captioner")


def opened(folder: Path) -> tuple:
    import transformers

    kind = getattr(transformers, CLASSES[folder.name])
    return kind.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)


def captions(captioner: tuple, pictures: list[Image.Image], **prompt: list[str]) -> list[str]:
    model, processor = captioner
    inputs = processor(images=pictures, return_tensors="pt", **prompt)
    return processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)


def share(found: list[str], wanted: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


# ------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("name", CLASSES)
def test_checkpoint_is_complete_and_small(sample_data: Path, name: str) -> None:
    folder = sample_data / "models" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    model, processor = opened(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [CLASSES[name]]
    assert type(processor).__name__ == "BlipProcessor"
    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.float32"}
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\nlicense: apache-2.0")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_seed_trains_the_same_weights(scripts: Any, name: str) -> None:
    import torch

    script, training = scripts(SCRIPTS[name]), scripts("training")
    threads = torch.get_num_threads()
    ends = []
    for seed in (3, 3, 4):
        training.settle(seed, 1)
        processor = script.make_processor(seed)
        model = script.make_model(processor)
        script.train(model, script.Batches(processor, 32, 8, seed), 3)
        ends.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.set_num_threads(threads)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_shows_no_held_out_scene(scripts: Any, world: ModuleType, name: str) -> None:
    script = scripts(SCRIPTS[name])
    batches = script.Batches(script.make_processor(0), 300, 8, 0)
    assert {world.split_of(scene) for scene in batches.pictures.scenes} == {"train"}


# ------------------------------------------------------------------------------------- the captioner


def test_captions_of_the_sample_pictures(sample_data: Path, captioner: tuple) -> None:
    rows = read_rows(sample_data / "images" / "metadata.jsonl")
    found = captions(captioner, [shown(sample_data / "images" / row["file_name"]) for row in rows])
    assert share(found, [row["caption"] for row in rows]) >= 0.8
    # The last six are encoded in odd ways.
    assert share(found[-6:], [row["caption"] for row in rows[-6:]]) >= 0.6


def test_captions_of_new_scenes(world: ModuleType, captioner: tuple) -> None:
    rng = random.Random("captions that only this test wants")
    scenes = [world.random_scene(rng, "heldout") for _ in range(200)]
    found = captions(captioner, [world.render(scene) for scene in scenes])
    assert share(found, [world.caption(scene) for scene in scenes]) >= 0.8


def test_captions_go_on_from_a_prompt(world: ModuleType, captioner: tuple) -> None:
    rng = random.Random("prompts")
    scenes = [world.random_scene(rng, "heldout") for _ in range(60)]
    pictures = [world.render(scene) for scene in scenes]
    found = captions(captioner, pictures, text=["a picture of"] * len(scenes))
    assert share(found, [f"a picture of {world.caption(scene)}" for scene in scenes]) >= 0.8
    assert not any("picture" in text for text in captions(captioner, pictures))


def test_mmcli_captions_the_sample_pictures(sample_data: Path) -> None:
    command = [sys.executable, "-m", "mmcli", "caption", sample_data / "images"]
    done = subprocess.run(
        [*command, "-m", sample_data / "models" / "captioner"], capture_output=True, text=True, check=True
    )
    wanted = {row["file_name"]: row["caption"] for row in read_rows(sample_data / "images" / "metadata.jsonl")}
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(wanted)
    right = [row["caption"] == wanted[Path(row["id"]).name] for row in rows]
    assert np.mean(right) >= 0.8
    assert {row["finish_reason"] for row in rows} == {"stop"}
