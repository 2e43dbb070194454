"""Tiny random checkpoints of every encoder type, each with its genuine tokenizer or processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tiny_dual import bert_tokenizer, randomize, roberta_tokenizer, xlm_roberta_tokenizer

SIDE = 32  # pixels of a picture that a model takes
FRAMES = 4

_LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'")
_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PIXELS = {"image_size": SIDE, "patch_size": 8}
# Convolutions of speech models: 30 samples for one frame, then one every 8.
_WAVES = {
    **_SIZE, "conv_dim": (16, 16, 16), "conv_kernel": (6, 3, 3), "conv_stride": (4, 2, 1), "layerdrop": 0.0,
    "num_conv_pos_embedding_groups": 4, "num_codevectors_per_group": 4, "codevector_dim": 8,
}  # fmt: skip


def save(folder: Path, model: Any, processor: Any) -> Path:
    randomize(model)
    if norms := [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]:
        _calibrate(model, norms)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _calibrate(model: Any, norms: list[Any]) -> None:
    """Batch norm as training leaves it; with other statistics all pictures look alike."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.0, generator=generator)
            norm.bias.uniform_(0.5, 1.5, generator=generator)
        for _ in range(4):
            noise = torch.randn(8, 3, 4, 4, generator=generator)
            model(torch.nn.functional.interpolate(noise, 2 * SIDE, mode="bicubic"))
    model.eval()


# ------------------------------------------------------------------------------------------------------- text


def mpnet_tokenizer() -> Any:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *_LETTERS, *(f"##{c}" for c in _LETTERS), "[UNK]", "<mask>"]
    return hf.MPNetTokenizer(vocab={token: n for n, token in enumerate(tokens)}, model_max_length=512)


def albert_tokenizer() -> Any:
    pieces = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "▁", *_LETTERS]
    return hf.AlbertTokenizer(vocab=[(p, -float(n)) for n, p in enumerate(pieces)], model_max_length=512)


def deberta_v2_tokenizer() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁", *_LETTERS, "[MASK]"]
    return hf.DebertaV2Tokenizer(vocab=[(p, -float(n)) for n, p in enumerate(pieces)])


def camembert_tokenizer() -> Any:
    pieces = [
        "<s>NOTUSED",
        "<pad>",
        "</s>NOTUSED",
        "<unk>",
        "<unk>NOTUSED",
        "▁",
        *_LETTERS,
        "<s>",
        "</s>",
        "<mask>",
    ]
    return hf.CamembertTokenizer(vocab=[(p, -float(n)) for n, p in enumerate(pieces)], model_max_length=512)


def fast_tokenizer() -> Any:
    """As ModernBERT has it: a tokenizer without a class of its own."""
    tokenizer = bert_tokenizer()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        unk_token="[UNK]", mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip


def text(
    model: str, tokenizer: Callable[[], Any] = bert_tokenizer, class_name: str = "Model", **config: Any
) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        made = tokenizer()
        settings = {"vocab_size": len(made), **_SIZE, "pad_token_id": made.pad_token_id, **config}
        configuration = getattr(hf, f"{model}Config")(**settings)
        return save(folder, getattr(hf, f"{model}{class_name}")(configuration), made)

    return build


TEXTS = {
    "albert": text("Albert", albert_tokenizer, embedding_size=16, max_position_embeddings=64),
    "bert": text("Bert", max_position_embeddings=64),
    "camembert": text("Camembert", camembert_tokenizer, max_position_embeddings=66),
    "deberta": text("Deberta", max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": text(
        "DebertaV2", deberta_v2_tokenizer, max_position_embeddings=64, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_biased_input=False, norm_rel_ebd="layer_norm", position_buckets=16,
        share_att_key=True,
    ),
    "distilbert": text("DistilBert", dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64),
    "electra": text("Electra", embedding_size=16, max_position_embeddings=64),
    "ernie": text("Ernie", max_position_embeddings=64),
    "modernbert": text("ModernBert", fast_tokenizer, global_attn_every_n_layers=2, local_attention=16),
    "mpnet": text("MPNet", mpnet_tokenizer, max_position_embeddings=66),
    "roberta": text("Roberta", roberta_tokenizer, max_position_embeddings=514, type_vocab_size=1),
    "xlm-roberta": text("XLMRoberta", xlm_roberta_tokenizer, max_position_embeddings=66, type_vocab_size=1),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------ images


def square(name: str, **settings: Any) -> Any:
    return getattr(hf, f"{name}ImageProcessor")(size={"height": SIDE, "width": SIDE}, **settings)


def cropped(name: str, side: int = SIDE, **settings: Any) -> Any:
    crop = {"height": side, "width": side}
    return getattr(hf, f"{name}ImageProcessor")(size={"shortest_edge": side + 4}, crop_size=crop, **settings)


def image(
    model: str, processor: Callable[[], Any], class_name: str = "Model", **config: Any
) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        configuration = getattr(hf, f"{model}Config")(**config)
        return save(folder, getattr(hf, f"{model}{class_name}")(configuration), processor())

    return build


def vit(
    model: str, processor: Callable[[], Any] | None = None, class_name: str = "Model", **config: Any
) -> Callable[[Path], Path]:
    return image(model, processor or (lambda: square("ViT")), class_name, **{**_SIZE, **_PIXELS, **config})


def _convnext() -> Any:
    return hf.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=0.875)


_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 24, 40]}

IMAGES = {
    "beit": vit("Beit", lambda: cropped("Beit"), use_relative_position_bias=True),
    "bit": image("Bit", lambda: cropped("Bit"), embedding_size=32, num_groups=4, **_STAGES),
    "clip_vision_model": vit("CLIPVision", lambda: cropped("CLIP"), projection_dim=24),
    "convnext": image("ConvNext", _convnext, **_STAGES),
    "convnextv2": image("ConvNextV2", _convnext, **_STAGES),
    "deit": vit("DeiT", lambda: cropped("DeiT")),
    "dinov2": vit("Dinov2", lambda: cropped("Bit"), mlp_ratio=2),
    "dinov2_with_registers": vit("Dinov2WithRegisters", lambda: cropped("Bit"), mlp_ratio=2, num_register_tokens=3),
    "dinov3_convnext": image("DINOv3ConvNext", lambda: square("DINOv3ViT"), layer_scale_init_value=0.5, **_STAGES),
    "dinov3_vit": vit("DINOv3ViT", lambda: square("DINOv3ViT"), num_register_tokens=3),
    "efficientnet": image(
        "EfficientNet", lambda: square("EfficientNet"), image_size=SIDE, kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24], out_channels=[16, 24, 30], strides=[1, 1, 2], num_block_repeats=[1, 1, 2],
        expand_ratios=[1, 6, 6], hidden_dim=1280, width_coefficient=1.0, depth_coefficient=1.0,
    ),
    "ijepa": vit("IJepa"),
    "mobilenet_v1": image("MobileNetV1", lambda: cropped("MobileNetV1", 2 * SIDE), depth_multiplier=0.25),
    "mobilenet_v2": image("MobileNetV2", lambda: cropped("MobileNetV2", 2 * SIDE), depth_multiplier=0.25),
    "regnet": image("RegNet", _convnext, embedding_size=16, groups_width=8, **_STAGES),
    "resnet": image("ResNet", _convnext, embedding_size=16, **_STAGES),
    "siglip_vision_model": vit("SiglipVision", lambda: square("Siglip")),
    "swin": image("Swin", lambda: square("ViT"), embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
                  image_size=SIDE, patch_size=4),
    "swinv2": image("Swinv2", lambda: square("ViT"), embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
                    image_size=SIDE, patch_size=4),
    "vit": vit("ViT"),
    "vit_msn": vit("ViTMSN"),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------- audio


def speech(model: str, norm: str | None, class_name: str = "Model", **config: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        settings = _WAVES | ({"feat_extract_norm": norm} if norm else {}) | config
        extractor = hf.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm != "group")
        configuration = getattr(hf, f"{model}Config")(**settings)
        return save(folder, getattr(hf, f"{model}{class_name}")(configuration), extractor)

    return build


def spectrogram(folder: Path) -> Path:
    extractor = hf.ASTFeatureExtractor(num_mel_bins=16, max_length=64, mean=-4.2, std=4.5)
    config = hf.ASTConfig(**_SIZE, patch_size=8, frequency_stride=4, time_stride=4, max_length=64, num_mel_bins=16)
    return save(folder, hf.ASTModel(config), extractor)


SOUNDS = {
    "audio-spectrogram-transformer": spectrogram,
    "data2vec-audio": speech("Data2VecAudio", None),
    "hubert-group": speech("Hubert", "group", num_conv_pos_embeddings=8),
    "hubert-layer": speech("Hubert", "layer", num_conv_pos_embeddings=8, do_stable_layer_norm=True),
    "unispeech-group": speech("UniSpeech", "group", num_conv_pos_embeddings=8),
    "unispeech-layer": speech("UniSpeech", "layer", num_conv_pos_embeddings=8, do_stable_layer_norm=True),
    "unispeech-sat-group": speech("UniSpeechSat", "group", num_conv_pos_embeddings=8),
    "unispeech-sat-layer": speech("UniSpeechSat", "layer", num_conv_pos_embeddings=8, do_stable_layer_norm=True),
    "wav2vec2-group": speech("Wav2Vec2", "group", num_conv_pos_embeddings=8),
    "wav2vec2-layer": speech("Wav2Vec2", "layer", num_conv_pos_embeddings=8, do_stable_layer_norm=True),
    "wav2vec2-adapter": speech("Wav2Vec2", "layer", num_conv_pos_embeddings=8, add_adapter=True,
                               output_hidden_size=24),
    "wav2vec2-conformer": speech("Wav2Vec2Conformer", "layer", num_conv_pos_embeddings=8,
                                 position_embeddings_type="relative", conv_depthwise_kernel_size=5),
    "wav2vec2-conformer-rotary": speech("Wav2Vec2Conformer", "layer", num_conv_pos_embeddings=8,
                                        position_embeddings_type="rotary", conv_depthwise_kernel_size=5),
    "wavlm-group": speech("WavLM", "group", num_conv_pos_embeddings=8, num_buckets=16, max_bucket_distance=40),
    "wavlm-layer": speech("WavLM", "layer", num_conv_pos_embeddings=8, num_buckets=16, max_bucket_distance=40,
                          do_stable_layer_norm=True),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------- video


def clip(model: str, processor: str, class_name: str = "Model", **config: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        settings = {**_SIZE, **_PIXELS, "num_frames": FRAMES, **config}
        made = getattr(hf, processor)(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
        )
        configuration = getattr(hf, f"{model}Config")(**settings)
        return save(folder, getattr(hf, f"{model}{class_name}")(configuration), made)

    return build


def vjepa2(folder: Path) -> Path:
    config = hf.VJEPA2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, crop_size=SIDE,
        frames_per_clip=FRAMES, pred_hidden_size=16, pred_num_hidden_layers=1, pred_num_attention_heads=2,
    )  # fmt: skip
    processor = hf.VJEPA2VideoProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    return save(folder, hf.VJEPA2Model(config), processor)


_TUBES = {"tubelet_size": (2, 8, 8)}

CLIPS = {
    "timesformer": clip("Timesformer", "VideoMAEImageProcessor"),
    "timesformer-new": clip("Timesformer", "TimesformerVideoProcessor"),
    "videomae": clip("VideoMAE", "VideoMAEImageProcessor"),
    "videomae-new": clip("VideoMAE", "VideoMAEVideoProcessor"),
    "vjepa2": vjepa2,
    "vivit": clip("Vivit", "VivitImageProcessor", **_TUBES),
    "vivit-new": clip("Vivit", "VivitVideoProcessor", **_TUBES),
}

# Saved with a head, as most checkpoints are that were fine-tuned: name -> builder, attribute of the base model.
HEADS = {
    "bert-masked-lm": (text("Bert", class_name="ForMaskedLM", max_position_embeddings=64), "bert"),
    "hubert-classifier": (
        speech("Hubert", "layer", "ForSequenceClassification", num_conv_pos_embeddings=8),
        "hubert",
    ),
    "mobilenet_v2-classifier": (
        image(
            "MobileNetV2", lambda: cropped("MobileNetV2", 2 * SIDE), "ForImageClassification", depth_multiplier=0.1
        ),
        "mobilenet_v2",
    ),
    "videomae-classifier": (clip("VideoMAE", "VideoMAEImageProcessor", "ForVideoClassification"), "videomae"),
    "vit-classifier": (vit("ViT", class_name="ForImageClassification"), "vit"),
    "wav2vec2-ctc": (speech("Wav2Vec2", "group", "ForCTC", num_conv_pos_embeddings=8), "wav2vec2"),
}
