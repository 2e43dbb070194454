"""The towers of a model, by modality: which parameters they are, and how they are kept as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmcli.core.errors import ConfigError
from mmcli.core.records import MODALITIES

_VISION = (
    "vision_model", "vision_tower", "visual", "vision_encoder", "image_model", "image_encoder", "image_tower",
)  # fmt: skip
# What transformers' models call the part of a modality: its encoder, or what writes texts.
_NAMES = {
    "image": _VISION,
    "video": (*_VISION, "video_model", "video_tower"),
    "audio": ("audio_model", "audio_tower", "audio_encoder", "speech_encoder"),
    "text": ("text_model", "text_encoder", "text_decoder", "language_model"),
}
# What their encoders take.
_INPUTS = {
    "image": {"pixel_values"},
    "video": {"pixel_values", "pixel_values_videos"},
    "audio": {"input_values", "input_features"},
    "text": {"input_ids"},
}


def towers(model: nn.Module, modality: str) -> list[tuple[str, nn.Module]]:
    """The parts of a model that are of one modality alone, with their names; none where it has none.

    That is what was pretrained on it: of dual encoders and of encoders joined by mmcli the encoder, without the
    projection into what is shared; of models that write the encoder of what they see or hear, or the language
    model; of a classifier all but the head.
    """
    joined = getattr(model, "towers", None)
    if isinstance(joined, nn.ModuleDict):
        return [(f"towers.{modality}.encoder", joined[modality].encoder)] if modality in joined else []  # type: ignore[list-item]
    named = list(_outermost(model, _NAMES[modality], ""))
    return named or _by_inputs(model, modality)


def _outermost(module: nn.Module, names: Iterable[str], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name in names:
            yield f"{prefix}{name}", child
        else:
            yield from _outermost(child, names, f"{prefix}{name}.")


def _by_inputs(model: Any, modality: str) -> list[tuple[str, nn.Module]]:
    """Of models whose parts have no telling names: the encoder and decoder of one, or an encoder with a head."""
    base = getattr(model, "base_model", model)
    inner = getattr(base, "encoder", None), getattr(base, "decoder", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and None not in inner:
        found = [part for part in inner if getattr(part, "main_input_name", "input_ids") in _INPUTS[modality]]
    else:
        takes = set(inspect.signature(base.forward).parameters) & set().union(*_INPUTS.values())
        # One that takes several is no tower of any.
        found = [base] if takes and takes <= _INPUTS[modality] and base is not model else []
    return [(name, part) for name, part in model.named_modules() if any(part is one for one in found)]


@dataclass(slots=True)
class Frozen:
    """What stays as it is: parameters without gradients, and modules that stay in evaluation mode.

    Where nothing of a part learns autograd keeps nothing of it: neither its activations need memory, nor a backward
    pass time.
    """

    modules: list[nn.Module]

    def eval(self) -> None:
        """To be called after each `model.train()`: no dropout, and batch norms keep their statistics."""
        for module in self.modules:
            module.eval()


def freeze(model: nn.Module, names: Iterable[str]) -> Frozen:
    """Keep parts as they are: the towers of a modality, or parameters whose names begin so.

    Raises ConfigError for a name that is of no part.
    """
    kept: set[nn.Parameter] = set()
    for name in names:
        if name in MODALITIES and (of_modality := towers(model, name)):
            found = [p for _, tower in of_modality for p in tower.parameters()]
        else:
            found = [p for full, p in model.named_parameters() if full.startswith(name) or f".{name}." in full]
        if not found:
            # The first modality that a tower is of: encoders of pictures take clips by the same name.
            own = {full: modality for modality in reversed(MODALITIES) for full, _ in towers(model, modality)}
            parts = dict.fromkeys(
                [*reversed(own.values()), *(n.split(".")[0] for n, _ in model.named_parameters())]
            )
            raise ConfigError(f"--freeze {name}: the model has no such part; it has {', '.join(parts)}")
        kept.update(found)
    for parameter in kept:
        parameter.requires_grad_(False)
    return Frozen(list(_whole(model, kept)))


def _whole(module: nn.Module, kept: set[nn.Parameter]) -> Iterator[nn.Module]:
    """The outermost modules of which all parameters are kept."""
    own = set(module.parameters())
    if own and own <= kept:
        yield module
    elif own & kept:
        for child in module.children():
            yield from _whole(child, kept)


def parameter_counts(model: nn.Module) -> str:
    """How many parameters each part of a model has, and how many of them learn."""
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        # Each tower is a part, and what stands in a `model` that a head stands beside.
        part = f"{first}.{rest[0]}" if first in ("towers", "model") and len(rest) > 1 else first
        counts = parts.setdefault(part, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    whole, learning = (sum(counts[n] for counts in parts.values()) for n in (0, 1))
    shown = [
        f"{part} {total:,}{'' if own == total else ' (frozen)' if not own else f' ({own:,} learn)'}"
        for part, (total, own) in parts.items()
    ]
    return f"{whole:,} parameters, of which {learning:,} learn: {', '.join(shown)}"
