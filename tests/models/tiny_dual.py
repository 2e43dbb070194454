"""Tiny random checkpoints of every dual-encoder type, each with its genuine tokenizer and processor."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SIDE = 32  # pixels of a picture that a tower takes
SIZE = 24  # of the vectors, unlike every hidden size
CLIP_DIRECTORY = Path(__file__).resolve().parents[2] / "sample_data" / "models" / "clip"

_LETTERS = [*string.ascii_lowercase, *string.digits, *".,!?'-", *"éßñ漢字一只猫привет"]
_WORDS = ["a", "the", "photo", "of", "cat", "dog", "red", "circle"]

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_act": "gelu",
}  # fmt: skip
_VISION = {
    "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- tokenizers


def clip_tokenizer() -> Any:
    return hf.CLIPTokenizer.from_pretrained(CLIP_DIRECTORY)


def bert_tokenizer(model_max_length: int = 512) -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS, *_LETTERS, *(f"##{c}" for c in _LETTERS)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return hf.BertTokenizer(vocab=vocabulary, model_max_length=model_max_length)


def roberta_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "ca", "cat", "Ġcat", "<mask>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    return hf.RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=512)


def xlm_roberta_tokenizer() -> Any:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in _WORDS), *_LETTERS]
    vocabulary = [(piece, -float(number)) for number, piece in enumerate(pieces)] + [("<mask>", 0.0)]
    return hf.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=77)


def gemma_tokenizer() -> Any:
    """As the SigLIP 2 checkpoints have it: lower-cased by its class, an end token, padded on the right."""
    letters = [*"▁", *_LETTERS, "ca", "cat", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = hf.Siglip2Tokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t")], padding_side="right")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    return tokenizer


def siglip_tokenizer() -> Any:
    """What SigLIP's sentencepiece model does, without that library."""
    pieces = ["<unk>", "</s>", "▁", *(f"▁{word}" for word in _WORDS), *_LETTERS]
    backend = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=16,
        model_input_names=["input_ids"],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- checkpoints


def randomize(model: Any, seed: int = 0) -> Any:
    """Weights large enough that different inputs give different vectors, which transformers' own are not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                fan_in = weight.shape[-1] if "embed" in name else weight[0].numel()
                scale = 0.5 if "embed" in name else 1.5 / math.sqrt(fan_in)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif weight.ndim == 1 and not name.endswith("norm.weight"):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def save(folder: Path, model: Any, processor: Any = None, seed: int = 0) -> Path:
    """As a checkpoint on the hub looks: the processor's parts in files of their own as well."""
    randomize(model, seed).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        for part in ("image_processor", "feature_extractor"):
            if (found := getattr(processor, part, None)) is not None:
                found.save_pretrained(folder)
    return folder


def square(kind: type, **settings: Any) -> Any:
    return kind(size={"height": SIDE, "width": SIDE}, **settings)


def cropped(kind: type, **settings: Any) -> Any:
    return kind(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **settings)


def clip(folder: Path, image_processor: Any = None, seed: int = 0, **config: Any) -> Path:
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_TEXT, **ids, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    made = hf.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=SIZE, **config)
    image_processor = image_processor or cropped(hf.CLIPImageProcessor)
    return save(folder, hf.CLIPModel(made), hf.CLIPProcessor(image_processor, tokenizer), seed)


def siglip(folder: Path) -> Path:
    tokenizer = siglip_tokenizer()
    text = {**_TEXT, "hidden_size": 40, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = hf.SiglipConfig(text_config=text, vision_config=_VISION)
    return save(folder, hf.SiglipModel(config), _SiglipParts(square(hf.SiglipImageProcessor), tokenizer))


def siglip2_fixed(folder: Path) -> Path:
    """SigLIP 2 of a fixed resolution: the SigLIP architecture with Gemma's tokenizer, as on the hub."""
    tokenizer = gemma_tokenizer()
    text = {**_TEXT, "hidden_size": 40, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = hf.SiglipConfig(text_config=text, vision_config=_VISION)
    return save(folder, hf.SiglipModel(config), _SiglipParts(square(hf.SiglipImageProcessor), tokenizer))


class _SiglipParts:
    """SiglipProcessor cannot be made without sentencepiece, but its files can."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def siglip2(folder: Path, patch_size: int = 16, max_num_patches: int = 256) -> Path:
    """SigLIP 2 of any aspect ratio (NaFlex)."""
    tokenizer = gemma_tokenizer()
    text = {**_TEXT, "hidden_size": 40, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision = {k: v for k, v in _VISION.items() if k != "image_size"}
    config = hf.Siglip2Config(
        text_config=text, vision_config={**vision, "patch_size": patch_size, "num_patches": 16}
    )
    image_processor = hf.Siglip2ImageProcessor(patch_size=patch_size, max_num_patches=max_num_patches)
    return save(folder, hf.Siglip2Model(config), hf.Siglip2Processor(image_processor, tokenizer))


def align(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    vision = hf.AlignVisionConfig(
        image_size=SIDE, kernel_sizes=[3, 3, 5], in_channels=[32, 16, 24], out_channels=[16, 24, SIZE],
        hidden_dim=SIZE, strides=[1, 1, 2], num_block_repeats=[1, 1, 2], expand_ratios=[1, 6, 6],
        width_coefficient=1.0, depth_coefficient=1.0,
    )  # fmt: skip
    text = hf.AlignTextConfig(**_TEXT, vocab_size=len(tokenizer))
    config = hf.AlignConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=SIZE)
    image_processor = square(hf.EfficientNetImageProcessor)
    return save(folder, hf.AlignModel(config), hf.AlignProcessor(image_processor, tokenizer))


def altclip(folder: Path) -> Path:
    tokenizer = xlm_roberta_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "project_dim": 28, "max_position_embeddings": 40}
    config = hf.AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=SIZE)
    processor = hf.AltCLIPProcessor(cropped(hf.CLIPImageProcessor), tokenizer)
    return save(folder, hf.AltCLIPModel(config), processor)


def chinese_clip(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 90}
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=SIZE)
    processor = hf.ChineseCLIPProcessor(square(hf.ChineseCLIPImageProcessor, do_center_crop=False), tokenizer)
    return save(folder, hf.ChineseCLIPModel(config), processor)


def metaclip_2(folder: Path) -> Path:
    tokenizer = xlm_roberta_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = hf.MetaClip2Config(text_config=text, vision_config=_VISION, projection_dim=SIZE)
    return save(folder, hf.MetaClip2Model(config), hf.CLIPProcessor(cropped(hf.CLIPImageProcessor), tokenizer))


def vision_text(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    text = hf.BertConfig(**_TEXT, vocab_size=len(tokenizer), max_position_embeddings=100)
    vision = hf.ViTConfig(**_VISION)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=SIZE)
    processor = hf.VisionTextDualEncoderProcessor(square(hf.ViTImageProcessor), tokenizer)
    return save(folder, hf.VisionTextDualEncoderModel(config), processor)


def vision_text_roberta(folder: Path) -> Path:
    """Another text tower, whose positions begin after the padding index, and CLIP's vision tower."""
    tokenizer = roberta_tokenizer()
    text = hf.RobertaConfig(**_TEXT, vocab_size=len(tokenizer), max_position_embeddings=66)
    vision = hf.CLIPVisionConfig(**_VISION)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=SIZE)
    processor = hf.VisionTextDualEncoderProcessor(cropped(hf.CLIPImageProcessor), tokenizer)
    return save(folder, hf.VisionTextDualEncoderModel(config), processor)


def clap(folder: Path, fused: bool = False) -> Path:
    tokenizer = roberta_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 100}
    audio = {
        "spec_size": 256, "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1],
        "num_attention_heads": [2, 2], "num_hidden_layers": 2, "mlp_ratio": 1.0, "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None, "aff_block_r": 2,
    }  # fmt: skip
    config = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=SIZE)
    extractor = hf.ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc")
    return save(folder, hf.ClapModel(config), hf.ClapProcessor(extractor, tokenizer))


def clap_fused(folder: Path) -> Path:
    return clap(folder, fused=True)


def xclip(folder: Path, image_processor: Any = None) -> Path:
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_TEXT, **ids, "vocab_size": len(tokenizer)}
    vision = {
        **_VISION, "num_frames": 4, "mit_hidden_size": SIZE, "mit_intermediate_size": 48,
        "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4,
    }  # fmt: skip
    config = hf.XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=SIZE, prompt_num_attention_heads=4
    )
    image_processor = image_processor or cropped(hf.VideoMAEImageProcessor)
    return save(folder, hf.XCLIPModel(config), hf.XCLIPProcessor(image_processor, tokenizer))


def xclip_flat(folder: Path) -> Path:
    """X-CLIP with an image processor that knows no clips: its frames come one by one."""
    return xclip(folder, cropped(hf.CLIPImageProcessor))


def flava(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    config = hf.FlavaConfig(
        image_config=_VISION,
        text_config={**_TEXT, "hidden_size": 40, "vocab_size": len(tokenizer), "max_position_embeddings": 90},
        multimodal_config={**_TEXT, "hidden_size": 40, "num_hidden_layers": 1},
        image_codebook_config={"num_groups": 2, "hidden_size": 8, "num_blocks_per_group": 1},
        hidden_size=40, projection_dim=SIZE, init_codebook=False,
    )  # fmt: skip
    image_processor = cropped(hf.FlavaImageProcessor)
    return save(folder, hf.FlavaModel(config), hf.FlavaProcessor(image_processor, tokenizer))


def _blip(folder: Path, model_class: type) -> Path:
    tokenizer = bert_tokenizer()
    text = {
        **_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 90, "encoder_hidden_size": 40,
        "bos_token_id": 2, "sep_token_id": 3,
    }  # fmt: skip
    config = hf.BlipConfig(
        text_config=text, vision_config=_VISION, projection_dim=SIZE, image_text_hidden_size=SIZE - 4
    )
    return save(folder, model_class(config), hf.BlipProcessor(square(hf.BlipImageProcessor), tokenizer))


def blip(folder: Path) -> Path:
    return _blip(folder, hf.BlipModel)


def blip_retrieval(folder: Path) -> Path:
    return _blip(folder, hf.BlipForImageTextRetrieval)


def blip_captioner(folder: Path) -> Path:
    return _blip(folder, hf.BlipForConditionalGeneration)


def clipseg(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_TEXT, **ids, "vocab_size": len(tokenizer)}
    config = hf.CLIPSegConfig(text_config=text, vision_config=_VISION, projection_dim=SIZE, extract_layers=[0])
    return save(folder, hf.CLIPSegModel(config), hf.CLIPSegProcessor(square(hf.ViTImageProcessor), tokenizer))


def owlvit(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = hf.OwlViTConfig(text_config=text, vision_config=_VISION, projection_dim=SIZE)
    return save(folder, hf.OwlViTModel(config), hf.OwlViTProcessor(square(hf.OwlViTImageProcessor), tokenizer))


def groupvit(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_TEXT, **ids, "vocab_size": len(tokenizer)}
    vision = {
        **_VISION, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4],
        "num_hidden_layers": 3,
    }  # fmt: skip
    config = hf.GroupViTConfig(
        text_config=text, vision_config=vision, projection_dim=SIZE, projection_intermediate_dim=48
    )
    return save(folder, hf.GroupViTModel(config), hf.CLIPProcessor(cropped(hf.CLIPImageProcessor), tokenizer))


def blip_2(folder: Path) -> Path:
    """Offers get_text_features, but they are a language model's output: no shared space."""
    tokenizer = roberta_tokenizer()
    config = hf.Blip2Config(
        vision_config=_VISION,
        qformer_config={**_TEXT, "encoder_hidden_size": 40, "vocab_size": len(tokenizer)},
        text_config={"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1,
                     "num_attention_heads": 4, "vocab_size": len(tokenizer), "word_embed_proj_dim": 32},
        num_query_tokens=4,
    )  # fmt: skip
    processor = hf.Blip2Processor(square(hf.BlipImageProcessor), tokenizer)
    return save(folder, hf.Blip2Model(config), processor)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function
    for function in (
        align, altclip, blip, blip_retrieval, chinese_clip, clap, clap_fused, clip, clipseg, flava, groupvit,
        metaclip_2, owlvit, siglip, siglip2, siglip2_fixed, vision_text, vision_text_roberta, xclip, xclip_flat,
        blip_captioner, blip_2,
    )
}  # fmt: skip


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content.update(changes)
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
