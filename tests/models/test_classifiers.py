"""Checkpoints with a head give, for every row and batch size, the scores that transformers gives for it alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_classifiers
import tiny_encoders
import torch
import transformers as hf
from classify_runs import ClassifyRun, asked, plan_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import LENGTHS, TEXTS, clips, pictures, sounds
from tiny_classifiers import LABELS
from tiny_dual import edit_json

from mmcli.core.errors import ConfigError, ModelError
from mmcli.core.records import Classified, DecodeOptions, Media, Record
from mmcli.media.decode import decode
from mmcli.models import classifier
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.options import Classification, ModelOptions
from mmcli.tasks.classify import Classify

# Batch sizes, rows.
BATCHES = ((1, 12), (5, 12), (16, 32))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return tiny_classifiers.BUILDERS[name](tmp_path_factory.mktemp("tiny") / name)

    return build


def copied(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    edit_json(to / "config.json", **config)
    return to


def reference_model(folder: Path) -> Any:
    """The class that the checkpoint was saved as."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(hf, name).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: Any, inputs: Sequence[Any]) -> torch.Tensor:
    outputs = [model(**one) for one in inputs]
    return torch.cat([(o.logits if "logits" in o else o.last_hidden_state).reshape(1, -1) for o in outputs])


def check(
    run: ClassifyRun, modality: Any, payloads: Sequence[Any], logits: torch.Tensor, limit: float = 1e-5
) -> None:
    """All scores are the softmax of the reference's logits, whatever a row's neighbours."""
    wanted = logits.softmax(dim=-1).numpy()
    assert wanted.shape == (len(payloads), LABELS)
    # Scores tell the inputs apart: else equality would say nothing.
    distances = np.abs(wanted[:, None] - wanted[None]).max(axis=-1)
    assert distances[~np.eye(len(wanted), dtype=bool)].min() > 3e-4
    for batch_size, rows in BATCHES:
        found = run.scores(modality, payloads, batch_size, max(rows, len(payloads)))
        assert np.abs(found - wanted[np.arange(len(found)) % len(wanted)]).max() < limit, batch_size


# ------------------------------------------------------------------------------------------------------- text


def text_logits(folder: Path, texts: Sequence[str], limit: int = 64) -> torch.Tensor:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = [tokenizer(text, truncation=True, max_length=limit, return_tensors="pt") for text in texts]
    model = reference_model(folder)
    if hasattr(model, "bert") and hasattr(model.bert, "set_attention_type"):
        # BigBird reads texts whole once it has read a short one.
        return torch.cat([logits_of(reference_model(folder), [one]) for one in inputs])
    return logits_of(model, inputs)


@pytest.mark.parametrize("name", tiny_classifiers.TEXTS)
def test_text(name: str, tiny: Callable[[str], Path]) -> None:
    folder = tiny(name)
    # Where nothing begins a text, there is none without letters.
    texts = [text for text in TEXTS if text] if name.startswith("gpt2") else TEXTS
    check(ClassifyRun(folder), "text", texts, text_logits(folder, texts))


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("name", tiny_classifiers.IMAGES)
def test_image(name: str, tiny: Callable[[str], Path]) -> None:
    folder, images = tiny(name), pictures()
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    inputs = [processor(Image.fromarray(one), return_tensors="pt") for one in images]
    # LeViT of random weights makes 1e-4 of the logits of 1e-7 of the pixels.
    limit = 1e-4 if "levit" in name else 1e-5
    check(ClassifyRun(folder), "image", images, logits_of(reference_model(folder), inputs), limit)


# ------------------------------------------------------------------------------------------------ sounds, clips


@pytest.mark.parametrize("name", tiny_classifiers.SOUNDS)
def test_audio(name: str, tiny: Callable[[str], Path]) -> None:
    folder = tiny(name)
    # Spectrograms of a few windows at least; SEW averages two frames.
    lengths = LENGTHS
    if "spectrogram" in name or name in ("whisper", "wav2vec2-bert"):
        lengths = [1600, 2400, 4000, 9000, 4000]
    run = ClassifyRun(folder)
    assert run.plan.inputs.audio is not None
    shortest = run.plan.inputs.audio.min_samples
    wanted = {"sew-layer": 38, "sew-group": 38, "wav2vec2-bert": 560}
    assert shortest == wanted.get(name, 30 if lengths is LENGTHS else 1)
    if name == "wav2vec2-bert":
        # Two frames of a spectrogram, the least; and sounds of different lengths share a batch.
        lengths[0] = shortest
        assert run.plan.inputs.audio.batching == "masked"
    heard = sounds([max(length, shortest) for length in lengths])
    extractor = hf.AutoFeatureExtractor.from_pretrained(folder)
    inputs = [extractor(one.waveform, sampling_rate=16_000, return_tensors="pt") for one in heard]
    check(run, "audio", heard, logits_of(reference_model(folder), inputs))


@pytest.mark.parametrize("name", tiny_classifiers.CLIPS)
def test_video(name: str, tiny: Callable[[str], Path]) -> None:
    folder, seen = tiny(name), clips(tiny_encoders.FRAMES)
    run = ClassifyRun(folder)
    assert run.plan.modalities == {"video"}
    assert run.plan.decode.num_frames == tiny_encoders.FRAMES
    if name in ("videoprism", "vjepa2"):
        processor = hf.AutoVideoProcessor.from_pretrained(folder)
        inputs = [processor([v.frames], return_tensors="pt", do_sample_frames=False) for v in seen]
    else:
        image_processor = hf.AutoImageProcessor.from_pretrained(folder)
        inputs = [image_processor(list(v.frames), return_tensors="pt") for v in seen]
    check(run, "video", seen, logits_of(reference_model(folder), inputs))


# ------------------------------------------------------------------------------------------------- real weights


@pytest.mark.parametrize("name", ["mobilenet_v1_0.25_128", "mobilenet_v2_1.0_224"])
def test_real_weights(name: str, shared_data: Path) -> None:
    """As transformers' image-classification pipeline; v1 and v2 know two cranes."""
    folder, photos = shared_data / "models" / name, sorted((shared_data / "images" / "photos").glob("*.*"))
    assert len(photos) > 5
    pipeline = hf.pipeline("image-classification", str(folder), device="cpu", top_k=1001)
    wanted = [pipeline(Image.open(photo).convert("RGB")) for photo in photos]
    run = ClassifyRun(folder, exact_decode=True)
    options = DecodeOptions(modalities=frozenset(["image"]), exact_decode=True)
    decoded = [decode(Media(file=str(photo)), options)[1] for photo in photos]
    cranes = {"crane (135)", "crane (518)"}
    assert cranes < set(run.plan.labels)
    assert len(set(run.plan.labels)) == 1001
    for found in (run("image", decoded, 1, len(photos)), run("image", decoded, 5, len(photos))):
        for one, reference in zip(found, wanted, strict=True):
            scores = dict(one.top_k)
            assert one.top_k[0][0] == reference[0]["label"]
            for label in {r["label"] for r in reference} - {"crane"}:
                (expected,) = [r["score"] for r in reference if r["label"] == label]
                assert scores[label] == pytest.approx(expected, abs=1e-4)
            both = sorted(r["score"] for r in reference if r["label"] == "crane")
            assert sorted(scores[crane] for crane in cranes) == pytest.approx(both, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ labels


def test_labels_are_those_of_the_checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    names = {str(index): name for index, name in enumerate(["cat", "dog", "cat", "", "cat (0)", "7"])}
    folder = copied(tiny("vit"), tmp_path / "named", id2label=names, label2id=None)
    labels = ("cat (0) (0)", "dog", "cat (2)", "", "cat (0) (4)", "7")
    found = ClassifyRun(folder)("image", pictures(), 4, 10)
    plain = ClassifyRun(tiny("vit"))("image", pictures(), 4, 10)
    assert [one.top_k[0] for one in plain] == [
        (f"LABEL_{labels.index(label)}", score) for label, score in (one.top_k[0] for one in found)
    ]
    assert {label for one in found for label, _ in one.top_k} == set(labels)


@given(st.lists(st.sampled_from(["a", "b", "a (0)", "a (1)", "a (0) (0)", "a (2) (2)", "b (1)"]), max_size=8))
def test_equal_names_become_different(names: list[str]) -> None:
    made = classifier.distinct(names)
    assert len(set(made)) == len(made) == len(names)
    for index, (name, new) in enumerate(zip(names, made, strict=True)):
        # What is added is the name's own index, so no label can be taken for another one.
        assert new.replace(f" ({index})", "") == name.replace(f" ({index})", "")
        assert new.startswith(name)
        assert new == name or names.count(name) > 1 or any(new.startswith(n) for n in names if n != name)


def test_several_labels(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Sigmoid where any number of labels is asked for, and where the checkpoint was trained so."""
    folder = tiny("bert")
    trained = copied(folder, tmp_path / "multi", problem_type="multi_label_classification")
    wanted = text_logits(folder, TEXTS).sigmoid().numpy()
    for run in (
        ClassifyRun(folder, asked(threshold=0.6)),
        ClassifyRun(trained),
        ClassifyRun(trained, asked(threshold=0.6)),
    ):
        found = run("text", TEXTS, 5, len(TEXTS))
        for one, row in zip(found, wanted, strict=True):
            assert [score for _, score in one.top_k] == pytest.approx(sorted(row, reverse=True), abs=1e-5)
            order = [f"LABEL_{index}" for index in np.argsort(-row)]
            assert [label for label, _ in one.top_k] == order
            reached = tuple(order[: int((row >= 0.6).sum())])
            assert one.labels == (None if run.plan.ranking.threshold is None else reached)
    assert any(one.labels for one in found)


def test_top_k_keeps_the_best(tiny: Callable[[str], Path]) -> None:
    whole = ClassifyRun(tiny("bert"))("text", TEXTS, 4, len(TEXTS))
    best = ClassifyRun(tiny("bert"), asked(top_k=2))("text", TEXTS, 4, len(TEXTS))
    assert best == [Classified(one.top_k[:2], one.margin, one.entropy) for one in whole]
    for one in whole:
        scores = np.array([score for _, score in one.top_k])
        assert one.margin == pytest.approx(scores[0] - scores[1], abs=1e-6)
        assert one.entropy == pytest.approx(-(scores * np.log(scores)).sum(), abs=1e-5)


# ------------------------------------------------------------------------------------------- texts of decoders


def test_a_text_that_ends_with_the_padding_token(tiny: Callable[[str], Path]) -> None:
    """Such tokens count as padding in transformers, alone or in a batch."""
    folder, texts = tiny("gpt2"), ["abc<pad><pad>", "abc", "a much longer text <pad>"]
    run = ClassifyRun(folder)
    assert run.samples("text", texts[0])[0].arrays["input_ids"].tolist()[-2:] == [3, 3]
    wanted = text_logits(folder, texts).softmax(-1).numpy()
    assert np.abs(run.scores("text", texts, 3, 3) - wanted).max() < 1e-5


def test_texts_are_padded_as_config_says(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The head finds a text's end by the padding token of config.json, whatever the tokenizer pads with."""
    folder = copied(tiny("llama"), tmp_path / "other", pad_token_id=2)
    wanted = text_logits(folder, TEXTS).softmax(-1).numpy()
    assert np.abs(ClassifyRun(folder).scores("text", TEXTS, 16, len(TEXTS)) - wanted).max() < 1e-5


def test_a_negative_padding_token(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """As the first Llama checkpoints have it."""
    folder = copied(tiny("llama"), tmp_path / "minus", pad_token_id=-1)
    wanted = text_logits(tiny("llama-minus"), TEXTS).softmax(-1).numpy()
    assert np.abs(ClassifyRun(folder).scores("text", TEXTS, 16, len(TEXTS)) - wanted).max() < 1e-5


# ---------------------------------------------------------------------------------------------------- failures


def without(folder: Path, to: Path, beginning: str) -> Path:
    """A copy that lacks weights."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(beginning)}
    assert len(kept) < len(weights)
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("name", "weights"),
    [("bert", "classifier."), ("vit", "classifier."), ("llama", "score."), ("deit-teacher", "distillation_"),
     ("hubert-layer", "projector."), ("videomae", "fc_norm.")],
)  # fmt: skip
def test_a_head_without_weights(name: str, weights: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = without(tiny(name), tmp_path / "headless", weights)
    with pytest.raises(ModelError, match=rf"lacks weights that its scores need \({weights}"):
        plan_of(folder).load()


def test_weights_of_training_may_be_missing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name, weights in (("wav2vec2-layer", "wav2vec2.masked_spec_embed"), ("vjepa2", "vjepa2.predictor.")):
        plan_of(without(tiny(name), tmp_path / name, weights)).load()


def test_weights_that_are_not_finite_are_an_error_row(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(tiny("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run = ClassifyRun(folder)
    (one,) = run("text", ["a cat"], 1, 1)
    assert np.isnan([score for _, score in one.top_k]).all()
    record = Record(0, "a", None, (Media("text", text="a cat"),))
    result = Classify(join=run.plan.open_joiner()).result(record, ["text"], [one])
    assert result.error is not None
    assert result.error.code == "nonfinite"


def test_numbers_are_no_labels(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    one = copied(tiny("bert"), tmp_path / "one", id2label={"0": "quality"}, label2id=None)
    with pytest.raises(ConfigError, match="one number"):
        plan_of(one)
    trained = copied(tiny("bert"), tmp_path / "trained", problem_type="regression")
    with pytest.raises(ConfigError, match="problem_type is 'regression'"):
        plan_of(trained)


def test_all_problems_are_told_together(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(tiny("vit"), tmp_path / "bare", problem_type="regression")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        plan_of(folder, asked("cat", "dog"))
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "has 6 labels of its own ('LABEL_0', 'LABEL_1', 'LABEL_2', ...)" in told
    assert "no preprocessor_config.json" in told
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny("vit"), Classification(templates=("a {}",), question="Which?"))
    assert [problem.split()[0] for problem in caught.value.problems] == ["--template", "--question"]


def test_more_logits_than_labels(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights and config.json disagree: no score gets another label's name."""
    names = {str(index): f"class {index}" for index in range(LABELS - 1)}
    folder = copied(tiny("vit"), tmp_path / "fewer", id2label=names, label2id=None)
    with pytest.raises(ModelError, match="cannot load it"):
        plan_of(folder).load()


def test_what_has_no_head(tmp_path: Path) -> None:
    for kind, builders in (("bert", tiny_encoders.TEXTS), ("vit", tiny_encoders.IMAGES)):
        folder = builders[kind](tmp_path / kind)
        assert classifier.find(open_checkpoint(ModelOptions(str(folder)))) is None


def test_code_that_comes_with_the_checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(
        tiny("bert"), tmp_path / "own", model_type="ours", architectures=["OursForSequenceClassification"],
        auto_map={"AutoModelForSequenceClassification": "modeling.OursForSequenceClassification"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="'ours' is code that comes with the checkpoint") as caught:
        plan_of(folder)
    assert "--trust-remote-code" in (caught.value.hint or "")


def test_models_that_need_more_than_a_text(tmp_path: Path) -> None:
    folder = tiny_classifiers.head("LayoutLM", max_position_embeddings=64)(tmp_path / "layoutlm")
    with pytest.raises(ConfigError, match="boxes of words"):
        plan_of(folder)
