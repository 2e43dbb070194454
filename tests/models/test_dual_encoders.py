"""Dual encoders give, for every row and batch size, what the checkpoint's own code gives for that row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dual
import torch
import transformers as hf
from PIL import Image

from mmcli.core.protocols import Pending
from mmcli.core.records import Audio, Modality, Payload, Sample, Video
from mmcli.engines.batching import Slot, batches
from mmcli.models.options import ModelOptions
from mmcli.models.plan import EmbeddingPlan
from mmcli.models.resolve import resolve

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


# ------------------------------------------------------------------------------------------ what mmcli gives


def embed(plan: EmbeddingPlan, modality: Modality, payloads: Sequence[Payload], batch_size: int = 7) -> np.ndarray:
    """Through processor, batches and runner, as a run does."""
    return forward(plan.load(), samples_of(plan, modality, payloads), batch_size)


def samples_of(plan: EmbeddingPlan, modality: Modality, payloads: Sequence[Payload]) -> list[Sample]:
    processor = plan.open_processor()
    return [processor(modality, payload) for payload in payloads]


def forward(runner: Any, samples: Sequence[Sample], batch_size: int) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    slots = [Slot(row, 0, sample) for row, sample in enumerate(samples)]
    for batch in batches(slots, lambda _: batch_size):
        output = runner.forward(runner.collate([slot.sample for slot in batch]))
        vectors = output.result() if isinstance(output, Pending) else output
        assert vectors.dtype == np.float32
        found.update(zip([slot.row for slot in batch], vectors, strict=True))
    return np.stack([found[row] for row in range(len(samples))])


def plan_of(folder: Path, **options: Any) -> EmbeddingPlan:
    plan = resolve(ModelOptions(str(folder), device="cpu", **options))
    assert isinstance(plan, EmbeddingPlan)
    return plan


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


def assert_same(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    wanted = wanted[np.arange(len(found)) % len(wanted)]
    assert found.shape == wanted.shape
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() >= 0.99999, f"row {cosine.argmin()}"
    assert np.abs(found - wanted).max() <= tolerance, f"row {np.abs(found - wanted).max(1).argmax()}"


def assert_different(vectors: np.ndarray) -> None:
    """What is compared must depend on its input: most rows are far apart, as the tolerance goes."""
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert np.median(distances[np.triu_indices(len(vectors), 1)]) > 0.05


def compare(
    name: str, folder: Path, modality: Modality, payloads: Sequence[Payload], note: Callable[[str, object], None]
) -> None:
    """Rows equal the reference at batch sizes 1, 7 and 64: there 66 rows, by repeating the samples."""
    plan = plan_of(folder)
    wanted = Reference(name, folder)(modality, payloads)
    assert_different(wanted)
    assert wanted.shape[1] == plan.embedding_size
    samples, runner = samples_of(plan, modality, payloads), plan.load()
    cost = samples[0].cost
    many = [samples[i % len(samples)] for i in range(66 if modality in ("text", "image") else 10)]
    worst = 0.0
    for batch_size, some in ((1, samples), (7 * cost, samples), (64 * cost, many)):
        found = forward(runner, some, batch_size)
        assert_same(found, wanted)
        worst = max(worst, float(np.abs(found[: len(wanted)] - wanted).max()))
    note("difference", worst)


@pytest.mark.parametrize("name", [*LIMITS, "xclip_flat"])
def test_texts_equal_the_reference(tiny: Callable[[str], Path], name: str, record_property: Any) -> None:
    compare(name, tiny(name), "text", TEXTS, record_property)


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
