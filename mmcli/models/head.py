"""A head on vectors: what makes scores of labels out of what `mmcli embed` gives."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmcli.core.errors import ConfigError, one_line
from mmcli.models.scores import Activation

# A folder with a head in it: as `--save-head` writes it and `-m` reads it.
HEAD_FILE, WEIGHTS_FILE = "head.json", "head.safetensors"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Similarity:
    """How a dual encoder makes a logit of a cosine: scale * cosine + bias, and what becomes of it."""

    scale: float
    bias: float = 0.0
    activation: Activation = "softmax"


@dataclass(frozen=True, slots=True)
class Cache:
    """The key-value cache of Tip-Adapter (Zhang et al. 2022, equation 5).

    It adds alpha * exp(-beta * (1 - x K^T)) V to the logits.

    keys     float32 [N, D], the examples' unit vectors
    classes  int64 [N], the label of each: V is one-hot
    """

    keys: torch.Tensor
    classes: torch.Tensor
    alpha: float = 1.0
    beta: float = 5.5


@dataclass(frozen=True, slots=True)
class Head:
    """Vectors [n, D] -> logits [n, L].

    labels      names, all different
    weight      float32 [L, D]; bias: float32 [L]
    normalize   vectors are divided by their L2 norm first
    activation  of the logits
    method      how it was made, and the settings of that
    """

    labels: tuple[str, ...]
    weight: torch.Tensor
    bias: torch.Tensor
    normalize: bool = True
    activation: Activation = "softmax"
    cache: Cache | None = None
    method: dict[str, Any] = field(default_factory=dict)

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.weight.shape[1]

    def logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Float vectors [n, D] -> float32 [n, L]."""
        vectors = vectors.float()
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        logits = torch.addmm(self.bias, vectors, self.weight.T)
        if self.cache is None:
            return logits
        affinity = torch.exp(-self.cache.beta * (1 - vectors @ self.cache.keys.T))
        return logits.index_add(1, self.cache.classes, affinity, alpha=self.cache.alpha)

    def to(self, device: torch.device) -> Head:
        """The same on another device."""
        cache = self.cache
        if cache is not None:
            cache = Cache(cache.keys.to(device), cache.classes.to(device), cache.alpha, cache.beta)
        return Head(
            self.labels,
            self.weight.to(device),
            self.bias.to(device),
            self.normalize,
            self.activation,
            cache,
            self.method,
        )


def write_head(head: Head, base: dict[str, Any], folder: Path) -> None:
    """Write head.json and head.safetensors into an existing folder. `base`: what makes its vectors."""
    from safetensors.torch import save_file

    tensors = {"weight": head.weight, "bias": head.bias}
    described: dict[str, Any] = {
        "format": FORMAT,
        "labels": list(head.labels),
        "normalize": head.normalize,
        "activation": head.activation,
        "method": head.method,
        "base": base,
    }
    if head.cache is not None:
        tensors |= {"cache.keys": head.cache.keys, "cache.classes": head.cache.classes}
        described["cache"] = {"alpha": head.cache.alpha, "beta": head.cache.beta}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / HEAD_FILE).write_text(text, encoding="utf-8")


def is_head(name: str) -> bool:
    """Whether `-m name` is a folder with a head."""
    return (Path(name) / HEAD_FILE).is_file()


def read_head(folder: Path) -> tuple[Head, dict[str, Any]]:
    """The head in a folder, and what makes its vectors. Raises ConfigError for one that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        told = json.loads((folder / HEAD_FILE).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ConfigError(f"-m {folder}: its format is {told['format']}; this version reads {FORMAT}")
        tensors = load_file(folder / WEIGHTS_FILE)
        cache = None
        if "cache" in told:
            keys, classes = tensors["cache.keys"], tensors["cache.classes"]
            cache = Cache(keys, classes, float(told["cache"]["alpha"]), float(told["cache"]["beta"]))
        head = Head(
            tuple(told["labels"]),
            tensors["weight"],
            tensors["bias"],
            bool(told["normalize"]),
            told["activation"],
            cache,
            told["method"],
        )
        if head.weight.shape[0] != len(head.labels) or told["activation"] not in ("softmax", "sigmoid"):
            raise ValueError(f"{len(head.labels)} labels, {head.weight.shape[0]} rows of weights")
        base = dict(told["base"])
        if not isinstance(base["model"], str) or not isinstance(base["identity"], dict):
            raise ValueError("nothing tells the model of its vectors")
        return head, base
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"-m {folder}: its head cannot be read: {one_line(str(error))}") from error
