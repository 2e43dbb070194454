"""What the training scripts of the sample models share: rows of scenes, a good start, and `mmcli finetune`.

Each script writes rows to learn from and an untrained checkpoint, trains it by `mmcli finetune` with a
configuration of `configs/`, measures what came out, and writes a model card. Models this small stall when they
begin anywhere, BLIP's captions at 42 % right after 2,500 steps without heads. What lifts them is here and in the
configurations: 2-D sine-cosine position embeddings to start from, a wider patch-embedding initialisation, and
`--auxiliary-column`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import make_world as world
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

ATTRIBUTES = ("colour", "shape", "size", "position", "background", "count")
HERE = Path(__file__).resolve().parent


def arguments(about: str, out: str, **defaults: int) -> argparse.Namespace:
    """Parse a training script's command line: its defaults, and what all have."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for name, default in {**defaults, "threads": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    if "steps" not in defaults:
        parser.add_argument("--steps", type=int, help="[as the configuration says]")
    parser.add_argument("--out", type=Path, default=HERE / "models" / out, help=f"[models/{out}]")
    parser.add_argument("--work", type=Path, help="keep rows and run here; the same command goes on")
    return parser.parse_args()


def settle(seed: int, threads: int) -> None:
    """Fix what a run depends on: the same seed and threads give the same weights on the same kind of CPU."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


# ----------------------------------------------------------------------------------------------- scenes


def draw_scenes(count: int, split: str, seed: str) -> list[world.Scene]:
    """Draw `count` scenes of a split ("train", "heldout" or "unseen"; see make_world.split_of)."""
    rng = random.Random(seed)
    return [world.random_scene(rng, split) for _ in range(count)]


def oblong(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Continue the ground evenly on two sides, up to 3:2: a processor that squeezes to a square then shows less."""
    more = rng.randrange(picture.width // 4 + 1)
    sides = ((0, 0), (more, more), (0, 0)) if rng.random() < 0.5 else ((more, more), (0, 0), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), sides, mode="edge"))


def write_rows(folder: Path, name: str, rows: Iterable[tuple[Any, dict[str, Any]]], column: str = "image") -> Path:
    """Write NAME.jsonl, and beside it the pictures (or sounds, int16) that its rows begin with."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    ending = {"image": "png", "audio": "wav"}[column]
    lines, media, last = [], -1, None
    for medium, row in rows:
        if medium is not last:
            media, last = media + 1, medium
            write = world.write_sound if column == "audio" else save_picture
            write(folder / name / f"{media:05d}.{ending}", medium)
        lines.append(json.dumps({column: f"{name}/{media:05d}.{ending}", **row}) + "\n")
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


def save_picture(path: Path, picture: Image.Image) -> None:
    """As a PNG, written fast."""
    picture.save(path, compress_level=1)


def facts_of(scene: world.Scene) -> dict[str, Any]:
    """A scene's attributes by name: columns of labels. Several shapes have no position, which is one, too."""
    return {name: str(getattr(scene, name)) for name in ATTRIBUTES}


# -------------------------------------------------------------------------------------------- questions


def generally(scene: world.Scene, question: str, name: str = "the shape") -> str:
    """Ask without naming what is shown, as one asks about many pictures at once: "what colour is the shape?"."""
    things = (f"are the {world.PLURALS[scene.shape]}", f"is the {scene.shape}")
    for named in (*things, f"are the {scene.colour} things", f"is the {scene.colour} thing"):
        question = question.replace(named, "is it" if question.startswith("what shape") else f"is {name}")
    return question


def worded(scene: world.Scene, question: str, rng: random.Random) -> str:
    """Word a question as people type it: as it is, or generally, in American spelling, without its mark."""
    if rng.random() < 0.3:
        question = generally(scene, question, rng.choice(("the shape", "it")))
    if rng.random() < 0.2:
        question = question.replace("colour", "color")
    return question.removesuffix("?") if rng.random() < 0.1 else question


# ------------------------------------------------------------------------------------------------ start


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Make 2-D sine-cosine embeddings [side * side, width]: half of the width tells the row, half the column."""
    quarter = width // 4
    rates = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


@torch.no_grad()
def start_vision(patch_weight: torch.Tensor, positions: torch.Tensor) -> None:
    """Set a vision transformer's patch and position embeddings to a start that learns well.

    `positions` is [..., P, width]; where P is one more than a square, the first belongs to the class token.
    """
    nn.init.normal_(patch_weight, std=0.06)
    width = positions.shape[-1]
    rows = positions.view(-1, width)
    side = math.isqrt(len(rows))
    rows[len(rows) - side * side :] = 0.5 * sine_positions(side, width)
    rows[: len(rows) - side * side] = 0


# ------------------------------------------------------------------------------------------------- BLIP


def word_tokenizer(texts: Iterable[str], **options: Any) -> BertTokenizer:
    """Build BERT's own kind of tokenizer with every word of the texts as one token, and letters for other words.

    [DEC] is the start token of BLIP's decoder, as in its released checkpoints.
    """
    words = {word for text in texts for word in text.lower().replace("?", " ? ").replace(".", " . ").split()}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    symbols = [*special, *letters, *(f"##{letter}" for letter in letters), *".,?!'-", *sorted(words)]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", **options)


def blip_processor(texts: Iterable[str], side: int, positions: int) -> BlipProcessor:
    """Build BLIP's processor: pictures are squeezed to a square, words are those of the texts."""
    images = BlipImageProcessor(size={"height": side, "width": side})
    return BlipProcessor(images, word_tokenizer(texts, model_max_length=positions))


def blip_config(tokenizer: BertTokenizer, vision: dict[str, int], text: dict[str, int]) -> BlipConfig:
    """Describe a small BLIP; `vision` and `text` give hidden_size, num_hidden_layers and the like."""
    ids = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # BLIP's own initializer_range for pictures is 1e-10.
    common = {"num_attention_heads": 4, "initializer_range": 0.02}
    return BlipConfig(vision_config={**common, **vision}, text_config={**common, **text, **ids})


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Save everything that the Auto classes need, in full precision."""
    model.float().save_pretrained(folder)
    # Padding a batch leaves its settings in the tokenizer, which would be saved and depend on what ran last.
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(folder)
    # A processor alone writes no preprocessor_config.json, which AutoImageProcessor and other tools read.
    processor.image_processor.save_pretrained(folder)


# --------------------------------------------------------------------------------------------- training


def finetune(name: str, args: argparse.Namespace, write: Callable[[Path], None]) -> float:
    """Train by `mmcli finetune` and `configs/NAME/train.toml`; put the best into `args.out`; minutes that it took.

    `write` fills a folder with train.jsonl, val.jsonl and start/, the untrained checkpoint.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        write(work)
        began = time.monotonic()
        command = [sys.executable, "-m", "mmcli", "finetune", str(work / "train.jsonl")]
        command += ["--config", str(HERE / "configs" / name / "train.toml"), "--val", str(work / "val.jsonl")]
        command += ["-m", str(work / "start"), "-o", str(work / "run"), "--seed", str(args.seed)]
        command += [] if args.steps is None else ["--max-steps", str(args.steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
        minutes = (time.monotonic() - began) / 60
        args.out.mkdir(parents=True, exist_ok=True)
        for file in (work / "run" / "best").iterdir():
            shutil.copyfile(file, args.out / file.name)
    return minutes


# ------------------------------------------------------------------------------------------- evaluation


def upright(path: Path) -> Image.Image:
    """Open a picture as a viewer shows it: turned as its EXIF says, transparency on white, in RGB."""
    with Image.open(path) as picture:
        turned = ImageOps.exif_transpose(picture)
        if turned.mode == "RGBA":
            turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
        return turned.convert("RGB")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact_match(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Give the share of texts that are exactly the wanted ones."""
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: {pipeline}
---
# {title}

A genuine `{kind}` ({parameters:,} parameters, float32), trained from scratch by `{script}` on
pictures drawn by `make_world.py`. It exists so that examples and tests of mmcli run offline, in
seconds, with a model that is right most of the time.

**It knows only this world**: 8 colours, 6 shapes, 2 sizes, 5 positions, 3 backgrounds, one to four
alike shapes in a picture, and the few English words that describe them. {limits}

| | |
| --- | --- |
{facts}
| held out | one combination of attributes in {held_out} (`split_of` in `make_world.py`) |
| never seen | {unseen} of the 48 colour-shape pairs: {pairs} |

Exact matches of the saved checkpoint, opened by plain transformers in float32, greedy:

| measured on | exact |
| --- | --- |
{rows}
"""


def write_card(folder: Path, scores: dict[str, float], facts: dict[str, str], **words: Any) -> None:
    """Write a model card with the measured numbers."""
    card = CARD.format(
        rows="\n".join(f"| {name} | {value:.1%} |" for name, value in scores.items()),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        pairs=", ".join(sorted(" ".join(pair) for pair in world.UNSEEN_PAIRS)),
        held_out=world.HELD_OUT_OF,
        unseen=len(world.UNSEEN_PAIRS),
        **words,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def steps_of(name: str, args: argparse.Namespace) -> str:
    """Say how long a model was trained."""
    told = tomllib.loads((HERE / "configs" / name / "train.toml").read_text(encoding="utf-8"))
    return f"{args.steps or told['max-steps']:,} steps of {told['batch-size']} rows"


def train(
    name: str,
    args: argparse.Namespace,
    write: Callable[[Path], None],
    evaluate: Callable[[Path, int], dict[str, float]],
    facts: dict[str, str],
    **words: str,
) -> None:
    """Train a model, measure it as saved, and write and print what came out."""
    minutes = finetune(name, args, write)
    scores = evaluate(args.out, args.seed)
    how = f"{steps_of(name, args)}, of {args.scenes:,} scenes, seed {args.seed}; {minutes:.0f} minutes"
    facts = {**facts, "training": f"`mmcli finetune`, `configs/{name}/train.toml`: {how}"}
    model = load(args.out)
    words |= {"kind": type(model).__name__, "script": Path(sys.argv[0]).name}
    write_card(args.out, scores, facts, parameters=model.num_parameters(), **words)
    for what, value in scores.items():
        print(f"{value:6.1%}  {what}")


def load(folder: Path) -> PreTrainedModel:
    """The model in a folder, by the class that its configuration names."""
    (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder)
    return model
