"""`mmcli eval`: from files on disk to a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli, finished, manifest
from sklearn import metrics

DIGITS = [str(i) for i in range(10)]


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(cli: Cli, *arguments: object) -> dict[str, Any]:
    done = cli("eval", *arguments, "--json", "--bootstrap", 20)
    assert done.code == 0, done.err
    assert done.err == ""
    found: dict[str, Any] = json.loads(done.out)
    return found


def values(found: dict[str, Any]) -> dict[str, float | None]:
    return {name: one["value"] for name, one in found["scores"].items()}


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Six rows: three right, one wrong, one failed, one rejected."""
    return write(
        tmp_path / "classes.parquet",
        {
            "id": ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jpg", "dog/5.jpg", "cat/6.jpg"],
            "label": ["cat", "cat", "dog", "cat", None, "cat"],
            "score": pa.array([0.9, 0.8, 0.7, 0.6, None, 0.4], pa.float32()),
            "rejected": [False, False, False, False, None, True],
            "right": ["cat", "cat", "dog", "dog", "dog", "cat"],
            "status": ["ok", "ok", "ok", "ok", "error", "ok"],
        },
    )


# Where the truth is ---------------------------------------------------------------------------------------------


def test_a_column(cli: Cli, classes: Path) -> None:
    found = report(cli, classes, "--truth", "right")
    assert found["metrics"] == "classification"
    assert found["rows"] == {
        "rows": 6, "evaluated": 6, "answered": 4, "errors": 1, "rejected": 1, "no_answer": 0,
        "without_truth": 0, "unused_truth": 0, "repeated_ids": 0, "merged": 0,
    }  # fmt: skip
    assert found["scores"]["accuracy"]["value"] == 0.5
    assert found["scores"]["accuracy"]["answered"] == 0.75
    assert found["scores"]["accuracy"]["low"] < 0.5 < found["scores"]["accuracy"]["high"]
    assert found["confusion"]["matrix"] == [[2, 0, 1], [1, 1, 1]]


def test_a_table_to_read(cli: Cli, classes: Path) -> None:
    done = cli("eval", classes, "--truth", "right")
    assert done.code == 0
    assert "6 rows evaluated, of 6; 1 failed, 1 rejected: these count against the model" in done.out
    rows = {line.split("  ")[0]: line.split() for line in reversed(done.out.splitlines())}
    assert rows["accuracy"][1] == "0.5000"
    assert rows["accuracy"][-1] == "0.7500"
    assert rows["cat"] == ["cat", "3", "3", "0.6667", "0.6667", "0.6667"]


def test_names_of_folders(cli: Cli, classes: Path) -> None:
    assert values(report(cli, classes, "--truth-folder")) == values(report(cli, classes, "--truth", "right"))


def test_folders_with_odd_names(cli: Cli, tmp_path: Path) -> None:
    """A byte that is not UTF-8 is written with a backslash, and files may lie beside the folders."""
    paths = ["/d/caf\\xe9/1.jpg", "/d/a b/2.jpg", "3.jpg"]
    path = write(tmp_path / "p.parquet", {"id": ["1", "2", "3"], "path": paths, "label": ["caf\\xe9", "a b", "x"]})
    found = report(cli, path, "--truth-folder")
    assert values(found)["accuracy"] == 1
    assert (found["rows"]["evaluated"], found["rows"]["without_truth"]) == (2, 1)


def test_an_empty_cell_is_no_answer(cli: Cli, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("id,label,caption,right\n1,cat,cat,cat\n2,,,dog\n")
    found = report(cli, table, "--truth", "right", "--metrics", "classification")
    assert (found["rows"]["no_answer"], [c["class"] for c in found["classes"]]) == (1, ["cat", "dog"])
    assert report(cli, table, "--truth", "right", "--metrics", "caption")["rows"]["no_answer"] == 1
    assert report(cli, table, "--truth", "right", "--metrics", "speech")["rows"]["no_answer"] == 0


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "json"])
def test_a_file(cli: Cli, classes: Path, tmp_path: Path, suffix: str) -> None:
    """In another order, without one row and with one more."""
    rows = [
        {"file": "dog/4.jpg", "n": 1, "label": "dog"},
        {"file": "cat/1.jpg", "n": 2, "label": "cat"},
        {"file": "cat/9.jpg", "n": 3, "label": "cat"},
        {"file": "dog/3.jpg", "n": 4, "label": "dog"},
        {"file": "dog/5.jpg", "n": 5, "label": "dog"},
        {"file": "cat/6.jpg", "n": 6, "label": "cat"},
    ]
    truth = tmp_path / f"truth.{suffix}"
    if suffix == "jsonl":
        lines(truth, rows)
    elif suffix == "json":
        truth.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), truth)
    else:
        separator = "," if suffix == "csv" else "\t"
        cells = [list(rows[0]), *([*map(str, row.values())] for row in rows)]
        truth.write_text("\n".join(separator.join(row) for row in cells))
    found = report(cli, classes, "--truth", truth)
    assert values(found)["accuracy"] == pytest.approx(2 / 5)
    assert found["rows"]["without_truth"] == 1
    assert found["rows"]["unused_truth"] == 1
    assert found["truth"] == f"{truth}, column label"


def test_columns_by_name(cli: Cli, tmp_path: Path) -> None:
    """Another tool's file, numbers for classes, and ids that are numbers here and texts there."""
    predictions = write(tmp_path / "p.parquet", {"nr": [1, 2, 3], "guess": [7, 8, 9]})
    truth = tmp_path / "t.csv"
    truth.write_text("row,wanted,label\n3,9,x\n2,8,x\n1,1,x\n")
    options = ("--id-column", "nr", "--truth-id-column", "row", "--truth-column", "wanted", "--column", "guess")
    found = report(cli, predictions, "--truth", truth, *options, "--metrics", "classification")
    assert values(found)["accuracy"] == pytest.approx(2 / 3)


def test_other_formats_of_predictions(cli: Cli, tmp_path: Path) -> None:
    rows = [{"id": i, "label": "a", "truth": "ab"[i % 2], "score": 0.5} for i in range(4)]
    jsonl = lines(tmp_path / "p.jsonl", rows)
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in range(2):
        pq.write_table(pa.Table.from_pylist(rows[2 * i : 2 * i + 2]), folder / f"part-{i}.parquet")
    table = tmp_path / "p.csv"
    table.write_text("id,label,truth,score\n" + "".join(f"{r['id']},{r['label']},{r['truth']},.5\n" for r in rows))
    for path in (jsonl, folder, table):
        found = report(cli, path, "--truth", "truth")
        assert values(found) == {"accuracy": 0.5, "mean_per_class": 0.5, "macro_f1": pytest.approx(1 / 3), "ece": 0}


# Kinds ----------------------------------------------------------------------------------------------------------


def test_captions_of_a_run(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    """The README's example, on some of the pictures."""
    out = tmp_path / "captions.parquet"
    model = sample_data / "models" / "captioner"
    done = cli("caption", sample_data / "images.jsonl", "-m", model, "--id-column", "id", "-o", out)
    assert done.code == 0, done.err
    found = report(cli, out, "--truth", sample_data / "images.jsonl")
    assert found["metrics"] == found["task"] == "caption"
    assert found["model"]["id"] == "captioner"
    assert found["rows"]["evaluated"] == 48
    assert values(found)["bleu_4"] == pytest.approx(0.99, abs=0.03)
    assert values(found)["cider"] == pytest.approx(9.8, abs=0.3)


def test_several_references(cli: Cli, tmp_path: Path) -> None:
    """As a list, as JSON text, as rows of a file, as rows of the predictions: all the same."""
    hyp = ["a red dog runs", "two blue cats sit here"]
    refs = [["the red dog runs fast", "a dog"], ["two cats sit", "blue cats sit here now"]]
    flat = [(i, ref) for i, several in enumerate(refs) for ref in several]
    one = write(tmp_path / "1.parquet", {"id": ["0", "1"], "caption": hyp, "refs": refs})
    two = write(tmp_path / "2.parquet", {"id": ["0", "1"], "caption": hyp, "refs": [json.dumps(r) for r in refs]})
    three = write(
        tmp_path / "3.parquet",
        {"id": [str(i) for i, _ in flat], "caption": [hyp[i] for i, _ in flat], "ref": [r for _, r in flat]},
    )
    truth = tmp_path / "truth.csv"
    truth.write_text("id,caption\n" + "".join(f"{i},{ref}\n" for i, ref in flat))
    expected = values(report(cli, one, "--truth", "refs"))
    assert expected["rouge_l"] == pytest.approx(0.8934, abs=1e-4)
    assert values(report(cli, two, "--truth", "refs")) == expected
    assert values(report(cli, one, "--truth", truth)) == expected
    merged = report(cli, three, "--truth", "ref")
    assert values(merged) == expected
    assert (merged["rows"]["rows"], merged["rows"]["evaluated"], merged["rows"]["merged"]) == (4, 2, 2)


def test_rows_of_one_file_are_pointed_out(cli: Cli, tmp_path: Path) -> None:
    columns = {"id": ["m#0", "m#1"], "path": ["a.jpg"] * 2, "caption": ["x y"] * 2, "ref": ["x", "y"]}
    path = write(tmp_path / "p.parquet", columns)
    found = report(cli, path, "--truth", "ref")
    assert "2 rows are of 1 files" in found["notes"][0]
    again = report(cli, path, "--truth", "ref", "--id-column", "path")
    assert again["rows"]["merged"] == 1
    assert not any("rows are of" in note for note in again["notes"])


def test_coco_annotations(cli: Cli, tmp_path: Path) -> None:
    """Ids are numbers in annotations, and names of files in a run over COCO's folder; results are a JSON list."""
    annotations = tmp_path / "captions_val2014.json"
    listed = [
        {"id": 1, "image_id": 391895, "caption": "A man rides a motorbike."},
        {"id": 2, "image_id": 391895, "caption": "Man on a motorcycle"},
        {"id": 3, "image_id": 522418, "caption": "A woman cuts a cake."},
    ]
    annotations.write_text(json.dumps({"images": [], "annotations": listed}))
    texts = ["a man rides a motorbike", "a woman cuts a cake"]
    names = ["COCO_val2014_000000391895.jpg", "000000522418.jpg"]
    run = write(tmp_path / "p.parquet", {"id": names, "caption": texts})
    results = tmp_path / "results.json"
    rows = [{"image_id": i, "caption": c} for i, c in zip((391895, 522418), texts, strict=True)]
    results.write_text(json.dumps(rows))
    for path in (run, results):
        found = report(cli, path, "--truth", annotations)
        assert found["rows"]["evaluated"] == 2
        assert values(found)["bleu_4"] == pytest.approx(1)
    as_they_are = report(cli, run, "--truth", annotations, "--tokenize", "whitespace")
    assert values(as_they_are)["bleu_4"] < 0.9


def test_vqa_annotations(cli: Cli, tmp_path: Path) -> None:
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"

    def annotation(number: int, agreeing: int) -> dict[str, Any]:
        given = ["Red."] * agreeing + [f"colour {i}" for i in range(10 - agreeing)]
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)]
        return {"question_id": number, "image_id": 1, "answers": answers, "multiple_choice_answer": "x"}

    annotations.write_text(json.dumps({"annotations": [annotation(i, agreeing=i) for i in range(5)]}))
    run = write(tmp_path / "p.parquet", {"id": [str(i) for i in range(5)], "answer": ["the red"] * 5})
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"question_id": i, "answer": "red"} for i in range(5)]))
    for path in (run, results):
        found = report(cli, path, "--truth", annotations)
        assert found["metrics"] == "vqa"
        assert values(found)["vqa_accuracy"] == pytest.approx((0 + 0.3 + 0.6 + 0.9 + 1) / 5)


def test_answers_to_several_questions(cli: Cli, tmp_path: Path) -> None:
    columns = {"id": ["1", "2"], "colour_answer": ["red", "blue"], "shape_answer": ["ring", "ring"]}
    path = write(tmp_path / "p.parquet", {**columns, "answer": ["red", "green"], "shape_score": [0.5, 0.75]})
    assert values(report(cli, path, "--truth", "answer", "--column", "colour_answer")) == {"exact_match": 0.5}
    done = cli("eval", path, "--truth", "answer")
    assert done.code == 2
    assert "has several answers: colour_answer, shape_answer; choose one with --column" in done.err
    chosen = ("--column", "shape_answer", "--metrics", "classification")
    assert values(report(cli, path, "--truth", "answer", *chosen))["ece"] == pytest.approx(0.625)


def test_speech(cli: Cli, shared_data: Path, tmp_path: Path) -> None:
    """Segments tell that captions are transcripts."""
    said = json.loads((shared_data / "audio" / "jfk.json").read_text())
    text = next(value for value in said.values() if "country" in str(value).lower())
    heard = " ".join(text.split()[1:]).upper()
    segment = [{"start": 0.0, "end": 1.0, "text": heard}]
    rows = [{"id": "jfk.flac", "caption": heard, "segments": segment, "said": text}]
    found = report(cli, lines(tmp_path / "p.jsonl", rows), "--truth", "said")
    assert found["metrics"] == "speech"
    assert found["settings"]["normalize"] == "basic"
    assert values(found)["wer"] == pytest.approx(1 / len(text.split()))
    assert values(found)["deletions"] == values(found)["wer"]
    as_it_is = report(cli, tmp_path / "p.jsonl", "--truth", "said", "--normalize", "none")
    assert values(as_it_is)["wer"] > 0.9


def test_several_classes(cli: Cli, tmp_path: Path) -> None:
    columns = {"id": ["1", "2"], "label": ["a", "b"], "labels": [["a", "b"], ["b"]], "tags": [["a"], ["b"]]}
    path = write(tmp_path / "p.parquet", columns)
    found = report(cli, path, "--truth", "tags")
    assert values(found) == {"micro_f1": 0.8, "macro_f1": pytest.approx(5 / 6), "exact_match": 0.5}
    assert [c["class"] for c in found["classes"]] == ["a", "b"]
    assert values(report(cli, path, "--truth", "tags", "--column", "label"))["accuracy"] == 1


def test_spoken_digits(cli: Cli, shared_data: Path, tmp_path: Path) -> None:
    """Real names of recordings, a model that is right in two of three, scikit-learn's numbers for each digit."""
    table = (shared_data / "audio" / "digits.csv").read_text().splitlines()[1:]
    files = [line.split(",")[0] for line in table]
    truth = [line.split(",")[1] for line in table]
    rng = np.random.default_rng(0)
    labels = [t if rng.random() < 2 / 3 else DIGITS[rng.integers(10)] for t in truth]
    path = write(tmp_path / "p.parquet", {"id": files, "label": labels})
    found = report(cli, path, "--truth", shared_data / "audio" / "digits.csv")
    assert found["rows"]["evaluated"] == len(files)
    assert values(report(cli, path, "--truth-folder")) == values(found)
    f1 = metrics.f1_score(truth, labels, average=None, labels=DIGITS)
    assert [c["f1"] for c in found["classes"]] == pytest.approx(list(f1))
    assert values(found)["macro_f1"] == pytest.approx(np.mean(f1))
    done = cli("eval", path, "--truth-folder", "--bootstrap", 0)
    rows = [line.split() for line in done.out.splitlines()]
    for digit, one in zip(DIGITS, f1, strict=True):
        assert any(row[:1] == [digit] and row[-1] == f"{one:.4f}" for row in rows)


def test_rows_without_a_truth(cli: Cli, tmp_path: Path) -> None:
    """Null, empty, a list of nothing: left out and counted, but for classes, of which there may be none."""
    nothing = [["x"], [], None, [""]]
    path = write(tmp_path / "p.parquet", {"id": list("abcd"), "caption": ["x"] * 4, "refs": nothing})
    found = report(cli, path, "--truth", "refs")
    assert (found["rows"]["evaluated"], found["rows"]["without_truth"]) == (1, 3)
    asked = write(tmp_path / "q.parquet", {"id": list("abcd"), "answer": ["x"] * 4, "answers": nothing})
    assert report(cli, asked, "--truth", "answers")["rows"]["without_truth"] == 3
    tagged = write(
        tmp_path / "l.parquet", {"id": list("abcd"), "labels": [["x"], [], ["x"], None], "tags": nothing}
    )
    found = report(cli, tagged, "--truth", "tags")
    assert (found["rows"]["evaluated"], found["rows"]["without_truth"], found["rows"]["no_answer"]) == (3, 1, 1)
    assert values(found)["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("column", ["label", "labels", "caption", "answer"])
def test_nothing_was_answered(cli: Cli, tmp_path: Path, column: str) -> None:
    kind = pa.list_(pa.string()) if column == "labels" else pa.string()
    path = write(tmp_path / "p.parquet", {"id": ["a", "b"], column: pa.nulls(2, kind), "right": ["x", "y z"]})
    found = report(cli, path, "--truth", "right")
    assert found["rows"]["no_answer"] == 2
    for one in found["scores"].values():
        assert one["value"] == pytest.approx(0, abs=1e-3)
        assert one["answered"] is None


# Retrieval ------------------------------------------------------------------------------------------------------


def vectors(values: Any) -> pa.Array:
    array = np.asarray(values, np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def test_pairs_of_vectors(cli: Cli, tmp_path: Path) -> None:
    """Five rows of which one has changed its vectors with another."""
    right = np.eye(5)[[1, 0, 2, 3, 4]]
    path = write(
        tmp_path / "p.parquet",
        {"id": list("abcde"), "image_embedding": vectors(np.eye(5)), "text_embedding": vectors(right)},
    )
    found = report(cli, path)
    assert found["metrics"] == "retrieval"
    assert values(found)["image_to_text_r_at_1"] == 0.6
    assert values(found)["text_to_image_median_rank"] == 1
    done = cli("eval", path)
    assert "image_to_text_r_at_1" in done.out


def test_vectors_of_a_run(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    """A folder in clip-retrieval's layout, and JSONL, hold the same vectors as Parquet."""
    rows = tmp_path / "m.jsonl"
    some = "".join((sample_data / "images.jsonl").read_text().splitlines(keepends=True)[:12])
    rows.write_text(some.replace("images/", f"{sample_data}/images/").replace("07-", "none-"))
    found = []
    for out in ("p.parquet", "p.jsonl", "npy/"):
        more = ("--format", "npy") if out == "npy/" else ()
        columns = ("--image-column", "image", "--text-column", "caption", "--id-column", "id")
        model = sample_data / "models" / "clip"
        done = cli("embed", rows, "-m", model, *columns, *more, "-o", f"{tmp_path}/{out}")
        assert done.code == 3
        found.append(report(cli, f"{tmp_path}/{out}"))
    for one in found:
        assert one["rows"]["evaluated"] == 12
        assert one["rows"]["errors"] == 1
        assert values(one)["image_to_text_r_at_1"] == pytest.approx(11 / 12)
        assert one["scores"]["image_to_text_r_at_1"]["answered"] == 1


def test_two_files_of_vectors(cli: Cli, tmp_path: Path) -> None:
    """Two captions a picture, a picture without captions, a caption of no picture."""
    images = write(tmp_path / "i.parquet", {"id": ["a", "b", "c"], "embedding": vectors(np.eye(4)[:3])})
    texts = write(
        tmp_path / "t.parquet",
        {
            "id": ["1", "2", "3", "4", "5"],
            "image": ["a", "a", "b", "b", "z"],
            "embedding": vectors([[1, 0, 0, 0], [0, 1, 0.1, 0], [0, 1, 0, 0], [0, 1, 0, 0.1], [0, 0, 0, 1]]),
        },
    )
    found = report(cli, images, "--truth", texts, "--truth-id-column", "image")
    assert found["rows"]["without_truth"] == 1
    assert found["rows"]["unused_truth"] == 1
    assert found["rows"]["evaluated"] == 2
    assert values(found)["predictions_to_truth_r_at_1"] == 1
    assert values(found)["truth_to_predictions_r_at_1"] == 0.75


# What is written ------------------------------------------------------------------------------------------------


def test_a_file_and_a_picture(cli: Cli, classes: Path, tmp_path: Path) -> None:
    from PIL import Image

    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    done = cli("eval", classes, "--truth", "right", "-o", out, "--plot", plot, "--bootstrap", 20)
    assert done.code == 0
    assert json.loads(out.read_text()) == report(cli, classes, "--truth", "right")
    with Image.open(plot) as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_pictures_of_other_kinds(cli: Cli, tmp_path: Path) -> None:
    pairs = {"id": list("abc"), "a_embedding": vectors(np.eye(3)), "b_embedding": vectors(np.eye(3))}
    first = write(tmp_path / "1.parquet", pairs)
    second = write(tmp_path / "2.parquet", {"id": ["1"], "caption": ["x"], "ref": ["x"]})
    many = [f"c{i} $x_" for i in range(50)]
    third = write(tmp_path / "3.parquet", {"id": many, "label": many, "right": many[::-1]})
    for arguments in ((first,), (second, "--truth", "ref"), (third, "--truth", "right")):
        assert cli("eval", *arguments, "--plot", tmp_path / "p.svg", "--bootstrap", 5).code == 0
        assert (tmp_path / "p.svg").stat().st_size > 5000
        (tmp_path / "p.svg").unlink()


def test_the_same_again(cli: Cli, classes: Path) -> None:
    one, two = (report(cli, classes, "--truth", "right") for _ in range(2))
    assert one == two
    other = report(cli, classes, "--truth", "right", "--seed", 7)
    assert values(other) == values(one)
    assert other["scores"] != one["scores"]


def test_names_are_untrusted(cli: Cli, tmp_path: Path) -> None:
    bad = "\x1b[31mcat\n"
    path = write(tmp_path / "p.parquet", {"id": ["1"], "label": [bad], "right": [bad]})
    done = cli("eval", path, "--truth", "right")
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "\\x1b[31mcat\\n" in done.out


def test_an_unfinished_run(cli: Cli, tmp_path: Path) -> None:
    """What is there is measured, and the report says that it is not all."""
    rows = manifest(tmp_path / "m.csv", 5000, r200="nan")
    out = tmp_path / "o.parquet"
    run = ("--part-rows", 20, "--max-errors", 0, "--batch-size", 8, "--keep", "text")
    assert cli("embed", rows, "-m", "fake:4,obey", "-o", out, *run).code == 4
    assert not out.exists()
    found = report(cli, out, "--truth", "text", "--metrics", "classification", "--column", "modality")
    assert 0 < found["rows"]["rows"] < 5000
    assert found["notes"][0] == f"the run is not finished: {found['rows']['rows']:,} of 5,000 rows are there"


# Mistakes -------------------------------------------------------------------------------------------------------


def test_all_problems_in_one_go(cli: Cli, classes: Path, tmp_path: Path) -> None:
    done = cli(
        *("eval", classes, "--truth", tmp_path / "none.csv", "--metrics", "clasification", "--column", "lable"),
        *("--bootstrap", "many", "--seed", "x", "--tokenize", "ptb", "--normalize", "all", "--plot", "x.jpeg"),
        *("-o", tmp_path / "no" / "r.json"),
    )
    assert done.code == 2
    for what in (
        "--bootstrap 'many' is not a number",
        "--seed 'x' is not a number",
        "--tokenize 'ptb' is not one of coco, whitespace",
        "--normalize 'all' is not one of basic, none",
        "--metrics 'clasification' is not one of classification, caption, vqa, speech, retrieval; did you mean",
        f"--column lable: {classes} has no such column; did you mean label?",
        f"--truth: there is no {tmp_path}/none.csv",
        "--plot x.jpeg: end the name with one of .png, .pdf, .svg",
        "/r.json is in a folder that does not exist",
    ):
        assert what in done.err
    assert len(done.err.splitlines()) == 9
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what is right? Add --truth with a column of"),
        (("--truth", "rihgt"), "--truth rihgt: {} has no such column; did you mean right?"),
        (("--truth", "label"), "--truth label: {} has no other column of answers"),
        (("--truth", "right", "--truth-folder"), "--truth and --truth-folder: give one of them"),
        (("--truth", "right", "--column", "right"), "would compare the truth with itself"),
        (("--truth", "right", "--metrics", "vqa"), "has no column answer or prediction to measure vqa by"),
        (("--truth", "right", "--column", "score"), "--column score does not tell what is to be measured"),
        (("--truth", "right", "--column", "label,id"), "one column at a time"),
        (("--truth-folder", "--truth-column", "x"), "--truth-column x is of a truth file; add --truth FILE"),
        (("--truth", "right", "--metrics", "retrieval"), "retrieval takes no column of truth; rows are pairs"),
        (("--metrics", "retrieval"), "has none; give the file with the others as --truth"),
        (("--truth", "right", "-o", "r.txt"), "the report is JSON; give e.g. -o r.json"),
        (("--truth", "right", "--id-column", "idd"), "--id-column idd: {} has no such column; did you mean id?"),
    ],
)
def test_mistakes(cli: Cli, classes: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli("eval", classes, *arguments)
    assert done.code == 2
    assert message.format(classes) in done.err
    assert done.out == ""
    assert "Traceback" not in done.err


def test_ids_that_do_not_meet(cli: Cli, classes: Path, tmp_path: Path) -> None:
    truth = tmp_path / "t.csv"
    truth.write_text("id,label\n1.jpg,cat\n")
    done = cli("eval", classes, "--truth", truth)
    assert done.code == 2
    assert "ids are e.g. 'cat/1.jpg', there '1.jpg'; choose others with --id-column" in done.err


def test_two_truths_of_a_row(cli: Cli, classes: Path, tmp_path: Path) -> None:
    truth = tmp_path / "t.csv"
    truth.write_text("id,label\ncat/1.jpg,cat\ncat/1.jpg,dog\n")
    done = cli("eval", classes, "--truth", truth)
    assert done.code == 2
    assert "each row needs one true class, but 'cat/1.jpg' has 'cat' and 'dog'" in done.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"id,label,right\n1,a\n", "row 1 has 2 cells, the header 3"),
        ("p.csv", b"", "is empty; its first line must name the columns"),
        ("p.csv", b"id,label,right\n\xff,a,b\n", "is not UTF-8"),
        ("p.jsonl", b'{"id": 1, "label": "a", "right": "a"}\n[1]\n', "line 2 is no JSON object"),
        ("p.jsonl", b'{"id": 1\n', "line 1 is not JSON"),
        ("p.parquet", b"PAR1", "cannot read"),
        ("p.json", b'{"a": 1}', "neither a JSON list of objects nor"),
        ("p.txt", b"x", "cannot tell the format"),
        ("p.csv", b"id,label,right\n", "has no rows"),
        ("p.csv", b"id,label,right\n1,a,\n", "is empty everywhere"),
    ],
)
def test_broken_files(cli: Cli, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    done = cli("eval", path, "--truth", "right")
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_help_is_light() -> None:
    """As the other commands': nothing heavy is imported to show it, nor to say what is missing."""
    code = (
        "import sys; from mmcli.cli.boundary import run; run(sys.argv[1:]); sys.stderr.write(' '.join(sys.modules))"
    )
    for arguments in (["eval", "--help"], ["eval"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        loaded = {name.split(".")[0] for name in done.stderr.split()}
        assert "typer" in loaded
        assert not loaded & {"numpy", "pyarrow", "sklearn", "scipy", "matplotlib", "jiwer", "torch", "transformers"}


def test_a_score_that_is_no_number(cli: Cli, tmp_path: Path) -> None:
    columns = {"id": ["1"], "label": ["a"], "caption": ["a b"], "right": ["a"], "score": ["high"]}
    path = write(tmp_path / "p.parquet", columns)
    done = cli("eval", path, "--truth", "right", "--metrics", "classification")
    assert done.code == 2
    assert "column score holds 'high', which is no number" in done.err
    assert values(report(cli, path, "--truth", "right", "--metrics", "caption"))["bleu_1"] == pytest.approx(0.5)


def test_without_matplotlib(classes: Path, tmp_path: Path) -> None:
    """As installed without the extra: reports work, and --plot says what to install before anything is read."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ImportError('hidden')")
    environment = {**os.environ, "PYTHONPATH": str(hidden)}
    plain = finished("eval", classes, "--truth", "right", "--bootstrap", 5, env=environment)
    assert plain.code == 0, plain.err
    drawn = finished("eval", classes, "--truth", "right", "--plot", tmp_path / "p.png", env=environment)
    assert drawn.code == 2
    assert "--plot needs matplotlib; type: pip install 'mmcli[eval]'" in drawn.err
