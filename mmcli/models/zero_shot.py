"""Zero-shot classification: labels as texts, in the shared space of a dual encoder (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmcli.core.errors import ConfigError, one_line
from mmcli.core.records import Sample
from mmcli.models.head import Head, Similarity
from mmcli.models.options import Label
from mmcli.models.plan import EmbeddingPlan
from mmcli.models.templates import TEMPLATES

# Where nothing else is asked for: what CLIP's authors recommend for pictures, and what is usual for sounds.
IMAGE_TEMPLATE, AUDIO_TEMPLATE, TEXT_TEMPLATE = "a photo of a {}.", TEMPLATES["audio"][0], "{}"
# Prompts in one forward pass.
_BATCH = 64


def default_template(modalities: frozenset[str]) -> str:
    """The usual template of a model that takes these modalities."""
    if modalities & {"image", "video"}:
        return IMAGE_TEMPLATE
    return AUDIO_TEMPLATE if "audio" in modalities else TEXT_TEMPLATE


def fill(labels: Sequence[Label], templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The prompts of each label: each of its texts in each template."""
    return tuple(tuple(t.replace("{}", text) for text in label.texts for t in templates) for label in labels)


def named(name: str) -> Label:
    """A label that its name alone stands for."""
    return Label(name, (name,))


def text_processor(plan: Any) -> Callable[[str], Sample]:
    """What makes model inputs of a text, in this process."""
    if not isinstance(plan, EmbeddingPlan):
        whole = plan.open_processor()
        return lambda text: whole("text", text)
    from mmcli.models.inputs import TextProcessor, open_tokenizer

    assert plan.inputs.text is not None
    return TextProcessor(open_tokenizer(plan.processor_of("text")), plan.inputs.text)


def check_distinct(plan: Any, labels: Sequence[str], prompts: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError for two labels that are the same to the tokenizer: cut at its limit, or unknown to it."""
    process = text_processor(plan)
    seen: dict[bytes, str] = {}
    for label, texts in zip(labels, prompts, strict=True):
        arrays = process(texts[0]).arrays
        other = seen.setdefault(b" ".join(array.tobytes() for array in arrays.values()), label)
        if other != label:
            both = f"{one_line(other, 80)!r} and {one_line(label, 80)!r}"
            raise ConfigError(
                f"the labels {both} are the same to the model's tokenizer; "
                "it cuts long texts, and does not know every letter"
            )


def text_features(runner: Any, process: Callable[[str], Sample], texts: Sequence[str]) -> torch.Tensor:
    """Texts -> their vectors as the text tower gives them, float32 [P, D], on the runner's device."""
    samples = [process(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: samples[index].length)
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        vectors = runner.vectors(runner.collate([samples[index] for index in chosen]))
        for index, vector in zip(chosen, vectors, strict=True):
            found[index] = vector
    return torch.stack(found)


def label_vectors(features: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """Vectors of prompts [..., P, D] -> one of each label [..., L, D]: normalised, averaged, normalised again.

    The prompt ensemble of CLIP (Radford et al. 2021, section 3.1.4: in embedding space). owners: int64 [P], the
    label of each prompt; every label has one.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    sums = unit.new_zeros((*unit.shape[:-2], count, unit.shape[-1])).index_add_(-2, owners, unit)
    return torch.nn.functional.normalize(sums, dim=-1)


def owners_of(prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """int64 [P]: of which label each prompt is, one label after the other."""
    return torch.tensor([index for index, texts in enumerate(prompts) for _ in texts])


def zero_shot_head(labels: Sequence[str], vectors: torch.Tensor, similarity: Similarity) -> Head:
    """The head whose weights are the labels' vectors [L, D]."""
    bias = torch.full((len(vectors),), similarity.bias, dtype=torch.float32, device=vectors.device)
    method = {"name": "zero-shot", "scale": similarity.scale, "bias": similarity.bias}
    return Head(tuple(labels), vectors * similarity.scale, bias, True, similarity.activation, None, method)
