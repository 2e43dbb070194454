"""Training several encoders together: rows without a medium, exact pieces, and what classify makes of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dual
import tiny_encoders
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import still, trainer_of

from mmcli.core.errors import ExitCode, Stopped
from mmcli.core.records import Media
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.fusion import MultimodalTransformer
from mmcli.models.options import ModelOptions
from mmcli.training.classify import Classify
from mmcli.training.data import Batches, MaskedMedia, Row, Rows, UnreadableRow, load
from mmcli.training.fusion import FusionNetwork, Recombined
from mmcli.training.options import TrainOptions

LABELS = ("no", "yes")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "text": still(tiny_encoders.TEXTS["bert"](folder / "text")),
        "image": still(tiny_encoders.IMAGES["vit"](folder / "image")),
    }


def network_of(bases: dict[str, Path], **settings: Any) -> FusionNetwork:
    options = ModelOptions("", device="cpu")
    opened: Any = {m: open_checkpoint(replace(options, model=str(folder))) for m, folder in bases.items()}
    return FusionNetwork.of(opened, options, LABELS, False, {**SIZES, "dropout": 0.0, **settings})


def rows_of(folder: Path, count: int, missing: bool = True) -> list[Row]:
    """Whether picture and text agree; every third row has no picture, every fifth no text."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        red, said = generator.random(2) < 0.5
        pixels = np.array((200, 40, 40) if red else (40, 40, 200)) + generator.integers(-30, 30, (34, 36, 3))
        file = folder / f"{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        image = Media("image") if missing and number % 3 == 2 else Media("image", file=str(file))
        text = "red circle " * int(generator.integers(1, 4)) if said else "the dog"
        words = Media("text") if missing and number % 5 == 4 and number % 3 != 2 else Media("text", text=text)
        rows.append(Row(str(number), (image, words), int(red == said)))
    return rows


def gradients(
    network: FusionNetwork, rows: list[Row], pieces: int, unimodal: float = 0.0
) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    network = replace(network, plan=replace(network.plan, dtype="float64"), unimodal_heads=unimodal > 0)
    objective = Classify(network, unimodal_loss=unimodal)
    model = objective.build(torch.device("cpu")).double().train()

    def collate(items: Any) -> Any:
        return objective.collate(items, pieces)

    batches = Batches(len(rows), len(rows), 0)
    found = next(iter(load(Rows(rows, objective.plan, 0), batches, collate, 0)))
    loss = objective.step(model, found, objective.count(found), lambda loss: loss.backward())
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, loss  # type: ignore[misc]


@pytest.mark.parametrize("unimodal", [0.0, 0.7])
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(
    tmp_path: Path, bases: dict[str, Path], unimodal: float
) -> None:
    """Rows without a medium are in it; in every piece every parameter that learns has a gradient."""
    network, rows = network_of(bases), rows_of(tmp_path / "images", 9)
    whole, loss = gradients(network, rows, 1, unimodal)
    assert all(gradient is not None for gradient in whole.values())
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for pieces in (2, 9):
        found, other = gradients(network, rows, pieces, unimodal)
        assert other == pytest.approx(loss, rel=1e-6)
        worst = max(float((found[name] - whole[name]).abs().max()) for name in whole)
        assert worst <= 1e-6 * largest, f"{worst / largest:.1e}"


def test_heads_of_one_modality(tmp_path: Path, bases: dict[str, Path], recwarn: pytest.WarningsRecorder) -> None:
    """Each learns from the rows that have its modality, before fusion; none of them is in what is saved."""
    objective = Classify(replace(network_of(bases), unimodal_heads=True), unimodal_loss=0.5)
    torch.manual_seed(0)
    model: Any = objective.build(torch.device("cpu")).eval()
    assert {f"unimodal_heads.{m}.{p}" for m in bases for p in ("weight", "bias")} <= objective.new_weights()
    data = Rows(rows_of(tmp_path / "images", 9), objective.plan, 0)
    items: Any = [data[(0, row)] for row in range(9)]
    ((whole,),) = objective.collate(items, 1)
    loss, wanted = float(objective.step(model, [[whole]], 9, lambda loss: None)), 0.0
    right: dict[str, list[bool]] = {"text": [], "image": []}
    for item in items:
        ((part,),) = objective.collate([item], 1)
        inputs = objective.network.collator(torch.device("cpu")).to_device(part.batch)
        present = inputs.pop("present")
        found = model(inputs, present)
        wanted += float(torch.nn.functional.cross_entropy(found.logits, part.targets)) / 9
        for place, (modality, tower) in enumerate(model.towers.items()):
            own = {n.partition(".")[2]: t for n, t in inputs.items() if n.startswith(f"{modality}.")}
            if present[0, place]:
                tokens, _ = tower(own, present[:, place])
                logits = model.unimodal_heads[modality](tokens.mean(dim=1))
                wanted += 0.5 * float(torch.nn.functional.cross_entropy(logits, part.targets)) / 9
                right[modality].append(bool(logits.argmax() == part.targets))
    assert loss == pytest.approx(wanted, rel=1e-5)
    measured = objective.measured([objective.predict(model, [[whole]])])
    assert (len(right["text"]), len(right["image"])) == (8, 6)
    for modality, answers in right.items():
        assert measured[f"accuracy_{modality}"] == pytest.approx(np.mean(answers))
    objective.save(model, tmp_path)
    saved, info = MultimodalTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not [str(one.message) for one in recwarn if "unimodal" in str(one.message)]
    assert set(saved.state_dict()) == {n for n in model.state_dict() if not n.startswith("unimodal_heads.")}


OPTIONS = TrainOptions(epochs=4, batch_size=6, learning_rate=1e-3, modality_dropout=0.4)


def test_it_goes_on_exactly_with_modality_dropout(tmp_path: Path, bases: dict[str, Path]) -> None:
    rows = rows_of(tmp_path / "images", 18)

    def run(name: str, stop: Any = None, workers: int = 0) -> dict[str, torch.Tensor]:
        objective = Classify(replace(network_of(bases, dropout=0.1), unimodal_heads=True), unimodal_loss=0.3)
        trainer = trainer_of(tmp_path / name, objective, rows, rows[:6], OPTIONS, stop, num_workers=workers)
        trainer.data.train = Rows(rows, objective.plan, 0, None, OPTIONS.modality_dropout)
        trainer.train()
        return load_file(tmp_path / name / "last" / "model.safetensors")

    whole, asked = run("whole"), iter(range(100))
    with pytest.raises(Stopped):
        run("stopped", lambda: ExitCode.INTERRUPTED if next(asked) == 4 else None)
    for found in (run("stopped"), run("workers", workers=1)):
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_modality_dropout_leaves_one(tmp_path: Path, bases: dict[str, Path]) -> None:
    rows = rows_of(tmp_path / "images", 6, missing=False)
    data = Rows(rows, network_of(bases).plan, 0, None, 0.5)
    counts: Counter[tuple[bool, ...]] = Counter()
    for epoch in range(60):
        for row in range(6):
            item: Any = data[(epoch, row)]
            counts[tuple(item.samples[0].arrays["present"].tolist())] += 1
            again: Any = data[(epoch, row)]
            assert np.array_equal(again.samples[0].arrays["present"], item.samples[0].arrays["present"])
    assert (False, False) not in counts
    assert counts[(True, True)] / 360 == pytest.approx(0.25, abs=0.08)


def test_classify_gives_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, some rows without a medium: accuracy and loss of the best step."""
    from mmcli.cli.boundary import run as mmcli

    clip, bert = tiny_dual.BUILDERS["clip"](tmp_path / "clip"), tiny_encoders.TEXTS["bert"](tmp_path / "bert")
    rows = rows_of(tmp_path / "images", 30)
    for name, part in (("train", rows[:20]), ("val", rows[20:])):
        lines = [
            {"picture": row.media[0].file, "words": row.media[1].text, "label": LABELS[row.target]} for row in part
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = ["--image-column", "picture", "--text-column", "words", "--num-workers", "0"]
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    sizes = ["--hidden-size", "16", "--fusion-layers", "1", "--fusion-heads", "2"]
    encoders = ["--encoder", f"image={clip}", "--encoder", f"text={bert}", *sizes]
    more = ["--epochs", "2", "--batch-size", "5", "--learning-rate", "1e-3", "--modality-dropout", "0.2"]
    more += ["--unimodal-loss", "0.3"]
    train, val = str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl")
    assert mmcli(["finetune", train, "--val", val, *columns, *encoders, *more, "-o", str(run)]) == 0
    said = capsys.readouterr().err
    assert mmcli(["classify", val, *columns, "-m", str(run / "best"), "--keep", "truth=label", "-o", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    told = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = next(line for line in lines if line["step"] == told["best_step"] and "val_loss" in line)
    assert np.mean([row["label"] == row["truth"] for row in found]) == pytest.approx(best["val_accuracy"])
    assert {"val_accuracy_image", "val_accuracy_text"} <= set(best)
    diagnosis = json.loads((run / "diagnostics.json").read_text())
    assert diagnosis["accuracy"]["value"] == pytest.approx(best["val_accuracy"])
    assert set(diagnosis["modalities"]) == {"image", "text"}
    assert (diagnosis["rows"], diagnosis["drawn_from"]) == (10, 10)
    assert "asking the best model what it makes of each modality: 231 answers, of 10 rows" in said
    scores = [{one["label"]: one["score"] for one in row["top_k"]}[row["truth"]] for row in found]
    assert -np.mean(np.log(scores)) == pytest.approx(best["val_loss"], rel=1e-4)


SHAPE = ["--hidden-size", "16", "--fusion-layers", "1", "--fusion-heads", "2"]
COLUMNS = ["--image-column", "image", "--text-column", "text"]


def manifest(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def cells(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"image": r.media[0].file, "text": r.media[1].text, "label": LABELS[r.target]} for r in rows]


def test_what_cannot_be_read_counts_as_missing(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """--missing-policy mask gives the weights that empty cells give; rows with nothing else are left out."""
    from mmcli.cli.boundary import run as mmcli

    broken = cells(rows_of(tmp_path / "images", 14, missing=False))
    for number in (1, 4, 11):
        Path(broken[number]["image"]).write_bytes(b"\x89PNG\r\n\x1a\n bad")
    broken[6]["image"], broken[4]["text"], broken[9]["text"] = str(tmp_path / "gone.png"), None, None
    empty = [{**row, "image": None if n in (1, 4, 6, 11) else row["image"]} for n, row in enumerate(broken)]
    encoders = ["--encoder", f"image={bases['image']}", "--encoder", f"text={bases['text']}", *SHAPE, *COLUMNS]
    common = [*encoders, "--max-steps", "3", "--batch-size", "4", "--learning-rate", "1e-3", "--num-workers", "0"]
    said = {}
    for name, lines, policy in (("masked", broken, "mask"), ("empty", empty, "drop")):
        train, val = (
            manifest(tmp_path / f"{name}-{n}.jsonl", part) for n, part in enumerate((lines[:9], lines[9:]))
        )
        run = ["-o", str(tmp_path / name), "--missing-policy", policy]
        assert mmcli(["finetune", train, "--val", val, *common, *run]) == 0
        said[name] = capsys.readouterr().err
    assert "INPUT: 2 media cannot be read and count as missing: image of" in said["masked"]
    assert "--val: 1 media cannot be read and count as missing: image of" in said["masked"]
    assert "left out 1 row that cannot be read" in said["masked"]
    assert "INPUT: of 8 rows, 2 have no image" in said["masked"]
    found, wanted = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("masked", "empty"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    no_image = [{**row, "image": str(tmp_path / "gone.png"), "text": "the dog"} for row in broken]
    train = manifest(tmp_path / "none.jsonl", no_image)
    run = ["-o", str(tmp_path / "none"), "--missing-policy", "mask"]
    assert mmcli(["finetune", train, "--val", train, *common, *run]) == 2
    assert "INPUT: no row has image; leave out --encoder image=..." in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_what_can_be_read_no_more_counts_as_missing(tmp_path: Path, bases: dict[str, Path], workers: int) -> None:
    """It is told once, and a row of which nothing is left is left out; without the policy it ends the run."""
    rows, told = rows_of(tmp_path / "images", 6, missing=False), list[str]()
    rows[4] = replace(rows[4], media=(rows[4].media[0], Media("text")))
    objective, order = Classify(network_of(bases)), [[(0, row) for row in range(6)], [(1, 2), (1, 4), (1, 5)]]
    for number in (2, 4):
        Path(str(rows[number].media[0].file)).unlink()
    data = Rows(rows, objective.plan, 0, masked=MaskedMedia(told.append))
    first, second = load(data, order, lambda items: objective.collate(items, 1), workers)  # type: ignore[arg-type]
    assert first[0][0].rows.tolist() == [0, 1, 2, 3, 5]
    assert first[0][0].batch.tensors["present"].tolist() == [[True, n != 2] for n in (0, 1, 2, 3, 5)]
    assert second[0][0].rows.tolist() == [2, 5]
    assert [line.partition(":")[0] for line in told] == [
        "4 cannot be read and is left out", "2 has no image that can be read"
    ]  # fmt: skip
    with pytest.raises(UnreadableRow, match="2: not_found"):
        list(load(Rows(rows, objective.plan, 0), order, lambda items: items, workers))  # type: ignore[arg-type]


def test_rows_that_are_drawn(tmp_path: Path, bases: dict[str, Path]) -> None:
    """The same ones each time, in order; all where they are few."""
    data = Rows(rows_of(tmp_path / "images", 9), network_of(bases).plan, 0)
    assert data.drawn(9) is data
    found = [row.id for row in data.drawn(4).rows]
    assert len(found) == 4
    assert found == sorted(found) == [row.id for row in data.drawn(4).rows]


def test_rows_put_together_anew(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Row r with the picture of one row and the text of another is answered as that row itself would be."""
    objective, rows = Classify(network_of(bases)), rows_of(tmp_path / "images", 7)
    torch.manual_seed(0)
    model: Any = objective.build(torch.device("cpu")).eval()
    data = Rows(rows, objective.plan, 0)
    items: Any = [data[(0, row)] for row in range(7)]
    asked = Recombined(model, objective.network.collator(torch.device("cpu")), [objective.collate(items, 3)])
    assert asked.targets.tolist() == [row.target for row in rows]
    assert list(objective.network.encoders) == ["text", "image"]  # type: ignore[attr-defined]
    has = [[one.file is not None or one.text is not None for one in row.media[::-1]] for row in rows]
    assert asked.present.tolist() == has
    indices = np.array([[0, 0], [1, 0], [6, 3], [3, 1], [0, 4], [1, 0], [1, 0]])
    present = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [1, 0]], bool)
    found = asked(indices, present)
    for (words, picture), (reads, sees), logits in zip(indices, present, found, strict=True):
        image = rows[picture].media[0] if sees else Media("image")
        text = rows[words].media[1] if reads else Media("text")
        item: Any = Rows([Row("", (image, text), 0)], objective.plan, 0)[(0, 0)]
        ((part,),) = objective.collate([item], 1)
        with torch.inference_mode():
            np.testing.assert_allclose(logits, objective.logits(model, part)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--encoder", "image"], "--encoder 'image': give a modality and a model"),
        (["--encoder", "image=x", "--encoder", "smell=y"], "--encoder 'smell=y': give a modality and a model"),
        (["--encoder", "text={text}"], "INPUT: rows have image, for which there is no --encoder"),
        (["-m", "{text}"], "to learn from both, join encoders: --encoder image=MODEL --encoder text=MODEL"),
        (["-m", "{text}", "--encoder", "text={text}"], "-m and --encoder exclude one another"),
        (
            [
                "--encoder",
                "text={text}",
                "--encoder",
                "image={image}",
                "--hidden-size",
                "10",
                "--fusion-heads",
                "4",
            ],
            "--hidden-size 10 is not a multiple of --fusion-heads 4",
        ),
        (["--encoder", "image={text}", "--encoder", "text={text}"], "a bert encodes no image here"),
    ],
)
def test_mistakes(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    from mmcli.cli.boundary import run as mmcli

    manifest = tmp_path / "rows.jsonl"
    lines = [{"image": row.media[0].file, "text": row.media[1].text, "label": str(row.target)} for row in
             rows_of(tmp_path / "images", 6, missing=False)]  # fmt: skip
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = [one.format(**bases) for one in more]
    columns = ["--image-column", "image", "--text-column", "text", "-o", str(tmp_path / "run")]
    assert mmcli(["finetune", str(manifest), "--val", str(manifest), *columns, *filled]) == 2
    assert said in capsys.readouterr().err
