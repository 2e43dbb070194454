"""Encoders give, for every row and batch size, what the checkpoint's own code gives for that row alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
import transformers as hf
from model_runs import Run, assert_distinct, assert_same, plan_of
from PIL import Image
from safetensors.torch import load_file, save_file

from mmcli.core.errors import ConfigError, ModelError, RowError
from mmcli.core.records import Audio, DecodeOptions, Media, Video
from mmcli.media.decode import decode
from mmcli.models.inputs import ClipProcessor, open_clip_processor, open_normalization
from mmcli.models.plan import Inputs, VideoSpec

BATCHES = ((1, 12), (7, 14), (64, 64))

TEXTS = [
    "a photo of a cat", "", "x", "The red circle!", "a cat's 42 dogs, and no circle at all?", "don't",
    "the quick brown fox jumps over the lazy dog", "abc" * 30, "a photo of a dog and a cat " * 20, "0123456789",
    "emoji \U0001f600 and \u00e9", "two words",
]  # fmt: skip
# Heights and widths: exactly right, tiny, tall, wide, a pixel off, a camera's.
SHAPES = [(32, 32), (3, 5), (90, 20), (18, 70), (33, 31), (64, 64), (36, 36), (97, 130), (48, 40), (240, 320)]
# Samples at 16 kHz: as short as one frame, then mixed.
LENGTHS = [30, 31, 400, 800, 801, 807, 1000, 1500, 2001, 2500]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""
    heads = {name: builder for name, (builder, _) in tiny_encoders.HEADS.items()}
    builders = tiny_encoders.TEXTS | tiny_encoders.IMAGES | tiny_encoders.SOUNDS | tiny_encoders.CLIPS | heads

    @cache
    def build(name: str) -> Path:
        return builders[name](tmp_path_factory.mktemp("tiny") / name)

    return build


def pictures(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    found = []
    for height, width in shapes:
        colours = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC), int)
        noise = generator.integers(-40, 40, (height, width, 3))
        found.append(np.clip(smooth + noise, 0, 255).astype(np.uint8))
    return found


def sounds(lengths: Sequence[int] = LENGTHS) -> list[Audio]:
    generator = np.random.default_rng(2)
    found = []
    for length in lengths:
        time = np.arange(length) / 16_000
        tone = np.sin(2 * np.pi * generator.uniform(100, 4000) * time) * generator.uniform(0.1, 0.5)
        found.append(Audio((tone + 0.1 * generator.standard_normal(length)).astype(np.float32), 16_000))
    return found


def clips(num_frames: int) -> list[Video]:
    found = []
    for picture in pictures()[2:8]:
        frames = np.stack([np.roll(picture, 3 * shift, axis=1) // (1 + shift % 2) for shift in range(num_frames)])
        found.append(Video(frames, np.arange(num_frames) / 25, num_frames / 25))
    return found


def reference_model(folder: Path, model_class: Any = hf.AutoModel) -> Any:
    return model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def rows(vectors: list[torch.Tensor]) -> np.ndarray:
    return np.stack([vector.numpy() for vector in vectors])


def check(run: Run, modality: Any, payloads: Sequence[Any], wanted: np.ndarray) -> None:
    assert run.plan.embedding_size == wanted.shape[1]
    assert_distinct(wanted)
    # A pooling that must be asked for shares all the rest with the type's own.
    batches = BATCHES if run.plan.pooling == plan_of(run.plan.checkpoint.directory).pooling else BATCHES[1:2]
    errors = [
        assert_same(run(modality, payloads, size, max(number, len(payloads))), wanted) for size, number in batches
    ]
    print(f"{run.plan.checkpoint.directory.name} {run.plan.pooling}: {max(errors):.1e}")


# ------------------------------------------------------------------------------------------------------- text


@torch.no_grad()
def text_reference(folder: Path, pooling: str, limit: int) -> np.ndarray:
    tokenizer, model = hf.AutoTokenizer.from_pretrained(folder), reference_model(folder)
    found = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        assert inputs["input_ids"].shape[1] <= limit
        output = model(**inputs)
        hidden = output.last_hidden_state[0]
        poolings = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0), "max": lambda h: h.max(0).values}
        found.append(output.pooler_output[0] if pooling == "pooler" else poolings[pooling](hidden))
    return rows(found)


WITH_TEXT_POOLER = ("albert", "bert", "camembert", "ernie", "mpnet", "roberta", "xlm-roberta")


@pytest.mark.parametrize("name", tiny_encoders.TEXTS)
def test_text(name: str, tiny: Callable[[str], Path]) -> None:
    folder, limit = tiny(name), 512 if name == "roberta" else 64
    for pooling in ("mean", "cls", "max", *(["pooler"] if name in WITH_TEXT_POOLER else [])):
        run = Run(folder, pooling=None if pooling == "mean" else pooling)
        assert run.plan.pooling == pooling
        texts = [*TEXTS, "long text " * 300] if name == "roberta" else TEXTS
        assert len(run.processor("text", texts[-1]).arrays["input_ids"]) <= limit
        check(run, "text", TEXTS, text_reference(folder, pooling, limit))


def test_texts_are_cut_where_the_positions_end(tiny: Callable[[str], Path]) -> None:
    """RoBERTa's positions begin after the padding index: 514 of them are 512 tokens, and the 513th would crash."""
    run = Run(tiny("roberta"))
    long = "long text " * 300
    assert len(run.processor("text", long).arrays["input_ids"]) == 512
    assert run("text", [long], 1, 1).shape == (1, 32)


# ------------------------------------------------------------------------------------------------------ images


@torch.no_grad()
def image_outputs(folder: Path, images: Sequence[np.ndarray], model_class: Any = hf.AutoModel) -> list[Any]:
    processor, model = hf.AutoImageProcessor.from_pretrained(folder), reference_model(folder, model_class)
    return [model(**processor(Image.fromarray(image), return_tensors="pt")) for image in images]


def pooled_image(output: Any, pooling: str, prefix: int) -> torch.Tensor:
    if pooling == "pooler":
        return output.pooler_output.reshape(-1)
    hidden = output.last_hidden_state[0]
    if hidden.ndim == 3:
        return hidden.mean((1, 2)) if pooling == "mean" else hidden.amax((1, 2))
    return {"cls": hidden[0], "mean": hidden[prefix:].mean(0), "max": hidden[prefix:].max(0).values}[pooling]


# Class token, distillation token, registers: tokens that are no patch.
PREFIX = {
    "beit": 1, "clip_vision_model": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 4, "dinov3_convnext": 1,
    "dinov3_vit": 4, "vit": 1, "vit_msn": 1,
}  # fmt: skip
# What the type's own classifier or the paper takes.
OWN_POOLING = {
    "beit": "pooler", "clip_vision_model": "pooler", "deit": "cls", "dinov2": "cls", "dinov2_with_registers": "cls",
    "dinov3_vit": "cls", "ijepa": "mean", "vit": "cls", "vit_msn": "cls",
}  # fmt: skip


@pytest.mark.parametrize("name", tiny_encoders.IMAGES)
def test_image(name: str, tiny: Callable[[str], Path]) -> None:
    folder, images = tiny(name), pictures()
    outputs = image_outputs(folder, images)
    own = OWN_POOLING.get(name, "pooler")
    others = ["mean", "max", "pooler"] if own != "mean" and name != "vit_msn" else ["mean", "max"]
    for pooling in dict.fromkeys([own, *others, *(["cls"] if PREFIX.get(name) else [])]):
        run = Run(folder, pooling=None if pooling == own else pooling)
        assert run.plan.pooling == pooling
        wanted = rows([pooled_image(output, pooling, PREFIX.get(name, 0)) for output in outputs])
        check(run, "image", images, wanted)


def test_a_clip_is_the_mean_of_its_frames(tiny: Callable[[str], Path]) -> None:
    folder = tiny("vit")
    videos = clips(5)
    run = Run(folder, frames=5)
    assert run.plan.decode.num_frames == 5
    wanted = [image_outputs(folder, list(video.frames)) for video in videos]
    vectors = rows([torch.stack([o.last_hidden_state[0, 0] for o in outputs]).mean(0) for outputs in wanted])
    assert_same(run("video", videos, 4, 12), vectors)


def test_normalize(tiny: Callable[[str], Path]) -> None:
    folder, images = tiny("resnet"), pictures()
    raw = rows([o.pooler_output.reshape(-1) for o in image_outputs(folder, images)])
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert_same(Run(folder, normalize=True)("image", images, 7, 10), unit)
    assert_same(Run(folder, normalize=False)("image", images, 7, 10), raw)


# ------------------------------------------------------------------------------------------------------- audio


@torch.no_grad()
def audio_reference(folder: Path, audios: Sequence[Audio], pooling: str) -> np.ndarray:
    extractor, model = hf.AutoFeatureExtractor.from_pretrained(folder), reference_model(folder)
    found = []
    for audio in audios:
        output = model(**extractor(audio.waveform, sampling_rate=16_000, return_tensors="pt"))
        hidden = output.last_hidden_state[0]
        if pooling == "pooler":
            found.append(output.pooler_output[0])
        elif pooling == "cls":
            found.append(hidden[0])
        else:
            frames = hidden[2:] if isinstance(model, hf.ASTModel) else hidden
            found.append(frames.mean(0) if pooling == "mean" else frames.max(0).values)
    return rows(found)


@pytest.mark.parametrize("name", tiny_encoders.SOUNDS)
def test_audio(name: str, tiny: Callable[[str], Path]) -> None:
    folder = tiny(name)
    is_spectrogram = name == "audio-spectrogram-transformer"
    audios = sounds([400, 1600, 5000, 9000, 16_000]) if is_spectrogram else sounds()
    for pooling in ("pooler", "cls", "mean", "max") if is_spectrogram else ("mean", "max"):
        run = Run(folder, pooling=pooling)
        assert run.plan.decode.sampling_rate == 16_000
        check(run, "audio", audios, audio_reference(folder, audios, pooling))
    assert plan_of(folder).pooling == ("pooler" if is_spectrogram else "mean")


@pytest.mark.parametrize("name", ["wav2vec2-group", "data2vec-audio"])
def test_a_sound_that_gives_no_frame_is_an_error_row(name: str, tiny: Callable[[str], Path]) -> None:
    processor = plan_of(tiny(name)).open_processor()
    with pytest.raises(RowError, match="needs at least 2 ms") as caught:
        processor("audio", sounds([29])[0])
    assert caught.value.code == "unsupported_format"


# ------------------------------------------------------------------------------------------------------- video


@torch.no_grad()
def clip_reference(name: str, folder: Path, videos: Sequence[Video], pooling: str) -> np.ndarray:
    model = reference_model(folder)
    if (folder / "video_preprocessor_config.json").is_file():
        processor = hf.AutoVideoProcessor.from_pretrained(folder)
        inputs = [processor([v.frames], return_tensors="pt", do_sample_frames=False) for v in videos]
    else:
        processor = hf.AutoImageProcessor.from_pretrained(folder)
        inputs = [processor([Image.fromarray(f) for f in v.frames], return_tensors="pt") for v in videos]
    found = []
    for values in inputs:
        output = model(**values)
        hidden = output.last_hidden_state[0]
        patches = hidden if name.startswith(("videomae", "vjepa2")) else hidden[1:]
        poolings = {"cls": hidden[0], "mean": patches.mean(0), "max": patches.max(0).values}
        found.append(output.pooler_output[0] if pooling == "pooler" else poolings[pooling])
    return rows(found)


@pytest.mark.parametrize("name", tiny_encoders.CLIPS)
def test_video(name: str, tiny: Callable[[str], Path]) -> None:
    folder, videos = tiny(name), clips(tiny_encoders.FRAMES)
    has_class_token = name.startswith(("timesformer", "vivit"))
    poolings = ["cls", "mean", "max"] if has_class_token else ["mean", "max"]
    assert plan_of(folder).pooling == poolings[0]
    for pooling in poolings + ["pooler"] * name.startswith("vivit"):
        run = Run(folder, pooling=pooling)
        assert run.plan.decode.num_frames == tiny_encoders.FRAMES
        check(run, "video", videos, clip_reference(name, folder, videos, pooling))


@pytest.mark.parametrize("name", tiny_encoders.CLIPS)
def test_frames_equal_the_processors(name: str, tiny: Callable[[str], Path]) -> None:
    """Sent as bytes, and normalised behind; whatever the size of a clip and the number of its frames.

    Not ViViT's, which adds an offset: what it gives is sent as it is.
    """
    checkpoint = plan_of(tiny(name)).checkpoint
    process, (processor, takes_pictures) = ClipProcessor(checkpoint), open_clip_processor(checkpoint)
    normalize = open_normalization(checkpoint, Inputs(video=VideoSpec(4, native=True)), "video")
    assert normalize is not None
    generator = np.random.default_rng(5)
    # Of 3 rows or columns the processors would take these for colours.
    shapes = [(1, 240, 320), (4, 32, 32), (9, 61, 90), *generator.integers(5, 99, (9, 3)).tolist()]
    for count, height, width in shapes:
        frames = generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        if takes_pictures:
            wanted = processor([Image.fromarray(frame) for frame in frames], return_tensors="pt")
        else:
            wanted = processor([frames], return_tensors="pt", do_sample_frames=False)
        found = process(Video(frames, np.arange(count) / 25, count / 25)).arrays
        assert found.keys() == wanted.keys()
        for key, array in found.items():
            assert array.dtype == (np.float32 if name.startswith("vivit") else np.uint8)
            normalized = torch.from_numpy(array)
            if array.dtype == np.uint8:
                normalized = normalize(normalized)
            torch.testing.assert_close(normalized, wanted[key].reshape(normalized.shape), atol=1e-6, rtol=1e-6)


def test_a_clip_of_hair_thin_frames_is_an_error_row(tiny: Callable[[str], Path]) -> None:
    process = ClipProcessor(plan_of(tiny("videomae")).checkpoint)
    with pytest.raises(RowError, match="1 x 100000 pixels: too narrow to be resized") as caught:
        process(Video(np.zeros((2, 100_000, 1, 3), np.uint8), np.arange(2) / 25, 2 / 25))
    assert caught.value.code == "too_large"


# ------------------------------------------------------------------------------------- what the weights are


INPUTS: dict[str, tuple[Any, Any]] = {
    "bert": ("text", lambda: TEXTS[:6]), "hubert": ("audio", sounds), "mobilenet_v2": ("image", pictures),
    "videomae": ("video", lambda: clips(tiny_encoders.FRAMES)), "vit": ("image", pictures),
    "wav2vec2": ("audio", sounds),
}  # fmt: skip


@pytest.mark.parametrize("name", tiny_encoders.HEADS)
def test_a_checkpoint_with_a_head(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Its vectors are those of the model under the head, saved alone."""
    folder, attribute = tiny(name), tiny_encoders.HEADS[name][1]
    modality, payloads = INPUTS[attribute]
    head_class = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    getattr(reference_model(folder, head_class), attribute).save_pretrained(tmp_path)
    found = Run(folder)(modality, payloads(), 7, 14)
    assert_same(found, Run(tmp_path, pooling=plan_of(folder).pooling)(modality, payloads(), 1, len(payloads())))


@pytest.mark.parametrize("name", ["bert-masked-lm", "vit-classifier"])
def test_a_pooler_that_is_not_there(name: str, tiny: Callable[[str], Path]) -> None:
    plan = plan_of(tiny(name), pooling="pooler")
    with pytest.raises(ModelError, match=r"lacks weights that its vectors need \(pooler\.") as caught:
        plan.load()
    assert "--pooling" in str(caught.value.hint)


def test_a_weight_that_is_not_there(tiny: Callable[[str], Path]) -> None:
    folder = tiny("deit")
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in weights if "layer" in name)
    del weights[removed]
    damaged = folder.parent / "damaged"
    shutil.copytree(folder, damaged)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        plan_of(damaged).load()


def test_weights_that_only_training_needs_may_be_missing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("wav2vec2-group")
    weights = load_file(folder / "model.safetensors")
    del weights["masked_spec_embed"]
    shutil.copytree(folder, tmp_path / "copy")
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert_same(Run(tmp_path / "copy")("audio", sounds(), 1, 10), Run(folder)("audio", sounds(), 1, 10))


def test_other_weights_in_subfolders_do_not_count(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Exports and training checkpoints beside a model neither change what it is, nor are they read."""
    shutil.copytree(tiny("vit"), tmp_path / "vit")
    before = plan_of(tmp_path / "vit").describe()
    for folder in ("onnx", "openvino", "checkpoint-500"):
        (tmp_path / "vit" / folder).mkdir()
        (tmp_path / "vit" / folder / "model.safetensors").write_bytes(b"other")
        (tmp_path / "vit" / folder / "config.json").write_text("{}")
    assert plan_of(tmp_path / "vit").describe() == before
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    weights["layernorm.bias"][0] += 1
    save_file(weights, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    assert plan_of(tmp_path / "vit").describe() != before


@pytest.mark.parametrize(("name", "pooling"), [("deberta-v2", "pooler"), ("resnet", "cls"), ("wavlm-layer", "cls")])
def test_a_pooling_that_a_type_has_not(name: str, pooling: str, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=f"--pooling {pooling}: a .* can be pooled by mean|pooler"):
        plan_of(tiny(name), pooling=pooling)


def test_no_processor(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("vit"), tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json, so nothing tells how it takes image"):
        plan_of(tmp_path / "vit")


def test_a_config_that_is_no_network(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("efficientnet"), tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps(config | {"in_channels": [7, 16, 24]}))
    with pytest.raises(ConfigError, match=r"config\.json is not usable"):
        plan_of(tmp_path / "net")


# ------------------------------------------------------------------------------------------------ real weights


MOBILENETS = ("mobilenet_v1_0.25_128", "mobilenet_v2_1.0_224")


def decoded(paths: Sequence[Path], options: DecodeOptions) -> list[np.ndarray]:
    found = [decode(Media(file=str(path)), options) for path in paths]
    assert all(modality == "image" for modality, _ in found)
    return [payload for _, payload in found if isinstance(payload, np.ndarray)]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("name", MOBILENETS)
def test_real_photos(name: str, shared_data: Path) -> None:
    folder = shared_data / "models" / name
    run = Run(folder, exact_decode=True)
    images = decoded(sorted((shared_data / "images" / "photos").glob("*.*")), run.plan.decode)
    assert len(images) == 12
    wanted = rows([output.pooler_output.reshape(-1) for output in image_outputs(folder, images)])
    check(run, "image", images, wanted)


@pytest.mark.parametrize("name", MOBILENETS)
def test_reduced_decoding_keeps_the_vectors_of_real_photos(name: str, shared_data: Path) -> None:
    """contracts.md section 5: cosine >= 0.999 to the full path."""
    run = Run(shared_data / "models" / name)
    paths = sorted((shared_data / "images" / "photos").glob("*.jpg")) + sorted(
        (shared_data / "images" / "exif").glob("*.jpg")
    )
    reduced, full = decoded(paths, run.plan.decode), decoded(paths, replace(run.plan.decode, exact_decode=True))
    smaller = [path.name for path, a, b in zip(paths, reduced, full, strict=True) if a.shape != b.shape]
    assert {f"Landscape_{n}.jpg" for n in (1, 3, 6, 8)} <= set(smaller)
    assert run.plan.decode.min_image_size is not None
    assert all(
        min(a.shape[:2]) >= min(2 * run.plan.decode.min_image_size, min(b.shape[:2]))
        for a, b in zip(reduced, full, strict=True)
    )
    found = cosines(run("image", reduced, 7, len(paths)), run("image", full, 7, len(paths)))
    print(dict(zip([path.name for path in paths], found.round(6), strict=True)))
    assert found.min() >= 0.999


def test_turned_photos_agree(shared_data: Path) -> None:
    """One scene, saved with four EXIF orientations."""
    run = Run(shared_data / "models" / "mobilenet_v2_1.0_224")
    images = decoded(sorted((shared_data / "images" / "exif").glob("*.jpg")), run.plan.decode)
    vectors = run("image", images, 4, 4)
    assert cosines(vectors[:, None], vectors[None]).min() >= 0.85
