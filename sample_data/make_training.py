"""Write a small set to learn from, of the world of `make_world.py`: pictures, train.jsonl and val.jsonl.

    python sample_data/make_training.py world                # 400 training rows, 100 validation rows
    python sample_data/make_training.py both --set xor       # where neither picture nor text alone tells the label

Columns of `shapes`: image, caption, shape, colour, question, answer. Validation rows are held-out scenes.

Columns of `xor`: image, text, label. The label is "same" when picture and text both say "round" or both do not: the
exclusive or of two bits, of which each alone says nothing. In a share of the rows (--redundant) the text says the
label as well, so that the text alone is right in at most (1 + share) / 2 of them, and the picture alone in half.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_world as world

ROUND = ("circle", "ring")


def shape_rows(folder: Path, split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of pictures with what is in them."""
    rng = random.Random(f"shapes {split} {seed}")
    for number in range(count):
        scene = world.random_scene(rng, "train" if split == "train" else "heldout")
        question, answer = rng.choice(world.questions(scene))
        yield {
            "image": _save(folder, split, number, scene),
            "caption": world.caption(scene),
            "shape": scene.shape,
            "colour": scene.colour,
            "question": question,
            "answer": answer,
        }


def xor_rows(folder: Path, split: str, count: int, seed: int, redundant: float) -> Iterator[dict[str, Any]]:
    """Rows whose label is whether picture and text agree."""
    rng = random.Random(f"xor {split} {seed}")
    others = [shape for shape in world.SHAPES if shape not in ROUND]
    for number in range(count):
        shown, said = rng.random() < 0.5, rng.random() < 0.5
        scene = world.random_scene(rng, "train" if split == "train" else "heldout")
        while (scene.shape in ROUND) != shown:
            scene = world.random_scene(rng, "train" if split == "train" else "heldout")
        label = "same" if shown == said else "different"
        word = rng.choice(ROUND if said else others)
        told = f" on the {'left' if label == 'same' else 'right'}" if rng.random() < redundant else ""
        colour = rng.choice(list(world.COLOURS))
        yield {"image": _save(folder, split, number, scene), "text": f"a {colour} {word}{told}", "label": label}


def _save(folder: Path, split: str, number: int, scene: world.Scene) -> str:
    name = f"{split}/{number:05d}.png"
    (folder / split).mkdir(parents=True, exist_ok=True)
    world.render(scene).save(folder / name)
    return name


def main() -> None:
    """Parse the command line and write one set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--set", choices=("shapes", "xor"), default="shapes", help="[shapes]")
    parser.add_argument(
        "--rows", type=int, default=400, help="training rows [400]; a quarter as many for validation"
    )
    parser.add_argument(
        "--redundant", type=float, default=0.3, help="share of xor's texts that say the label [0.3]"
    )
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    given = parser.parse_args()
    for split, count in (("train", given.rows), ("val", given.rows // 4)):
        if given.set == "xor":
            rows = xor_rows(given.folder, split, count, given.seed, given.redundant)
        else:
            rows = shape_rows(given.folder, split, count, given.seed)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (given.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
