"""Train a small but genuine BLIP captioner on the world of `make_world.py`, from scratch, on two CPU cores.

    python sample_data/train_captioner.py       # writes sample_data/models/captioner, with a model card

The recipe is that of `training.py`. Some training captions begin with a prompt ("a photo of"): the model goes on
from these, and hardly ever begins with one itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import make_world as world
import torch
import training
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

SIDE = 60
VISION = {
    "image_size": SIDE,
    "patch_size": 12,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
}
TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
POSITIONS = 96  # mmcli's default of 50 new tokens, and a long prompt
PROMPTS = ("a photo of", "a picture of", "an image of", "a drawing of", "this is", "there is", "it shows")
PROMPT_SHARE = 0.2
VALIDATED = 200
OBLONG_SHARE = 0.2  # pictures that are not square, and that the processor squeezes


def make_processor(seed: int) -> BlipProcessor:
    """Build BLIP's processor with the words of captions and prompts."""
    captions = [world.caption(scene) for scene in training.draw_scenes(4000, "train", f"words {seed}")]
    return training.blip_processor([*captions, *PROMPTS], SIDE, POSITIONS)


def make_model(processor: BlipProcessor) -> BlipForConditionalGeneration:
    """Build an untrained BLIP of about 1.4 million parameters."""
    model = BlipForConditionalGeneration(training.blip_config(processor.tokenizer, VISION, TEXT))
    embeddings = model.vision_model.embeddings
    training.start_vision(embeddings.patch_embedding.weight, embeddings.position_embedding)
    return model


def rows(scenes: int, split: str, seed: int) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Pictures with their captions, some behind a prompt, and their attributes."""
    stretched, prompts = random.Random("oblong"), random.Random("prompts")
    for scene in training.draw_scenes(scenes, split, f"captions {seed}"):
        picture = world.render(scene)
        if stretched.random() < OBLONG_SHARE:
            picture = training.oblong(picture, stretched)
        caption = world.caption(scene)
        if split == "train" and prompts.random() < PROMPT_SHARE:
            caption = f"{prompts.choice(PROMPTS)} {caption}"
        yield picture, {"caption": caption, **training.facts_of(scene)}


def write(folder: Path, scenes: int, seed: int) -> None:
    """Write the rows and the untrained checkpoint."""
    processor = make_processor(seed)
    training.save(make_model(processor), processor, folder / "start")
    training.write_rows(folder, "train", rows(scenes, "train", seed))
    training.write_rows(folder, "val", rows(VALIDATED, "heldout", seed))


@torch.no_grad()
def write_captions(folder: Path, pictures: Sequence[Image.Image], prompt: str | None = None) -> list[str]:
    """Caption pictures as a user of transformers would, with the saved checkpoint."""
    processor = BlipProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder)
    written = []
    for start in range(0, len(pictures), 64):
        part = list(pictures[start : start + 64])
        text = {} if prompt is None else {"text": [prompt] * len(part)}
        inputs = processor(images=part, return_tensors="pt", **text)
        written += processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)
    return written


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Measure exact captions of the sample pictures, of held-out scenes and of never-seen pairs."""
    listed = training.read_jsonl(training.HERE / "images" / "metadata.jsonl")
    files = [training.upright(training.HERE / "images" / row["file_name"]) for row in listed]
    held_out = training.draw_scenes(1000, "heldout", f"evaluation {seed}")
    unseen = training.draw_scenes(500, "unseen", f"evaluation {seed}")
    drawn, wanted = [world.render(scene) for scene in held_out], [world.caption(scene) for scene in held_out]
    prompted = write_captions(folder, drawn, "a photo of")
    return {
        "the 48 pictures of `images/`": training.exact_match(
            write_captions(folder, files), [row["caption"] for row in listed]
        ),
        "1,000 new scenes of seen pairs": training.exact_match(write_captions(folder, drawn), wanted),
        'the same, after the prompt "a photo of"': training.exact_match(
            prompted, [f"a photo of {caption}" for caption in wanted]
        ),
        "500 new scenes of never-seen pairs": training.exact_match(
            write_captions(folder, [world.render(scene) for scene in unseen]), [world.caption(s) for s in unseen]
        ),
    }


def main() -> None:
    """Train, save and evaluate one model."""
    args = training.arguments(__doc__, "captioner", scenes=24_000)
    training.settle(args.seed, args.threads)
    training.train(
        "captioner",
        args,
        lambda folder: write(folder, args.scenes, args.seed),
        evaluate,
        {
            "input": f"pictures, squeezed to {SIDE} x {SIDE}; a prompt, such as {PROMPTS[0]!r}, is optional",
            "output": '"a large red circle on the left of a white background", "two small blue rings on a ..."',
        },
        title="A tiny BLIP that captions coloured shapes",
        pipeline="image-to-text",
        limits="On photos its captions mean nothing.",
    )


if __name__ == "__main__":
    main()
