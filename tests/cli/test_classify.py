"""`mmcli classify` as a user meets it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import threading
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli

# What identifies an input: the text `cat` has the vector of the label `cat`, and of no other.
PLAIN = ("-m", "fake:16", "--templates", "none")


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    path = tmp_path / "animals.csv"
    path.write_text("text,truth\n" + "".join(f"{name},{name}!\n" for name in ("dog", "cat", "bird", "cat", "dog")))
    return path


# ------------------------------------------------------------------------------------- labels as texts


def test_every_input_gets_the_label_that_it_is(cli: Cli, animals: Path) -> None:
    done = cli("classify", animals, "--text-column", "text", "--keep", "truth", *PLAIN, "--labels", "cat,dog,bird")
    assert done.code == 0, done.err
    found = rows(done.out)
    assert [row["label"] for row in found] == ["dog", "cat", "bird", "cat", "dog"]
    assert [row["truth"] for row in found] == ["dog!", "cat!", "bird!", "cat!", "dog!"]
    first = found[0]
    assert list(first)[:8] == ["id", "path", "modality", "label", "score", "top_k", "margin", "entropy"]
    assert first["top_k"][0]["label"] == "dog"
    assert sum(one["score"] for one in first["top_k"]) == pytest.approx(1)
    assert first["margin"] == pytest.approx(first["top_k"][0]["score"] - first["top_k"][1]["score"], abs=1e-6)


def test_top_k_and_rejection(cli: Cli, animals: Path) -> None:
    done = cli("classify", animals, "--text-column", "text", *PLAIN, "--labels", "cat,dog,bird", "--top-k", 1,
               "--min-score", "0.9999")  # fmt: skip
    for row in rows(done.out):
        assert len(row["top_k"]) == 1
        assert row["rejected"] == (row["score"] < 0.9999)
        assert (row["label"] is None) == row["rejected"]
    assert any(row["rejected"] for row in rows(done.out))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "dog\n\ncat \r\nbird\n"),
        ("labels.json", '["dog", "cat", "bird"]'),
        ("labels.json", '{"dog": "dog", "cat": ["cat", "kitten"], "bird": "bird"}'),
    ],
)
def test_labels_come_from_files(cli: Cli, animals: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text("\ufeff" + text)
    done = cli("classify", animals, "--text-column", "text", *PLAIN, "--labels-file", tmp_path / name)
    assert done.code == 0, done.err
    assert [row["label"] for row in rows(done.out)] == ["dog", "cat", "bird", "cat", "dog"]


def test_the_sample_model_knows_the_sample_pictures(cli: Cli, sample_data: Path) -> None:
    done = cli("classify", sample_data / "images.jsonl", "--image-column", "image", "--keep", "truth=label",
               "-m", sample_data / "models" / "clip", "--labels-file", sample_data / "labels.txt")  # fmt: skip
    assert done.code == 0, done.err
    found = rows(done.out)
    right = sum(row["label"] == row["truth"] for row in found)
    assert len(found) == 48
    assert right >= 40


def test_pictures_are_examples_for_clips(cli: Cli, sample_data: Path) -> None:
    """The example of the README."""
    model, solved = sample_data / "models" / "clip", sample_data / "images.jsonl"
    done = cli("classify", sample_data / "videos.csv", "-m", model, "--keep", "truth=label", "--examples", solved)
    assert done.code == 0, done.err
    assert [row["label"] for row in rows(done.out)] == [row["truth"] for row in rows(done.out)]
    assert len(rows(done.out)) == 6


def test_kept_labels_give_the_same_rows(cli: Cli, animals: Path, tmp_path: Path) -> None:
    kept = tmp_path / "labels.parquet"
    common = ("classify", animals, "--text-column", "text", "-m", "fake:16")
    made = cli(
        *common, "--labels", "cat,dog,bird", "--templates", "none", "--template", "{}!", "--save-labels", kept
    )
    assert made.code == 0, made.err
    again = cli(*common, "--labels-file", kept)
    assert again.code == 0, again.err
    assert rows(again.out) == rows(made.out)
    other = cli("classify", animals, "--text-column", "text", "-m", "fake:8", "--labels-file", kept)
    assert other.code == 2
    assert "--labels-file: its vectors have 16 numbers, those of -m fake:8 8" in other.err
    texts = [set(one) for one in pq.read_table(kept).column("texts").to_pylist()]
    assert texts == [{name, f"{name}!"} for name in ("cat", "dog", "bird")]


def test_other_vectors_of_labels_are_another_job(cli: Cli, animals: Path, tmp_path: Path) -> None:
    """Kept vectors of the same labels, made with other texts: rows would differ, so they are not mixed."""
    out, kept = tmp_path / "out.parquet", tmp_path / "labels.parquet"
    common = ("classify", animals, "--text-column", "text", "-m", "fake:16")
    made = ("--labels", "cat,dog,bird", "--save-labels", kept)
    assert cli(*common, *made, "--templates", "none").code == 0
    assert cli(*common, "--labels-file", kept, "-o", out).code == 0
    assert cli(*common, *made, "--template", "a {}!").code == 0
    done = cli(*common, "--labels-file", kept, "-o", out)
    assert (done.code, "model.head.weights" in done.err) == (6, True)


def test_a_complete_output_still_keeps_what_is_asked(cli: Cli, animals: Path, tmp_path: Path) -> None:
    out, kept, head = tmp_path / "out.parquet", tmp_path / "labels.parquet", tmp_path / "head"
    common = ("classify", animals, "--text-column", "text", *PLAIN, "--labels", "cat,dog,bird", "-o", out)
    assert cli(*common).code == 0
    done = cli(*common, "--save-labels", kept, "--save-head", head)
    assert done.code == 0, done.err
    assert "is complete already" in done.err
    assert pq.read_table(kept).column("label").to_pylist() == ["cat", "dog", "bird"]
    assert rows(cli("classify", animals, "--text-column", "text", "-m", head).out)[0]["label"] == "dog"


# -------------------------------------------------------------------------------------------- vectors


@pytest.fixture
def embedded(cli: Cli, animals: Path, tmp_path: Path) -> Path:
    """An output of embed: a folder of parts, with the true labels."""
    done = cli(
        "embed", animals, "--text-column", "text", "-m", "fake:16", "--keep", "truth", "-o", f"{tmp_path}/v/"
    )
    assert done.code == 0, done.err
    return tmp_path / "v"


def test_a_folder_of_vectors_is_input_and_examples(cli: Cli, embedded: Path, animals: Path, tmp_path: Path) -> None:
    common = ("--examples", embedded, "--label-column", "truth")
    done = cli("classify", embedded, *common)
    assert done.code == 0, done.err
    assert [row["label"] for row in rows(done.out)] == ["dog!", "cat!", "bird!", "cat!", "dog!"]
    media = cli("classify", animals, "--text-column", "text", "-m", "fake:16", *common)
    assert [row["label"] for row in rows(media.out)] == ["dog!", "cat!", "bird!", "cat!", "dog!"]


def test_how_files_are_read_is_not_of_vectors(cli: Cli, embedded: Path) -> None:
    """What cannot be heeded is refused: all rows would be classified, whatever was to be left out."""
    common = ("classify", embedded, "-m", "fake:16", "--labels", "cat,dog")
    done = cli(*common, "--glob", "part-1*", "--glob", "*.pq", "--input-format", "csv")
    assert (done.code, done.out) == (2, "")
    assert "--glob part-1* *.pq chooses media in a folder; these inputs are vectors" in done.err
    assert "--input-format csv: these inputs are vectors, which are read from Parquet; leave it out" in done.err
    same = cli(*common, "--input-format", "parquet")
    assert (same.code, same.out) == (0, cli(*common).out)


def test_a_head_needs_no_model_beside_vectors(cli: Cli, embedded: Path, animals: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    made = cli("classify", embedded, "--examples", embedded, "--label-column", "truth", "--save-head", head)
    assert made.code == 0, made.err
    again = cli("classify", embedded, "-m", head)
    assert (again.code, again.out) == (0, made.out)
    media = cli("classify", animals, "--text-column", "text", "-m", head)
    assert media.code == 2
    assert "this head was made of vectors, without their model" in media.err
    other = cli("embed", animals, "--text-column", "text", "-m", "fake:8", "-o", tmp_path / "other.parquet")
    assert other.code == 0
    refused = cli("classify", tmp_path / "other.parquet", "-m", head)
    assert refused.code == 2
    assert "INPUT: its vectors" in refused.err


def test_vectors_of_unlike_lengths_do_not_meet_in_a_probe(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    """A probe reads lengths where a model's vectors have any: unit vectors are then other inputs."""
    model = sample_data / "models" / "clip"
    for name, flag in (("unit", "--normalize"), ("long", "--no-normalize")):
        assert cli("embed", sample_data / "images.jsonl", "--image-column", "image", "--keep", "label", "-m", model,
                   flag, "-o", tmp_path / f"{name}.parquet").code == 0  # fmt: skip
    unit, long = tmp_path / "unit.parquet", tmp_path / "long.parquet"
    done = cli("classify", long, "--examples", unit, "--method", "probe")
    assert done.code == 2
    assert "--examples: their vectors were divided by their length" in done.err
    assert cli("classify", long, "--examples", unit, "--method", "mean").code == 0
    assert cli("classify", unit, "--examples", unit, "--method", "probe").code == 0


def test_a_pipe_of_paths_is_read_once(animals: Path, tmp_path: Path) -> None:
    from cli_runs import finished

    pipe, text = tmp_path / "pipe", tmp_path / "a.txt"
    text.write_text("cat")
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_text(f"{text}\n"), daemon=True).start()
    done = finished("classify", pipe, "--input-format", "paths", *PLAIN, "--labels", "cat,dog")
    assert done.code == 0, done.err
    assert [row["label"] for row in rows(done.out)] == ["cat"]


@pytest.mark.parametrize("name", ["v.parquet", "v/"])
def test_an_unfinished_output_of_embed(cli: Cli, tmp_path: Path, name: str) -> None:
    """One row is damaged, which ends the run behind the first of its parts."""
    texts, out = tmp_path / "texts.csv", f"{tmp_path}/{name}"
    texts.write_text("text\n" + "a\n" * 40 + '""\n' + "b\n" * 9)
    slow = ("--part-rows", 1, "--batch-size", 1, "--on-error", "fail")
    assert cli("embed", texts, "--text-column", "text", "-m", "fake:16", "-o", out, *slow).code == 4
    done = cli("classify", out, "-m", "fake:16", "--labels", "a,b")
    assert done.code == 2
    assert "is not complete; finish its run first" in done.err


def test_vectors_of_one_of_several_media(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    pairs, vectors = tmp_path / "pairs.csv", tmp_path / "v.parquet"
    names = sorted(path for path in (sample_data / "images").iterdir() if path.suffix == ".png")[:3]
    pairs.write_text("image,text\n" + "".join(f"{name},red {name.stem}\n" for name in names))
    model = sample_data / "models" / "clip"
    labels = ("-m", model, "--labels", "red,blue")
    columns = ("--image-column", "image", "--text-column", "text")
    assert cli("embed", pairs, *columns, "-m", model, "-o", vectors).code == 0
    refused = cli("classify", vectors, *labels)
    assert "add --vector-column, one of image_embedding, text_embedding" in refused.err
    both = rows(cli("classify", pairs, *columns, *labels).out)
    for kind in ("image", "text"):
        one = rows(cli("classify", vectors, *labels, "--vector-column", f"{kind}_embedding").out)
        assert {row["modality"] for row in one} == {kind}
        assert [row["score"] for row in one] == pytest.approx([row[f"{kind}_score"] for row in both], abs=1e-5)


def test_vectors_give_the_rows_that_media_give(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    pictures, model = tmp_path / "pictures", sample_data / "models" / "clip"
    shutil.copytree(sample_data / "images", pictures, ignore=shutil.ignore_patterns("metadata.*"))
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    vectors = tmp_path / "vectors.parquet"
    labels = ("--labels-file", sample_data / "labels.txt", "--templates", "simple7")
    assert cli("embed", pictures, "-m", model, "-o", vectors).code == 3
    direct = cli("classify", pictures, "-m", model, *labels)
    shutil.rmtree(pictures)
    from_vectors = cli("classify", vectors, "-m", model, *labels)
    assert (direct.code, from_vectors.code) == (3, 3), from_vectors.err
    for one, other in zip(rows(direct.out), rows(from_vectors.out), strict=True):
        assert {k: v for k, v in one.items() if k not in ("score", "top_k", "margin", "entropy")} == {
            k: v for k, v in other.items() if k not in ("score", "top_k", "margin", "entropy")
        }
        if one["status"] == "ok":
            assert other["score"] == pytest.approx(one["score"], abs=1e-5)
    assert Counter(row["error_code"] for row in rows(from_vectors.out)) == {None: 48, "truncated": 1}


def vectors_file(path: Path, vectors: list[list[float] | None], **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"v": pa.array(vectors, pa.list_(pa.float64())), **columns}), path)
    return path


def test_vectors_of_others(cli: Cli, tmp_path: Path) -> None:
    """A probe on vectors alone needs no model; rows that are no vectors are error rows."""
    near, far = [1.0, 0.0, 0.1], [0.0, 1.0, 0.1]
    solved = [near, far] * 4
    train = vectors_file(tmp_path / "train.parquet", list(solved), label=["near", "far"] * 4)
    asked = [near, None, far, [1.0], [float("nan"), 0.0, 0.0], near]
    test = vectors_file(tmp_path / "test.parquet", asked, id=["a", "b", "c", "d", "e", ""], year=[1, 2, 3, 4, 5, 6])
    done = cli("classify", test, "--vector-column", "v", "--examples", train, "--keep", "year,name=id")
    assert done.code == 3, done.err
    found = rows(done.out)
    assert [row["label"] for row in found] == ["near", None, "far", None, None, "near"]
    assert [row["error_code"] for row in found] == [None, "bad_row", None, "bad_row", "nonfinite", None]
    assert [row["year"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["name"] for row in found] == ["a", "b", "c", "d", "e", ""]
    assert found[5]["id"] == f"{test}#5"
    assert "column 'v' has 1 numbers, not 3" in found[3]["error_message"]


def test_vectors_are_classified_in_parts_and_resumed(cli: Cli, tmp_path: Path) -> None:
    from cli_runs import finished

    train = vectors_file(tmp_path / "train.parquet", [[1.0, 0.0], [0.0, 1.0]], label=["x", "y"])
    many = [[float(row % 3), 1.0] for row in range(5000)]
    test = vectors_file(tmp_path / "test.parquet", list(many))
    common = ("classify", test, "--vector-column", "v", "--examples", train)
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert finished(*common, "-o", whole).code == 0
    cut = finished(*common, "-o", out, "--part-rows", "500", "--time-limit", "0.05s")
    assert cut.code in (0, 75), cut.err
    assert finished(*common, "-o", out).code == 0
    assert pq.read_table(out).equals(pq.read_table(whole))
    labels = pq.read_table(out).column("label").to_pylist()
    assert labels == ["y" if row % 3 == 0 else "x" if row % 3 == 2 else labels[1] for row in range(5000)]


def test_an_interrupt_while_examples_are_looked_at(animals: Path, tmp_path: Path) -> None:
    from cli_runs import process

    folder, out = solved_texts(tmp_path / "solved"), tmp_path / "out.parquet"
    slow = ("-m", "fake:16,ms=2000", "--batch-size", "1", "--num-workers", "0", "--examples", folder, "-o", out)
    with process("classify", animals, "--text-column", "text", *slow) as run:
        assert run.stderr is not None
        while b"2 examples of 2 labels" not in run.stderr.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        err = run.stderr.read().decode()
    assert run.returncode == 130
    assert "mmcli: interrupted" in err
    assert "Traceback" not in err
    assert not out.exists()


def test_options_from_variables_and_a_file(
    cli: Cli, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text('model = "fake:16"\ntemplates = "none"\nlabels = "cat,bird"\ntop-k = 1\n')
    monkeypatch.setenv("MMCLI_LABELS", "dog,cat")
    monkeypatch.setenv("MMCLI_MIN_SCORE", "0.9")
    done = cli("classify", animals, "--text-column", "text", "--config", tmp_path / "run.toml")
    assert done.code == 0, done.err
    found = rows(done.out)
    # A variable wins over the file.
    assert [row["label"] for row in found] == ["dog", "cat", None, "cat", "dog"]
    assert [len(row["top_k"]) for row in found] == [1] * 5


def test_rows_of_vectors_do_not_depend_on_the_batch(cli: Cli, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((300, 16)).round(3)
    # Rows alike, and labels that cannot be told apart there.
    numbers[::7] = numbers[0]
    test = vectors_file(tmp_path / "v.parquet", numbers.tolist())
    common = ("classify", test, "--vector-column", "v", "-m", "fake:16", "--labels", "a,b,c,d", "-o")
    found = []
    for size in (1, 7, 2048):
        assert cli(*common, tmp_path / f"{size}.parquet", "--batch-size", size).code == 0
        found.append(pq.read_table(tmp_path / f"{size}.parquet"))
    for table in found[1:]:
        assert table.column("label").equals(found[0].column("label"))
        for name in ("score", "margin", "entropy"):
            assert np.allclose(table.column(name), found[0].column(name), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {}}, "its head cannot be read"),
        ({"labels": ["a", "b"]}, "2 labels, 3 rows of weights"),
        ({"format": 9}, "its format is 9; this version reads 1"),
        (None, "its head cannot be read"),
    ],
)
def test_a_damaged_head(cli: Cli, animals: Path, tmp_path: Path, change: dict[str, Any] | None, said: str) -> None:
    head = tmp_path / "head"
    common = ("classify", animals, "--text-column", "text", "-m")
    assert cli(*common, "fake:16", "--labels", "a,b,c", "--save-head", head).code == 0
    told = json.loads((head / "head.json").read_text())
    (head / "head.json").write_text("{" if change is None else json.dumps({**told, **change}))
    done = cli(*common, head)
    assert (done.code, said in done.err) == (2, True), done.err


# ------------------------------------------------------------------------------------- solved examples


def solved_texts(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.txt").write_text(name)
    return folder


def test_examples_in_folders_and_a_kept_head(cli: Cli, animals: Path, tmp_path: Path) -> None:
    folder, head = solved_texts(tmp_path / "solved"), tmp_path / "head"
    common = ("classify", animals, "--text-column", "text", "-m")
    done = cli(*common, "fake:16", "--examples", folder, "--save-head", head)
    assert done.code == 0, done.err
    found = rows(done.out)
    assert [row["label"] for row in found if row["score"] > 0.9] == ["dog", "cat", "cat", "dog"]
    assert "--method auto: nearest class means: a label has 1 of the 4 for a probe" in done.err
    again = cli(*common, head)
    assert again.code == 0, again.err
    assert rows(again.out) == found
    # It is there: the same command makes it anew, and one of something else does not touch it.
    assert cli(*common, "fake:16", "--examples", folder, "--save-head", head).code == 0
    assert "--labels" in cli(*common, head, "--labels", "a,b").err


@pytest.mark.parametrize("method", ["mean", "probe", "tip-adapter"])
def test_methods(cli: Cli, animals: Path, tmp_path: Path, method: str) -> None:
    folder = solved_texts(tmp_path / "solved")
    model = PLAIN if method == "tip-adapter" else PLAIN[:2]
    done = cli("classify", animals, "--text-column", "text", *model, "--examples", folder, "--method", method)
    assert done.code == 0, done.err
    found = rows(done.out)
    assert [row["label"] for row in found if row["id"][-1] in "0134"] == ["dog", "cat", "cat", "dog"]


def test_bad_examples(cli: Cli, animals: Path, tmp_path: Path) -> None:
    folder = solved_texts(tmp_path / "solved")
    (folder / "cat" / "2.txt").write_bytes(b"\xff\xfe\xff")
    common = ("classify", animals, "--text-column", "text", "-m", "fake:16", "--examples", folder)
    done = cli(*common)
    assert done.code == 0, done.err
    assert "1 of 3 examples cannot be used: cat/2.txt: corrupt" in done.err
    (folder / "cat" / "1.txt").unlink()
    done = cli(*common, "-o", tmp_path / "out.parquet")
    assert done.code == 2
    assert "no readable example of 'cat'" in done.err
    assert not (tmp_path / "out.parquet").exists()
    (folder / "bird").mkdir()
    assert "there is no example in the folder bird" in cli(*common).err
    (folder / "stray.txt").write_text("cat")
    assert "stray.txt lie in no label's folder" in cli(*common).err


def test_another_label_of_an_example_is_another_job(cli: Cli, animals: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_text("text,label\ncat,cat\ndog,dog\n")
    out = tmp_path / "out.parquet"
    common = ("classify", animals, "--text-column", "text", "-m", "fake:16", "--examples", train, "-o", out)
    assert cli(*common).code == 0
    train.write_text("text,label\ncat,dog\ndog,cat\n")
    done = cli(*common)
    assert done.code == 6
    assert cli(*common, "--overwrite").code == 0
    assert pq.read_table(out).column("label").to_pylist()[:2] == ["cat", "dog"]


def test_the_few_photos(cli: Cli, shared_data: Path) -> None:
    model = shared_data / "models" / "mobilenet_v2_1.0_224"
    photos = shared_data / "images" / "fewshot"
    done = cli("classify", photos / "test", "-m", model, "--examples", photos / "train")
    assert done.code == 0, done.err
    assert [(row["id"].split("/")[0], row["label"]) for row in rows(done.out)] == [
        (name, name) for name in ("cat", "dog", "hotdog")
    ]


def digit_features(folder: Path, target: Path) -> Path:
    """Each sound's cepstra in twelve equal pieces of time, and their spread: float32 [260]."""
    import torch
    import torchaudio
    from torchaudio.transforms import MFCC

    cepstra = MFCC(8000, n_mfcc=20, melkwargs={"n_fft": 256, "hop_length": 80, "n_mels": 40})
    files, vectors = sorted(folder.rglob("*.wav")), []
    for file in files:
        with wave.open(str(file)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768
        found = cepstra(torch.from_numpy(samples))
        pieces = torch.nn.functional.adaptive_avg_pool1d(found[None], 12)[0]
        vectors.append(torch.cat([pieces.flatten(), found.std(dim=1)]).numpy())
    assert torchaudio is not None
    flat = pa.array(np.stack(vectors).reshape(-1))
    features = pa.FixedSizeListArray.from_arrays(flat, len(vectors[0]))
    names = [file.relative_to(folder).as_posix() for file in files]
    digits = [file.parent.name for file in files]
    pq.write_table(pa.table({"id": names, "digit": digits, "features": features}), target)
    return target


def test_a_probe_hears_spoken_digits(cli: Cli, shared_data: Path, tmp_path: Path) -> None:
    digits = shared_data / "audio" / "digits"
    train = digit_features(digits / "train", tmp_path / "train.parquet")
    test = digit_features(digits / "test", tmp_path / "test.parquet")
    out = tmp_path / "out.parquet"
    done = cli("classify", test, "--vector-column", "features", "--examples", train, "--label-column", "digit",
               "--keep", "digit", "-o", out)  # fmt: skip
    assert done.code == 0, done.err
    assert "--method auto: a probe: every label has 18 examples or more" in done.err
    report = cli("eval", out, "--truth", "digit", "--json")
    assert report.code == 0, report.err
    found = json.loads(report.out)
    table = pq.read_table(out)
    right = [a == b for a, b in zip(*(table.column(n).to_pylist() for n in ("label", "digit")), strict=True)]
    assert np.mean(right) >= 0.9
    assert found["scores"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert len(found["classes"]) == 10


# --------------------------------------------------------------------------------------- model's labels


def test_a_models_own_labels(cli: Cli, shared_data: Path) -> None:
    """At least 9 of 12 photos are what photos.csv says, by the ImageNet classes of that kind."""
    done = cli("classify", shared_data / "images" / "photos", "-m", shared_data / "models" / "mobilenet_v2_1.0_224")
    assert done.code == 0, done.err
    with (shared_data / "images" / "photos.csv").open(newline="") as file:
        known = {Path(row["file"]).name: row["label"] for row in csv.DictReader(file)}
    found = {row["id"]: row["label"] for row in rows(done.out)}
    assert found.keys() == known.keys()
    right = [name for name, label in known.items() if any(kind in found[name] for kind in KINDS.get(label, ()))]
    assert len(right) >= 9, found


# Words of ImageNet's labels for what is in the photos; it has no sunflower and no astronaut.
KINDS = {
    "bird": ("chickadee", "bulbul", "jay", "junco", "finch"),
    "cat": ("tabby", "tiger cat", "Egyptian cat", "Persian cat", "Siamese cat"),
    "dragonfly": ("dragonfly", "damselfly"),
    "owl": ("owl",),
    "parrot": ("macaw", "lorikeet", "African grey"),
    "hot dog": ("hot dog",),
    "dog": ("hound", "whippet", "retriever", "pointer", "setter", "terrier"),
    "cup of coffee": ("espresso", "cup", "coffee mug"),
}


# --------------------------------------------------------------------------------------------- mistakes

IMAGES, CLIP, VQA = "sample_data/images", "sample_data/models/clip", "sample_data/models/vqa"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", CLIP], ["-m sample_data/models/clip: it has no labels of its own; add --labels cat,dog"]),
        (["-m", CLIP, "--labels", ""], ["--labels: there is no label in it"]),
        (["-m", CLIP, "--labels", "cat"], ["--labels: with one label every input has it"]),
        (["-m", CLIP, "--labels", "README.md"], ["is a file; for the labels in it: --labels-file README.md"]),
        (["-m", CLIP, "--labels", "cat,dog,cat"], ["--labels: 'cat' is there twice"]),
        (["-m", CLIP, "--labels", "a,b", "--labels-file", "x"], ["--labels and --labels-file exclude"]),
        (["-m", CLIP, "--labels-file", "none.txt"], ["--labels-file: cannot read none.txt: No such file"]),
        (["-m", CLIP, "--labels-file", "none.parquet"], ["cannot read none.parquet: there is no such file"]),
        (["-m", CLIP, "--labels-file", "sample_data/images.parquet"], ["it was not written by --save-labels"]),
        (["-m", CLIP, "--labels", "a,b", "--templates", "x"], ["--templates 'x' is not one of imagenet80"]),
        (["-m", CLIP, "--labels", "a,b", "--multi-label"], ["--multi-label: the labels of this model compete"]),
        (["-m", CLIP, "--labels", "a,b", "--method", "probe"], ["--method probe: there are no --examples"]),
        (["-m", CLIP, "--labels", "a,b", "--question", "?"], ["is asked nothing; leave it out"]),
        (["-m", CLIP, "--labels", "a,b", "--save-labels", "x.json"], ["name it x.parquet"]),
        (["-m", CLIP, "--labels", "a,b", "--save-head", "sample_data"], ["there is something else already"]),
        (["-m", CLIP, "--examples", IMAGES], ["has no folders; give it one for each label"]),
        (["-m", CLIP, "--labels", "a,b", "--save-labels", "x/y.parquet"], ["there is no folder"]),
        (["-m", CLIP, "--labels", "a,b", "--tip-beta", "3"], ["--tip-beta goes with --examples and --method tip"]),
        (["-m", CLIP, "--labels", "a,b", "--label-column", "x"], ["--label-column x: there are no --examples"]),
        (["-m", CLIP, "--labels", "a,b", "--vector-column", "v", "--image-column", "x"], ["exclude one another"]),
        (["-m", VQA, "--labels", "a,b", "--save-labels", "x.parquet"], ["compares no vectors"]),
        (["-m", VQA, "--examples", "solved"], ["it writes, and gives no vectors to compare; mmcli ask --choices"]),
        (["-m", VQA, "--labels", "a,b", "--question", "{x}?"], ["{x} is no variable of it"]),
        (["-m", VQA, "--labels", "a,b", "--template", "{}"], ["say it with --question"]),
        (["-m", "sample_data/models/captioner", "--labels", "a,b"], ["it writes captions (mmcli caption)"]),
        (["--labels", "a,b"], ["no model given; add -m MODEL"]),
        (
            ["-m", CLIP, "--labels", "a,,b", "--template", "photo", "--top-k", "0", "--min-score", "7"],
            ["--labels: label 2 of 3 is empty", "there is no {} in it", "--top-k '0'", "--min-score '7'"],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(
    cli: Cli,
    sample_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(sample_data.parent)
    arguments = [str(solved_texts(tmp_path / one)) if one == "solved" else one for one in arguments]
    done = cli("classify", IMAGES, *arguments)
    assert done.code == 2
    for text in said:
        assert text in done.err
    assert done.out == ""
