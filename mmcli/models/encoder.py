"""The family *encoder*: one modality, its tokens pooled into one vector (BERT, ViT, ResNet, Wav2Vec2, VideoMAE)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ConfigError, ModelError, one_line
from mmcli.core.records import DecodeOptions, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import available, max_tokens, min_image_size, sampling_rate, setting
from mmcli.models.options import ModelOptions
from mmcli.models.plan import AudioSpec, EmbeddingPlan, Inputs, TextSpec, VideoSpec

if TYPE_CHECKING:
    import torch

    from mmcli.models.runner import Loaded, Tower

FAMILY = "encoder"
# Of the picture that measures a network's vectors; convolutions take any.
_MEASURED_SIDE = 224
# Weights that only training needs: checkpoints lack them (wav2vec2-base-960h), and vectors do not depend on them.
TRAINING_ONLY = ("masked_spec_embed", "embeddings.mask_token", "predictor.")


@dataclass(frozen=True, slots=True)
class Encoder:
    """How a model type gives one vector.

    poolings    what can be asked of it, its own first
    size        where config.json has the size of the vectors; None: found by a forward pass without weights
    prefix      tokens before those of patches, which `mean` and `max` leave out; "registers" adds
                config.num_register_tokens
    num_frames  where it has the frames of a clip
    exact       sounds of unequal length cannot share a batch: padding changes the output although it is masked
    """

    modality: Modality
    poolings: tuple[str, ...]
    size: str | None = "hidden_size"
    prefix: int = 0
    registers: bool = False
    num_frames: str | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the last hidden state [n, T, D] becomes [n, D]: by `name`, without its first `skip` tokens."""

    name: str
    skip: int = 0


# Why a type's own pooling is what it is. Texts: the mean of the tokens, as sentence-transformers begins with.
_TEXT = Encoder("text", ("mean", "cls", "max", "pooler"))
_TEXT_WITHOUT_POOLER = Encoder("text", ("mean", "cls", "max"))
# ViT's pooler is random in checkpoints that were saved with a classification head; the class token is not.
_VIT = Encoder("image", ("cls", "mean", "max", "pooler"), prefix=1)
_DINO = Encoder("image", ("cls", "mean", "max", "pooler"), prefix=1, registers=True)
# Convolutions: the average of the last feature map, which is their pooler and what their classifiers take.
_CONV = Encoder("image", ("pooler", "mean", "max"), size="hidden_sizes.-1")
_CONV_MEASURED = Encoder("image", ("pooler", "mean", "max"), size=None)
# Swin's pooler averages the last stage; SigLIP's is an attention head that was trained with it.
_TOWER = Encoder("image", ("pooler", "mean", "max"))
# Speech: the mean of the frames, as their classifiers take it; there is no class token.
_SPEECH = Encoder("audio", ("mean", "max"))
# Their convolutions read what is behind the end of a sound: up to 0.35 of the norm (data2vec), 0.15 (conformer).
_SPEECH_EXACT = Encoder("audio", ("mean", "max"), exact=True)

# model_type of config.json -> how it is called
ENCODERS = {
    "albert": _TEXT,
    "bert": _TEXT,
    "camembert": _TEXT,
    "deberta": _TEXT_WITHOUT_POOLER,
    "deberta-v2": _TEXT_WITHOUT_POOLER,
    "distilbert": _TEXT_WITHOUT_POOLER,
    "electra": _TEXT_WITHOUT_POOLER,
    "ernie": _TEXT,
    "modernbert": _TEXT_WITHOUT_POOLER,
    "mpnet": _TEXT,
    "roberta": _TEXT,
    "xlm-roberta": _TEXT,
    # Its pooler is the mean of the patches, normalised: what its classifier takes.
    "beit": Encoder("image", ("pooler", "cls", "mean", "max"), prefix=1),
    "bit": _CONV_MEASURED,
    # Its pooler is the class token, normalised: what CLIP projects.
    "clip_vision_model": Encoder("image", ("pooler", "cls", "mean", "max"), prefix=1),
    "convnext": _CONV,
    "convnextv2": _CONV,
    "deit": Encoder("image", ("cls", "mean", "max", "pooler"), prefix=2),
    "dinov2": _VIT,
    "dinov2_with_registers": _DINO,
    # Its last hidden state begins with the pooled vector.
    "dinov3_convnext": Encoder("image", ("pooler", "cls", "mean", "max"), size="hidden_sizes.-1", prefix=1),
    "dinov3_vit": _DINO,
    "efficientnet": _CONV_MEASURED,
    # No class token and no pooler.
    "ijepa": Encoder("image", ("mean", "max")),
    "mobilenet_v1": _CONV_MEASURED,
    "mobilenet_v2": _CONV_MEASURED,
    "regnet": _CONV,
    "resnet": _CONV,
    "siglip_vision_model": _TOWER,
    "swin": _TOWER,
    "swinv2": _TOWER,
    "vit": _VIT,
    "vit_msn": Encoder("image", ("cls", "mean", "max"), prefix=1),
    # Its pooler is the mean of class and distillation token: what its classifier takes.
    "audio-spectrogram-transformer": Encoder("audio", ("pooler", "cls", "mean", "max"), prefix=2),
    "data2vec-audio": _SPEECH_EXACT,
    "hubert": _SPEECH,
    "unispeech": _SPEECH,
    "unispeech-sat": _SPEECH,
    "wav2vec2": _SPEECH,
    "wav2vec2-conformer": _SPEECH_EXACT,
    "wavlm": _SPEECH,
    # TimeSformer's and ViViT's classifiers take the class token, VideoMAE's the mean. V-JEPA 2's has a pooler of
    # its own, which the bare model lacks.
    "timesformer": Encoder("video", ("cls", "mean", "max"), prefix=1, num_frames="num_frames"),
    "videomae": Encoder("video", ("mean", "max"), num_frames="num_frames"),
    "vjepa2": Encoder("video", ("mean", "max"), num_frames="frames_per_clip"),
    "vivit": Encoder("video", ("cls", "mean", "max", "pooler"), prefix=1, num_frames="num_frames"),
}

# Their convolutions are faster on weights laid out as channels_last (one core, batch 32: MobileNetV2 and ResNet-50
# 1.39 times, RegNet 1.18, EfficientNet 1.14; ConvNeXt 0.95), and the same to 1e-6.
CHANNELS_LAST = frozenset(["bit", "efficientnet", "mobilenet_v1", "mobilenet_v2", "regnet", "resnet"])


def plan(checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Encoder) -> EmbeddingPlan:
    """What `row` says about this checkpoint. Raises ConfigError."""
    pooling = _pooling(checkpoint, options.pooling, row)
    if not available(checkpoint, row.modality):
        what = "tokenizer" if row.modality == "text" else "preprocessor_config.json"
        raise ConfigError(f"-m {checkpoint.id}: it has no {what}, so nothing tells how it takes {row.modality}")
    inputs = _inputs(checkpoint, options, row)
    skip = row.prefix + (getattr(checkpoint.config, "num_register_tokens", 0) if row.registers else 0)
    made = EmbeddingPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.encoder:load",
        detail=Pooling(pooling, skip),
        inputs=inputs,
        embedding_size=0,
        decode=DecodeOptions(
            modalities=inputs.modalities,
            min_image_size=min_image_size(checkpoint),
            exact_decode=options.exact_decode,
            sampling_rate=inputs.audio.sampling_rate if inputs.audio else None,
            num_frames=inputs.video.num_frames if inputs.video else options.frames,
        ),
        pooling=pooling,
        normalize=bool(options.normalize),
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
    )
    return _with_size(made, row)


def _pooling(checkpoint: Checkpoint, asked: str | None, row: Encoder) -> str:
    if asked is None:
        return row.poolings[0]
    if asked not in row.poolings:
        kind = checkpoint.config.model_type
        raise ConfigError(f"--pooling {asked}: a {kind} can be pooled by {', '.join(row.poolings)}")
    return asked


def _inputs(checkpoint: Checkpoint, options: ModelOptions, row: Encoder) -> Inputs:
    config = checkpoint.config
    match row.modality:
        case "text":
            return Inputs(text=TextSpec(max_tokens(checkpoint, config)))
        case "audio":
            return Inputs(audio=audio_spec(checkpoint, row.exact))
        case "image":
            return Inputs(image=True, video=VideoSpec(options.frames, native=False))
        case "video":
            return Inputs(video=VideoSpec(int(setting(config, row.num_frames or "")), native=True))


def audio_spec(checkpoint: Checkpoint, exact: bool) -> AudioSpec:
    """How an audio encoder takes sounds. `exact`: it is known that padding changes its output."""
    config = checkpoint.config
    rate = sampling_rate(checkpoint)
    kernels = getattr(config, "conv_kernel", None)
    if not kernels:
        if config.model_type != "wav2vec2-bert":
            return AudioSpec("fixed", rate)
        # Its spectrograms are as long as their sounds, with masks, which all its layers heed; `stride` of their
        # frames (400 samples, 160 apart, whatever the rate) are one of the model's.
        stride = int(checkpoint.processor_json("feature_extractor").get("stride", 2))
        batching: Any = "fixed" if exact or config.add_adapter else "masked"
        return AudioSpec(batching, rate, 400 + 160 * (stride - 1))
    # Samples for one output frame, through all convolutions: 400 for wav2vec2 (25 ms). SEW averages frames then.
    samples = getattr(config, "squeeze_factor", 1)
    for kernel, stride in zip(reversed(kernels), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    # Group norm takes its statistics over the padding too, and an adapter's convolutions reach over the end.
    group_norm = getattr(config, "feat_extract_norm", None) == "group"
    exact = exact or group_norm or getattr(config, "add_adapter", False)
    return AudioSpec("exact" if exact else "masked", rate, samples)


def _with_size(made: EmbeddingPlan, row: Encoder) -> EmbeddingPlan:
    from dataclasses import replace

    config = made.checkpoint.config
    if row.size is None:
        return replace(made, embedding_size=_measured_size(made))
    name, _, index = row.size.partition(".")
    size = getattr(config, name)
    if getattr(config, "add_adapter", False):
        size = config.output_hidden_size
    return replace(made, embedding_size=int(size[int(index)] if index else size))


def _measured_size(plan: EmbeddingPlan) -> int:
    """D by a forward pass of one picture on torch's meta device, which holds no weights (0.2 s)."""
    import torch
    from transformers import AutoModel

    checkpoint = plan.checkpoint
    try:
        with torch.device("meta"), torch.inference_mode():
            model = AutoModel.from_config(checkpoint.config).eval()
            pixels = torch.zeros(1, 3, _MEASURED_SIDE, _MEASURED_SIDE)
            return int(pool(model(pixel_values=pixels), None, plan.detail).shape[-1])
    except Exception as error:
        raise ConfigError(f"-m {checkpoint.id}: config.json is not usable: {one_line(str(error))}") from error


def load(plan: EmbeddingPlan, device: torch.device) -> Loaded:
    """The tower of a loaded model; an image encoder has one for the frames of clips too."""
    import torch
    from transformers import AutoModel

    from mmcli.models.dual_encoder import frame_tower
    from mmcli.models.runner import Loaded, load_model

    pooling: Pooling = plan.detail
    unused = TRAINING_ONLY if pooling.name == "pooler" else (*TRAINING_ONLY, "pooler.")
    model = load_model(AutoModel, plan, device, unused)
    if plan.checkpoint.config.model_type in CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
    tower = encoder_tower(model, pooling)
    towers: dict[Modality, Tower] = dict.fromkeys(plan.modalities, tower)
    if plan.inputs.video and not plan.inputs.video.native:
        towers["video"] = frame_tower(tower, plan.normalize)
    return Loaded(towers)


def encoder_tower(model: Any, pooling: Pooling) -> Tower:
    """model(...) -> pooled [n, D]."""
    accepted = set(inspect.signature(model.forward).parameters)
    # V-JEPA 2 predicts hidden patches beside, which nothing here reads.
    options = {"skip_predictor": True} if "skip_predictor" in accepted else {}

    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model(**{name: tensor for name, tensor in inputs.items() if name in accepted}, **options)
        mask = inputs.get("attention_mask")
        if mask is not None and "input_values" in inputs:
            # Of samples -> of the frames that the convolutions make of them.
            mask = model._get_feature_vector_attention_mask(output.last_hidden_state.shape[1], mask)
        return pool(output, mask, pooling)

    return tower


def pool(output: Any, mask: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
    """A model's output -> [n, D]. `mask`: [n, T], 1 for tokens that count; None: all do.

    cls: the first token; mean, max: over the tokens that count; pooler: the model's own pooler_output.
    """
    import torch

    if pooling.name == "pooler":
        pooled: torch.Tensor | None = output.pooler_output
        if pooled is None:
            raise ModelError("this checkpoint has no pooler", hint="--pooling mean")
        return pooled.flatten(1)
    hidden: torch.Tensor = output.last_hidden_state
    if hidden.ndim == 4:
        # A feature map [n, C, H, W]: each place is a token.
        hidden = hidden.flatten(2).transpose(1, 2)
    if pooling.name == "cls":
        return hidden[:, 0]
    hidden = hidden[:, pooling.skip :]
    if mask is None:
        return hidden.mean(dim=1) if pooling.name == "mean" else hidden.amax(dim=1)
    counts = mask[:, pooling.skip :].unsqueeze(-1).to(hidden.dtype)
    if pooling.name == "mean":
        return (hidden * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1e-9)
    return torch.where(counts > 0, hidden, torch.finfo(hidden.dtype).min).amax(dim=1)
