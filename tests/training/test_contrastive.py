"""The objective *contrastive*: the models' own losses, exact in pieces; what is measured is what embed gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dual
import torch
from PIL import Image
from rare import rarely
from safetensors.torch import load_file
from training_runs import sound_rows, still, trainer_of

from mmcli.cli.contrastive import measure_retrieval, measure_scores
from mmcli.core.errors import ModelError, Stopped
from mmcli.core.records import Media
from mmcli.models.options import ModelOptions
from mmcli.models.resolve import resolve
from mmcli.training.contrastive import CheckpointNetwork, Contrastive, group_rows
from mmcli.training.data import Batches, Row, Rows, load
from mmcli.training.options import TrainOptions

COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "circle": (40, 40, 200), "photo": (200, 200, 40)}


def pair_rows(folder: Path, count: int, seed: int = 0, repeated: bool = False) -> list[Row]:
    """Pictures with captions; `repeated`: each picture comes with two captions."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    media = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        file = folder / f"{number // 2 if repeated else number}.png"
        if not file.exists():
            pixels = np.array(COLOURS[name]) + generator.integers(-30, 30, (36, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        media.append(
            (Media("image", file=str(file)), Media("text", text=f"{'a the '[: 2 * (number % 4)]}{name} {number}"))
        )
    return [Row(str(n), one, group) for n, (one, group) in enumerate(zip(media, group_rows(media), strict=True))]


def sound_pairs(folder: Path, count: int) -> list[Row]:
    rows = sound_rows(folder, count)
    return [Row(r.id, (r.media[0], Media("text", text=f"cat {n}")), n) for n, r in enumerate(rows)]


def objective_of(base: Path, slots: Any = ("image", "text")) -> Contrastive:
    plan: Any = resolve(ModelOptions(str(base), device="cpu"))
    return Contrastive(CheckpointNetwork(plan), slots, measure_retrieval)


def gradients(objective: Contrastive, rows: Sequence[Row], pieces: int) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    network: Any = objective.network
    network.plan = replace(network.plan, dtype="float64")
    model = objective.build(torch.device("cpu")).double().train()

    def collate(items: Any) -> Any:
        return objective.collate(items, pieces)

    batches = Batches(len(rows), len(rows), 0)
    found = next(iter(load(Rows(rows, objective.plan, 0), batches, collate, 0)))
    loss = objective.step(model, found, objective.count(found), lambda loss: loss.backward())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


def clip_pairs(count: int) -> list[Row]:
    """The sample's clips, with texts."""
    folder = Path(__file__).resolve().parents[2] / "sample_data" / "videos"
    media = [(Media("video", file=str(f)), Media("text", text=f.stem[3:])) for f in sorted(folder.glob("*.mp4"))]
    return [Row(str(n), one, n) for n, one in enumerate(media[:count])]


@pytest.mark.parametrize(
    "name",
    rarely(
        ["clip", "clip video", "siglip", "siglip2", "chinese_clip", "vision_text", "align", "clap", "xclip",
         "flava", "blip_retrieval"],
        {"clip", "clip video", "siglip", "flava", "clap"}.__contains__,
    ),
)  # fmt: skip
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(tmp_path: Path, name: str) -> None:
    base = still(tiny_dual.BUILDERS[name.split()[0]](tmp_path / "base"))
    if name == "clap":
        rows, slots = sound_pairs(tmp_path / "sounds", 5), ("audio", "text")
    elif name in ("xclip", "clip video"):
        rows, slots = clip_pairs(5), ("video", "text")
    else:
        rows, slots = pair_rows(tmp_path / "images", 7, repeated=True), ("image", "text")
    objective = objective_of(base, slots)
    whole, loss = gradients(objective, rows, 1)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    found, other = gradients(objective, rows, 3)
    assert other == pytest.approx(loss, rel=1e-6)
    assert found.keys() == whole.keys()
    learned = any("logit_scale" in key or key == "temperature" for key in whole)
    assert learned or name == "blip_retrieval", "whose class has none"
    worst = max(float((found[key] - whole[key]).abs().max()) for key in whole)
    assert worst <= 1e-6 * largest, f"{worst / largest:.1e}"


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese_clip", "xclip"])
def test_the_loss_is_the_models_own(tmp_path: Path, name: str) -> None:
    """transformers' `return_loss=True` on the same batch."""
    base = tiny_dual.BUILDERS[name](tmp_path / "base")
    rows = clip_pairs(6) if name == "xclip" else pair_rows(tmp_path / "images", 6)
    objective = objective_of(base, ("video", "text") if name == "xclip" else ("image", "text"))
    model: Any = objective.build(torch.device("cpu")).eval()
    items: Any = [Rows(rows, objective.plan, 0)[(0, row)] for row in range(6)]
    (piece,) = objective.collate(items, 1)
    with torch.inference_mode():
        found = float(objective._loss(model, objective._encode(piece.a), objective._encode(piece.b), piece.groups))
        assert objective._device is not None
        inputs = {}
        for side in (piece.a, piece.b):
            inputs |= objective._device.to_device(side.parts[0][0])
        inputs = {k: v for k, v in inputs.items() if name == "chinese_clip" or k != "token_type_ids"}
        assert found == pytest.approx(float(model(**inputs, return_loss=True).loss), rel=1e-5)


def test_captions_of_one_picture_belong_together() -> None:
    def row(file: str, text: str) -> tuple[Media, ...]:
        return Media("image", file=file), Media("text", text=text)

    groups = group_rows([row("a", "1"), row("b", "2"), row("a", "3"), row("c", "2"), row("d", "4"), row("e", "3")])
    assert groups[0] == groups[2] == groups[5]
    assert groups[1] == groups[3]
    assert len({groups[0], groups[1], groups[4]}) == 3
    # The name of a file and a text that reads alike are two things.
    other = group_rows([(Media("image", file="x"), Media("text", text="y")), row("z", "x")])
    assert other[0] != other[1]


OPTIONS = TrainOptions(epochs=4, batch_size=8, learning_rate=1e-3, accumulation=2)


def test_it_learns_goes_on_exactly_and_the_scale_stays_in_bounds(tmp_path: Path) -> None:
    base = tiny_dual.BUILDERS["clip"](tmp_path / "base")
    rows = pair_rows(tmp_path / "images", 24)
    lines: list[dict[str, Any]] = []
    trainer_of(tmp_path / "whole", objective_of(base), rows[:16], rows[16:], OPTIONS, told=lines.append).train()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    asked = iter(range(100))
    stop = lambda: 130 if next(asked) >= 3 else None  # noqa: E731
    with pytest.raises(Stopped):
        trainer_of(tmp_path / "run", objective_of(base), rows[:16], rows[16:], OPTIONS, stop).train()
    trainer_of(tmp_path / "run", objective_of(base), rows[:16], rows[16:], OPTIONS).train()
    found, wanted = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    before = load_file(base / "model.safetensors")
    assert found["logit_scale"] != before["logit_scale"]
    hot = objective_of(base)
    model: Any = hot.build(torch.device("cpu"))
    model.logit_scale.data.fill_(50.0)
    hot.after_step(model)
    assert float(model.logit_scale) == pytest.approx(np.log(100))


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"freeze": ("vision_model", "text_model")}])
def test_the_temperature_learns_whatever_is_frozen(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny_dual.BUILDERS["clip"](tmp_path / "base")
    rows = pair_rows(tmp_path / "images", 8)
    trainer_of(tmp_path / "run", objective_of(base), rows, rows, replace(OPTIONS, **options)).train()
    found, before = (
        load_file(tmp_path / "run" / "last" / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    assert found.keys() == before.keys()
    assert found["logit_scale"] != before["logit_scale"]
    name = "text_model.embeddings.token_embedding.weight"
    assert torch.equal(found[name], before[name])


def test_what_is_measured_is_what_embed_gives(tmp_path: Path) -> None:
    """`mmcli embed -m run/best` on the validation rows: R@1 and the gap are those of the run."""
    import json

    import pyarrow.parquet as pq

    from mmcli.cli.boundary import run as mmcli

    base = tiny_dual.BUILDERS["clip"](tmp_path / "base")
    for name, seed in (("train", 0), ("val", 1)):
        rows = pair_rows(tmp_path / name, 16, seed)
        lines = [{"image": row.media[0].file, "text": row.media[1].text} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = ["--image-column", "image", "--text-column", "text", "--num-workers", "0"]
    run, out = tmp_path / "run", tmp_path / "val.parquet"
    command = ["finetune", str(tmp_path / "train.jsonl"), "--val", str(tmp_path / "val.jsonl"), *columns]
    more = ["--objective", "contrastive", "-m", str(base), "-o", str(run), "--learning-rate", "1e-3"]
    assert mmcli([*command, *more, "--batch-size", "8"]) == 0
    assert mmcli(["embed", str(tmp_path / "val.jsonl"), *columns, "-m", str(run / "best"), "-o", str(out)]) == 0
    table = pq.read_table(out)
    sides = [np.stack(table.column(f"{name}_embedding").to_numpy()) for name in ("image", "text")]
    found = measure_retrieval(*sides, np.arange(16))
    told = json.loads((run / "run.json").read_text())
    measured = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = next(line for line in measured if line["step"] == told["best_step"] and "val_r_at_1" in line)
    report = json.loads((run / "diagnostics.json").read_text())
    assert report["modalities"] == ["image", "text"]
    assert report["scores"]["modality_gap"]["value"] == pytest.approx(found["modality_gap"], abs=1e-5)
    ways = [report["scores"][f"{way}_r_at_1"]["value"] for way in ("image_to_text", "text_to_image")]
    assert np.mean(ways) == pytest.approx(found["r_at_1"])
    for name, value in found.items():
        assert best[f"val_{name}"] == pytest.approx(value, abs=1e-5), name


def test_clips_whose_texts_heed_them(tmp_path: Path) -> None:
    """X-CLIP learns; it is measured by the vectors of embed, and by texts beside clips as classify has them."""
    base, rows = tiny_dual.BUILDERS["xclip"](tmp_path / "base"), clip_pairs(6)
    lines: list[dict[str, Any]] = []
    objective = objective_of(base, ("text", "video"))
    objective.measure_scores, objective.metric = measure_scores, "conditioned_r_at_1"
    pairs = [replace(row, media=row.media[::-1]) for row in rows]
    options = TrainOptions(epochs=8, batch_size=6, learning_rate=1e-3, accumulation=2)
    trainer_of(tmp_path / "run", objective, pairs, pairs, options, told=lines.append).train()  # type: ignore[arg-type]
    measured = [line for line in lines if "val_loss" in line]
    assert measured[-1]["val_loss"] < measured[0]["val_loss"]
    best = max(measured, key=lambda line: line["val_conditioned_r_at_1"])
    plan: Any = resolve(ModelOptions(str(tmp_path / "run" / "best"), device="cpu"))
    runner = plan.load()
    items: Any = [Rows(pairs, plan, 0)[(0, row)].samples for row in range(6)]  # type: ignore[union-attr]
    with torch.inference_mode():
        sides = [torch.cat([runner.vectors(runner.collate([item[side]])) for item in items]) for side in range(2)]
    found = measure_retrieval(sides[0].numpy(), sides[1].numpy(), np.arange(6))
    scores = []
    with torch.inference_mode():
        for item in items:
            clip, texts = runner.conditioned(runner.to_device(runner.collate([item[1]])), sides[0])
            scores.append(torch.nn.functional.cosine_similarity(clip, texts[0], dim=-1))
    found |= measure_scores(torch.stack(scores).numpy(), np.arange(6))
    for name, value in found.items():
        assert best[f"val_{name}"] == pytest.approx(value, abs=1e-5), name
    assert best["val_conditioned_r_at_1"] > 0.5


def test_what_has_no_text_of_its_own_is_refused(tmp_path: Path) -> None:
    """A captioner lacks what would project its vectors: nothing random is trained as if it were pretrained."""
    objective = objective_of(tiny_dual.BUILDERS["blip_captioner"](tmp_path / "base"))
    with pytest.raises(ModelError, match="it lacks weights that its vectors need"):
        objective.build(torch.device("cpu"))
