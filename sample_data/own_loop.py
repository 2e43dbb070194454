"""The loop of `train_chat.py`, whose heads read every token and whose rows have one picture or two.

`mmcli finetune`, which trains the other sample models, has neither.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import make_world as world
import torch
from torch import nn
from torch.nn import functional
from training import save, write_card
from transformers import PreTrainedModel, ProcessorMixin

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


def attributes_of(scene: world.Scene) -> list[int]:
    """Give a scene's attributes as indices into ATTRIBUTES."""
    return [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]


def render_set(scenes: Sequence[world.Scene], image_processor: Any) -> torch.Tensor:
    """Render scenes and preprocess them as a user's pictures will be: uint8 [N, 3, H, W]."""
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    done = []
    for start in range(0, len(scenes), 256):
        pictures = [world.render(scene) for scene in scenes[start : start + 256]]
        pixels = image_processor(pictures, **plain)["pixel_values"]
        done.append(pixels.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(done)


def normalise(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Do the image processor's last step on a batch of uint8 pictures."""
    mean = torch.tensor(image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(image_processor.image_std).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


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


def training_facts(args: argparse.Namespace, minutes: float) -> str:
    """Say how a model was trained."""
    return (
        f"{args.steps:,} steps of {args.batch} pictures, from {args.scenes:,} rendered scenes, seed {args.seed}; "
        f"{minutes:.0f} minutes of CPU time, with --threads {args.threads}"
    )


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
