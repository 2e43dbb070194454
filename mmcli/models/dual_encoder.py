"""The family *dual encoder*: text and image, audio or video in one shared space (CLIP and its kin)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.errors import ConfigError
from mmcli.core.records import DecodeOptions, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import (
    available,
    max_tokens,
    min_image_size,
    reject_pooling,
    sampling_rate,
    setting,
)
from mmcli.models.options import ModelOptions
from mmcli.models.plan import AudioSpec, EmbeddingPlan, Inputs, TextSpec, VideoSpec

if TYPE_CHECKING:
    import torch

    from mmcli.models.head import Similarity
    from mmcli.models.runner import Conditioned, Loaded, Tower

FAMILY = "dual encoder"
# The model_class of two encoders that were joined here (mmcli.models.joined).
JOINED = "MultimodalDualEncoder"


@dataclass(frozen=True, slots=True)
class DualEncoder:
    """How a model type gives vectors of the shared space.

    modalities   what it takes; one with an image tower also takes video, frame by frame
    size         where config.json has the size of the vectors
    text_config  where it has the text tower's settings ("" is the top level)
    padding      of texts, as the type's processor does it
    max_length   where texts are cut, when the text tower's own limit is not it
    num_frames   where it has the frames of a clip that a video tower takes
    first_token  it gives a vector per token, of which its contrastive loss takes the first
    causal       its text tower is CLIP's: it looks only back, and so never at padding, which is on the right;
                 and it takes a text's end for its vector, which may be found as the largest id
    model_class  the transformers class, or JOINED; None: AutoModel's
    scale        the parameter that scales logits: by its exponential, or "temperature" divides; None: it has none
    activation   of its logits, as it was trained
    conditioned  its texts' vectors depend on the clip that they are compared with
    """

    modalities: tuple[Modality, ...]
    size: str = "projection_dim"
    text_config: str = "text_config"
    padding: Literal["longest", "max_length"] = "longest"
    max_length: int | None = None
    num_frames: str | None = None
    first_token: bool = False
    causal: bool = False
    model_class: str | None = None
    scale: str | None = "logit_scale"
    activation: Literal["softmax", "sigmoid"] = "softmax"
    conditioned: bool = False


_TEXT_IMAGE: tuple[Modality, ...] = ("text", "image")
_SIGLIP = DualEncoder(_TEXT_IMAGE, size="vision_config.hidden_size", padding="max_length", activation="sigmoid")

# model_type of config.json -> how it is called
DUAL_ENCODERS = {
    "align": DualEncoder(_TEXT_IMAGE, padding="max_length", max_length=64, scale="temperature"),
    "altclip": DualEncoder(_TEXT_IMAGE),
    "blip": DualEncoder(_TEXT_IMAGE),
    "chinese_clip": DualEncoder(_TEXT_IMAGE),
    "clap": DualEncoder(("text", "audio"), scale="logit_scale_a"),
    "clip": DualEncoder(_TEXT_IMAGE, causal=True),
    "flava": DualEncoder(_TEXT_IMAGE, first_token=True),
    "metaclip_2": DualEncoder(_TEXT_IMAGE, causal=True),
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "vision-text-dual-encoder": DualEncoder(_TEXT_IMAGE),
    "xclip": DualEncoder(("text", "video"), num_frames="vision_config.num_frames", causal=True, conditioned=True),
}
# Checkpoints saved as another class than their type's AutoModel, by the `architectures` of config.json.
BY_ARCHITECTURE = {
    "BlipForImageTextRetrieval": DualEncoder(
        _TEXT_IMAGE, size="image_text_hidden_size", model_class="BlipForImageTextRetrieval", scale=None
    ),
}

# Unlisted types whose text tower is CLIP's.
_CAUSAL = frozenset({"clipseg", "groupvit", "owlvit"})


def generic_row(checkpoint: Checkpoint) -> DualEncoder | None:
    """A row for an unlisted type whose model offers get_text_features and one more; None when it does not.

    Without a projection_dim its features belong to no shared space (BLIP-2: a language model's logits).
    """
    from transformers import CONFIG_MAPPING, AutoModel

    if checkpoint.json("config.json").get("model_type") not in CONFIG_MAPPING:
        return None
    config = checkpoint.config
    if not isinstance(getattr(config, "projection_dim", None), int):
        return None
    model_class = AutoModel._model_mapping.get(type(config), None)
    found: list[Modality] = []
    candidates: tuple[Modality, ...] = ("text", "image", "audio")
    for modality in candidates:
        if hasattr(model_class, f"get_{modality}_features"):
            found.append(modality)
    causal = config.model_type in _CAUSAL
    return DualEncoder(tuple(found), causal=causal) if "text" in found and len(found) > 1 else None


def plan(checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: DualEncoder) -> EmbeddingPlan:
    """What `row` says about this checkpoint. Raises ConfigError."""
    reject_pooling(options.pooling, FAMILY)
    config = checkpoint.config
    wanted = [m for m in row.modalities if available(checkpoint, m)]
    if not wanted:
        raise ConfigError(f"-m {checkpoint.id}: it has neither a tokenizer nor a preprocessor_config.json")
    text = audio = video = None
    if "text" in wanted:
        text_config = setting(config, row.text_config) or config
        limit = max_tokens(checkpoint, text_config)
        text = TextSpec(min(filter(None, (limit, row.max_length)), default=None), row.padding)
    if "audio" in wanted:
        audio = AudioSpec("fixed", sampling_rate(checkpoint))
    if "video" in wanted:
        assert row.num_frames is not None
        video = VideoSpec(int(setting(config, row.num_frames)), native=True)
    elif "image" in wanted:
        video = VideoSpec(options.frames, native=False)
    inputs = Inputs(text, "image" in wanted, audio, video)
    return EmbeddingPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.dual_encoder:load",
        detail=row,
        inputs=inputs,
        embedding_size=int(setting(config, row.size)),
        decode=DecodeOptions(
            modalities=inputs.modalities,
            min_image_size=min_image_size(checkpoint),
            exact_decode=options.exact_decode,
            sampling_rate=audio.sampling_rate if audio else None,
            num_frames=video.num_frames if video else options.frames,
        ),
        pooling=None,
        normalize=True if options.normalize is None else options.normalize,
        activation=row.activation if "text" in wanted else None,
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
    )


def load(plan: EmbeddingPlan, device: torch.device) -> Loaded:
    """The towers of a loaded model, one per modality."""
    from mmcli.models.runner import load_model

    return towers_of(load_model(model_class_of(plan.detail), plan, device), plan)


def model_class_of(row: DualEncoder) -> Any:
    """The class that loads it: transformers' or our own."""
    if row.model_class == JOINED:
        from mmcli.models.joined import MultimodalDualEncoder, register

        register()
        return MultimodalDualEncoder
    import transformers

    return getattr(transformers, row.model_class or "AutoModel")


def towers_of(model: Any, plan: EmbeddingPlan) -> Loaded:
    """The towers of a model, one per modality."""
    from mmcli.models.runner import Loaded

    row: DualEncoder = plan.detail
    if row.model_class == "BlipForImageTextRetrieval":
        towers: dict[Modality, Tower] = {"text": _blip_text(model), "image": _blip_image(model)}
    else:
        # A config.json may say of CLIP's tower that it looks both ways.
        unmasked = row.causal and getattr(model.config.text_config, "is_causal", True)
        unused = {"attention_mask"} if unmasked else set()
        methods = {m: getattr(model, f"get_{m}_features") for m in row.modalities}
        towers = {m: _features(method, row.first_token, unused) for m, method in methods.items()}
    if plan.inputs.video and not plan.inputs.video.native:
        towers["video"] = frame_tower(towers["image"], plan.normalize)
    return Loaded(towers, _similarity(model, row), _conditioned(model) if row.conditioned else None)


# BLIP's contrastive loss divides by a temperature that begins at this, and that its checkpoints leave out.
_BLIP_TEMPERATURE = 0.07


def _similarity(model: Any, row: DualEncoder) -> Similarity:
    """How the model's own forward pass makes logits of cosines."""
    from mmcli.models.head import Similarity

    if row.scale is None:
        return Similarity(1 / _BLIP_TEMPERATURE)
    learned = getattr(model, row.scale).detach().float()
    scale = float(1 / learned if row.scale == "temperature" else learned.exp())
    bias = float(model.logit_bias.detach()) if row.activation == "sigmoid" else 0.0
    return Similarity(scale, bias, row.activation)


def _conditioned(model: Any) -> Conditioned:
    def compare(inputs: dict[str, torch.Tensor], texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = clip_features(model, inputs)
        return seen[:, 0], texts_beside(model, texts, seen)

    return compare


def clip_features(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Clips of an X-CLIP -> [n, 1 + T, D]: each clip's vector, not normalised, then what texts heed of it."""
    import torch

    clips = inputs["pixel_values"]
    count, frames = clips.shape[:2]
    seen = model.vision_model(pixel_values=clips.flatten(0, 1))
    of_frames = model.visual_projection(seen.pooler_output).view(count, frames, -1)
    vectors = model.mit(of_frames).pooler_output
    patches = model.prompts_visual_layernorm(seen.last_hidden_state[:, 1:]) @ model.prompts_visual_projection
    return torch.cat([vectors[:, None], patches.unflatten(0, (count, frames)).mean(dim=1)], dim=1)


def texts_beside(model: Any, texts: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """X-CLIP's video-specific prompting (Ni et al. 2022, section 3.3): a text's vector heeds the clip's patches.

    Texts [P, D], `clip_features` [n, 1 + T, D] -> what each text becomes beside each clip, [n, P, D].
    """
    texts = texts.to(clips.dtype).expand(len(clips), -1, -1)
    beside: torch.Tensor = texts + model.prompts_generator(texts, clips[:, 1:])
    return beside


def _features(method: Callable[..., Any], first_token: bool, unused: set[str]) -> Tower:
    """`get_*_features`. Its result is an output whose pooler_output holds the vectors [n, D], not normalised.

    unused  inputs that make no difference. With a mask, transformers asks the device whether anything is masked,
            and waits for all batches before.
    """
    # A tokenizer may give more than a model takes (token_type_ids).
    accepted = set(inspect.signature(method).parameters) - unused

    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output = method(**{name: tensor for name, tensor in inputs.items() if name in accepted})
        vectors: torch.Tensor = output.pooler_output
        return vectors[:, 0] if first_token else vectors

    return tower


def frame_tower(image: Tower, normalize: bool) -> Tower:
    """A clip [n, F, ...] as the mean of its frames' vectors (meanP of CLIP4Clip, Luo et al. 2021).

    Frames count equally: their vectors are normalised before the mean, where vectors are normalised at all.
    """
    import torch

    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        clips, frames = next(iter(inputs.values())).shape[:2]
        vectors = image({name: tensor.flatten(0, 1) for name, tensor in inputs.items()})
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        if normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.reshape(clips, frames, -1).mean(dim=1)

    return tower


def _blip_text(model: Any) -> Tower:
    """The unimodal text side of image-text retrieval (the ITC head of BLIP, Li et al. 2022)."""

    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model.text_encoder(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
        projected: torch.Tensor = model.text_proj(output.last_hidden_state[:, 0])
        return projected

    return tower


def _blip_image(model: Any) -> Tower:
    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model.vision_model(pixel_values=inputs["pixel_values"])
        projected: torch.Tensor = model.vision_proj(output.last_hidden_state[:, 0])
        return projected

    return tower
