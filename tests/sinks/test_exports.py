"""COCO caption results and VQA v2 results: as their evaluation code reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmcli.cli.boundary import run
from mmcli.sinks.exports import result_id

IMAGES = Path(__file__).parents[2] / "sample_data/images"


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMCLI_NUM_WORKERS", "0")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("391895", 391895),
        ("000000391895.jpg", 391895),
        ("val2014/COCO_val2014_000000391895.jpg", 391895),
        ("COCO_val2014_000000391895", 391895),
        ("0", 0),
        ("IMG_1234.jpg", "IMG_1234.jpg"),
        ("a/photo1.jpg", "a/photo1.jpg"),
        ("questions.jsonl#3", "questions.jsonl#3"),
        ("12.5x.jpg", "12.5x.jpg"),
        ("١٢", "١٢"),
        ("1234567890123456", "1234567890123456"),
        ("", ""),
    ],
)
def test_ids(name: str, wanted: int | str) -> None:
    assert result_id(name) == wanted


def coco_folder(folder: Path) -> Path:
    folder.mkdir()
    names = ("COCO_val2014_000000000042.png", "COCO_val2014_000000391895.png", "other.png")
    for name, source in zip(names, sorted(IMAGES.glob("*.png")), strict=False):
        shutil.copy(source, folder / name)
    (folder / "COCO_val2014_000000000007.png").write_bytes(b"\x89PNG\r\n")
    return folder


def test_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = coco_folder(tmp_path / "val2014"), tmp_path / "captions.json"
    command = ["caption", str(folder), "-m", "fake:8", "-o", str(out), "-f", "coco"]
    assert run(command) == 3
    assert f"1 error row is not in {out}: coco holds results only" in capsys.readouterr().err
    assert run([*command[:4], "-o", str(tmp_path / "all.jsonl")]) == 3
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    texts = [row["caption"] for row in rows if row["status"] == "ok"]
    found = json.loads(out.read_text())
    assert found == [
        {"image_id": number, "caption": text} for number, text in zip([42, 391895, "other.png"], texts, strict=True)
    ]
    content = out.read_bytes()
    assert run(command) == 3
    assert "is complete already" in capsys.readouterr().err
    assert out.read_bytes() == content
    assert run(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == {"unsupported_format": 1}
    assert run(["inspect", str(out), "--errors", "1"]) == 2
    assert "is of format coco, which holds no rows" in capsys.readouterr().err


def test_vqa(tmp_path: Path) -> None:
    source = tmp_path / "q.csv"
    picture = next(IMAGES.glob("*.png"))
    source.write_text(f"qid,image,question\n262148000,{picture},What is it?\n262148001,{picture},Where is it?\n")
    command = ["ask", str(source), "-m", "fake:4", "--question-column", "question", "--id-column", "qid"]
    assert run([*command, "-o", str(tmp_path / "a.json"), "-f", "vqa"]) == 0
    assert run([*command, "-o", str(tmp_path / "a.jsonl")]) == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(set(answers)) == 2
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {"question_id": 262148000, "answer": answers[0]},
        {"question_id": 262148001, "answer": answers[1]},
    ]


def test_no_rows_is_a_list_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert run(["caption", str(tmp_path / "in"), "-m", "fake:4", "-o", str(tmp_path / "o.json"), "-f", "coco"]) == 0
    assert json.loads((tmp_path / "o.json").read_text()) == []


def test_two_inputs_of_one_id_are_refused_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation would take the last of them, or stop."""
    for name in ("train", "val"):
        (tmp_path / "in" / name).mkdir(parents=True)
        shutil.copy(next(IMAGES.glob("*.png")), tmp_path / "in" / name / "000007.png")
    command = ["caption", str(tmp_path / "in"), "-m", "fake:4", "-o", str(tmp_path / "o.json")]
    assert run([*command, "-f", "coco"]) == 8
    said = capsys.readouterr().err
    assert "two inputs have the same image_id 7" in said
    assert not (tmp_path / "o.json").exists()
    assert run([*command, "-f", "jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["resumed"] == 2


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("caption", ["-f", "coco", "--update"], "--update: --format coco holds no rows to go on from"),
        ("caption", ["-f", "coco", "--retry-errors"], "--retry-errors: --format coco holds no rows to go on from"),
        ("caption", ["-f", "vqa"], "--format vqa holds one answer a row"),
        ("embed", ["-f", "coco"], "--format coco holds one caption a row"),
        ("ask", ["-f", "vqa", "-q", "a?", "-q", "b?"], "--format vqa holds one answer a row"),
        ("caption", [], "add --format coco or --format vqa"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, options: list[str], said: str
) -> None:
    folder = coco_folder(tmp_path / "in")
    assert run([task, str(folder), "-m", "fake:4", "-o", str(tmp_path / "o.json"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
