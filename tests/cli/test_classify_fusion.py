"""`mmcli classify` with a fusion model: rows of several media, some of which they lack."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from cli_runs import Cli, Ended
from PIL import Image
from tiny_fusion import LABELS, fusion

from mmcli.models.fusion import register
from mmcli.models.fusion_family import save_fusion

COLUMNS = ("--image-column", "image", "--audio-column", "sound", "--text-column", "words")
RATE = 16_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusion")
    made = fusion(folder, text="bert", image="vit", audio="wav2vec2-layer")
    save_fusion(made.model, made.sources, folder / "model")
    return folder / "model"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Rows of a picture, a sound and words; 1 and 4 have no sound, 2 no words, 3 only words, 5 nothing at all."""
    generator = np.random.default_rng(0)
    lines = []
    for row in range(12):
        # As PNG and 16-bit samples, which any decoder reads alike.
        side = 40 + row
        Image.fromarray(generator.integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)).save(
            tmp_path / f"{row}.png"
        )
        with wave.open(str(tmp_path / f"{row}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(generator.integers(-20_000, 20_000, 900 + 333 * row, dtype=np.int16).tobytes())
        lines.append({"id": f"r{row}", "image": f"{row}.png", "sound": f"{row}.wav", "words": f"words {'x' * row}"})
    for row, column in ((1, "sound"), (2, "words"), (3, "image"), (3, "sound"), (5, "image"), (5, "words")):
        lines[row][column] = None  # type: ignore[assignment]
    del lines[4]["sound"]
    lines[5]["sound"] = ""
    lines[7]["image"] = "gone.png"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(done: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


def direct(model: Path, manifest: Path, row: int) -> dict[str, float]:
    """Scores of one row, by transformers alone."""
    register()
    loaded = hf.AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    line = json.loads(manifest.read_text().splitlines()[row])
    inputs = {}
    if line["words"]:
        found = hf.AutoTokenizer.from_pretrained(model / "text")(line["words"], return_tensors="pt")
        inputs |= {f"text.{name}": tensor for name, tensor in found.items()}
    if line["image"]:
        picture = Image.open(manifest.parent / line["image"])
        found = hf.AutoImageProcessor.from_pretrained(model / "image")(picture, return_tensors="pt")
        inputs |= {f"image.{name}": tensor for name, tensor in found.items()}
    if line.get("sound"):
        with wave.open(str(manifest.parent / line["sound"])) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(2**15)
        extractor = hf.AutoFeatureExtractor.from_pretrained(model / "audio")
        found = extractor(sound, sampling_rate=RATE, return_tensors="pt")
        inputs |= {f"audio.{name}": tensor for name, tensor in found.items()}
    with torch.no_grad():
        scores = loaded(inputs).logits.softmax(dim=1)[0]
    return dict(zip(LABELS, scores.tolist(), strict=True))


def test_rows_are_what_the_model_gives_for_the_media_that_they_have(cli: Cli, model: Path, manifest: Path) -> None:
    done = cli("classify", manifest, *COLUMNS, "--id-column", "id", "-m", model, "--batch-size", 4)
    assert done.code == 3, done.err
    found = rows(done)
    assert [row["id"] for row in found] == [f"r{i}" for i in range(12)]
    errors = {row["id"]: (row["error_code"], row["error_message"]) for row in found if row["status"] == "error"}
    assert set(errors) == {"r5", "r7"}
    assert errors["r5"] == ("bad_row", "columns 'image', 'sound', 'words' are all empty")
    assert errors["r7"][0] == "not_found"
    assert [found[i]["modality"] for i in range(4)] == ["image+audio+text", "image+text", "image+audio", "text"]
    seen = []
    for i, row in enumerate(found):
        if row["status"] == "ok":
            scores = {one["label"]: one["score"] for one in row["top_k"]}
            assert scores == pytest.approx(direct(model, manifest, i), abs=1e-5)
            assert row["label"] == max(scores, key=scores.__getitem__)
            seen.append(scores["yes"])
    assert np.diff(sorted(seen)).min() > 1e-5  # rows differ, or equality would say nothing


def test_a_row_is_the_same_in_any_batch(cli: Cli, model: Path, manifest: Path) -> None:
    runs = [rows(cli("classify", manifest, *COLUMNS, "-m", model, "--batch-size", n)) for n in (1, 3, 32)]
    for row, *others in zip(*runs, strict=True):
        for other in others:
            assert other["score"] == pytest.approx(row["score"], abs=1e-5)


def test_decode_workers_give_the_same(
    cli: Cli, model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = rows(cli("classify", manifest, *COLUMNS, "-m", model))
    monkeypatch.setenv("MMCLI_NUM_WORKERS", "1")
    assert rows(cli("classify", manifest, *COLUMNS, "-m", model)) == inline


def test_a_folder_of_pictures_alone(cli: Cli, model: Path, manifest: Path) -> None:
    folder = manifest.parent
    done = cli("classify", folder, "--glob", "*.png", "-m", model)
    assert done.code == 0, done.err
    (only,) = [row for row in rows(done) if row["id"] == "3.png"]
    picture = {"id": "x", "image": "3.png", "sound": None, "words": None}
    (folder / "one.jsonl").write_text(json.dumps(picture))
    scores = direct(model, folder / "one.jsonl", 0)
    assert {one["label"]: one["score"] for one in only["top_k"]} == pytest.approx(scores, abs=1e-5)
    assert only["modality"] == "image"


def test_a_lone_empty_column_is_an_error_as_ever(cli: Cli, model: Path, manifest: Path) -> None:
    found = rows(cli("classify", manifest, "--text-column", "words", "-m", model))
    assert [i for i, row in enumerate(found) if row["status"] == "error"] == [2, 5]
    assert found[2]["error_message"] == "column 'words' is empty"


def test_models_that_cannot_do_without_do_not(cli: Cli, manifest: Path) -> None:
    done = cli("classify", manifest, "--image-column", "image", "--text-column", "words", "-m", "fake:8",
               "--labels", "a,b")  # fmt: skip
    found = rows(done)
    assert found[2]["error_message"] == "column 'words' is empty"
    assert found[3]["error_message"] == "column 'image' is empty"
    assert [row["status"] for row in found].count("error") >= 3


def test_an_output_is_resumed_and_described(cli: Cli, model: Path, manifest: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "out.parquet"
    done = cli("classify", manifest, *COLUMNS, "-m", model, "-o", out)
    assert done.code == 3, done.err
    table = pq.read_table(out)
    assert table.num_rows == 12
    told = json.loads({k.decode(): v for k, v in table.schema.metadata.items()}["mmcli"])
    assert "fusion" in json.dumps(told)
    again = cli("classify", manifest, *COLUMNS, "-m", model, "-o", out, "--update")
    assert again.code == 3, again.err
    assert pq.read_table(out).equals(table)


def test_what_it_does_not_take_is_told_before_it_runs(cli: Cli, model: Path, manifest: Path) -> None:
    done = cli("classify", manifest, "--video-column", "image", "--text-column", "words", "-m", model,
               "--labels", "a,b")  # fmt: skip
    assert done.code == 2
    assert "it has 3 labels of its own (no, yes, perhaps)" in done.err
    done = cli("classify", manifest, "--video-column", "image", "--text-column", "words", "-m", model)
    assert done.code == 2
    assert "does not take video; it takes audio, image, text" in done.err
