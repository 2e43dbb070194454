"""What the training scripts of the sample models share: scenes as tensors, a good start, the training loop.

A plain run of models this small stalls: CLIP near 70 % accuracy, BLIP's captions at 10 to 18 %. What lifts
them is here: 2-D sine-cosine position embeddings to start from, a wider patch-embedding initialisation, and
attribute heads on the picture's vector that help during training and are then thrown away.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import make_world as world
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

# Each attribute's values in a fixed order; a picture's and a caption's attributes are indices into these.
ATTRIBUTES: dict[str, tuple[object, ...]] = {
    "colour": tuple(world.COLOURS),
    "shape": world.SHAPES,
    "size": world.SIZES,
    "position": (None, *world.POSITIONS),
    "background": tuple(world.BACKGROUNDS),
    "count": tuple(world.NUMBERS),
}
UNSAID = -1
HERE = Path(__file__).resolve().parent


def arguments(about: str, out: str, **defaults: int) -> argparse.Namespace:
    """Parse a training script's command line: its defaults, --threads, --seed and --out (a folder of models/)."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for name, default in {**defaults, "threads": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--out", type=Path, default=HERE / "models" / out)
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


def attributes_of(scene: world.Scene) -> list[int]:
    """Give a scene's attributes as indices into ATTRIBUTES."""
    return [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]


def oblong(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Continue the ground evenly on two sides, up to 3:2: a processor that squeezes to a square then shows less."""
    more = rng.randrange(picture.width // 4 + 1)
    sides = ((0, 0), (more, more), (0, 0)) if rng.random() < 0.5 else ((more, more), (0, 0), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), sides, mode="edge"))


def render_set(scenes: Sequence[world.Scene], image_processor: Any, oblong_share: float = 0.0) -> torch.Tensor:
    """Render scenes and preprocess them as a user's pictures will be: uint8 [N, 3, H, W], kept so until training.

    `oblong_share` of the pictures are made wider or higher than a square.
    """
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    rng = random.Random("oblong")
    done = []
    for start in range(0, len(scenes), 256):
        pictures = [world.render(scene) for scene in scenes[start : start + 256]]
        if oblong_share:
            pictures = [oblong(p, rng) if rng.random() < oblong_share else p for p in pictures]
        pixels = image_processor(pictures, **plain)["pixel_values"]
        done.append(pixels.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(done)


def normalise(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Do the image processor's last step on a batch of uint8 pictures."""
    mean = torch.tensor(image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(image_processor.image_std).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


class Pictures:
    """Training scenes rendered once, drawn from again and again."""

    def __init__(self, scenes: Sequence[world.Scene], image_processor: Any, oblong_share: float = 0.0) -> None:
        self.scenes, self.image_processor = scenes, image_processor
        self.pixels = render_set(scenes, image_processor, oblong_share)
        self.facts = torch.tensor([attributes_of(scene) for scene in scenes])

    def __getitem__(self, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give pixel values [N, 3, H, W] and attributes [N, A] of the chosen scenes."""
        return normalise(self.pixels[chosen], self.image_processor), self.facts[chosen]


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


class AttributeHeads(nn.Module):
    """Linear read-outs of every attribute from a picture's (or a text's) vector; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in ATTRIBUTES.values())

    def forward(self, vectors: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """Add the attributes' cross-entropies, skipping what was left UNSAID; facts are [N, attributes]."""
        losses = []
        for head, target in zip(self.heads, facts.T, strict=True):
            if (target != UNSAID).any():
                losses.append(functional.cross_entropy(head(vectors), target, ignore_index=UNSAID))
        return torch.stack(losses).sum()


def fit(
    modules: Sequence[nn.Module], step_loss: Callable[[float], torch.Tensor], steps: int, rate: float = 1.5e-3
) -> None:
    """Train modules in place by AdamW with a one-cycle rate.

    `step_loss` gets the share of the run that is done, 0 to 1, and gives the next batch's loss.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for module in modules:
        module.train()
    started = time.process_time()
    for step in range(steps):
        loss = step_loss(step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step:5d}  loss {loss.item():.3f}  {time.process_time() - started:.0f} s of CPU", flush=True
            )
    for module in modules:
        module.eval()


def help_weight(done: float) -> float:
    """How much the attribute heads' loss counts: they lead at first and keep a small part to the end."""
    return max(0.1, 0.5 - done)


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


def training_facts(args: argparse.Namespace, minutes: float) -> str:
    """Say how a model was trained."""
    return (
        f"{args.steps:,} steps of {args.batch} pictures, from {args.scenes:,} rendered scenes, seed {args.seed}; "
        f"{minutes:.0f} minutes of CPU time, with --threads {args.threads}"
    )


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


def finish(
    args: argparse.Namespace,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    evaluate: Callable[[Path, int], dict[str, float]],
    facts: dict[str, str],
    **words: str,
) -> None:
    """Save a trained model, measure it as saved, and write and print what came out."""
    minutes = time.process_time() / 60
    save(model, processor, args.out)
    scores = evaluate(args.out, args.seed)
    words |= {"kind": type(model).__name__, "script": Path(sys.argv[0]).name}
    facts = {**facts, "training": training_facts(args, minutes)}
    write_card(args.out, scores, facts, parameters=model.num_parameters(), **words)
    for name, value in scores.items():
        print(f"{value:6.1%}  {name}")
