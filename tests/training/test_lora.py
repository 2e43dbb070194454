"""Adapters that finetune keeps: what the commands make of them is what was trained, merged or not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny_classifiers
import tiny_dual
import tiny_encoders
import torch
import transformers
from rare import rarely
from test_contrastive import objective_of as contrastive_of
from test_contrastive import pair_rows
from test_fusion_training import network_of
from test_fusion_training import rows_of as fusion_rows
from test_joined import network_of as joined_of
from test_write import FAMILIES, SAMPLES, manifest, picture_rows
from test_write import objective_of as writing_of
from training_runs import LABELS, image_files, image_rows, objective_of, sound_rows, still, text_rows, trainer_of

from mmcli.cli.boundary import run as mmcli
from mmcli.cli.contrastive import measure_retrieval
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.options import ModelOptions
from mmcli.training.classify import Classify
from mmcli.training.contrastive import Contrastive
from mmcli.training.options import TrainOptions

OPTIONS = TrainOptions(epochs=2, batch_size=4, learning_rate=1e-2, lora_rank=2, lora_save="adapter", warmup=0.0)
# LeViT's batch norms learn from rows, too, though they are not adapted.
CLASSIFIED = {"vit": "image", "bert": "text", "wav2vec2-layer": "audio", "convnext": "image", "levit": "image"}
# A VisionTextDualEncoder, and one of our own.
JOINED = {"joined": "clip", "joined-siglip": "siglip"}
WRITTEN = ("git", "blip", "llava", "whisper", "vilt")
OFTEN = {"vit", "bert", "joined", "llava", "fusion"}


def text_and_image(folder: Path) -> dict[str, Path]:
    return {
        "text": still(tiny_encoders.TEXTS["bert"](folder / "text")),
        "image": still(tiny_encoders.IMAGES["vit"](folder / "image")),
    }


def objective_and_rows(name: str, folder: Path) -> tuple[Any, list[Any]]:
    """On bases in `folder`, whose weights are always the same."""
    torch.manual_seed(0)
    if name == "clip":
        return contrastive_of(tiny_dual.BUILDERS["clip"](folder / "base")), pair_rows(folder / "pairs", 8)
    if name in JOINED:
        network = joined_of(text_and_image(folder), JOINED[name])
        return Contrastive(network, ("image", "text"), measure_retrieval), pair_rows(folder / "pairs", 8)
    if name == "fusion":
        return Classify(network_of(text_and_image(folder))), fusion_rows(folder / "pairs", 8)
    if name in WRITTEN:
        from test_write import rows_of
        from tiny_vqa import vilt

        base = still((vilt if name == "vilt" else FAMILIES[name][0])(folder / "base"))
        if name == "vilt":
            return writing_of(name, base, new=True), picture_rows(folder / "pictures", 4, [("cat",)])
        return writing_of(name, base), rows_of(name, folder / "media", 4)
    base = tiny_classifiers.BUILDERS[name](folder / "base")
    kind = CLASSIFIED[name]
    if kind == "text":
        return objective_of(base), text_rows(8)
    rows = image_rows(image_files(folder / "p", 8)) if kind == "image" else sound_rows(folder / "sounds", 8)
    return objective_of(base), rows


def loaded(folder: Path, model_class: Any) -> Any:
    options = ModelOptions(str(folder), device="cpu")
    model, info = open_checkpoint(options).load(model_class, dtype=torch.float32)
    assert not info["missing_keys"]
    return model


@pytest.mark.parametrize("name", rarely([*CLASSIFIED, "clip", *JOINED, *WRITTEN, "fusion"], OFTEN.__contains__))
def test_kept_is_what_merged_is(tmp_path: Path, name: str) -> None:
    """Weight by weight, buffers too; the directory has none of the base's; peft loads the same."""
    objective, rows = objective_and_rows(name, tmp_path)
    trainer = trainer_of(tmp_path / "run", objective, rows, rows, OPTIONS)
    trainer.train()
    assert trainer._lora is not None
    merged = trainer._lora.merged().cpu()
    kept = tmp_path / "run" / "last"
    assert not (kept / "model.safetensors").exists()
    assert not (kept / "config.json").exists()
    found, wanted = loaded(kept, type(merged)).state_dict(), merged.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    # As whoever has only peft and the base would do it.
    torch.manual_seed(1)
    base = objective.build(torch.device("cpu"))
    plain = peft.PeftModel.from_pretrained(base, str(kept)).merge_and_unload().state_dict()
    for key, tensor in wanted.items():
        torch.testing.assert_close(plain[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", rarely(WRITTEN, {"blip", "llava"}.__contains__))
def test_merged_writes_as_what_learned(tmp_path: Path, name: str) -> None:
    """Tied weights, too: of BLIP's the last layer's are those of its words."""
    objective, rows = objective_and_rows(name, tmp_path)
    trainer = trainer_of(tmp_path / "run", objective, rows, rows, replace(OPTIONS, learning_rate=0.05))
    trainer.train()
    assert trainer._lora is not None
    model, merged = trainer._parts.model.eval().cpu(), trainer._lora.merged().eval().cpu()
    # Wherever it learned, it is compared on the CPU: batches go where the objective last built a model.
    objective.build(torch.device("cpu"))
    for part in (part for pieces in trainer.validation_batches() for piece in pieces for part in piece):
        with torch.inference_mode():
            found, wanted = (float(objective._sums(one, part).loss) for one in (merged, model))
        assert found == pytest.approx(wanted, rel=1e-5)


def test_half_way_to_the_base(tmp_path: Path) -> None:
    """Weights of a run with --wise-ft are on the straight line from the base's to those of a run without."""
    found = {}
    for share in (None, 0.25):
        objective, rows = objective_and_rows("clip", tmp_path)
        trainer = trainer_of(tmp_path / str(share), objective, rows, rows, replace(OPTIONS, wise_ft=share))
        trainer.train()
        kept = loaded(tmp_path / str(share) / "last", transformers.CLIPModel)
        found[share] = {name: tensor.detach().clone() for name, tensor in kept.state_dict().items()}
    base = loaded(tmp_path / "base", transformers.CLIPModel).state_dict()
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert (found[None][name] - base[name]).abs().max() > 1e-2
    for name, tensor in base.items():
        wanted = torch.lerp(tensor, found[None][name], 0.25) if tensor.is_floating_point() else tensor
        torch.testing.assert_close(found[0.25][name], wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_what_a_kept_adapter_is(tmp_path: Path) -> None:
    """Its head is peft's `modules_to_save`; its file has nothing of the base, but who it is."""
    objective, rows = objective_and_rows("vit", tmp_path)
    trainer_of(tmp_path / "run", objective, rows, rows, OPTIONS).train()
    kept = tmp_path / "run" / "best"
    config = json.loads((kept / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    from safetensors.torch import load_file

    names = {name.removeprefix("base_model.model.") for name in load_file(kept / "adapter_model.safetensors")}
    assert {name for name in names if ".lora_" not in name} == {"classifier.weight", "classifier.bias"}
    assert "weights" in json.loads((kept / "mmcli_adapter.json").read_text())["bases"][""]


@pytest.fixture
def clip_run(tmp_path: Path) -> tuple[Path, Any, list[Any]]:
    objective, rows = objective_and_rows("clip", tmp_path)
    trainer = trainer_of(tmp_path / "run", objective, rows, rows, replace(OPTIONS, epochs=4))
    trainer.train()
    return tmp_path / "run" / "last", trainer._parts.model.eval().cpu(), rows


def test_the_temperature_is_kept_too(tmp_path: Path, clip_run: tuple[Path, Any, list[Any]]) -> None:
    """Zero-shot scores of `mmcli classify` are those of the model in training, which no merging has touched."""
    kept, model, rows = clip_run
    before = loaded(tmp_path / "base", type(model)).logit_scale
    assert model.logit_scale.item() != pytest.approx(before.item(), abs=1e-3)
    labels, out = ["cat", "dog", "red"], tmp_path / "out.jsonl"
    files = [row.media[0].file for row in rows]
    command = ["classify", *files, "-m", kept, "--labels", ",".join(labels), "--template", "{}", "-o", out]
    assert mmcli([str(word) for word in [*command, "--num-workers", 0]]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = np.array([[{k["label"]: k["score"] for k in line["top_k"]}[name] for name in labels] for line in lines])
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "base")
    from PIL import Image

    inputs = processor(
        text=labels, images=[Image.open(line["path"]) for line in lines], return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        wanted = model(**inputs).logits_per_image.softmax(dim=-1).numpy()
    assert np.abs(found - wanted).max() < 1e-5


# ---------------------------------------------------------------------------------------- the command line

COLUMNS = ["--image-column", "image", "--text-column", "text"]


def words(*command: object) -> list[str]:
    return [str(word) for word in command]


def finetune(folder: Path, rows: Path, *more: object) -> dict[str, Any]:
    """The best line of the log."""
    run = folder / "run"
    command = words("finetune", rows, "--val", rows, "-o", run, "--num-workers", 0, "--lora-rank", 2, "--lora-save",
                    "adapter", "--learning-rate", "1e-2", *more)  # fmt: skip
    assert mmcli(command) == 0
    told = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == told["best_step"] and "val_loss" in line)


def results(folder: Path, command: str, *more: object) -> list[dict[str, Any]]:
    out = folder / f"{command}.jsonl"
    assert mmcli(words(command, *more, "-o", out, "--num-workers", 0, "--overwrite")) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def lines_of(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_classes_as_they_were_measured(tmp_path: Path) -> None:
    """Moved together with the base, too."""
    here = tmp_path / "here"
    base = tiny_classifiers.BUILDERS["vit"](here / "base")
    data = image_files(tmp_path / "p", 9)
    best = finetune(here, data, "-m", base, "--batch-size", 3)
    shutil.move(here, tmp_path / "there")
    found = results(tmp_path, "classify", data, "-m", tmp_path / "there" / "run" / "best")
    assert {one["label"] for one in found[0]["top_k"]} == set(LABELS)
    scores = [{k["label"]: k["score"] for k in row["top_k"]}[row["id"].split("/")[0]] for row in found]
    assert -np.mean(np.log(scores)) == pytest.approx(best["val_loss"], rel=1e-4)


def test_vectors_as_they_were_measured(tmp_path: Path) -> None:
    base = tiny_dual.BUILDERS["clip"](tmp_path / "base")
    rows = [{"image": r.media[0].file, "text": r.media[1].text} for r in pair_rows(tmp_path / "images", 12)]
    file = lines_of(tmp_path / "rows.jsonl", rows)
    best = finetune(tmp_path, file, *COLUMNS, "--objective", "contrastive", "-m", base, "--batch-size", 6)
    found = results(tmp_path, "embed", file, *COLUMNS, "-m", tmp_path / "run" / "best")
    sides = [np.array([row[f"{name}_embedding"] for row in found]) for name in ("image", "text")]
    wanted = measure_retrieval(*sides, np.arange(12))
    assert {name: best[f"val_{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert json.loads((tmp_path / "run" / "diagnostics.json").read_text())["modalities"] == ["image", "text"]


@pytest.mark.parametrize(
    ("model", "objective", "columns", "command"),
    [
        *rarely([("captioner", "caption", ("images.jsonl", "caption"), ["caption"])]),
        ("chat", "vqa", ("questions.jsonl", "answer"), ["ask", "--question-column", "question"]),
    ],
)
def test_texts_as_they_were_measured(
    tmp_path: Path, model: str, objective: str, columns: tuple[str, str], command: list[str]
) -> None:
    """Of models that write something of sense from the beginning, and something else after some steps."""
    source, column = columns
    file = manifest(tmp_path / "rows.jsonl", source, slice(0, 12))
    base, pictures = SAMPLES / "models" / model, ["--image-column", "image"]
    best = finetune(tmp_path, file, *pictures, "--objective", objective, "-m", base, "--target-column", column,
                    "--max-steps", 2, "--no-preflight", "--metric", "neg_loss")  # fmt: skip
    found, before = (
        [row[column] for row in results(tmp_path, *command, file, *pictures, "-m", folder, "--max-new-tokens", 20)]
        for folder in (tmp_path / "run" / "best", base)
    )
    wanted = [json.loads(line)[column] for line in file.read_text().splitlines()]
    right = np.mean([text == true for text, true in zip(found, wanted, strict=True)])
    assert found != before
    assert 0 < right == pytest.approx(best["val_exact_match"])


def test_a_fusion_as_it_was_measured(tmp_path: Path) -> None:
    """Its bases are two; what joins them is in the adapter."""
    bases = text_and_image(tmp_path)
    made = fusion_rows(tmp_path / "images", 12)
    rows = [{"image": r.media[0].file, "text": r.media[1].text, "label": ["no", "yes"][r.target]} for r in made]
    file = lines_of(tmp_path / "rows.jsonl", rows)
    encoders = [word for name, base in bases.items() for word in ("--encoder", f"{name}={base}")]
    shape = ["--hidden-size", 16, "--fusion-layers", 1, "--fusion-heads", 2]
    best = finetune(tmp_path, file, *COLUMNS, *encoders, *shape, "--batch-size", 4)
    kept = tmp_path / "run" / "best"
    told = json.loads((kept / "mmcli_adapter.json").read_text())
    assert told["bases"].keys() == {"text", "image"}
    found = results(tmp_path, "classify", file, *COLUMNS, "-m", kept)
    scores = [
        {k["label"]: k["score"] for k in row["top_k"]}[line["label"]] for row, line in zip(found, rows, strict=True)
    ]
    assert -np.mean(np.log(scores)) == pytest.approx(best["val_loss"], rel=1e-4)
    diagnosis = json.loads((tmp_path / "run" / "diagnostics.json").read_text())
    assert diagnosis["accuracy"]["value"] == pytest.approx(best["val_accuracy"])


def test_an_adapter_is_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that learns nothing from it gives what it gives; differences from it are saved merged."""
    base = tiny_classifiers.BUILDERS["vit"](tmp_path / "base")
    data = image_files(tmp_path / "p", 9)
    finetune(tmp_path, data, "-m", base, "--batch-size", 3)
    kept, again = tmp_path / "run" / "best", tmp_path / "again"
    common = words("finetune", data, "--val", data, "-m", kept, "--num-workers", 0, "--lora-rank", 2)
    assert mmcli([*common, *words("-o", tmp_path / "no", "--lora-save", "adapter")]) == 2
    assert f"--lora-save adapter: -m {kept} is an adapter itself" in capsys.readouterr().err
    assert mmcli([*common, *words("-o", again, "--learning-rate", 0, "--epochs", 1)]) == 0
    assert (again / "best" / "model.safetensors").is_file()
    found, wanted = (results(tmp_path, "classify", data, "-m", folder) for folder in (again / "best", kept))
    for one, other in zip(found, wanted, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "peft", None)


Mistake = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("kind", "more", "prepare", "said"),
    [
        ("vit", [], without_peft, "--lora-rank needs the library peft: pip install 'mmcli[finetune]'"),
        ("resnet", [], None, "has no linear layers to adapt"),
        ("vit", ["--from-config"], None, "--lora-save adapter: with --from-config there is no base"),
        ("vit", ["--lora-save", "both"], None, "--lora-save 'both' is not one of merged, adapter"),
        ("vit", ["--base-model", "."], None, "is a model of its own, not an adapter"),
    ],
)  # fmt: skip
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    more: list[str],
    prepare: Mistake | None,
    said: str,
) -> None:
    """All of them with the other problems, before a row is read."""
    base = tiny_classifiers.BUILDERS[kind](tmp_path / "base")
    data = image_files(tmp_path / "p", 6)
    if prepare is not None:
        prepare(monkeypatch)
    command = words("finetune", data, "--val", data, "-m", base, "-o", tmp_path / "run", "--lora-rank", 2,
                    "--lora-save", "adapter", *more)  # fmt: skip
    assert mmcli(command) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_form_without_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = image_files(tmp_path / "p", 3)
    command = words(
        "finetune", data, "--val", data, "-m", tmp_path, "-o", tmp_path / "run", "--lora-save", "adapter"
    )
    assert mmcli(command) == 2
    assert "--lora-save adapter goes with --lora-rank N" in capsys.readouterr().err
