"""Train a small but genuine CLIP on the world of `make_world.py`, from scratch, on two CPU cores.

    python sample_data/train_clip.py            # writes sample_data/models/clip, with a model card

The recipe is that of `training.py`: without its start a run of this size stalls near 70 % accuracy. A caption may
fit several pictures of a batch ("a red circle"); the loss takes the others' for wrong, which changes no order among
the captions of a picture: what it learns is how much likelier a caption is with the picture than without.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import make_world as world
import numpy as np
import torch
import training
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

IMAGE_SIZE = 64
PATCH_SIZE = 8
WIDTH, LAYERS = 128, 4
TEXT_WIDTH, TEXT_LAYERS = 96, 2
CONTEXT = 77
VALIDATED = 400
TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a photo of a {}.",
    "a photo of the {}",
    "a photo of one {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "a blurry photo of a {}",
    "this is a {}",
    "this is a photo of a {}.",
    "there is a {} in the picture",
    "the {}",
)


# --------------------------------------------------------------------------------------------- captions


def varied_caption(scene: world.Scene, rng: random.Random) -> str:
    """Write one of many true captions."""
    kind = rng.random()
    if kind < 0.2:
        return world.caption(scene)
    if kind < 0.5:
        return rng.choice(TEMPLATES).format(scene.label)
    if kind < 0.57:
        return rng.choice(("a {} shape", "something {}", "{}")).format(scene.colour)
    if kind < 0.69:
        return rng.choice(TEMPLATES).format(scene.shape)
    if kind < 0.8:
        number, plural = world.NUMBERS[scene.count], world.PLURALS[scene.shape]
        things = scene.shape if scene.count == 1 else plural
        return rng.choice(("{}", "a photo of {}", "there are {}")).format(f"{number} {scene.colour} {things}")
    text = f"{scene.size} {scene.label}" if rng.random() < 0.6 else scene.label
    text = world.article(text) if rng.random() < 0.8 else text
    if scene.position and rng.random() < 0.6:
        return f"{text} {world.POSITIONS[scene.position]} the picture"
    return f"{text} on a {scene.background} background" if rng.random() < 0.7 else text


# -------------------------------------------------------------------------------------------- tokenizer


def learn_merges(words: Counter[str], limit: int = 1000) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one token; ties go by the alphabet, so it is reproducible."""
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(parts, best) for word, parts in spelled.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        # `out[-1]` may be a merge made just now, which is longer than pair[0] and so never matches again.
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def make_tokenizer(seed: int) -> CLIPTokenizer:
    """Build CLIP's own kind of tokenizer, with a vocabulary learned from captions."""
    rng = random.Random(f"words {seed}")
    words: Counter[str] = Counter()
    for _ in range(4000):
        text = varied_caption(world.random_scene(rng), rng)
        words.update(text.replace(".", " .").split())
    merges = learn_merges(words)
    # All 256 bytes, inside and at the end of a word: no text can yield the unknown token, which in CLIP is
    # the end token and would move the position that the text vector is read from.
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *(a + b for a, b in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


# ------------------------------------------------------------------------------------------------ model


def make_processor(seed: int) -> CLIPProcessor:
    """Build the image processor (resize, centre crop, CLIP's normalisation) and the tokenizer."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return CLIPProcessor(image_processor=images, tokenizer=make_tokenizer(seed))


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build an untrained CLIP of about 1.1 million parameters."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "projection_dim": WIDTH,
        **special,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, **special))
    embeddings = model.vision_model.embeddings
    training.start_vision(embeddings.patch_embedding.weight, embeddings.position_embedding.weight)
    return model


# --------------------------------------------------------------------------------------------- training


def rows(scenes: int, split: str, seed: int) -> Iterator[tuple[Image.Image, dict[str, str]]]:
    """Pictures, each with one of its captions."""
    rng = random.Random(f"clip {seed}" if split == "train" else f"clip {split} {seed}")
    for _ in range(scenes):
        scene = world.random_scene(rng, split)
        caption = varied_caption(scene, rng) if split == "train" else world.caption(scene)
        yield world.render(scene), {"caption": caption, **training.facts_of(scene)}


def write(folder: Path, scenes: int, seed: int) -> None:
    """Write the rows and the untrained checkpoint."""
    processor = make_processor(seed)
    training.save(make_model(processor.tokenizer), processor, folder / "start")
    training.write_rows(folder, "train", rows(scenes, "train", seed))
    training.write_rows(folder, "val", rows(VALIDATED, "heldout", seed))


# ------------------------------------------------------------------------------------------- evaluation


def unit(vectors: torch.Tensor) -> np.ndarray:
    """Scale vectors to length one."""
    return functional.normalize(vectors.float(), dim=-1).numpy()


@torch.no_grad()
def zero_shot(folder: Path, scenes: Sequence[world.Scene], template: str) -> np.ndarray:
    """Name each scene with one of the 48 labels; True where it is right. Full precision, user's own path."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    texts = [template.format(label) for label in world.LABELS]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    classes = unit(model.get_text_features(**tokens).pooler_output)
    right = []
    for start in range(0, len(scenes), 128):
        part = scenes[start : start + 128]
        inputs = processor.image_processor([world.render(scene) for scene in part], return_tensors="pt")
        vectors = unit(model.get_image_features(**inputs).pooler_output)
        names = [world.LABELS[index] for index in (vectors @ classes.T).argmax(axis=1)]
        right += [name == scene.label for name, scene in zip(names, part, strict=True)]
    return np.array(right)


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Measure 48-way zero-shot accuracy on scenes and on pairs that training never showed."""
    rng = random.Random(f"evaluation {seed}")
    held_out = [world.random_scene(rng, "heldout") for _ in range(1200)]
    unseen = [world.random_scene(rng, "unseen") for _ in range(600)]
    scores = {}
    for template in ("a photo of a {}", "{}"):
        scores[f'new scenes of seen pairs, "{template}"'] = zero_shot(folder, held_out, template).mean()
        scores[f'never-seen pairs, "{template}"'] = zero_shot(folder, unseen, template).mean()
    singles = [scene for scene in held_out if scene.count == 1]
    for size in world.SIZES:
        part = [scene for scene in singles if scene.size == size]
        right = zero_shot(folder, part, "a photo of a {}")
        scores[f'new scenes with one {size} shape, "a photo of a {{}}"'] = right.mean()
    return {name: float(value) for name, value in scores.items()}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# A tiny CLIP of coloured shapes

A genuine `CLIPModel` ({parameters:,} parameters, float32), trained from scratch by `train_clip.py` on
pictures drawn by `make_world.py`. It exists so that examples and tests of mmcli run offline, in
seconds, with a model that is right most of the time.

**It knows only this world**: 8 colours, 6 shapes, 2 sizes, 5 positions, 3 backgrounds, one to four
alike shapes in a picture, and the few English words that describe them. On photos, and on any other
text, its vectors mean nothing.

| | |
| --- | --- |
| input | {image} x {image} pixels, patches of {patch}; texts of up to {context} tokens |
| training | `mmcli finetune`, `configs/clip/train.toml`: {steps}, of {scenes:,} scenes, seed {seed} |
| time | {minutes:.0f} minutes, with --threads {threads} |
| held out | one combination of attributes in {held_out} |
| never seen | {unseen} of the 48 colour-shape pairs, neither shown nor named: {pairs} |

48-way zero-shot accuracy, by the wording of the class names (measured after the last step, with
1,200 held-out scenes and 600 scenes of never-seen pairs):

| measured on | accuracy |
| --- | --- |
{rows}

The rows for never-seen pairs say how well it combines a colour and a shape by itself: mind them before
drawing conclusions from `sample_data/labels.txt`, which lists all 48 pairs.
"""


def write_card(folder: Path, scores: dict[str, float], facts: dict[str, object]) -> None:
    """Write the model card with the measured numbers."""
    rows = "\n".join(f"| {name} | {value:.1%} |" for name, value in scores.items())
    pairs = ", ".join(sorted(" ".join(pair) for pair in world.UNSEEN_PAIRS))
    card = CARD.format(
        rows=rows,
        pairs=pairs,
        image=IMAGE_SIZE,
        patch=PATCH_SIZE,
        context=CONTEXT,
        held_out=world.HELD_OUT_OF,
        unseen=len(world.UNSEEN_PAIRS),
        **facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Train, save and evaluate one model."""
    args = training.arguments(__doc__, "clip", scenes=40_000)
    training.settle(args.seed, args.threads)
    minutes = training.finetune("clip", args, lambda folder: write(folder, args.scenes, args.seed))
    scores = evaluate(args.out, args.seed)
    facts = {name: getattr(args, name) for name in ("scenes", "seed", "threads")}
    facts |= {"steps": training.steps_of("clip", args), "minutes": minutes}
    write_card(args.out, scores, {**facts, "parameters": training.load(args.out).num_parameters()})
    for name, value in scores.items():
        print(f"{value:6.1%}  {name}")


if __name__ == "__main__":
    main()
