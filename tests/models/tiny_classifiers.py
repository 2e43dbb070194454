"""Tiny random checkpoints with classification heads, each with its genuine tokenizer or processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_dual
import tiny_encoders as tiny
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_dual import bert_tokenizer, roberta_tokenizer, xlm_roberta_tokenizer
from tiny_encoders import FRAMES, SIDE, clip, cropped, image, speech, square, text, vit
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LABELS = 6
_COUNT = {"num_labels": LABELS}
_TEXT, _IMAGE = "ForSequenceClassification", "ForImageClassification"
Builder = Callable[[Path], Path]

# ------------------------------------------------------------------------------------------------------- text


def plain_tokenizer() -> Any:
    """As Llama's: no end token, and one that only pads."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'"]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=64, padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def gpt2_tokenizer() -> Any:
    """As GPT-2's, which has nothing to pad with."""
    made = hf.GPT2Tokenizer(vocab=roberta_tokenizer().get_vocab(), merges=[("c", "a"), ("ca", "t")])
    made.model_max_length = 64
    return made


def bare(text_model: str, tokenizer: Callable[[], Any], **config: Any) -> Builder:
    """A checkpoint whose config.json has these settings and no others that are common to encoders."""

    def build(folder: Path) -> Path:
        made = tokenizer()
        configuration = getattr(hf, f"{text_model}Config")(vocab_size=len(made), **(_COUNT | config))
        return tiny.save(folder, getattr(hf, f"{text_model}{_TEXT}")(configuration), made)

    return build


def head(model: str, tokenizer: Callable[[], Any] = bert_tokenizer, **config: Any) -> Builder:
    return text(model, tokenizer, _TEXT, **(_COUNT | config))


_DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BOTH = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_DISENTANGLED = {"max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

TEXTS: dict[str, Builder] = {
    "albert": head("Albert", tiny.albert_tokenizer, embedding_size=16, max_position_embeddings=64),
    "bert": head("Bert", max_position_embeddings=64),
    "camembert": head("Camembert", tiny.camembert_tokenizer, max_position_embeddings=66),
    "deberta": head("Deberta", **_DISENTANGLED),
    "deberta-v2": head(
        "DebertaV2", tiny.deberta_v2_tokenizer, position_biased_input=False, norm_rel_ebd="layer_norm",
        position_buckets=16, share_att_key=True, **_DISENTANGLED,
    ),
    "distilbert": head("DistilBert", dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64),
    "electra": head("Electra", embedding_size=16, max_position_embeddings=64),
    "modernbert": head("ModernBert", tiny.fast_tokenizer, global_attn_every_n_layers=2, local_attention=16),
    "mpnet": head("MPNet", tiny.mpnet_tokenizer, max_position_embeddings=66),
    "roberta": head("Roberta", roberta_tokenizer, max_position_embeddings=66, type_vocab_size=1),
    "xlm-roberta": head("XLMRoberta", xlm_roberta_tokenizer, max_position_embeddings=66, type_vocab_size=1),
    "xmod": head("Xmod", xlm_roberta_tokenizer, max_position_embeddings=66, type_vocab_size=1,
                 languages=["en_XX"], default_language="en_XX"),
    # What stands behind a text counts.
    "big_bird": head("BigBird", max_position_embeddings=64, block_size=2, num_random_blocks=1),
    "convbert": head("ConvBert", embedding_size=16, max_position_embeddings=64),
    "fnet": head("FNet", max_position_embeddings=64),
    "mobilebert": head(
        "MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, max_position_embeddings=64,
        normalization_type="layer_norm",
    ),
    "xlnet": bare("XLNet", plain_tokenizer, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=3),
    # Encoder and decoder: the head reads the decoder's end token.
    "bart": bare("Bart", roberta_tokenizer, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                 decoder_start_token_id=2, **_BOTH),
    # Decoders: the head reads the last token. GPT-2's finds none to pad with.
    "gpt2": bare("GPT2", plain_tokenizer, pad_token_id=3, **_GPT2),
    "gpt2-end": bare("GPT2", gpt2_tokenizer, pad_token_id=2, **_GPT2),
    "gpt2-none": bare("GPT2", gpt2_tokenizer, pad_token_id=None, **_GPT2),
    "llama": bare("Llama", plain_tokenizer, pad_token_id=3, **_DECODER),
    "llama-minus": bare("Llama", plain_tokenizer, pad_token_id=None, **_DECODER),
    "qwen2": bare("Qwen2", plain_tokenizer, pad_token_id=3, **_DECODER),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------- entailment


def nli(*names: str) -> dict[str, Any]:
    """Settings of a head with these labels."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


_MNLI = nli("CONTRADICTION", "NEUTRAL", "ENTAILMENT")

ENTAILMENT: dict[str, Builder] = {
    "bart": bare("Bart", lambda: limited(roberta_tokenizer()), pad_token_id=1, bos_token_id=0, eos_token_id=2,
                 decoder_start_token_id=2, **_MNLI, **_BOTH),
    "bert": head("Bert", lambda: bert_tokenizer(64), max_position_embeddings=64, **_MNLI),
    "bert-first": head("Bert", lambda: bert_tokenizer(64), max_position_embeddings=64,
                       **nli("entailment", "neutral", "contradiction")),
    "bert-two": head("Bert", lambda: bert_tokenizer(64), max_position_embeddings=64,
                     **nli("entailment", "not_entailment")),
    "deberta-v2": head(
        "DebertaV2", lambda: limited(tiny.deberta_v2_tokenizer()), position_biased_input=False,
        norm_rel_ebd="layer_norm", position_buckets=16, share_att_key=True,
        **nli("contradiction", "entailment", "neutral"), **_DISENTANGLED,
    ),
    "distilbert": head("DistilBert", lambda: bert_tokenizer(64), dim=32, hidden_dim=48, n_layers=2, n_heads=4,
                       max_position_embeddings=64, **_MNLI),
    "mobilebert": head(
        "MobileBert", lambda: bert_tokenizer(64), embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16,
        max_position_embeddings=64, normalization_type="layer_norm", **_MNLI,
    ),
    "roberta": head("Roberta", lambda: limited(roberta_tokenizer()), max_position_embeddings=66, type_vocab_size=1,
                    **_MNLI),
}  # fmt: skip


def limited(tokenizer: Any) -> Any:
    """One that says itself where texts are cut, as the pipeline of transformers needs it."""
    tokenizer.model_max_length = 64
    return tokenizer


# ------------------------------------------------------------------------------------------------------ images


def picture(model: str, processor: Callable[[], Any], class_name: str = _IMAGE, **config: Any) -> Builder:
    return image(model, processor, class_name, **_COUNT, **config)


def patches(
    model: str, processor: Callable[[], Any] | None = None, class_name: str = _IMAGE, **config: Any
) -> Builder:
    return vit(model, processor, class_name, **_COUNT, **config)


def tower(model: str, processor: Callable[[], Any], **vision: Any) -> Builder:
    """The vision tower of a dual encoder, with a head."""

    def build(folder: Path) -> Path:
        config = getattr(hf, f"{model}Config")(vision_config=tiny_dual._VISION | vision, **_COUNT)
        return tiny.save(folder, getattr(hf, f"{model}{_IMAGE}")(config), processor())

    return build


def _convnext() -> Any:
    return hf.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=0.875)


_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 24, 40]}
_SWIN = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": SIDE,
    "patch_size": 4,
}
_BLOCKS = [[[3, 16, 16, 1, False]], *([[3, 16, 16, stride, False]] for stride in (1, 2, 2)), [[5, 16, 64, 1, True]]]


def _pp_lcnet() -> Any:
    return hf.PPLCNetImageProcessor(resize_short=SIDE + 4, crop_size={"height": SIDE, "width": SIDE})


def levit(ending: str = "") -> Builder:
    """With a head of small weights: else all scores are 0 or 1."""
    made = picture(
        "Levit", lambda: cropped("Levit", 64), _IMAGE + ending, hidden_sizes=[16, 24, 32], depths=[1, 1, 1],
        num_attention_heads=[2, 2, 2], key_dim=[8, 8, 8], image_size=64,
    )  # fmt: skip

    def build(folder: Path) -> Path:
        weights = load_file(made(folder) / "model.safetensors")
        for name in weights:
            if name.startswith("classifier") and name.endswith("linear.weight"):
                weights[name] *= 0.05
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return build


IMAGES: dict[str, Builder] = {
    "beit": patches("Beit", lambda: cropped("Beit"), use_relative_position_bias=True),
    "bit": picture("Bit", lambda: cropped("Bit"), embedding_size=32, num_groups=4, **_STAGES),
    "clip": tower("CLIP", lambda: cropped("CLIP")),
    "convnext": picture("ConvNext", _convnext, **_STAGES),
    "convnextv2": picture("ConvNextV2", _convnext, **_STAGES),
    "deit": patches("DeiT", lambda: cropped("DeiT")),
    "deit-teacher": patches("DeiT", lambda: cropped("DeiT"), f"{_IMAGE}WithTeacher"),
    "dinov2": patches("Dinov2", lambda: cropped("Bit"), mlp_ratio=2),
    "dinov2_with_registers": patches("Dinov2WithRegisters", lambda: cropped("Bit"), mlp_ratio=2,
                                     num_register_tokens=3),
    "efficientnet": picture(
        "EfficientNet", lambda: square("EfficientNet"), image_size=SIDE, kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24], out_channels=[16, 24, 30], strides=[1, 1, 2], num_block_repeats=[1, 1, 2],
        expand_ratios=[1, 6, 6], hidden_dim=1280, width_coefficient=1.0, depth_coefficient=1.0,
    ),
    "levit": levit(),
    "levit-teacher": levit("WithTeacher"),
    "mobilenet_v1": picture("MobileNetV1", lambda: cropped("MobileNetV1", 2 * SIDE), depth_multiplier=0.25),
    "mobilenet_v2": picture("MobileNetV2", lambda: cropped("MobileNetV2", 2 * SIDE), depth_multiplier=0.25),
    # Its processor swaps red and blue.
    "mobilevit": picture(
        "MobileViT", lambda: cropped("MobileViT", 2 * SIDE), image_size=2 * SIDE, hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32], num_attention_heads=2,
    ),
    "pp_lcnet": picture("PPLCNet", _pp_lcnet, class_expand=64, block_configs=_BLOCKS),
    "regnet": picture("RegNet", _convnext, embedding_size=16, groups_width=8, **_STAGES),
    "resnet": picture("ResNet", _convnext, embedding_size=16, **_STAGES),
    "segformer": picture("Segformer", lambda: square("Segformer"), depths=[1, 1, 1, 1],
                         hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16),
    "siglip": tower("Siglip", lambda: square("Siglip")),
    "siglip2": tower(
        "Siglip2", lambda: hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), patch_size=8, num_patches=16
    ),
    "swin": picture("Swin", lambda: square("ViT"), **_SWIN),
    "swinv2": picture("Swinv2", lambda: square("ViT"), **_SWIN),
    "vit": patches("ViT"),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------- sounds, clips


def waves(model: str, norm: str | None, **config: Any) -> Builder:
    return speech(model, norm, _TEXT, **_COUNT, classifier_proj_size=16, **config)


def spectrogram(folder: Path) -> Path:
    extractor = hf.ASTFeatureExtractor(num_mel_bins=16, max_length=64, mean=-4.2, std=4.5)
    config = hf.ASTConfig(
        **tiny._SIZE, **_COUNT, patch_size=8, frequency_stride=4, time_stride=4, max_length=64, num_mel_bins=16
    )
    return tiny.save(folder, hf.ASTForAudioClassification(config), extractor)


def whisper(folder: Path) -> Path:
    config = hf.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, num_mel_bins=20,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=50,
        classifier_proj_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **_COUNT,
    )  # fmt: skip
    return tiny.save(
        folder, hf.WhisperForAudioClassification(config), hf.WhisperFeatureExtractor(20, chunk_length=1)
    )


def conformer(folder: Path) -> Path:
    config = hf.Wav2Vec2BertConfig(
        **tiny._SIZE,
        **_COUNT,
        feature_projection_input_dim=32,
        conv_depthwise_kernel_size=7,
        classifier_proj_size=16,
    )
    extractor = hf.SeamlessM4TFeatureExtractor(feature_size=16, num_mel_bins=16)
    return tiny.save(folder, hf.Wav2Vec2BertForSequenceClassification(config), extractor)


_NEAR = {"num_conv_pos_embeddings": 8}
_STABLE = {**_NEAR, "do_stable_layer_norm": True}

SOUNDS: dict[str, Builder] = {
    "audio-spectrogram-transformer": spectrogram,
    "data2vec-audio": waves("Data2VecAudio", None),
    "hubert-group": waves("Hubert", "group", **_NEAR),
    "hubert-layer": waves("Hubert", "layer", **_STABLE),
    "sew-layer": waves("SEW", "layer", squeeze_factor=2, **_NEAR),
    "sew-group": waves("SEW", "group", squeeze_factor=2, **_NEAR),
    "wav2vec2-bert": conformer,
    "wav2vec2-group": waves("Wav2Vec2", "group", **_NEAR),
    "wav2vec2-layer": waves("Wav2Vec2", "layer", **_STABLE),
    "wav2vec2-weighted": waves("Wav2Vec2", "layer", use_weighted_layer_sum=True, **_STABLE),
    "wavlm-group": waves("WavLM", "group", num_buckets=16, max_bucket_distance=40, **_NEAR),
    "wavlm-layer": waves("WavLM", "layer", num_buckets=16, max_bucket_distance=40, **_STABLE),
    "whisper": whisper,
}


def frames(model: str, processor: str, **config: Any) -> Builder:
    return clip(model, processor, "ForVideoClassification", **_COUNT, **config)


def vjepa2(folder: Path) -> Path:
    config = hf.VJEPA2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, crop_size=SIDE,
        frames_per_clip=FRAMES, pred_hidden_size=16, pred_num_hidden_layers=1, pred_num_attention_heads=2,
        num_pooler_layers=1, **_COUNT,
    )  # fmt: skip
    processor = hf.VJEPA2VideoProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    return tiny.save(folder, hf.VJEPA2ForVideoClassification(config), processor)


def videoprism(folder: Path) -> Path:
    config = hf.VideoPrismVisionConfig(
        hidden_size=32, intermediate_size=48, num_spatial_layers=1, num_temporal_layers=1, num_attention_heads=4,
        num_auxiliary_layers=1, image_size=SIDE, num_frames=FRAMES, tubelet_size=[1, 8, 8], **_COUNT,
    )  # fmt: skip
    processor = hf.LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})
    return tiny.save(folder, hf.VideoPrismForVideoClassification(config), processor)


CLIPS: dict[str, Builder] = {
    "timesformer": frames("Timesformer", "VideoMAEImageProcessor"),
    "videomae": frames("VideoMAE", "VideoMAEImageProcessor"),
    "vivit": frames("Vivit", "VivitImageProcessor", tubelet_size=(2, 8, 8)),
    "videoprism": videoprism,
    "vjepa2": vjepa2,
}

BUILDERS = TEXTS | IMAGES | SOUNDS | CLIPS
