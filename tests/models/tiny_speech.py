"""Tiny random Whisper checkpoints: the genuine tokenizer and feature extractor, few words, small windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, pre_tokenizers

# Seconds of a window.
WINDOW = 2
RATE = 16_000
# Tokens of a window, those before what is written included.
POSITIONS = 24


def multilingual(folder: Path) -> Path:
    """As openai/whisper-tiny: languages are detected, the task is forced."""
    tokenizer = whisper_tokenizer(["en", "de", "fr", "ja"])
    languages = {f"<|{code}|>": tokenizer.convert_tokens_to_ids(f"<|{code}|>") for code in ("en", "de", "fr", "ja")}
    tasks = {task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")}
    return _save(
        folder,
        tokenizer,
        seed=3,
        end_scale=4.0,
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id=tasks,
        forced_decoder_ids=[[1, None], [2, tasks["transcribe"]]],
    )


def english(folder: Path) -> Path:
    """As openai/whisper-tiny.en: no language, no task."""
    tokenizer = whisper_tokenizer([])
    stamp = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    return _save(folder, tokenizer, seed=4, end_scale=2.5, is_multilingual=False, forced_decoder_ids=[[1, stamp]])


def thirty(folder: Path) -> Path:
    """As `english`, with windows of the real size: 30 s, 80 mel bins."""
    tokenizer = whisper_tokenizer([], seconds=30)
    return _save(folder, tokenizer, seed=4, end_scale=2.5, seconds=30, mels=80, is_multilingual=False)


def whisper_tokenizer(languages: Sequence[str], seconds: int = WINDOW) -> Any:
    """Bytes and a few words; special tokens and timestamps in the order of the real ones."""
    words = ["Ġthe", "Ġsea", "Ġis", "Ġblue", "Ġand", "Ġwide", "Ġtoday"]
    merges = [pair for word in words for pair in _merges(word)]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = hf.WhisperTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)))
    special = ["startoftranscript", *languages, "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{name}|>" for name in [*special, "notimestamps"]]}
    )
    stamps = [f"<|{step * 0.02:.2f}|>" for step in range(50 * seconds + 1)]
    tokenizer.add_tokens([AddedToken(stamp, special=False, normalized=False) for stamp in stamps])
    return tokenizer


def _merges(word: str) -> list[tuple[str, str]]:
    return [(word[:end], word[end]) for end in range(1, len(word))]


def _save(
    folder: Path,
    tokenizer: Any,
    seed: int,
    end_scale: float,
    seconds: int = WINDOW,
    mels: int = 16,
    **settings: Any,
) -> Path:
    token = tokenizer.convert_tokens_to_ids
    end, start, stamps = token("<|endoftext|>"), token("<|startoftranscript|>"), token("<|0.00|>")
    torch.manual_seed(seed)
    config = hf.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=mels, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=50 * seconds, max_target_positions=POSITIONS, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=start, suppress_tokens=None, begin_suppress_tokens=None,
        init_std=0.2,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        # So that what is heard matters, and that some texts end by themselves: the end's row is zeros.
        tokens, encoder = model.proj_out.weight, model.model.encoder
        tokens *= 1.5
        tokens[stamps:] *= 0.9
        tokens[end] = torch.randn(32) * 0.3 * end_scale
        encoder.embed_positions.weight *= 0.3
        for convolution in (encoder.conv1, encoder.conv2):
            convolution.weight *= 4
    model.generation_config = hf.GenerationConfig(
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        max_length=POSITIONS, no_timestamps_token_id=token("<|notimestamps|>"), max_initial_timestamp_index=50,
        # As the real ones: what is between the end and the first timestamp is never written.
        suppress_tokens=[1, 2, *range(end + 1, token("<|notimestamps|>"))], begin_suppress_tokens=[220, end],
        prev_sot_token_id=token("<|startofprev|>"), return_timestamps=False, **settings,
    )  # fmt: skip
    model.save_pretrained(folder)
    extractor = hf.WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds, sampling_rate=RATE)
    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function for function in (multilingual, english, thirty)
}
