"""`MultimodalDualEncoder`: two encoders of any modalities, projected into one space.

    encoder -> one vector, pooled as `mmcli embed` pools it -> linear, without bias -> divided by its length

Two encoders of text and image that have poolers become transformers' own VisionTextDualEncoderModel instead, which
is the same for poolers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, VisionTextDualEncoderConfig
from transformers import VisionTextDualEncoderModel as VisionTextDualEncoder
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from mmcli.core.records import MODALITIES, Modality
from mmcli.models.encoder import ENCODERS, TRAINING_ONLY, Pooling, encoder_tower
from mmcli.models.fusion import (
    as_config,
    check_complete,
    encoder_class,
    open_encoder,
    prefix_tokens,
    token_size,
)
from mmcli.models.fusion_inputs import Part
from mmcli.models.joined_family import MODEL_TYPE

Loss = Literal["clip", "siglip"]
# Logarithm of the scale that cosines are multiplied by, and what is added: Radford et al. 2021, section 2.5, and
# Zhai et al. 2023, section 3.2.
BEGINNINGS: dict[Loss, tuple[float, float | None]] = {
    "clip": (math.log(1 / 0.07), None),
    "siglip": (math.log(10), -10.0),
}


class MultimodalDualEncoderConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of a MultimodalDualEncoder.

    modalities      two
    *_config        of the encoder of each
    poolings        how its tokens become one vector: see mmcli.models.encoder.pool
    pooled_sizes    how many numbers that has
    projection_dim  of the shared space
    loss            "clip": logits are exp(logit_scale) times cosines, and compete; "siglip": logit_bias is added,
                    and each stands for itself
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {f"{modality}_config": AutoConfig for modality in MODALITIES}

    def __init__(
        self,
        modalities: Sequence[str] = (),
        poolings: Mapping[str, str] | None = None,
        pooled_sizes: Mapping[str, int] | None = None,
        projection_dim: int = 512,
        loss: Loss = "clip",
        initializer_range: float = 0.02,
        **settings: Any,
    ) -> None:
        if loss not in BEGINNINGS:
            raise ValueError(f"loss {loss!r} is not one of {', '.join(BEGINNINGS)}")
        self.modalities = list(modalities)
        self.poolings, self.pooled_sizes = dict(poolings or {}), dict(pooled_sizes or {})
        self.projection_dim, self.loss = projection_dim, loss
        self.initializer_range = initializer_range
        encoders = {name: as_config(settings.pop(name, None)) for name in self.sub_configs}
        super().__init__(**settings)
        # Behind, since it resets how they compute attention, with which masks would be ignored.
        for name, encoder in encoders.items():
            setattr(self, name, encoder)
        if (attention := settings.get("attn_implementation")) is not None:
            self._attn_implementation = attention

    def encoder(self, modality: str) -> Any:
        """The settings of the encoder of a modality."""
        return getattr(self, f"{modality}_config")


@dataclass
class DualEncoderOutput(ModelOutput):  # type: ignore[misc]
    """What a MultimodalDualEncoder gives.

    logits  [n, m], of each row of the first modality with each of the second
    embeds  of both modalities, [n, D] and [m, D], of length 1
    """

    logits: torch.Tensor | None = None
    embeds: tuple[torch.Tensor, ...] | None = None


class Side(nn.Module):
    """An encoder, and what projects its pooled vector into the shared space."""

    def __init__(self, modality: str, config: MultimodalDualEncoderConfig, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(config.pooled_sizes[modality], config.projection_dim, bias=False)
        settings = config.encoder(modality)
        skip = prefix_tokens(settings, ENCODERS.get(settings.model_type))
        self._pooling = Pooling(config.poolings[modality], skip)

    def forward(self, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """Inputs of the encoder, [n, ...]; those that are None are left out -> [n, D], of any length."""
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        # Made each time: a function that holds the encoder would be no part of a copy of this module.
        projected: torch.Tensor = self.projection(encoder_tower(self.encoder, self._pooling)(given))
        return projected


class MultimodalDualEncoder(PreTrainedModel):  # type: ignore[misc]
    """See the module. Its `towers` are by modality; `towers[m].encoder` is what was pretrained."""

    config_class = MultimodalDualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "inputs"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MultimodalDualEncoderConfig, encoders: Mapping[Any, Any] | None = None) -> None:
        """`encoders`: loaded ones; without them they have random weights."""
        super().__init__(config)
        made = encoders or {
            m: encoder_class(config.encoder(m))._from_config(config.encoder(m)) for m in config.modalities
        }
        self.towers = nn.ModuleDict({m: Side(m, config, made[m]) for m in config.modalities})
        scale, bias = BEGINNINGS[config.loss]
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.post_init()

    def forward(self, inputs: dict[str, torch.Tensor]) -> DualEncoderOutput:
        """Model inputs of both modalities, `image.pixel_values` and so on, [n, ...] and [m, ...]."""
        of: dict[str, dict[str, torch.Tensor | None]] = {modality: {} for modality in self.config.modalities}
        for name, tensor in inputs.items():
            modality, _, own = name.partition(".")
            of[modality][own] = tensor
        embeds = tuple(
            nn.functional.normalize(tower(of[modality]), dim=-1) for modality, tower in self.towers.items()
        )
        logits = self.logit_scale.exp() * embeds[0] @ embeds[1].T
        return DualEncoderOutput(logits if self.logit_bias is None else logits + self.logit_bias, embeds)

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Tokens [n, T] -> `pooler_output` [n, D], not normalised; so do the others."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self._features("text", given)

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Pictures [n, 3, H, W]."""
        return self._features("image", {"pixel_values": pixel_values})

    def get_audio_features(
        self,
        input_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Sounds [n, T], or spectrograms; `attention_mask`: [n, T], of samples."""
        given = {"input_values": input_values, "input_features": input_features, "attention_mask": attention_mask}
        return self._features("audio", given)

    def get_video_features(
        self, pixel_values: torch.Tensor | None = None, pixel_values_videos: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Clips [n, F, 3, H, W]."""
        given = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
        return self._features("video", given)

    def _features(self, modality: str, inputs: dict[str, torch.Tensor | None]) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.towers[modality](inputs))


# ---------------------------------------------------------------------------------------------------- a new model


@dataclass(slots=True)
class _Encoder:
    """A loaded encoder, the names of weights that its checkpoint lacks, and the pooling that it states."""

    part: Part
    model: Any
    missing: list[str]
    stated: str | None = None

    @property
    def pooling(self) -> str:
        """Its own: see mmcli.models.encoder."""
        row = ENCODERS.get(self.model.config.model_type)
        return self.stated or (row.poolings[0] if row is not None else "pooler")

    @property
    def has_pooler(self) -> bool:
        row = ENCODERS.get(self.model.config.model_type)
        has = row is None or "pooler" in row.poolings
        return self.stated is None and has and not any(name.startswith("pooler.") for name in self.missing)

    def check(self, pooling: str) -> None:
        """Raise ModelError for missing weights that this pooling needs."""
        unused = TRAINING_ONLY if pooling == "pooler" else (*TRAINING_ONLY, "pooler.")
        needed = [name for name in self.missing if not name.startswith(unused)]
        check_complete(self.part.checkpoint, self.part.modality, needed)


def join(
    parts: Sequence[Part],
    projection_size: int,
    loss: Loss = "clip",
    weights: bool = True,
    attn_implementation: str | None = None,
    poolings: Mapping[Modality, str] | None = None,
) -> MultimodalDualEncoder | VisionTextDualEncoder:
    """A new model on two encoders, whose weights are loaded (`weights`) or random; projections are random.

    poolings  those that are not as mmcli.models.encoder has them
    Random weights are drawn from torch's global generator. Raises ModelError for weights that an encoder lacks.
    """
    encoders = {}
    for part in parts:
        model, missing = open_encoder(part.checkpoint, part.modality, weights, attn_implementation)
        encoders[part.modality] = _Encoder(part, model, missing, (poolings or {}).get(part.modality))
    if loss == "clip" and _is_vision_text(encoders):
        for encoder in encoders.values():
            encoder.check("pooler")
        return _vision_text(encoders["image"].model, encoders["text"].model, projection_size)
    for encoder in encoders.values():
        encoder.check(encoder.pooling)
    config = MultimodalDualEncoderConfig(
        modalities=list(encoders),
        poolings={modality: encoder.pooling for modality, encoder in encoders.items()},
        pooled_sizes={modality: token_size(encoder.model.config) for modality, encoder in encoders.items()},
        projection_dim=projection_size,
        loss=loss,
        **{f"{modality}_config": encoder.model.config for modality, encoder in encoders.items()},
    )
    return MultimodalDualEncoder(config, {modality: encoder.model for modality, encoder in encoders.items()})


def _is_vision_text(encoders: Mapping[Modality, _Encoder]) -> bool:
    """Whether a VisionTextDualEncoderModel can have both: it takes what `pooler_output` holds, of `hidden_size`."""
    if encoders.keys() != {"text", "image"}:
        return False
    text = encoders["text"].part.inputs.text
    # Where texts are always as long, nothing in its directory would say so (SigLIP).
    if text is None or text.padding != "longest":
        return False
    sizes = all(isinstance(getattr(one.model.config, "hidden_size", None), int) for one in encoders.values())
    return sizes and all(one.has_pooler for one in encoders.values())


def _vision_text(image: Any, text: Any, projection_size: int) -> VisionTextDualEncoder:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image.config, text.config, projection_dim=projection_size, logit_scale_init_value=BEGINNINGS["clip"][0]
    )
    return VisionTextDualEncoder(config, image, text)


def new_weights(model: MultimodalDualEncoder | VisionTextDualEncoder) -> frozenset[str]:
    """Names of the projections of a new model."""
    if isinstance(model, MultimodalDualEncoder):
        return frozenset(f"towers.{modality}.projection.weight" for modality in model.config.modalities)
    return frozenset(("visual_projection.weight", "text_projection.weight"))


def register() -> None:
    """Let transformers' AutoConfig and AutoModel load MultimodalDualEncoders."""
    AutoConfig.register(MODEL_TYPE, MultimodalDualEncoderConfig, exist_ok=True)
    AutoModel.register(MultimodalDualEncoderConfig, MultimodalDualEncoder, exist_ok=True)
