"""Train a small but genuine CLIP on the world of `make_world.py`, from scratch, on two CPU cores.

    python sample_data/train_clip.py            # writes sample_data/models/clip, with a model card

A plain contrastive run of this size stalls near 70 % accuracy. What lifts it past 90 %: 2-D sine-cosine
position embeddings to start from, a wider patch-embedding initialisation, attribute heads that help
during training and are then thrown away, and a loss that knows that one caption fits many pictures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import make_world as world
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn import functional
from training import ATTRIBUTES, UNSAID, AttributeHeads, attributes_of, normalise, render_set, start_vision
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

IMAGE_SIZE = 64
PATCH_SIZE = 8
WIDTH, LAYERS = 128, 4
TEXT_WIDTH, TEXT_LAYERS = 96, 2
CONTEXT = 77
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


def varied_caption(scene: world.Scene, rng: random.Random) -> tuple[str, list[int]]:
    """Write one of many true captions, and say which attributes it states (the others are UNSAID)."""
    facts = dict(zip(ATTRIBUTES, attributes_of(scene), strict=True))
    kind = rng.random()
    if kind < 0.2:
        return world.caption(scene), _stated(facts, *(n for n in facts if n != "position" or scene.position))
    if kind < 0.5:
        return rng.choice(TEMPLATES).format(scene.label), _stated(facts, "colour", "shape")
    if kind < 0.57:
        return rng.choice(("a {} shape", "something {}", "{}")).format(scene.colour), _stated(facts, "colour")
    if kind < 0.69:
        return rng.choice(TEMPLATES).format(scene.shape), _stated(facts, "shape")
    if kind < 0.8:
        number, plural = world.NUMBERS[scene.count], world.PLURALS[scene.shape]
        things = scene.shape if scene.count == 1 else plural
        text = rng.choice(("{}", "a photo of {}", "there are {}")).format(f"{number} {scene.colour} {things}")
        return text, _stated(facts, "colour", "shape", "count")
    said = {"colour", "shape"}
    text = scene.label
    if rng.random() < 0.6:
        text, said = f"{scene.size} {text}", said | {"size"}
    text = world.article(text) if rng.random() < 0.8 else text
    if scene.position and rng.random() < 0.6:
        text = f"{text} {world.POSITIONS[scene.position]} the picture"
        said |= {"position"}
    elif rng.random() < 0.7:
        text, said = f"{text} on a {scene.background} background", said | {"background"}
    return text, _stated(facts, *said)


def _stated(facts: dict[str, int], *names: str) -> list[int]:
    return [value if name in names else UNSAID for name, value in facts.items()]


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
        text, _ = varied_caption(world.random_scene(rng), rng)
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
    start_vision(embeddings.patch_embedding.weight, embeddings.position_embedding.weight)
    return model


# --------------------------------------------------------------------------------------------- training


def contrastive_loss(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy in which every caption that fits a picture (rows: pictures) is a right answer."""
    target = fits.float()
    to_text = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
    to_image = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0)
    return (to_text.mean() + to_image.mean()) / 2


class Batches:
    """Seeded batches: pictures rendered once, captions written anew each time."""

    def __init__(self, processor: CLIPProcessor, scenes: int, size: int, seed: int) -> None:
        self.rng = random.Random(f"batches {seed}")
        self.scenes = [world.random_scene(self.rng) for _ in range(scenes)]
        self.processor, self.size = processor, size
        self.pixels = render_set(self.scenes, processor.image_processor)
        self.facts = torch.tensor([attributes_of(scene) for scene in self.scenes])

    def draw(self) -> dict[str, torch.Tensor]:
        """Make one batch: model inputs and the attributes of its pictures and captions."""
        chosen = self.rng.sample(range(len(self.scenes)), self.size)
        texts, stated = zip(*(varied_caption(self.scenes[i], self.rng) for i in chosen), strict=True)
        tokens = self.processor.tokenizer(list(texts), padding=True, return_tensors="pt")
        pixels = self.pixels[chosen]
        return {
            **tokens,
            "pixel_values": normalise(pixels, self.processor.image_processor),
            "facts": self.facts[chosen],
            "stated": torch.tensor(stated),
        }


def batch_loss(
    model: CLIPModel, heads: AttributeHeads, batch: dict[str, torch.Tensor], help_weight: float
) -> torch.Tensor:
    """Compute the contrastive loss, plus the attribute heads' losses times their weight."""
    facts, stated = batch["facts"], batch["stated"]
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    fits = ((stated[None] == UNSAID) | (stated[None] == facts[:, None])).all(dim=2)
    scale = model.logit_scale.exp()
    logits = scale * out.image_embeds.float() @ out.text_embeds.float().T
    loss = contrastive_loss(logits, fits)
    # Pictures and texts share the heads, so that both put an attribute in the same directions.
    helped = heads(10 * out.image_embeds.float(), facts) + heads(10 * out.text_embeds.float(), stated)
    return loss + help_weight * helped


def train(model: CLIPModel, batches: Batches, steps: int) -> None:
    """Train in place. The attribute heads lead at first and keep a small part to the end."""
    heads = AttributeHeads(WIDTH)
    parameters = [p for p in model.parameters() if p is not model.logit_scale] + list(heads.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1] + [model.logit_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        help_weight = max(0.1, 0.5 - step / steps)
        loss = batch_loss(model, heads, batches.draw(), help_weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


# ------------------------------------------------------------------------------------------- evaluation


def unit(vectors: torch.Tensor) -> np.ndarray:
    """Scale vectors to length one."""
    return functional.normalize(vectors.float(), dim=-1).numpy()


@torch.no_grad()
def zero_shot(
    model: CLIPModel, processor: CLIPProcessor, scenes: Sequence[world.Scene], template: str
) -> np.ndarray:
    """Name each scene with one of the 48 labels; True where it is right. Full precision, user's own path."""
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


def evaluate(model: CLIPModel, processor: CLIPProcessor, seed: int) -> dict[str, float]:
    """Measure 48-way zero-shot accuracy on scenes and on pairs that training never showed."""
    rng = random.Random(f"evaluation {seed}")
    held_out = [world.random_scene(rng, "heldout") for _ in range(1200)]
    unseen = [world.random_scene(rng, "unseen") for _ in range(600)]
    scores = {}
    for template in ("a photo of a {}", "{}"):
        scores[f'new scenes of seen pairs, "{template}"'] = zero_shot(model, processor, held_out, template).mean()
        scores[f'never-seen pairs, "{template}"'] = zero_shot(model, processor, unseen, template).mean()
    singles = [scene for scene in held_out if scene.count == 1]
    for size in world.SIZES:
        part = [scene for scene in singles if scene.size == size]
        right = zero_shot(model, processor, part, "a photo of a {}")
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
| training | {steps} steps of {batch} pictures, from {scenes:,} rendered scenes, seed {seed} |
| time | {minutes:.0f} minutes on {threads} CPU threads |
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


def save(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Save everything that the Auto classes need, in full precision."""
    model.float().save_pretrained(folder)
    # Padding a batch leaves its settings in the tokenizer, which would be saved and depend on what ran last.
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(folder)
    # CLIPProcessor.save_pretrained alone writes no preprocessor_config.json, which AutoImageProcessor and
    # other tools read (transformers 5.23).
    processor.image_processor.save_pretrained(folder)


def run(args: argparse.Namespace) -> None:
    """Train, save and evaluate one model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    processor = make_processor(args.seed)
    model = make_model(processor.tokenizer)
    batches = Batches(processor, args.scenes, args.batch, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens; rendered", flush=True)
    train(model, batches, args.steps)
    minutes = (time.monotonic() - started) / 60
    save(model, processor, args.out)
    scores = evaluate(model, processor, args.seed)
    facts = {name: getattr(args, name) for name in ("steps", "batch", "scenes", "seed", "threads")}
    write_card(args.out, scores, {**facts, "minutes": minutes, "parameters": model.num_parameters()})
    for name, value in scores.items():
        print(f"{value:6.1%}  {name}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--scenes", type=int, default=24_000, help="pictures to render once and train on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "models" / "clip")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
