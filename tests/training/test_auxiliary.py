"""Heads on auxiliary labels: they teach the encoder, whatever the pieces, and are not in what is saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_captioners
import tiny_chats
import tiny_dual
import tiny_speech
import tiny_vqa
import torch
from PIL import Image
from safetensors import safe_open
from test_contrastive import pair_rows
from training_runs import sound_rows, still, trainer_of

from mmcli.cli.boundary import run as mmcli
from mmcli.cli.contrastive import measure_retrieval
from mmcli.cli.writing import measure_texts
from mmcli.core.errors import ExitCode, Stopped
from mmcli.core.records import Media
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.resolve import resolve, resolve_writer
from mmcli.models.runner import Collator
from mmcli.training.auxiliary import UNKNOWN, AuxiliaryHeads, AuxiliaryLabels
from mmcli.training.contrastive import CheckpointNetwork, Contrastive
from mmcli.training.data import Row, Rows, load
from mmcli.training.options import TrainOptions
from mmcli.training.towers import towers
from mmcli.training.write import Write
from mmcli.training.write_tokens import form_of

# name -> (builder, task, modality)
MODELS: dict[str, tuple[Any, str, str]] = {
    "blip": (tiny_captioners.blip, "caption", "image"),
    "blip_vqa": (tiny_vqa.blip_vqa, "ask", "image"),
    "llava": (tiny_chats.llava, "ask", "image"),
    "whisper": (tiny_speech.multilingual, "caption", "audio"),
}
CLASSES = {"colour": ("blue", "red"), "kind": ("cat", "dog", "hen")}


def labels(modality: str) -> AuxiliaryLabels:
    return AuxiliaryLabels(modality, CLASSES, 0.5)


def rows_of(name: str, folder: Path, count: int) -> list[Row]:
    """Questions of two lengths, so that batches have several parts; some labels are missing."""
    if name == "whisper":
        rows = [replace(row, target=("the sea",)) for row in sound_rows(folder, count)]
    else:
        rows = []
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            file = folder / f"{number}.png"
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(file)
            asked = ("is it a cat", "what is on the left of the photo?")[number % 2]
            rows.append(Row(str(number), (Media("image", file=str(file)),), ("a cat",), (asked,)))
    for number, row in enumerate(rows):
        row.auxiliary = (number % 2, UNKNOWN if number % 4 == 3 else number % 3)
    return rows


def objective_of(name: str, folder: Path, dtype: str = "float32") -> Write:
    builder, task, _ = MODELS[name]
    if not folder.exists():
        torch.manual_seed(0)
        still(builder(folder))
    generation = Generation(
        max_new_tokens=10,
        questions=("{question}",) if task == "ask" else (),
        variables=() if name == "whisper" else ("question",),
        task=task,  # type: ignore[arg-type]
        language="de" if name == "whisper" else None,
    )
    form = form_of(resolve_writer(ModelOptions(str(folder), device="cpu"), generation))  # type: ignore[arg-type]
    return Write(replace(form.plan, dtype=dtype), form, measure_texts)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_have_the_gradients_of_the_whole(tmp_path: Path, name: str) -> None:
    """And they are those of cross-entropy of each row by itself, which knows nothing of batches."""
    rows = rows_of(name, tmp_path / "rows", 6)

    def learned(pieces: int) -> tuple[Any, AuxiliaryHeads, Write]:
        objective = objective_of(name, tmp_path / "base", "float64")
        model = objective.build(torch.device("cpu")).train()
        torch.manual_seed(1)
        heads = AuxiliaryHeads(model, labels(MODELS[name][2]))
        model.get_submodule("auxiliary_heads").double()
        data = Rows(rows, objective.plan, 0)
        (found,) = load(data, [[(0, n) for n in range(6)]], lambda items: objective.collate(items, pieces), 0)  # type: ignore[arg-type]
        heads.begin([objective.auxiliary(piece) for piece in found])
        objective.step(model, found, objective.count(found), lambda loss: (loss + heads.loss()).backward())
        return model, heads, objective

    whole, heads, objective = learned(1)
    parts, _, _ = learned(3)
    wanted = {key: p.grad for key, p in whole.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, p in parts.named_parameters():
        if p.grad is not None:
            assert float((p.grad - wanted[key]).abs().max()) <= 1e-6 * largest, key
    by_hand = [losses(whole, row, objective) for row in rows]
    # Each column's mean is over the rows that have a label.
    means = [sum(one[n] for one in by_hand) / sum(row.auxiliary[n] != UNKNOWN for row in rows) for n in range(2)]
    assert heads.total == pytest.approx(0.5 * sum(means))


def losses(model: Any, row: Row, objective: Write) -> tuple[float, float]:
    """Of both heads, of a row, by hand."""
    seen: list[torch.Tensor] = []
    ((_, tower),) = towers(model, row.media[0].modality or "image")
    hook = tower.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    (found,) = load(Rows([row], objective.plan, 0), [[(0, 0)]], lambda items: objective.collate(items, 1), 0)  # type: ignore[arg-type]
    with torch.no_grad():
        objective.step(model, found, 1, lambda loss: None)
    hook.remove()
    logits = [head(seen[0].mean(dim=1)) for head in model.get_submodule("auxiliary_heads")]
    found = [
        0.0 if label == UNKNOWN else float(-one.log_softmax(dim=-1)[0, label])
        for one, label in zip(logits, row.auxiliary, strict=True)
    ]
    return found[0], found[1]


def test_a_stopped_run_ends_with_the_same_weights_and_without_heads(tmp_path: Path) -> None:
    rows = rows_of("blip", tmp_path / "rows", 8)
    options = TrainOptions(max_steps=6, batch_size=2, epochs=2, learning_rate=1e-2)

    def run(folder: Path, stops: Sequence[int]) -> None:
        for stop in (*stops, 99):
            steps: list[int] = []

            def asked(at: int = stop, seen: list[int] = steps) -> ExitCode | None:
                seen.append(1)
                return ExitCode.INTERRUPTED if len(seen) == at else None

            trainer = trainer_of(folder, objective_of("blip", tmp_path / "base"), rows, rows[:2], options, asked)  # type: ignore[arg-type]
            trainer.auxiliary = labels("image")
            try:
                trainer.train()
            except Stopped:
                continue

    run(tmp_path / "once", ())
    run(tmp_path / "twice", (2, 2))
    saved = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert saved[0] == saved[1]
    with safe_open(tmp_path / "once" / "last" / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "auxiliary" in name]  # noqa: SIM118


def test_pairs_have_the_gradients_of_both_losses(tmp_path: Path) -> None:
    """Contrastive: that of the pairs, and that of each picture's labels by hand."""
    rows = pair_rows(tmp_path / "rows", 6)
    for number, row in enumerate(rows):
        row.auxiliary = (number % 2, UNKNOWN if number == 3 else number % 3)
    base = still(tiny_dual.clip(tmp_path / "clip"))
    plan: Any = resolve(ModelOptions(str(base), device="cpu"))

    def learned(beside: bool) -> tuple[Any, Any]:
        objective = Contrastive(CheckpointNetwork(plan), ("image", "text"), measure_retrieval)
        model = objective.build(torch.device("cpu")).train()
        torch.manual_seed(1)
        heads = AuxiliaryHeads(model, labels("image"))
        data = Rows(rows, objective.plan, 0)
        ((piece,),) = load(data, [[(0, n) for n in range(6)]], lambda items: objective.collate(items, 1), 0)  # type: ignore[arg-type]
        heads.begin([objective.auxiliary(piece)])

        def backward(loss: torch.Tensor) -> None:
            told = heads.loss()
            assert told is not None
            (loss + told if beside else loss).backward()

        objective.step(model, [piece], 6, backward)
        heads.end()
        return model, piece

    both, piece = learned(True)
    by_hand, _ = learned(False)
    of_pairs = {key: p.grad.clone() for key, p in by_hand.named_parameters() if p.grad is not None}
    ((_, tower),) = towers(by_hand, "image")
    ((batch, numbers),) = piece.a.parts
    pixels = Collator(plan, torch.device("cpu")).to_device(batch)["pixel_values"]
    states = tower(pixel_values=pixels).last_hidden_state.mean(dim=1)
    for column, head in enumerate(by_hand.get_submodule("auxiliary_heads")):
        wanted = torch.tensor([rows[n].auxiliary[column] for n in numbers])
        loss = torch.nn.functional.cross_entropy(head(states), wanted, ignore_index=UNKNOWN)
        (0.5 * loss).backward(retain_graph=True)
    for (key, p), (_, q) in zip(both.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        if key.startswith("text_model"):
            torch.testing.assert_close(p.grad, of_pairs[key], rtol=1e-4, atol=1e-6)
    first = "vision_model.embeddings.patch_embedding.weight"
    assert not torch.allclose(both.get_parameter(first).grad, of_pairs[first], rtol=1e-2)


@pytest.mark.slow
def test_a_picture_teaches_its_encoder_what_no_text_says(tmp_path: Path, sample_data: Path) -> None:
    """All captions are alike: only the heads have anything to learn from, and their loss falls."""
    lines = [json.loads(line) for line in (sample_data / "images.jsonl").read_text().splitlines()]
    made = [
        {"image": str(sample_data / one["image"]), "caption": "a thing", "colour": one["label"].split()[0]}
        for one in lines
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    base = sample_data / "models" / "captioner"
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    command = ("finetune", rows, "--val", rows, "-m", base, "-o", run, "--objective", "caption", "--quiet",
               "--auxiliary-column", "colour", "--auxiliary-loss", 1, "--max-steps", 12, "--batch-size", 24,
               "--learning-rate", "1e-3", "--epochs", 9, "--num-workers", 0)  # fmt: skip
    assert mmcli([str(one) for one in command]) == 0
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line["auxiliary_loss"] for line in log if "auxiliary_loss" in line]
    assert told[-1] < 0.7 * told[0]
    out = tmp_path / "out.jsonl"
    assert (
        mmcli(["caption", str(sample_data / "images"), "-m", str(tmp_path / "run" / "best"), "-o", str(out)]) == 0
    )


def test_mistakes(tmp_path: Path, sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, base = sample_data / "images.jsonl", sample_data / "models" / "captioner"

    def said(*more: object, model: Path = base, code: int = 2) -> str:
        capsys.readouterr()
        told = ("--val", rows, "-m", model, "-o", tmp_path / "run", "--num-workers", 0, "--max-steps", 1, *more)
        assert mmcli([str(one) for one in ("finetune", rows, *told)]) == code
        return capsys.readouterr().err

    caption = ("--objective", "caption")
    assert "is for --objective contrastive, caption and vqa, not classify" in said("--auxiliary-column", "label")
    pairs = ("--objective", "contrastive", "--text-column", "caption", "--image-column", "image")
    assert "--gradient-accumulation-steps 1, no more" in said(
        *pairs, "--auxiliary-column", "label", "--gradient-accumulation-steps", 2
    )
    assert "--auxiliary-column caption is --target-column, too" in said(*caption, "--auxiliary-column", "caption")
    assert "--auxiliary-column nothing" in said(*caption, "--auxiliary-column", "nothing")
    assert "differences alone" in said(*caption, "--auxiliary-column", "label", "--lora-rank", 2)
    assert "learn, and read one in each" in said(
        *caption, "--auxiliary-column", "label", "--freeze", "image", code=7
    )
    one = tmp_path / "one.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()][:2]
    one.write_text(
        "".join(json.dumps({**x, "image": str(sample_data / x["image"]), "a": "b"}) + "\n" for x in lines)
    )
    rows = one
    assert "--auxiliary-column a: its rows have 1 labels; two are needed" in said(
        *caption, "--auxiliary-column", "a"
    )
