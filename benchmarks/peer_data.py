"""Inputs and models of peers.py: generated, the same on every machine."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TEXT = "a small red circle above two large blue stars on the left of a grey wall near water at night"
SAMPLING_RATE = 16_000

Maker = Callable[[Path, np.random.Generator], None]


def make_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of smooth coloured noise: about the bytes and the decoding time of photos of that size."""
    # Of camera-size ones 64 different ones, under many names.
    different = 4096 if size[0] < 1000 else 64
    _make_files(folder, count, "jpg", partial(_make_image, size), different)


def _make_image(size: tuple[int, int], path: Path, generator: np.random.Generator) -> None:
    small = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    picture.save(path, quality=88)


def _make_files(folder: Path, count: int, kind: str, make: Maker, different: int) -> None:
    """So many files, made on all cores; beyond `different` they are links to those before."""
    folder.mkdir()
    paths = [folder / f"{number:06d}.{kind}" for number in range(count)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_make_file, make), paths[:different], range(different), chunksize=4))
    for number in range(different, count):
        os.link(paths[number % different], paths[number])


def _make_file(make: Maker, path: Path, seed: int) -> None:
    make(path, np.random.default_rng(seed))


def make_texts(path: Path, count: int, mean: float, most: int) -> None:
    """Texts of 1 to `most` words, most of them short, as JSONL."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            words = generator.choice(TEXT.split(), min(most, 1 + int(generator.exponential(mean))))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def make_sounds(folder: Path, count: int) -> None:
    """WAV files of 1 to 15 s, half of them shorter than 4 s, as utterances are."""
    _make_files(folder, count, "wav", _make_sound, 1024)


def _make_sound(path: Path, generator: np.random.Generator) -> None:
    seconds = min(15.0, 1.0 + generator.exponential(4.0))
    samples = (generator.normal(size=int(seconds * SAMPLING_RATE)) * 3000).clip(-32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(samples.tobytes())


def make_videos(folder: Path, count: int) -> None:
    """MP4 (H.264) clips of 2 to 4 s, 320 x 240, 25 frames a second."""
    _make_files(folder, count, "mp4", _make_video, 128)


def _make_video(path: Path, generator: np.random.Generator) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        small = generator.integers(0, 256, (30, 80, 3), dtype=np.uint8)
        wide = np.asarray(Image.fromarray(small).resize((640, 240), Image.Resampling.BICUBIC))
        for frame in range(int(generator.integers(50, 101))):
            moved = np.ascontiguousarray(wide[:, 3 * frame : 3 * frame + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved)))
        container.mux(stream.encode(None))


def make_clip(folder: Path, width: int, layers: int) -> None:
    """A CLIP for pictures of 224 pixels, patches of 32, random weights; 768 and 12 are those of ViT-B/32."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    heads = max(1, width // 64)
    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": 224, "patch_size": 32,
    }  # fmt: skip
    # The end token's id is not 2: with that, transformers takes the largest id, as for OpenAI's checkpoints.
    text = {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 8,
        "vocab_size": 49_408, "eos_token_id": 49_407, "bos_token_id": 49_406, "pad_token_id": 49_407,
    }  # fmt: skip
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    model.save_pretrained(folder)
    hf.CLIPImageProcessor().save_pretrained(folder)


def make_minilm(folder: Path) -> None:
    """A sentence-transformers directory: a BERT of 6 layers of 384, as MiniLM, random weights, the tokens' mean."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(TEXT.split()))]
    config = hf.BertConfig(
        vocab_size=30_522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    hf.BertModel(config).save_pretrained(folder)
    tokenizer = hf.BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=256)
    tokenizer.save_pretrained(folder)
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def make_wav2vec2(folder: Path) -> None:
    """A Wav2Vec2 of 4 layers of 256 behind the convolutions of the base model, random weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Wav2Vec2Config(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        conv_dim=[128] * 7, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    hf.Wav2Vec2Model(config).save_pretrained(folder)
    hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)


def make_videomae(folder: Path) -> None:
    """A VideoMAE of 2 layers of 192 for 16 frames of 224 pixels, random weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.VideoMAEConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3, num_frames=16
    )
    hf.VideoMAEModel(config).save_pretrained(folder)
    hf.VideoMAEImageProcessor().save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """What is compared.

    kind   of inputs: images, texts, audio, video
    count  how many, where nothing else is said
    data   writes so many of them to a path
    model  writes the checkpoint to a path
    """

    kind: str
    count: int
    data: Callable[[Path, int], Any]
    model: Callable[[Path], Any]

    def write(self, folder: Path, count: int) -> tuple[Path, Path]:
        """Inputs and model into a folder; returns where they are."""
        data, model = folder / ("texts.jsonl" if self.kind == "texts" else "data"), folder / "model"
        self.data(data, count)
        self.model(model)
        return data, model


def _images(width: int, height: int) -> Callable[[Path, int], None]:
    return lambda folder, count: make_images(folder, count, (width, height))


def _texts(mean: float, most: int) -> Callable[[Path, int], None]:
    return lambda path, count: make_texts(path, count, mean, most)


def _clip(width: int, layers: int) -> Callable[[Path], None]:
    return lambda folder: make_clip(folder, width, layers)


CASES = {
    "small-jpeg": Case("images", 2000, _images(320, 240), _clip(64, 2)),
    "camera-jpeg": Case("images", 200, _images(4032, 3024), _clip(64, 2)),
    "vit-b-32": Case("images", 240, _images(320, 240), _clip(768, 12)),
    "short-texts": Case("texts", 3000, _texts(6, 12), make_minilm),
    "mixed-texts": Case("texts", 1500, _texts(18, 120), make_minilm),
    "speech": Case("audio", 300, make_sounds, make_wav2vec2),
    "video": Case("video", 120, make_videos, make_videomae),
}
