"""Dual encoders give, for every row and batch size, what the checkpoint's own code gives for that row alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dual
import torch
import transformers as hf
from model_runs import DEVICE, Run, assert_same, plan_of
from PIL import Image
from torch import nn

from mmcli.core.errors import RowError
from mmcli.core.records import Audio, Media, Modality, Payload, Video
from mmcli.media.decode import decode
from mmcli.models.inputs import ImageProcessor, Normalize

# Tokens that the text tower of each tiny checkpoint can take.
LIMITS = {
    "align": 64, "altclip": 38, "blip": 90, "blip_retrieval": 90, "chinese_clip": 90, "clap": 98,
    "clap_fused": 98, "clip": 77, "clipseg": 77, "flava": 90, "groupvit": 77, "metaclip_2": 77, "owlvit": 16,
    "siglip": 16, "siglip2": 64, "siglip2_fixed": 64, "vision_text": 100, "vision_text_roberta": 64, "xclip": 77,
}  # fmt: skip
# As the model cards of these types say; the others' texts are padded to the longest of a batch.
PADDED = ("align", "siglip", "siglip2", "siglip2_fixed")
WITH_AUDIO = ("clap", "clap_fused")
WITH_CLIPS = ("xclip", "xclip_flat")
WITH_IMAGES = tuple(name for name in LIMITS if name not in WITH_AUDIO + WITH_CLIPS)

TEXTS = [
    "a photo of a cat", "", " ", "a", "The RED circle!", "a cat's 42 dogs, and no circle at all?",
    "一只猫", "привет, это кот", "emoji \U0001f600\U0001f408 and é ß ñ", "قطة حمراء", "x" * 400,
    "a photo of a dog and a cat " * 20, "tab\tand\nnew line", "don't", "cat cat cat cat cat cat cat cat cat",
    "one [SEP] two </s> three <|endoftext|> four", "the circle of the cat of the dog of the photo", "0123456789",
]  # fmt: skip
# Heights and widths: tiny, tall, wide, a camera's, exactly right, a pixel off.
SHAPES = [(3, 5), (5, 3), (1, 1), (200, 20), (18, 250), (480, 640), (32, 32), (33, 31), (64, 64), (97, 130)]
SECONDS = (0.02, 1.0, 3.3, 9.99, 10.0, 10.005, 12.5)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return tiny_dual.BUILDERS[name](tmp_path_factory.mktemp("tiny") / name)

    return build


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    found = []
    for height, width in SHAPES:
        smooth = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        resized = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
        noise = generator.integers(-40, 40, (height, width, 3))
        found.append(np.clip(np.asarray(resized).astype(int) + noise, 0, 255).astype(np.uint8))
    return found


def sounds() -> list[Audio]:
    generator = np.random.default_rng(2)
    found = []
    for seconds in SECONDS:
        time = np.arange(round(seconds * 48_000)) / 48_000
        tone = np.sin(2 * np.pi * (200 + 90 * time) * time) * 0.3
        found.append(Audio((tone + 0.1 * generator.standard_normal(len(time))).astype(np.float32), 48_000))
    return found


def clips(num_frames: int) -> list[Video]:
    found = []
    for picture in pictures()[:8]:
        frames = np.stack([np.roll(picture, shift, axis=1) // (1 + shift % 2) for shift in range(num_frames)])
        found.append(Video(frames, np.arange(num_frames) / 25, num_frames / 25))
    return found


# ------------------------------------------------------------------------------------------ the reference


class Reference:
    """A checkpoint called as its model card says: its own processor, eager attention, one input at a time."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        model_class = hf.BlipForImageTextRetrieval if name == "blip_retrieval" else hf.AutoModel
        self.model = model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        # SiglipProcessor insists on sentencepiece; these are its parts.
        parts = name in ("siglip", "siglip2_fixed")
        self.tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        self.images = hf.AutoImageProcessor.from_pretrained(folder) if parts else None
        self.processor = None if parts else hf.AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def raw(self, modality: Modality, payload: Any) -> np.ndarray:
        vector: torch.Tensor = getattr(self, modality)(payload)
        assert vector.ndim == 2
        return vector[0].numpy()

    def __call__(self, modality: Modality, payloads: Sequence[Any], normalize: bool = True) -> np.ndarray:
        vectors = np.stack([self.raw(modality, payload) for payload in payloads])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors

    def text(self, text: str) -> torch.Tensor:
        name = self.name.replace("xclip_flat", "xclip")
        options = {"truncation": True, "max_length": LIMITS[name], "return_tensors": "pt"}
        if name in PADDED:
            options["padding"] = "max_length"
        inputs = self.tokenizer([text], **options) if self.images else self.processor(text=[text], **options)
        if self.name == "blip_retrieval":
            pixels = torch.zeros(1, 3, tiny_dual.SIDE, tiny_dual.SIDE)
            output = self.model(pixel_values=pixels, use_itm_head=False, **inputs)
            return self.model.text_proj(output.question_embeds[:, 0])
        return self.pooled(self.model.get_text_features(**inputs))

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        process = self.images or self.processor
        inputs = process(images=[Image.fromarray(pixels)], return_tensors="pt")
        if self.name == "blip_retrieval":
            output = self.model(**inputs, input_ids=torch.tensor([[2, 3]]), use_itm_head=False)
            return self.model.vision_proj(output.last_hidden_state[:, 0])
        return self.pooled(self.model.get_image_features(**inputs))

    def audio(self, audio: Audio) -> torch.Tensor:
        np.random.seed(0)
        inputs = self.processor(audio=audio.waveform, sampling_rate=audio.sampling_rate, return_tensors="pt")
        return self.pooled(self.model.get_audio_features(**inputs))

    def video(self, video: Video) -> torch.Tensor:
        frames = [Image.fromarray(frame) for frame in video.frames]
        pixels = self.processor(videos=frames, return_tensors="pt")["pixel_values"]
        pixels = pixels if pixels.ndim == 5 else pixels[None]
        return self.pooled(self.model.get_video_features(pixels))

    def pooled(self, output: Any) -> torch.Tensor:
        # FLAVA's contrastive loss takes the first token.
        return output.pooler_output[:, 0] if self.name == "flava" else output.pooler_output


def assert_different(vectors: np.ndarray) -> None:
    """What is compared must depend on its input: most rows are far apart, as the tolerance goes."""
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert np.median(distances[np.triu_indices(len(vectors), 1)]) > 0.05


def compare(
    name: str, folder: Path, modality: Modality, payloads: Sequence[Payload], note: Callable[[str, object], None]
) -> None:
    """Rows equal the reference at batch sizes 1, 7 and 64, the last with enough rows to fill it."""
    run = Run(folder)
    wanted = Reference(name, folder)(modality, payloads)
    assert_different(wanted)
    assert wanted.shape[1] == run.plan.embedding_size
    cost = 4 if modality == "video" else 1
    many = 66 if modality in ("text", "image") else 9
    worst = 0.0
    for batch_size, rows in ((1, len(wanted)), (7, len(wanted)), (64, many)):
        worst = max(worst, assert_same(run(modality, payloads, batch_size * cost, rows), wanted))
    note("difference", worst)


@pytest.mark.parametrize("name", [*LIMITS, "xclip_flat"])
def test_texts_equal_the_reference(tiny: Callable[[str], Path], name: str, record_property: Any) -> None:
    compare(name, tiny(name), "text", TEXTS, record_property)


@pytest.mark.parametrize("name", ["clip", "clipseg", "groupvit", "xclip"])
def test_a_padding_token_above_the_end_is_not_taken_for_it(
    tiny: Callable[[str], Path], name: str, tmp_path: Path, record_property: Any
) -> None:
    """Of the older checkpoints, whose eos_token_id is 2, a text ends at its largest id."""
    folder = Path(shutil.copytree(tiny(name), tmp_path / "model"))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model = hf.AutoModel.from_pretrained(folder)
    text_config = model.config.text_config
    text_config.eos_token_id, text_config.vocab_size = 2, len(tokenizer)
    model.text_model.embeddings.token_embedding = nn.Embedding(len(tokenizer), text_config.hidden_size)
    model.save_pretrained(folder)
    assert tokenizer.pad_token_id > tokenizer.eos_token_id
    compare(name, folder, "text", TEXTS, record_property)


def test_a_text_tower_that_looks_both_ways_gets_its_mask(
    tiny: Callable[[str], Path], tmp_path: Path, record_property: Any
) -> None:
    folder = Path(shutil.copytree(tiny("clip"), tmp_path / "model"))
    config = hf.AutoConfig.from_pretrained(folder)
    config.text_config.is_causal = False
    config.save_pretrained(folder)
    run = Run(folder, attn_implementation="eager")
    assert_same(run("text", TEXTS, 64, 66), Reference("clip", folder)("text", TEXTS))


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_images_equal_the_reference(tiny: Callable[[str], Path], name: str, record_property: Any) -> None:
    compare(name, tiny(name), "image", pictures(), record_property)


@pytest.mark.parametrize("name", WITH_AUDIO)
def test_sounds_equal_the_reference(tiny: Callable[[str], Path], name: str, record_property: Any) -> None:
    assert plan_of(tiny(name)).decode.sampling_rate == 48_000
    compare(name, tiny(name), "audio", sounds(), record_property)


@pytest.mark.parametrize("name", WITH_CLIPS)
def test_clips_equal_the_reference(tiny: Callable[[str], Path], name: str, record_property: Any) -> None:
    plan = plan_of(tiny(name), frames=13)
    assert plan.decode.num_frames == 4, "a video tower takes as many frames as it was made for"
    compare(name, tiny(name), "video", clips(4), record_property)


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["clip", "flava", "clap"])
def test_raw_vectors_without_normalisation(tiny: Callable[[str], Path], name: str) -> None:
    modality: Modality = "audio" if name == "clap" else "image"
    payloads: Sequence[Payload] = sounds()[:2] if name == "clap" else pictures()
    reference = Reference(name, tiny(name))
    run = Run(tiny(name), normalize=False)
    assert_same(run("text", TEXTS, 7, len(TEXTS)), reference("text", TEXTS, normalize=False))
    assert_same(run(modality, payloads, 7, len(payloads)), reference(modality, payloads, normalize=False))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_bfloat16_stays_close(tiny: Callable[[str], Path], name: str) -> None:
    reference = Reference(name, tiny(name))
    run = Run(tiny(name), dtype="bfloat16")
    for modality, payloads in (("text", TEXTS), ("image", pictures())):
        found, wanted = run(modality, payloads, 64, len(payloads)), reference(modality, payloads)
        assert found.dtype == np.float32
        assert (found * wanted).sum(axis=1).min() >= 0.999
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip2", "blip_retrieval"])
def test_clip_through_an_image_tower(tiny: Callable[[str], Path], name: str) -> None:
    """The mean of the frames' unit vectors, made a unit vector; without normalisation the mean of the frames'."""
    videos = clips(5)
    reference = Reference(name, tiny(name))
    frames = np.stack([reference("image", list(video.frames), normalize=False) for video in videos])
    run = Run(tiny(name), frames=5)
    assert run.plan.decode.num_frames == 5
    mean = (frames / np.linalg.norm(frames, axis=2, keepdims=True)).mean(axis=1)
    wanted = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(wanted - frames[:, 0] / np.linalg.norm(frames[:, 0], axis=1, keepdims=True)).max() > 0.02
    for batch_size in (1, 15, 320):
        assert_same(run("video", videos, batch_size, len(videos)), wanted)
    raw = Run(tiny(name), frames=5, normalize=False)
    assert_same(raw("video", videos, 15, len(videos)), frames.mean(axis=1))


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("chinese_clip"), tmp_path / "left"))
    tiny_dual.edit_json(folder / "tokenizer_config.json", padding_side="left", model_input_names=["input_ids"])
    wanted = Reference("chinese_clip", tiny("chinese_clip"))("text", TEXTS)
    assert_same(Run(folder)("text", TEXTS, 64, len(TEXTS)), wanted)


def test_patches_of_another_size(tmp_path: Path) -> None:
    """Siglip2Processor ignores the saved patch size and number of patches; its image processor does not."""
    if DEVICE != "cpu":
        pytest.skip("on a CPU, which the reference is on, torch resizes positions wrongly to a width of 1")
    folder = tiny_dual.siglip2(tmp_path / "small", patch_size=8, max_num_patches=20)
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    model = hf.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = []
    for picture in pictures():
        with torch.no_grad():
            inputs = processor(images=[Image.fromarray(picture)], return_tensors="pt")
            wanted.append(model.get_image_features(**inputs).pooler_output[0].numpy())
    unit = np.stack(wanted) / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert_same(Run(folder)("image", pictures(), 64, len(unit)), unit)


def test_siglip_with_its_sentencepiece_tokenizer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the library of SigLIP's tokenizer")
    pytest.importorskip("google.protobuf", reason="SigLIP's tokenizer needs it too")
    folder = Path(shutil.copytree(tiny("siglip"), tmp_path / "siglip"))
    (folder / "tokenizer.json").unlink()
    sentences = ["a photo of a cat", "the red circle", "a dog and 42 cats, don't!"]
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=40, hard_vocab_limit=False,
            bos_id=-1, pad_id=-1, eos_id=1, unk_id=2, minloglevel=2,
        )  # fmt: skip
    settings = {"model_max_length": 16, "model_input_names": ["input_ids"]}
    hf.SiglipTokenizer(str(folder / "spiece.model"), **settings).save_pretrained(folder)
    wanted = Reference("siglip", folder)("text", TEXTS)
    assert_different(wanted)
    assert_same(Run(folder)("text", TEXTS, 7, len(TEXTS)), wanted)


# ------------------------------------------------------------------------------------------ pictures


def odd_processors() -> dict[str, tuple[Any, bool]]:
    """Image processors, and whether they send bytes."""
    clip, square = partial(tiny_dual.cropped, hf.CLIPImageProcessor), tiny_dual.square
    return {
        "clip": (clip(), True),
        "siglip": (square(hf.SiglipImageProcessor), True),
        "blip": (square(hf.BlipImageProcessor), True),
        "vit": (square(hf.ViTImageProcessor), True),
        "chinese_clip": (tiny_dual.cropped(hf.ChineseCLIPImageProcessor), True),
        "flava": (tiny_dual.cropped(hf.FlavaImageProcessor), True),
        "crop_pct": (hf.ConvNextImageProcessor(size={"shortest_edge": tiny_dual.SIDE}, crop_pct=0.875), True),
        "no normalisation": (clip(do_normalize=False), True),
        "no rescaling": (clip(do_rescale=False), True),
        "odd numbers": (clip(rescale_factor=1 / 200, image_mean=[0.1, 0.7, 0.2], image_std=[2.0, 0.01, 1.0]), True),
        "crop only": (clip(do_resize=False), True),
        "nearest": (square(hf.SiglipImageProcessor, resample=0), True),
        "lanczos": (square(hf.SiglipImageProcessor, resample=1), True),
        "padding": (square(hf.SiglipImageProcessor, do_pad=True, pad_size={"height": 40, "width": 40}), False),
        "offset": (square(hf.EfficientNetImageProcessor, rescale_offset=True, rescale_factor=1 / 127.5), False),
        "twice normalised": (square(hf.EfficientNetImageProcessor), False),
        "patches": (hf.Siglip2ImageProcessor(), False),
        "pixel mask": (hf.ViltImageProcessor(size={"shortest_edge": tiny_dual.SIDE}), False),
        "pillow": (tiny_dual.cropped(hf.CLIPImageProcessorPil), True),
    }


@pytest.mark.parametrize("name", odd_processors())
def test_pixels_equal_the_processors(name: str) -> None:
    processor, sends_bytes = odd_processors()[name]
    ours = ImageProcessor(processor)
    normalize = Normalize.of(processor)
    generator = np.random.default_rng(4)
    shapes = [(480, 640), (32, 32), (90, 61), *generator.integers(60, 100, (12, 2)).tolist()]
    for height, width in shapes:
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = processor(images=[Image.fromarray(picture)], return_tensors="pt")
        found = {key: torch.from_numpy(array) for key, array in ours(picture).arrays.items()}
        assert found.keys() == wanted.keys()
        assert (found["pixel_values"].dtype == torch.uint8) == sends_bytes
        if sends_bytes:
            found["pixel_values"] = normalize(found["pixel_values"])
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[key][0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["crop_pct", "no normalisation", "odd numbers", "offset", "pillow"])
def test_vectors_with_an_odd_processor(tmp_path: Path, name: str) -> None:
    processor, _ = odd_processors()[name]
    folder = tiny_dual.clip(tmp_path / "odd", processor)
    assert_same(Run(folder)("image", pictures(), 7, 10), Reference("clip", folder)("image", pictures()))


def test_pictures_of_other_sizes_share_no_batch(tmp_path: Path) -> None:
    """Without resizing, the model takes only its own size: the others fail, each as a row of its own."""
    folder = tiny_dual.clip(
        tmp_path / "as-is", tiny_dual.cropped(hf.CLIPImageProcessor, do_resize=False, do_center_crop=False)
    )
    processor = plan_of(folder).open_processor()
    right, wrong = pictures()[6], pictures()[7]
    groups = {processor("image", picture).group for picture in (right, right[::-1].copy(), wrong)}
    assert len(groups) == 2
    assert_same(Run(folder)("image", [right], 7, 9), Reference("clip", folder)("image", [right]))


def test_a_hair_thin_picture_is_an_error_row() -> None:
    process = ImageProcessor(hf.CLIPImageProcessor())
    assert process(np.zeros((1, 900, 3), np.uint8)).arrays["pixel_values"].shape == (3, 224, 224)
    with pytest.raises(RowError, match="1 x 100000 pixels: too narrow to be resized to 224") as caught:
        process(np.zeros((100_000, 1, 3), np.uint8))
    assert caught.value.code == "too_large"


# ------------------------------------------------------------------------------------------ real data


def test_zero_shot_through_mmcli_names_the_sample_pictures(sample_data: Path) -> None:
    run = Run(sample_data / "models" / "clip")
    rows = [json.loads(line) for line in (sample_data / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    payloads = []
    options = replace(run.plan.decode, exact_decode=True)
    for row in rows:
        modality, payload = decode(Media(file=str(sample_data / row["image"])), options)
        assert modality == "image"
        payloads.append(payload)
    labels = (sample_data / "labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
    classes = run("text", [f"a photo of a {label}" for label in labels], 64, len(labels))
    chosen = (run("image", payloads, 64, len(payloads)) @ classes.T).argmax(axis=1)
    assert np.mean([labels[index] == row["label"] for index, row in zip(chosen, rows, strict=True)]) >= 0.9


@pytest.mark.parametrize("name", ["clip", "clipseg", "groupvit", "metaclip_2", "owlvit", "xclip"])
def test_a_text_tower_asks_nothing_of_the_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bool(tensor)` and `tensor.item()` wait for all that a device has to do."""
    run = Run(tiny_dual.BUILDERS[name](tmp_path), device="cpu")
    batch = run.runner.collate([run.processor("text", text) for text in ("a photo of a cat", "a dog")])
    assert not batch.tensors["attention_mask"].all()
    for question in ("__bool__", "item", "tolist", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, question, _refuse)
    run.runner.forward(batch)


def _refuse(*_: Any) -> None:
    raise AssertionError("the device was asked")
