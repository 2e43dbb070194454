"""Train a small but genuine BLIP for visual question answering on the world of `make_world.py`, from scratch.

    python sample_data/train_vqa.py             # writes sample_data/models/vqa, with a model card

The recipe is that of `training.py`; every picture is asked several questions, each a row.
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
from transformers import BlipForQuestionAnswering, BlipProcessor

SIDE = 60
# BLIP's decoder reads the question's states as if they came from the picture: both must be of one width.
WIDTH = 112
VISION = {
    "image_size": SIDE,
    "patch_size": 12,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 4,
}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}  # encoder and decoder each
POSITIONS = 96
ASKED = 4  # questions about each picture
VALIDATED = 100
OBLONG_SHARE = 0.2  # pictures that are not square, and that the processor squeezes


def make_processor(seed: int) -> BlipProcessor:
    """Build BLIP's processor with the words of questions and answers."""
    scenes = training.draw_scenes(4000, "train", f"words {seed}")
    texts = [text for scene in scenes for pair in world.questions(scene) for text in pair]
    return training.blip_processor([*texts, "color it"], SIDE, POSITIONS)


def make_model(processor: BlipProcessor) -> BlipForQuestionAnswering:
    """Build an untrained BLIP of about 1.4 million parameters."""
    model = BlipForQuestionAnswering(training.blip_config(processor.tokenizer, VISION, TEXT))
    embeddings = model.vision_model.embeddings
    training.start_vision(embeddings.patch_embedding.weight, embeddings.position_embedding)
    return model


def rows(scenes: int, split: str, seed: int) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Pictures, each with ASKED questions, their answers, and the picture's attributes."""
    rng = random.Random(f"rows {split} {seed}")
    for scene in training.draw_scenes(scenes, split, f"questions {seed}"):
        picture = world.render(scene)
        if rng.random() < OBLONG_SHARE:
            picture = training.oblong(picture, rng)
        for question, answer in rng.sample(world.questions(scene), ASKED):
            asked = training.worded(scene, question, rng)
            yield picture, {"question": asked, "answer": answer, **training.facts_of(scene)}


def write(folder: Path, scenes: int, seed: int) -> None:
    """Write the rows and the untrained checkpoint."""
    processor = make_processor(seed)
    training.save(make_model(processor), processor, folder / "start")
    training.write_rows(folder, "train", rows(scenes, "train", seed))
    training.write_rows(folder, "val", rows(VALIDATED, "heldout", seed))


@torch.no_grad()
def answer(folder: Path, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Answer a question about each picture as a user of transformers would, with the saved checkpoint."""
    processor = BlipProcessor.from_pretrained(folder)
    model = BlipForQuestionAnswering.from_pretrained(folder)
    answers = []
    for start in range(0, len(pictures), 64):
        part = {"images": list(pictures[start : start + 64]), "text": list(questions[start : start + 64])}
        inputs = processor(**part, padding=True, return_tensors="pt")
        answers += processor.batch_decode(model.generate(**inputs, max_new_tokens=8), skip_special_tokens=True)
    return answers


def kind_of(question: str) -> str:
    """Name what a question is about."""
    starts = {"is there": "yes or no", "how many": "count", "where": "position", "what shape": "shape"}
    for start, kind in starts.items():
        if question.startswith(start):
            return kind
    if "small or large" in question:
        return "size"
    return "background" if "background" in question else "colour"


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Measure exact answers about the sample pictures, held-out scenes and never-seen pairs."""
    listed = training.read_jsonl(training.HERE / "questions.jsonl")
    files = [training.upright(training.HERE / row["image"]) for row in listed]
    found = answer(folder, files, [row["question"] for row in listed])
    scores = {
        "the 144 questions of `questions.jsonl`": training.exact_match(found, [row["answer"] for row in listed])
    }
    for split, name in (("heldout", "new scenes of seen pairs"), ("unseen", "new scenes of never-seen pairs")):
        scenes = training.draw_scenes(500, split, f"evaluation {seed}")
        asked = [(scene, *pair) for scene in scenes for pair in world.questions(scene)]
        questions, wanted = [question for _, question, _ in asked], [right for *_, right in asked]
        found = answer(folder, [world.render(scene) for scene, *_ in asked], questions)
        scores[f"all {len(asked):,} questions about 500 {name}"] = training.exact_match(found, wanted)
        if split == "heldout":
            for kind in dict.fromkeys(kind_of(question) for question in questions):
                chosen = [index for index, question in enumerate(questions) if kind_of(question) == kind]
                scores[f"of these, {kind}"] = training.exact_match(
                    [found[index] for index in chosen], [wanted[index] for index in chosen]
                )
            general = [training.generally(scene, question) for scene, question, _ in asked]
            found = answer(folder, [world.render(scene) for scene, *_ in asked], general)
            name = 'all of these, asked generally ("what colour is the shape?")'
            scores[name] = training.exact_match(found, wanted)
    return scores


def main() -> None:
    """Train, save and evaluate one model."""
    args = training.arguments(__doc__, "vqa", scenes=24_000)
    training.settle(args.seed, args.threads)
    training.train(
        "vqa",
        args,
        lambda folder: write(folder, args.scenes, args.seed),
        evaluate,
        {
            "input": f"a picture, squeezed to {SIDE} x {SIDE}, and a question as in `questions.jsonl`",
            "output": "one word",
        },
        title="A tiny BLIP that answers questions about coloured shapes",
        pipeline="visual-question-answering",
        limits="On photos, or asked something else, its answers mean nothing.",
    )


if __name__ == "__main__":
    main()
