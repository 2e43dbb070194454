"""Tiny random checkpoints of every chat type, each with its genuine tokenizer, processor and form of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tiny_dual import save
from tokenizers import pre_tokenizers

# As the templates of Qwen: a system message of its own unless there is one.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As those of LLaVA: the pictures of a message before its text.
LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As those of Idefics 2, Idefics 3 and SmolVLM, with and without the token that begins.
_IDEFICS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
IDEFICS2, IDEFICS3 = _IDEFICS, "<|im_start|>" + _IDEFICS

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = (*_QWEN, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_SMOL = (
    "<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip


# As Gemma's: a start token, a name of its own for the assistant, and no system message.
GEMMA = (
    "<bos>{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


# -------------------------------------------------------------------------------------------------- tokenizers


def byte_level(tokenizer_class: Any, special: Sequence[str], **options: Any) -> Any:
    """A GPT-2-like tokenizer whose special tokens are the first of its vocabulary."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ca", "cat", "Ġcat"]
    return tokenizer_class(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[("c", "a"), ("ca", "t"), ("Ġ", "cat")],
        additional_special_tokens=list(special),
        **options,
    )


def llama_tokenizer(*special: str) -> Any:
    """As Llama's and Mistral's: a start token, spaces as ▁, bytes where a letter is not known."""
    return _with_bytes(hf.LlamaTokenizer, ("<unk>", "<s>", "</s>"), special, pad_token="<unk>")


def _with_bytes(tokenizer_class: Any, first: Sequence[str], special: Sequence[str], **options: Any) -> Any:
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!", "ca", "cat"]
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *special]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("c", "a"), ("ca", "t")]
    return tokenizer_class(vocab=vocabulary, merges=merges, additional_special_tokens=list(special), **options)


# -------------------------------------------------------------------------------------------------- checkpoints


def qwen2_vl(folder: Path) -> Path:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return _qwen(folder, hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor, vision)


def qwen2_5_vl(folder: Path) -> Path:
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(folder, hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor, vision)


def qwen3_vl(folder: Path) -> Path:
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen(
        folder, hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor, vision,
        hf.Qwen3VLVideoProcessor, head_dim=8,
    )  # fmt: skip


def _qwen(
    folder: Path,
    config_class: Any,
    model_class: Any,
    processor_class: Any,
    vision: dict[str, Any],
    video_class: Any = hf.Qwen2VLVideoProcessor,
    **text: Any,
) -> Path:
    tokenizer = byte_level(hf.Qwen2Tokenizer, _QWEN_VISION, eos_token="<|im_end|>")
    ids = {token: number for number, token in enumerate(_QWEN_VISION)}
    text = {**_TEXT, **text, "vocab_size": len(tokenizer), "rope_parameters": _MROPE}
    config = config_class(
        text_config={**text, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = model_class(config)
    # As their checkpoints have it; nothing is drawn in these tests.
    model.generation_config = hf.GenerationConfig(
        bos_token_id=0, pad_token_id=0, eos_token_id=[2, 0], do_sample=True, temperature=0.1, top_k=1,
        repetition_penalty=1.05,
    )  # fmt: skip
    size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    images = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size)
    videos = video_class(patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 16 * 16 * 4})
    processor = processor_class(images, tokenizer, videos, chat_template=CHATML)
    return _ending(save(folder, model, processor), model_class, 2, 2.5)


def smolvlm(folder: Path) -> Path:
    videos = hf.SmolVLMVideoProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, video_sampling={"fps": 1, "max_frames": 8},
    )  # fmt: skip
    return _idefics3(
        folder, hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, hf.SmolVLMProcessor, hf.SmolVLMImageProcessor,
        video_processor=videos,
    )  # fmt: skip


def idefics3(folder: Path) -> Path:
    return _idefics3(
        folder, hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, hf.Idefics3Processor,
        hf.Idefics3ImageProcessor,
    )  # fmt: skip


def _idefics3(
    folder: Path, config_class: Any, model_class: Any, processor_class: Any, image_class: Any, **parts: Any
) -> Path:
    """Pictures are cut into tiles of 32 pixels and a small picture of the whole: 4 tokens each."""
    tokenizer = byte_level(
        hf.GPT2Tokenizer, _SMOL, unk_token="<|endoftext|>", bos_token="<|im_start|>",
        eos_token="<end_of_utterance>", pad_token="<|im_start|>",
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = config_class(
        text_config={
            **_TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 1,
        },
        vision_config={**_VISION, "image_size": 32},
        image_token_id=image,
        scale_factor=2,
        pad_token_id=1,
    )  # fmt: skip
    model = model_class(config)
    model.generation_config = hf.GenerationConfig(bos_token_id=1, pad_token_id=1, eos_token_id=2)
    images = image_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = processor_class(images, tokenizer, image_seq_len=4, chat_template=IDEFICS3, **parts)
    return _ending(save(folder, model, processor), model_class, 2, 2.5)


def llava(folder: Path) -> Path:
    """As LLaVA 1.5: pictures are cropped to one size."""
    tokenizer = llama_tokenizer("<image>")
    config = hf.LlavaConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model", "image_size": 32},
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip
    model_class = hf.LlavaForConditionalGeneration
    return _ending(save(folder, model_class(config), processor), model_class, 2, 2.5)


def pixtral(folder: Path) -> Path:
    """A LLaVA by its model type: pictures keep their form, with tokens where a row of patches ends."""
    special = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = llama_tokenizer(*special)
    images = hf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8})
    template = (
        "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% else %}[INST]"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% endif %}{% endfor %}"
    )
    processor = hf.PixtralProcessor(images, tokenizer, patch_size=8, chat_template=template)
    config = hf.LlavaConfig(
        vision_config={**_VISION, "model_type": "pixtral", "image_size": 48, "head_dim": 8},
        text_config={**_llama(tokenizer), "model_type": "mistral", "sliding_window": None},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model_class = hf.LlavaForConditionalGeneration
    return _ending(save(folder, model_class(config), processor), model_class, 2, 2.5)


def llava_next(folder: Path) -> Path:
    """As LLaVA-NeXT: a picture is also cut into tiles, as many as its form wants."""
    tokenizer = llama_tokenizer("<image>")
    grid = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = hf.LlavaNextConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model", "image_size": 32},
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grid
    )
    processor = hf.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip
    model_class = hf.LlavaNextForConditionalGeneration
    return _ending(save(folder, model_class(config), processor), model_class, 2, 2.5)


def llava_onevision(folder: Path) -> Path:
    """Tiles for a single picture, none for several; clips."""
    special = (*_QWEN, "<image>", "<video>")
    tokenizer = byte_level(hf.Qwen2Tokenizer, special, eos_token="<|im_end|>")
    grid = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = hf.LlavaOnevisionConfig(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        text_config={
            **_TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_index=special.index("<image>"),
        video_token_index=special.index("<video>"),
        image_grid_pinpoints=grid,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>").replace(
            "<|vision_start|><|video_pad|><|vision_end|>", "<video>"
        ),
    )
    model_class = hf.LlavaOnevisionForConditionalGeneration
    return _ending(save(folder, model_class(config), processor), model_class, 2, 2.5)


def paligemma(folder: Path) -> Path:
    tokenizer = _with_bytes(hf.GemmaTokenizer, ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), ("<image>",))
    images = hf.SiglipImageProcessor(size={"height": 32, "width": 32}, image_seq_length=16)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)
    config = hf.PaliGemmaConfig(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        text_config={
            **_TEXT, "model_type": "gemma", "head_dim": 8, "vocab_size": len(tokenizer), "bos_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 0,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    model = hf.PaliGemmaForConditionalGeneration(config)
    model.generation_config = hf.GenerationConfig(bos_token_id=2, pad_token_id=0, eos_token_id=1)
    return _ending(save(folder, model, processor), hf.PaliGemmaForConditionalGeneration, 1, 2.5)


def idefics2(folder: Path) -> Path:
    """Pictures keep their form: those of a batch are padded to one size."""
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    tokenizer = llama_tokenizer(*special)
    images = hf.Idefics2ImageProcessor(
        size={"longest_edge": 48, "shortest_edge": 16}, do_image_splitting=False, do_pad=True
    )
    processor = hf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS2)
    config = hf.Idefics2Config(
        vision_config={**_VISION, "image_size": 48, "patch_size": 4},
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16, "num_key_value_heads": 2,
        },
        text_config={**_llama(tokenizer), "model_type": "mistral", "sliding_window": None},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = hf.Idefics2ForConditionalGeneration(config)
    model.generation_config = hf.GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=2)
    return _ending(save(folder, model, processor), hf.Idefics2ForConditionalGeneration, 2, 2.5)


def idefics(folder: Path) -> Path:
    """The open Flamingo: text attends to the pictures before it, each with an attention of its own."""
    tokenizer = llama_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    words = len(tokenizer)
    config = hf.IdeficsConfig(
        vocab_size=words - 3,
        additional_vocab_size=3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=1,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={
            "embed_dim": 32, "image_size": 32, "patch_size": 8, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 16, "qk_layer_norms_perceiver": True},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessor(image_size=32), tokenizer, image_size=32)
    model_class = hf.IdeficsForVisionText2Text
    model = model_class(config)
    save(folder, model, processor)
    # Closed gates, as they begin, would let nothing of a picture through.
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "alpha" in name:
                weight.fill_(1.0)
    model.save_pretrained(folder)
    return _ending(folder, model_class, 2, 2.5)


def qwen2_audio(folder: Path) -> Path:
    """Sounds are cut or padded to 1 s: 25 tokens of 40 ms."""
    special = (*_QWEN, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    tokenizer = byte_level(hf.Qwen2Tokenizer, special, eos_token="<|im_end|>")
    audio = {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32,
        "max_source_positions": 50,
    }  # fmt: skip
    config = hf.Qwen2AudioConfig(
        audio_config=audio,
        text_config={
            **_TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        audio_token_index=special.index("<|AUDIO|>"),
    )  # fmt: skip
    extractor = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    # Its template is the processor's own.
    processor = hf.Qwen2AudioProcessor(extractor, tokenizer)
    model = hf.Qwen2AudioForConditionalGeneration(config)
    model.generation_config = hf.GenerationConfig(bos_token_id=0, pad_token_id=0, eos_token_id=[2, 0])
    return _ending(save(folder, model, processor), hf.Qwen2AudioForConditionalGeneration, 2, 2.5)


def llama(folder: Path) -> Path:
    """Of texts alone."""
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings = _llama(tokenizer)
    settings.pop("model_type")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
    # As Qwen2.5's instructed ones: in a batch, padding must not count as text.
    model.generation_config = hf.GenerationConfig(
        bos_token_id=1, pad_token_id=0, eos_token_id=2, repetition_penalty=1.1
    )
    save(folder, model)
    tokenizer.save_pretrained(folder)
    return _ending(folder, hf.LlamaForCausalLM, 2, 2.5)


def gemma3(folder: Path) -> Path:
    """Of a type that mmcli does not know by name."""
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    special = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>")
    names = {"boi_token": special[0], "eoi_token": special[1], "image_token": special[2]}
    tokenizer = _with_bytes(hf.GemmaTokenizer, first, special, extra_special_tokens=names)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    images = hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}, image_seq_length=4)
    processor = hf.Gemma3Processor(images, tokenizer, chat_template=GEMMA, image_seq_length=4)
    config = hf.Gemma3Config(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        text_config={
            **_TEXT, "model_type": "gemma3_text", "head_dim": 8, "vocab_size": len(tokenizer), "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    model.generation_config = hf.GenerationConfig(bos_token_id=2, pad_token_id=0, eos_token_id=[1, end])
    return _ending(save(folder, model, processor), hf.Gemma3ForConditionalGeneration, end, 2.5)


def mllama(folder: Path) -> Path:
    """Without weights: of a type that mmcli does not know, and cannot learn by trying."""
    tokenizer = byte_level(
        hf.PreTrainedTokenizerFast, ("<|begin_of_text|>", "<|eot_id|>", "<|image|>"), bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", pad_token="<|eot_id|>",
    )  # fmt: skip
    images = hf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4)
    template = (
        "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    hf.MllamaProcessor(images, tokenizer, chat_template=template).save_pretrained(folder)
    images.save_pretrained(folder)
    hf.MllamaConfig(architectures=["MllamaForConditionalGeneration"]).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


def _llama(tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {**_TEXT, **ids, "model_type": "llama", "vocab_size": len(tokenizer)}


def _ending(folder: Path, model_class: Any, end: int, scale: float) -> Path:
    """Make the end token `scale` times as loud, so that some texts end by themselves."""
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[end] *= scale
    model.save_pretrained(folder)
    return folder


_ALL = (
    qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm, idefics3, idefics2, idefics, llava, pixtral, llava_next,
    llava_onevision, paligemma, qwen2_audio,
)  # fmt: skip
BUILDERS: dict[str, Callable[[Path], Path]] = {function.__name__: function for function in _ALL}
# Of types that are no rows of the table.
OTHERS: dict[str, Callable[[Path], Path]] = {function.__name__: function for function in (llama, gemma3)}
