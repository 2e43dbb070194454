"""Tiny random checkpoints of every captioner type, each with its genuine tokenizer and processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_dual
import torch
import transformers as hf
from tiny_dual import SIDE, bert_tokenizer, roberta_tokenizer, save, square

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_act": "gelu",
}  # fmt: skip
_VISION = {**_TEXT, "image_size": SIDE, "patch_size": 8}


def blip(folder: Path) -> Path:
    return _ending(tiny_dual.blip_captioner(folder), hf.BlipForConditionalGeneration, 3, 2.0)


def git(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0}
    config = hf.GitConfig(
        vision_config=_VISION, **_TEXT, **ids, vocab_size=len(tokenizer), max_position_embeddings=60
    )
    processor = hf.GitProcessor(tiny_dual.cropped(hf.CLIPImageProcessor), tokenizer)
    save(folder, hf.GitForCausalLM(config), processor)
    return _ending(folder, hf.GitForCausalLM, tokenizer.sep_token_id, 4.0)


def vit_gpt2(folder: Path) -> Path:
    tokenizer = hf.GPT2Tokenizer(**_byte_level(), unk_token="<|end|>", bos_token="<|end|>", eos_token="<|end|>")
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end}
    decoder = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=len(tokenizer), **ids)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**_VISION), decoder)
    model = hf.VisionEncoderDecoderModel(config)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id = end, end, end
    return save(folder, model, _Parts(square(hf.ViTImageProcessor), tokenizer))


def blip_2(folder: Path) -> Path:
    """With OPT, as Salesforce/blip2-opt-2.7b: places for the picture are tokens."""
    text = {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 80,
    }  # fmt: skip
    return _blip_2(folder, text)


def blip_2_t5(folder: Path) -> Path:
    """With T5, as Salesforce/blip2-flan-t5-xl."""
    text = {
        "model_type": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8,
        "decoder_start_token_id": 1, "dense_act_fn": "gelu",
    }  # fmt: skip
    return _blip_2(folder, text)


def _blip_2(folder: Path, text: dict[str, Any]) -> Path:
    tokenizer = roberta_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = hf.Blip2Config(
        vision_config=_VISION,
        qformer_config={**_TEXT, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)},
        text_config={**text, **ids, "vocab_size": len(tokenizer)},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.Blip2Processor(square(hf.BlipImageProcessor), tokenizer, num_query_tokens=4)
    save(folder, hf.Blip2ForConditionalGeneration(config), processor)
    return _ending(folder, hf.Blip2ForConditionalGeneration, 2, 2.0)


def florence2(folder: Path) -> Path:
    """Its generation settings too: three beams, no repeated three tokens, an end that is forced at the limit."""
    tokenizer = hf.RobertaTokenizer(
        **_byte_level("<s>", "<pad>", "</s>", "<unk>", "<mask>"), extra_special_tokens={"image_token": "<image>"}
    )
    vision = {
        "embed_dim": [8, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
        "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
        "projection_dim": 32, "max_position_embeddings": 8, "max_temporal_embeddings": 4,
    }  # fmt: skip
    text = {
        "model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "vocab_size": len(tokenizer), "max_position_embeddings": 128, "bos_token_id": 0, "pad_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    }  # fmt: skip
    config = hf.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id, is_encoder_decoder=True,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.Florence2ForConditionalGeneration(config)
    settings = model.generation_config
    settings.num_beams, settings.no_repeat_ngram_size, settings.early_stopping = 3, 3, True
    settings.forced_eos_token_id, settings.decoder_start_token_id = 2, 2
    # 32 / 4 / 2 squared, and their mean.
    image_processor = tiny_dual.cropped(hf.CLIPImageProcessor, image_seq_length=17)
    processor = hf.Florence2Processor(image_processor, tokenizer, post_processor_config={"pure_text": {}})
    save(folder, model, processor)
    return _ending(folder, hf.Florence2ForConditionalGeneration, 2, 3.0)


def _ending(folder: Path, model_class: Any, end: int, scale: float) -> Path:
    """Make the end token `scale` times as loud, so that some texts end by themselves."""
    model = model_class.from_pretrained(folder)
    weight = getattr(model, "text_decoder", getattr(model, "language_model", model)).get_output_embeddings().weight
    with torch.no_grad():
        weight[end] *= scale
    model.save_pretrained(folder)
    return folder


def _byte_level(*special: str) -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    tokens = [*(special or ("<|end|>",)), *sorted(pre_tokenizers.ByteLevel.alphabet()), "ca", "cat", "Ġcat"]
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    return {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}


class _Parts:
    """VisionEncoderDecoder has no processor of its own: two files."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function for function in (blip, git, vit_gpt2, blip_2, blip_2_t5, florence2)
}
