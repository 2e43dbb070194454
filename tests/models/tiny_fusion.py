"""Tiny fusion models of random weights, and what each row gives by the formula, written out for one row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_dual
import tiny_encoders
import torch
from tiny_dual import randomize
from torch import nn
from torch.nn import functional

from mmcli.core.records import Modality, Payload, Sample
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.fusion import MultimodalTransformer
from mmcli.models.fusion_family import input_plan
from mmcli.models.fusion_inputs import FusionProcessor, parts_of
from mmcli.models.fusion_runner import FusionCollator
from mmcli.models.options import ModelOptions
from mmcli.models.plan import ClassificationPlan

LABELS = ("no", "yes", "perhaps")
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "dropout": 0.0, "max_tokens": 6,
}  # fmt: skip
BUILDERS = {
    "text": tiny_encoders.TEXTS | {name: tiny_dual.BUILDERS[name] for name in ("clip", "siglip")},
    "image": tiny_encoders.IMAGES | {name: tiny_dual.BUILDERS[name] for name in ("clip", "siglip")},
    "audio": tiny_encoders.SOUNDS,
    "video": tiny_encoders.CLIPS,
}


def encoders(folder: Path, **names: str) -> dict[Modality, Checkpoint]:
    """Checkpoints of encoders: `text="bert"`."""
    made: dict[Modality, Checkpoint] = {}
    for modality, name in names.items():
        path = BUILDERS[modality][name](folder / f"{modality}-{name}")
        made[modality] = Checkpoint(str(path), path, None)  # type: ignore[index]
    return made


@dataclass
class Fusion:
    """A model on the host, its encoders' checkpoints, and what runs in front of it."""

    model: MultimodalTransformer
    sources: dict[Modality, Checkpoint]
    plan: ClassificationPlan
    processor: FusionProcessor

    def samples(self, records: Sequence[Mapping[Modality, Payload]]) -> list[Sample]:
        return [self.processor.record(list(record.items()), ())[0] for record in records]

    def batch(self, samples: Sequence[Sample], whole: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Model inputs, and which modalities each row has."""
        collator = FusionCollator(self.plan, torch.device("cpu"), whole)
        tensors = collator.to_device(collator.collate(samples))
        return tensors, tensors.pop("present")

    def logits(self, samples: Sequence[Sample], batch_size: int) -> torch.Tensor:
        found = []
        with torch.no_grad():
            for start in range(0, len(samples), batch_size):
                found.append(self.model(*self.batch(samples[start : start + batch_size])).logits)
        return torch.cat(found)


def fusion(folder: Path, sizes: Mapping[str, Any] | None = None, **names: str) -> Fusion:
    """A fusion model whose outputs tell inputs apart."""
    sources = encoders(folder, **names)
    torch.manual_seed(0)
    model = MultimodalTransformer.from_encoders(sources, LABELS, **{**SIZES, **(sizes or {})})
    for part in (*model.layers, model.head, *(tower.projection for tower in model.towers.values())):
        randomize(part)
    with torch.no_grad():
        for own in (model.cls, *(p for t in model.towers.values() for p in (t.kind, t.missing))):
            own.normal_(0, 1)
    parts = parts_of(sources)
    plan = input_plan(next(iter(sources.values())), parts, ModelOptions("x", device="cpu"), LABELS)
    return Fusion(model.eval(), sources, plan, FusionProcessor(parts))


# --------------------------------------------------------------------------------------- the formula, for one row


@torch.no_grad()
def reference(made: Fusion, sample: Sample) -> torch.Tensor:
    """Logits [L] of one record, of what its processor gives, without padding, masks or a batch."""
    model, config = made.model, made.model.config
    sequence = [model.cls[None]]
    for modality, tower in model.towers.items():
        own = {n.partition(".")[2]: a for n, a in sample.arrays.items() if n.startswith(f"{modality}.")}
        tokens = _encoded(made, modality, own)
        if tokens is None:
            sequence.append(tower.missing[None] + tower.kind)
        else:
            tokens = functional.layer_norm(tower.projection(_pooled(made, modality, tokens)), [config.hidden_size])
            sequence.append(tokens + tower.kind)
    hidden = torch.cat(sequence)
    for layer in model.layers:
        hidden = _layer(layer, hidden)
    return model.head(functional.layer_norm(hidden[0], [config.hidden_size]))  # type: ignore[no-any-return]


def _encoded(made: Fusion, modality: str, arrays: Mapping[str, np.ndarray]) -> torch.Tensor | None:
    """The last hidden state of one input: [T, D], or [C, H, W]."""
    if not arrays:
        return None
    inputs = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
    if modality in ("image", "video"):
        name, alone = f"{modality}.pixel_values", _only(modality, made, arrays)
        inputs["pixel_values"] = made.batch([Sample(modality, alone)])[0][name]
    if modality == "audio":
        inputs = {"input_values": inputs["input_values"]}
    encoder = made.model.towers[modality].encoder
    return encoder(**inputs).last_hidden_state[0]  # type: ignore[no-any-return]


def _only(modality: str, made: Fusion, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    present = np.array([source == modality for source in made.sources])
    return {"present": present, **{f"{modality}.{name}": array for name, array in arrays.items()}}


# Class tokens before those of patches.
PREFIX = {
    "vit": 1,
    "clip": 1,
    "clip_vision_model": 1,
    "timesformer": 1,
    "deit": 2,
    "audio-spectrogram-transformer": 2,
}


def _pooled(made: Fusion, modality: str, tokens: torch.Tensor) -> torch.Tensor:
    most = made.model.config.max_tokens
    if tokens.ndim == 3:
        height, width = tokens.shape[1:]
        if height * width > most:
            side = math.isqrt(most)
            tokens = functional.adaptive_avg_pool2d(tokens, (min(side, height), min(side, width)))
        return tokens.flatten(1).T
    if len(tokens) <= most:
        return tokens
    kind = made.sources[modality].config.model_type  # type: ignore[index]
    prefix = PREFIX.get(kind, 0) if modality != "text" else 0
    classes, rest = tokens[:prefix], tokens[prefix:]
    if modality == "image":
        side, kept = math.isqrt(len(rest)), math.isqrt(most - prefix)
        square = rest.T.unflatten(1, (side, side))
        return torch.cat([classes, functional.adaptive_avg_pool2d(square, kept).flatten(1).T])
    return torch.cat([classes, functional.adaptive_avg_pool1d(rest.T, most - prefix).T])


def _layer(layer: nn.TransformerEncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). x: [T, H]."""
    attention = layer.self_attn
    heads = attention.num_heads
    mixed = functional.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in mixed.chunk(3, dim=1))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
    return x + layer.linear2(functional.gelu(layer.linear1(layer.norm2(x))))  # type: ignore[no-any-return]
