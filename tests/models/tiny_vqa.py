"""Tiny random checkpoints of every type that answers questions about pictures, each with its genuine processor."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_captioners
import transformers as hf
from tiny_captioners import _TEXT, _VISION, _ending
from tiny_dual import SIDE, bert_tokenizer, edit_json, roberta_tokenizer, save, square

# What VisualBERT and LXMERT are told of a region.
FEATURES = 12
# Two outputs have one name: they must not be taken for one another.
ANSWERS = ("yes", "no", "red", "blue", "two", "on the left", "red")
_LABELS = {"id2label": dict(enumerate(ANSWERS)), "label2id": {name: i for i, name in enumerate(ANSWERS)}}


# ------------------------------------------------------------------------------------------ they choose


def vilt(folder: Path) -> Path:
    """Pictures of the shortest side 64 and any shape, in patches of 8 x 8."""
    tokenizer = bert_tokenizer(40)
    config = hf.ViltConfig(
        **_TEXT, vocab_size=len(tokenizer), image_size=64, patch_size=8, max_position_embeddings=40, **_LABELS
    )
    images = hf.ViltImageProcessor(size={"shortest_edge": 64}, size_divisor=8)
    return save(folder, hf.ViltForQuestionAnswering(config), hf.ViltProcessor(images, tokenizer))


def visual_bert(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    config = hf.VisualBertConfig(
        **_TEXT, vocab_size=len(tokenizer), visual_embedding_dim=FEATURES, pad_token_id=0, **_LABELS
    )
    return save(folder, hf.VisualBertForQuestionAnswering(config), tokenizer)


def lxmert(folder: Path) -> Path:
    """As on the hub: its config.json has no names of answers; they are added here."""
    tokenizer = bert_tokenizer()
    config = hf.LxmertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=len(tokenizer), l_layers=2,
        x_layers=2, r_layers=2, visual_feat_dim=FEATURES, num_qa_labels=len(ANSWERS),
    )  # fmt: skip
    save(folder, hf.LxmertForQuestionAnswering(config), tokenizer)
    edit_json(folder / "config.json", **_LABELS)
    return folder


# ------------------------------------------------------------------------------------------ they write


def blip_vqa(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "sep_token_id": 3}
    # The decoder looks at the encoder's texts, which looks at the picture: all of one size.
    text = {**_TEXT, **ids, "max_position_embeddings": 90, "encoder_hidden_size": 32}
    config = hf.BlipConfig(text_config=text, vision_config=_VISION)
    # Random weights that tell both pictures and questions apart are rare.
    save(folder, hf.BlipForQuestionAnswering(config), hf.BlipProcessor(square(hf.BlipImageProcessor), tokenizer), 4)
    return _ending(folder, hf.BlipForQuestionAnswering, 3, 1.5)


def instructblip(folder: Path) -> Path:
    """With LLaMA, as Salesforce/instructblip-vicuna-7b."""
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 80,
    }  # fmt: skip
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *".,?!'", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = hf.LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], padding_side="left"
    )
    tokenizer.add_special_tokens({"pad_token": "</s>"})
    return _instructblip(folder, text, tokenizer, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def instructblip_t5(folder: Path) -> Path:
    """With T5, as Salesforce/instructblip-flan-t5-xl."""
    text = {
        "model_type": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8,
        "decoder_start_token_id": 1, "dense_act_fn": "gelu",
    }  # fmt: skip
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return _instructblip(folder, text, roberta_tokenizer(), ids)


def _instructblip(folder: Path, text: dict[str, Any], tokenizer: Any, ids: dict[str, int]) -> Path:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    questions = bert_tokenizer(40)
    config = hf.InstructBlipConfig(
        vision_config={**_VISION, "image_size": SIDE},
        qformer_config={**_TEXT, "encoder_hidden_size": 32, "vocab_size": len(questions)},
        text_config={**text, **ids, "vocab_size": len(tokenizer)},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.InstructBlipProcessor(square(hf.BlipImageProcessor), tokenizer, questions, num_query_tokens=4)
    save(folder, hf.InstructBlipForConditionalGeneration(config), processor)
    return _ending(folder, hf.InstructBlipForConditionalGeneration, ids["eos_token_id"], 2.0)


CHOOSING: dict[str, Callable[[Path], Path]] = {f.__name__: f for f in (vilt, visual_bert, lxmert)}
WRITING: dict[str, Callable[[Path], Path]] = {
    f.__name__: f
    for f in (
        blip_vqa, instructblip, instructblip_t5, tiny_captioners.blip_2, tiny_captioners.blip_2_t5,
        tiny_captioners.git,
    )
}  # fmt: skip
