"""The other side of peers.py, as a careful user would write it: PEER KIND DATA MODEL OUT.npy DTYPE.

A line on stdout, `steady N`, says how many rows a second it makes after its first batch.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import wave
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Vectors = Iterator[Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Those of mmcli.
BATCH_SIZE = 256 if DEVICE == "cuda" else 32


class Files(torch.utils.data.Dataset):
    """Files of a folder, read and processed in the DataLoader's workers."""

    def __init__(self, folder: str, read: Callable[[Path], Any]) -> None:
        self.paths = sorted(Path(folder).iterdir())
        self.read = read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.paths[index])


def loader(data: str, read: Callable[[Path], Any], collate: Any = None) -> Any:
    """A worker per core."""
    return torch.utils.data.DataLoader(
        Files(data, read), batch_size=BATCH_SIZE, num_workers=os.cpu_count() or 1, collate_fn=collate,
        pin_memory=DEVICE == "cuda",
    )  # fmt: skip


def open_rgb(path: Path) -> Any:
    with Image.open(path) as picture:
        return picture.convert("RGB")


# ------------------------------------------------------------------------------ transformers, in a loop


def loop_images(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, dtype=dtype).eval().to(DEVICE)
    forward = model.get_image_features if hasattr(model, "get_image_features") else model

    def read(path: Path) -> Any:
        return processor(open_rgb(path), return_tensors="pt")["pixel_values"][0]

    for pixels in loader(data, read):
        yield forward(pixel_values=pixels.to(DEVICE, dtype, non_blocking=True)).pooler_output.flatten(1)


def loop_texts(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    from transformers import AutoModel, AutoTokenizer

    texts = read_texts(data)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, dtype=dtype).eval().to(DEVICE)
    for start in range(0, len(texts), BATCH_SIZE):
        batch = texts[start : start + BATCH_SIZE]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(DEVICE)
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        yield (hidden * mask).sum(1) / mask.sum(1)


def loop_audio(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    """Padded to the longest of a batch, with masks; the mean of what is no padding."""
    import torchaudio
    from transformers import AutoFeatureExtractor, AutoModel

    extractor = AutoFeatureExtractor.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, dtype=dtype).eval().to(DEVICE)

    def read(path: Path) -> Any:
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768
            wave_rate = file.getframerate()
        sound = torch.from_numpy(samples)
        if wave_rate != extractor.sampling_rate:
            sound = torchaudio.functional.resample(sound, wave_rate, extractor.sampling_rate)
        return sound.numpy()

    def collate(sounds: list[np.ndarray]) -> Any:
        return extractor(sounds, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt")

    for inputs in loader(data, read, collate):
        inputs = inputs.to(DEVICE)
        hidden = model(inputs["input_values"].to(dtype), attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = model._get_feature_vector_attention_mask(hidden.shape[1], inputs["attention_mask"]).unsqueeze(-1)
        yield (hidden * mask).sum(1) / mask.sum(1)


def loop_video(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    """Frames at even distances, of the whole clip; the mean of all tokens."""
    import av
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, dtype=dtype).eval().to(DEVICE)
    wanted = model.config.num_frames

    def read(path: Path) -> Any:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        chosen = (np.arange(wanted) + 0.5) * len(frames) / wanted
        return processor([frames[int(index)] for index in chosen], return_tensors="pt")["pixel_values"][0]

    for pixels in loader(data, read):
        yield model(pixels.to(DEVICE, dtype)).last_hidden_state.mean(1)


# -------------------------------------------------------------------------------------------- pipelines


def pipeline_images(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    from transformers import AutoModel, pipeline

    model = AutoModel.from_pretrained(model_path, dtype=dtype)
    # A pipeline calls the whole model, which of a CLIP wants texts too; and it does not project.
    project = getattr(model, "visual_projection", torch.nn.Identity()).to(DEVICE)
    model = getattr(model, "vision_model", model)
    pipe = pipeline("image-feature-extraction", model=model, image_processor=model_path, device=DEVICE, pool=True)
    paths = (str(path) for path in sorted(Path(data).iterdir()))
    found = pipe(paths, batch_size=BATCH_SIZE, num_workers=os.cpu_count() or 1, return_tensors=True)
    for rows in in_batches(row[0] for row in found):
        yield project(torch.stack(rows).to(DEVICE))


def in_batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH_SIZE)):
        yield batch


def pipeline_texts(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    from transformers import pipeline

    pipe = pipeline("feature-extraction", model=model_path, dtype=dtype, device=DEVICE)
    texts = (text for text in read_texts(data))
    found = pipe(texts, batch_size=BATCH_SIZE, return_tensors=True, truncation=True)
    # [tokens, D] of one text, padding and all: a user of a pipeline has no mask to leave it out by.
    for rows in in_batches(row[0].mean(0) for row in found):
        yield torch.stack(rows)


# ------------------------------------------------------------------------------------- other libraries


def sentence_texts(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_path, device=DEVICE, model_kwargs={"dtype": dtype})
    texts = read_texts(data)
    yield torch.from_numpy(model.encode(texts[:BATCH_SIZE], batch_size=BATCH_SIZE))
    # The rest at once, so that it can sort all of it by length.
    yield torch.from_numpy(model.encode(texts[BATCH_SIZE:], batch_size=BATCH_SIZE))


def open_clip_images(data: str, model_path: str, dtype: torch.dtype) -> Vectors:
    """open_clip's own model and preprocessing in a DataLoader, with the checkpoint's weights under its names."""
    import open_clip

    name = "ViT-B-32-quickgelu"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
    copy_vision(model, model_path)
    model = model.eval().to(DEVICE, dtype)
    for pixels in loader(data, lambda path: preprocess(open_rgb(path))):
        yield model.encode_image(pixels.to(DEVICE, dtype))


def copy_vision(model: Any, model_path: str) -> None:
    """The picture tower of transformers' CLIP into open_clip's, whose attention keeps q, k and v in one matrix."""
    from safetensors.torch import load_file

    theirs = load_file(f"{model_path}/model.safetensors")
    tower = "vision_model."
    named = {
        "visual.class_embedding": theirs[f"{tower}embeddings.class_embedding"],
        "visual.positional_embedding": theirs[f"{tower}embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs[f"{tower}embeddings.patch_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
    }
    for ours, name in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for kind in ("weight", "bias"):
            named[f"visual.{ours}.{kind}"] = theirs[f"{tower}{name}.{kind}"]
    layers = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
              "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for layer in range(len(model.visual.transformer.resblocks)):
        ours, name = f"visual.transformer.resblocks.{layer}", f"{tower}encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for a, b in layers.items():
                named[f"{ours}.{a}.{kind}"] = theirs[f"{name}.{b}.{kind}"]
            parts = [theirs[f"{name}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            named[f"{ours}.attn.in_proj_{kind}"] = torch.cat(parts)
    left = model.load_state_dict(named, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert not [key for key in left.missing_keys if key.startswith("visual.")], left.missing_keys


def clip_retrieval_images(data: str, model_path: str, out: str) -> float:
    """clip-retrieval's own command, unchanged; rows a second after its first batch, by its own statistics.

    What the library that it loads checkpoints with expects of transformers is what version 4 returned.
    """
    from clip_retrieval.clip_inference import runner, worker
    from clip_retrieval.clip_inference.main import main as clip_inference
    from transformers import CLIPModel

    features = CLIPModel.get_image_features
    CLIPModel.get_image_features = lambda self, *args, **kw: features(self, *args, **kw).pooler_output
    times: list[tuple[float, int]] = []

    class Clocked(runner.Runner):
        def __init__(self, **builders: Any) -> None:
            super().__init__(**builders)
            build = builders["logger_builder"]
            self.logger_builder = lambda i: _Clock(build(i), times)

    worker.Runner = Clocked
    folder = Path(out).with_suffix("")
    clip_inference(
        input_dataset=data, output_folder=str(folder), input_format="files", enable_text=False,
        batch_size=BATCH_SIZE, num_prepro_workers=os.cpu_count() or 1, clip_model=f"hf_clip:{model_path}",
    )  # fmt: skip
    np.save(out, np.load(folder / "img_emb" / "img_emb_0.npy").astype(np.float32))
    return sum(n for _, n in times[1:]) / (times[-1][0] - times[0][0])


class _Clock:
    """A logger of clip-retrieval that notes when each batch was done."""

    def __init__(self, logger: Any, times: list[tuple[float, int]]) -> None:
        self.logger, self.times = logger, times
        self.start, self.end = logger.start, logger.end

    def __call__(self, stats: dict[str, Any]) -> None:
        self.times.append((stats["end_time"], stats["sample_count"]))
        self.logger(stats)


def read_texts(data: str) -> list[str]:
    with open(data) as file:
        return [json.loads(line)["text"] for line in file]


PEERS: dict[str, dict[str, Callable[..., Vectors]]] = {
    "loop": {"images": loop_images, "texts": loop_texts, "audio": loop_audio, "video": loop_video},
    "pipeline": {"images": pipeline_images, "texts": pipeline_texts},
    "sentence-transformers": {"texts": sentence_texts},
    "open_clip": {"images": open_clip_images},
    "clip-retrieval": {"images": clip_retrieval_images},
}


def main() -> None:
    peer, kind, data, model, out, dtype = sys.argv[1:]
    if peer == "clip-retrieval":
        print("\nsteady", clip_retrieval_images(data, model, out), flush=True)
        return
    found, times = [], []
    with torch.inference_mode():
        for vectors in PEERS[peer][kind](data, model, getattr(torch, dtype)):
            found.append(vectors.float().cpu().numpy())
            times.append(time.perf_counter())
    np.save(out, np.concatenate(found))
    print("steady", sum(map(len, found[1:])) / (times[-1] - times[0]) if len(found) > 1 else 0.0)


if __name__ == "__main__":
    main()
