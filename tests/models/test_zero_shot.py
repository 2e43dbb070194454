"""Zero-shot scores are those of the checkpoint's own forward pass, with one template and with several."""

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
from classify_runs import as_array
from model_runs import DEVICE, outputs_of
from PIL import Image
from rare import rarely
from test_dual_encoders import PADDED, Reference, clips, pictures, sounds

from mmcli.core.errors import ConfigError
from mmcli.core.records import Modality
from mmcli.models.classify import resolve_classifier
from mmcli.models.options import Classification, Label, ModelOptions, Ranking
from mmcli.models.templates import TEMPLATES
from mmcli.models.vectors import VectorPlan
from mmcli.models.zero_shot import label_vectors, owners_of

NAMES = ("cat", "dog", "red circle", "the 42 dogs", "a")
TEMPLATES_3 = ("a photo of a {}.", "{}", "the {} of the cat, the {}!")
IMAGES = ("align", "altclip", "blip", "chinese_clip", "clip", "clipseg", "metaclip_2", "siglip", "siglip2_fixed",
          "vision_text")  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(name: str) -> Path:
        return tiny_dual.BUILDERS[name](tmp_path_factory.mktemp("tiny") / name)

    return build


def asked(
    names: Sequence[str] = NAMES, templates: tuple[str, ...] | None = ("a photo of a {}.",), **ranking: Any
) -> Classification:
    labels = tuple(Label(name, (name,)) for name in names)
    return Classification(labels, templates, None, Ranking(**{"top_k": 1000, **ranking}))


def plan_of(folder: Path | str, wanted: Classification, **options: Any) -> VectorPlan:
    plan = resolve_classifier(ModelOptions(str(folder), device=DEVICE, **options), wanted)
    assert isinstance(plan, VectorPlan)
    return plan


def scores(plan: VectorPlan, modality: Modality, payloads: Sequence[Any], batch_size: int) -> np.ndarray:
    """float [n, L], in the order of the labels."""
    process, runner = plan.open_processor(), plan.load()
    samples: list[Any] = [process(modality, payload) for payload in payloads]  # type: ignore[operator]
    groups: dict[Any, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(row)
    found: dict[int, Any] = {}
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            rows = members[start : start + batch_size]
            found.update(zip(rows, outputs_of(runner, [samples[row] for row in rows]), strict=True))
    return as_array([found[row] for row in range(len(payloads))], plan.labels)


class Forward:
    """The whole model on one input beside all prompts, as its documentation shows."""

    def __init__(self, name: str, folder: Path) -> None:
        self.reference = Reference(name, folder)
        self.model, self.padded = self.reference.model, name in PADDED
        self.sigmoid = name.startswith("siglip")

    @torch.no_grad()
    def output(self, modality: Modality, payload: Any, prompts: Sequence[str]) -> Any:
        padding = "max_length" if self.padded else True
        options = {"padding": padding, "return_tensors": "pt"}
        if self.padded:
            options |= {"max_length": 64 if self.reference.name != "siglip" else 16, "truncation": True}
        inputs = dict(self.reference.tokenizer(list(prompts), **options))
        inputs |= self.media(modality, payload)
        if not isinstance(self.model, hf.AltCLIPModel | hf.AlignModel | hf.BlipModel | hf.ChineseCLIPModel):
            inputs.pop("token_type_ids", None)
        return self.model(**inputs)

    def media(self, modality: Modality, payload: Any) -> dict[str, Any]:
        if modality == "image":
            images = self.reference.images or self.reference.processor.image_processor
            return dict(images(Image.fromarray(payload), return_tensors="pt"))
        if modality == "audio":
            np.random.seed(0)
            extractor = self.reference.processor.feature_extractor
            return dict(extractor(payload.waveform, sampling_rate=payload.sampling_rate, return_tensors="pt"))
        frames = [Image.fromarray(frame) for frame in payload.frames]
        return dict(self.reference.processor(videos=frames, return_tensors="pt"))

    def logits(self, modality: Modality, payload: Any, prompts: Sequence[str]) -> np.ndarray:
        output = self.output(modality, payload, prompts)
        name = {"image": "logits_per_image", "audio": "logits_per_audio", "video": "logits_per_video"}[modality]
        return np.asarray(output[name][0])

    def scores(self, logits: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(logits)
        return np.asarray(tensor.sigmoid() if self.sigmoid else tensor.softmax(dim=-1))

    def ensembled(self, modality: Modality, payload: Any, prompts: Sequence[Sequence[str]]) -> np.ndarray:
        """Logits from the unit vectors that the forward pass returns: normalised, averaged, normalised."""
        output = self.output(modality, payload, [text for texts in prompts for text in texts])
        medium, texts = output[f"{modality}_embeds"][0], output["text_embeds"]
        if texts.ndim == 3:
            texts = texts[0]
        means = torch.stack([part.mean(dim=0) for part in texts.split([len(one) for one in prompts])])
        cosines = torch.nn.functional.normalize(means, dim=-1) @ torch.nn.functional.normalize(medium, dim=-1)
        model = self.model
        if isinstance(model, hf.AlignModel):
            return np.asarray(cosines / model.temperature.detach())
        scale = getattr(model, "logit_scale_a", None)
        scale = (model.logit_scale if scale is None else scale).detach().exp()
        return np.asarray(cosines * scale + (model.logit_bias.detach() if self.sigmoid else 0.0))


def media_of(modality: Modality) -> list[Any]:
    if modality == "image":
        return pictures()
    return sounds()[:4] if modality == "audio" else clips(4)


CASES: list[tuple[str, Modality]] = [
    *((name, "image") for name in IMAGES), ("clap", "audio"), ("clap_fused", "audio"), ("xclip", "video")
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "modality"),
    rarely(CASES, lambda case: case[0] in ("clip", "siglip", "blip", "altclip", "clap", "xclip")),
)
def test_one_template_gives_the_models_own_scores(
    tiny: Callable[[str], Path], name: str, modality: Modality
) -> None:
    forward, payloads = Forward(name, tiny(name)), media_of(modality)
    if modality == "audio":
        payloads = [_resampled(one, 48_000) for one in payloads]
    prompts = [f"a photo of a {label}." for label in NAMES]
    wanted = np.stack([forward.scores(forward.logits(modality, one, prompts)) for one in payloads])
    plan = plan_of(tiny(name), asked())
    for batch_size in (1, 5, 16):
        found = scores(plan, modality, payloads, batch_size)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    # Else equality would say nothing.
    assert np.ptp(wanted, axis=0).max() > 1e-3


@pytest.mark.parametrize(("name", "modality"), rarely(CASES, lambda case: case[0] in ("clip", "siglip", "clap")))
def test_several_templates_are_averaged_as_unit_vectors(
    tiny: Callable[[str], Path], name: str, modality: Modality
) -> None:
    forward, payloads = Forward(name, tiny(name)), media_of(modality)[:3]
    prompts = [[template.replace("{}", label) for template in TEMPLATES_3] for label in NAMES]
    wanted = np.stack([forward.scores(forward.ensembled(modality, one, prompts)) for one in payloads])
    found = scores(plan_of(tiny(name), asked(templates=TEMPLATES_3)), modality, payloads, 5)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    single = scores(plan_of(tiny(name), asked()), modality, payloads, 5)
    assert np.abs(found - single).max() > 1e-4


def _resampled(audio: Any, rate: int) -> Any:
    assert audio.sampling_rate == rate
    return audio


def test_the_averages_are_those_of_each_label() -> None:
    features = torch.randn(5, 7)
    prompts = [("a", "b"), ("c",), ("d", "e")]
    found = label_vectors(features * 9, owners_of(prompts), 3)
    unit = features / features.norm(dim=1, keepdim=True)
    wanted = torch.stack([unit[:2].mean(0), unit[2], unit[3:].mean(0)])
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True))


def test_texts_of_a_label_stand_for_it(tiny: Callable[[str], Path]) -> None:
    folder, payloads = tiny("clip"), pictures()[:2]
    labels = (Label("animal", ("cat", "dog")), Label("shape", ("red circle",)))
    wanted = Classification(labels, ("{}",), None, Ranking(10))
    forward = Forward("clip", folder)
    prompts = [["cat", "dog"], ["red circle"]]
    reference = np.stack([forward.scores(forward.ensembled("image", one, prompts)) for one in payloads])
    np.testing.assert_allclose(scores(plan_of(folder, wanted), "image", payloads, 2), reference, atol=1e-4)


def test_the_published_template_sets() -> None:
    assert {name: len(set(found)) for name, found in TEMPLATES.items()} == {
        "imagenet80": 80, "simple7": 7, "audio": 1, "none": 1
    }  # fmt: skip
    assert all(template.count("{}") == 1 for found in TEMPLATES.values() for template in found)
    assert set(TEMPLATES["simple7"]) <= set(TEMPLATES["imagenet80"])


def test_siglip_scores_labels_alone_and_gives_those_over_the_threshold(tiny: Callable[[str], Path]) -> None:
    plan = plan_of(tiny("siglip"), asked(threshold=0.2))
    process, runner = plan.open_processor(), plan.load()
    samples: list[Any] = [process("image", picture) for picture in pictures()]  # type: ignore[operator]
    found = list(outputs_of(runner, samples))
    for one in found:
        assert one.labels == tuple(label for label, score in one.top_k if score >= 0.2)
    assert sum(score for _, score in found[0].top_k) != pytest.approx(1.0, abs=1e-3)


def test_what_does_not_go_together_is_said_before_weights_load(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="no labels of its own; add --labels"):
        plan_of(tiny("clip"), asked(names=()))
    with pytest.raises(ConfigError, match="--multi-label: the labels of this model compete"):
        plan_of(tiny("clip"), asked(threshold=0.5))
    with pytest.raises(ConfigError, match="are the same to the model's tokenizer"):
        plan_of(tiny("align"), asked(names=("cat " * 90 + "dog", "cat " * 90 + "red")))
