"""`mmcli classify --into`: files in folders of their labels, through the command."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import Cli, process, wait_until
from PIL import Image, ImageOps

MODEL = ("-m", "fake:8", "--labels", "a,b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sorted"


@pytest.fixture
def command(texts: Path, tmp_path: Path, folder: Path) -> list[object]:
    return ["classify", texts, *MODEL, "-o", tmp_path / "o.parquet", "--into", folder]


def labels(out: Path) -> dict[str, str]:
    table = pq.read_table(out, columns=["id", "label"])
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.glob("*/*") if p.parent.name != ".mmcli")


def matches(folder: Path, out: Path) -> bool:
    """Whether FOLDER says what the rows say: the files, and metadata.csv."""
    wanted = [f"{label}/{name}" for name, label in labels(out).items() if label is not None]
    rows = list(csv.DictReader(io.StringIO((folder / "metadata.csv").read_text())))
    same = [(row["file_name"], f"{row['label']}/{row['id']}") for row in rows] == [(one, one) for one in wanted]
    return same and tree(folder) == sorted(wanted)


@pytest.mark.parametrize("how", [(), ("--link",), ("--copy",)])
@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "folder/"])
def test_files_go_to_their_labels(
    cli: Cli, command: list[object], folder: Path, tmp_path: Path, how: tuple[str, ...], name: str
) -> None:
    command[command.index("-o") + 1] = f"{tmp_path}/{name}"
    done = cli(*command, *how)
    assert done.code == 0, done.err
    copied = how == ("--copy",)
    assert f"{folder}: 5 {'copied' if copied else 'linked'}\n" in done.err
    assert cli("classify", tmp_path / "texts", *MODEL, "-o", tmp_path / "check.parquet").code == 0
    assert matches(folder, tmp_path / "check.parquet")
    placed = [folder / one for one in tree(folder)]
    assert [p.read_text() for p in placed] == [(tmp_path / "texts" / p.name).read_text() for p in placed]
    assert all(p.is_symlink() != copied for p in placed)
    # An output that is complete is not made again, its files are.
    placed[0].unlink()
    done = cli(*command, *how)
    assert "complete already" in done.err
    assert f"{folder}: 1 {'copied' if copied else 'linked'}; 4 were there\n" in done.err
    assert matches(folder, tmp_path / "check.parquet")


def test_update_follows_the_rows(
    cli: Cli, command: list[object], texts: Path, folder: Path, tmp_path: Path
) -> None:
    assert cli(*command).code == 0
    for number in range(5):
        (texts / f"{number}.txt").write_text(f"another text {number}")
    (texts / "3.txt").unlink()
    (texts / "new.txt").write_text("new")
    before = labels(tmp_path / "o.parquet")
    assert cli(*command, "--update").code == 0
    assert labels(tmp_path / "o.parquet") != before
    assert matches(folder, tmp_path / "o.parquet")
    assert not any("3.txt" in name for name in tree(folder))


def test_other_labels(cli: Cli, command: list[object], folder: Path, tmp_path: Path) -> None:
    assert cli(*command).code == 0
    command[command.index("a,b")] = "c,.."
    assert cli(*command).code == 6
    assert cli(*command, "--overwrite").code == 0
    assert set(labels(tmp_path / "o.parquet").values()) == {"c", ".."}
    assert {p.name for p in folder.iterdir()} == {".mmcli", "metadata.csv", "c", "%2E."}


def test_errors_and_rejected_rows_are_left_out(
    cli: Cli, command: list[object], texts: Path, folder: Path, tmp_path: Path
) -> None:
    (texts / "3.txt").write_bytes(b"\xff\xff")
    scores = tmp_path / "s.parquet"
    assert cli("classify", texts, *MODEL, "-o", scores).code == 3
    found = sorted(s for s in pq.read_table(scores)["score"].to_pylist() if s is not None)
    done = cli(*command, "--min-score", (found[1] + found[2]) / 2)
    assert done.code == 3
    assert f"{folder}: 2 linked; 2 without a label left out; 1 error rows left out" in done.err
    assert matches(folder, tmp_path / "o.parquet")


def test_several_labels(cli: Cli, sample_data: Path, folder: Path, tmp_path: Path) -> None:
    """Each has its copy, also those that --top-k does not list."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    names = {"id2label": {0: "one", 1: "two/2"}, "label2id": {"one": 0, "two/2": 1}}
    config = ViTConfig(**small, **names, image_size=32, problem_type="multi_label_classification")
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    images = [sample_data / "images" / name for name in ("00-red-circle.png", "01-red-square.jpg")]
    command = ["classify", *images, "-m", tmp_path / "model", "-o", tmp_path / "o.parquet", "--into", folder]
    done = cli(*command, "--multi-label", "--threshold", "0.000001", "--top-k", "1")
    assert done.code == 0, done.err
    assert tree(folder) == [f"{label}/{image.name}" for label in ("one", "two%2F2") for image in images]
    rows = list(csv.DictReader(io.StringIO((folder / "metadata.csv").read_text())))
    assert sorted(row["score"] != "" for row in rows) == [False, False, True, True]
    assert {row["label"] for row in rows} == {"one", "two/2"}


def test_vectors_know_absolute_paths(
    cli: Cli, texts: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, root in (("relative", "texts"), ("absolute", texts)):
        assert cli("embed", root, "-m", "fake:8", "-o", f"{name}.parquet").code == 0
        done = cli("classify", f"{name}.parquet", *MODEL, "-o", f"{name}-labels.parquet", "--into", name)
        assert done.code == 0, done.err
    assert "absolute: 5 linked\n" in done.err
    assert tree(tmp_path / "relative") == []
    assert matches(tmp_path / "absolute", tmp_path / "absolute-labels.parquet")


def test_the_folder_is_an_input_of_mmcli(cli: Cli, command: list[object], folder: Path, tmp_path: Path) -> None:
    """A folder with metadata.csv, and one of solved examples."""
    assert cli(*command).code == 0
    assert cli("embed", folder, "-m", "fake:8", "--keep", "true=label", "-o", tmp_path / "e.parquet").code == 0
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["true"].to_pylist() == list(labels(tmp_path / "o.parquet").values())
    assert table["status"].to_pylist() == ["ok"] * 5
    done = cli(
        "classify", tmp_path / "texts", "-m", "fake:8", "--examples", folder, "-o", tmp_path / "again.parquet"
    )
    assert done.code == 0, done.err
    assert labels(tmp_path / "again.parquet") == labels(tmp_path / "o.parquet")


def test_imagefolder_reads_it(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("the package datasets is not installed")
    from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]

    shutil.copytree(sample_data / "images", tmp_path / "in", ignore=shutil.ignore_patterns("metadata.*"))
    command = ["classify", tmp_path / "in", "-m", "fake:8", "--labels", "x/y,.z,train"]
    done = cli(*command, "-o", tmp_path / "o.parquet", "--into", tmp_path / "sorted")
    assert done.code == 0, done.err
    loaded = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "sorted"), data_files={"train": "**"}, cache_dir=str(tmp_path / "c")
    )["train"]
    assert dict(zip(loaded["id"], loaded["label"], strict=True)) == labels(tmp_path / "o.parquet")
    turned = {p.name: ImageOps.exif_transpose(Image.open(p)) for p in (tmp_path / "in").iterdir()}
    sizes = {name: picture.size for name, picture in turned.items()}
    assert {name: picture.size for name, picture in zip(loaded["id"], loaded["image"], strict=True)} == sizes


def test_interrupted_while_copying(texts: Path, folder: Path, tmp_path: Path, cli: Cli) -> None:
    for number in range(1500):
        (texts / f"x{number}.txt").write_text(f"text {number}")
    command = ["classify", texts, *MODEL, "-o", tmp_path / "o.parquet", "--into", folder, "--copy"]
    running = process(*command, "--num-workers", "0")
    wait_until(lambda: len(tree(folder)) > 10)
    running.send_signal(signal.SIGINT)
    err = running.communicate(timeout=60)[1].decode()
    if running.returncode == 0:
        pytest.skip("it was finished before the signal came")
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert not (folder / "metadata.csv").exists()
    assert not (folder / ".mmcli/new").exists()
    done = cli(*command)
    assert done.code == 0, done.err
    assert matches(folder, tmp_path / "o.parquet")


# ------------------------------------------------------------------------------------------ wrong commands


def refused(done: object, *said: str) -> None:
    """Before anything runs: exit 2, and what to type."""
    assert done.code == 2, done  # type: ignore[attr-defined]
    for one in said:
        assert one in done.err, done  # type: ignore[attr-defined]
    assert " ok" not in done.err  # type: ignore[attr-defined]


def test_options_that_do_not_go_together(cli: Cli, command: list[object], texts: Path, folder: Path) -> None:
    bare = ["classify", texts, *MODEL]
    refused(cli(*bare, "--copy"), "--copy: there is no folder to put files into; add --into FOLDER")
    refused(cli(*command, "--link", "--copy"), "--link and --copy exclude one another")
    done = cli(*bare, "--into", folder)
    refused(done, f"--into {folder}: files are put there when all rows are there, from an output; add e.g. -o")
    refused(cli(*command, "-f", "coco"), "made from the rows of an output")
    assert not folder.exists()


@pytest.mark.parametrize("place", ["texts", "texts/sorted", "texts/deep/sorted"])
def test_a_folder_in_an_input(cli: Cli, texts: Path, tmp_path: Path, place: str) -> None:
    (texts / "deep").mkdir()
    (tmp_path / "link").symlink_to(texts)
    for given in (texts, tmp_path / "link", f"{texts}/**/*.txt"):
        done = cli("classify", given, *MODEL, "-o", tmp_path / "o.parquet", "--into", tmp_path / place)
        refused(done, f"--into {tmp_path / place}: ")
        assert "the input " in done.err
    assert not (tmp_path / "o.parquet").exists()


@pytest.mark.parametrize(
    ("pattern", "code"), [("*.txt", 0), ("*/*.txt", 0), ("*/*/*.txt", 2), ("deep/*/*.txt", 0), ("**/*.txt", 2)]
)
def test_patterns_that_reach_into_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "deep/a.txt", "deep/er/a.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    done = cli("classify", pattern, *MODEL, "-o", "o.parquet", "--into", "sorted")
    assert done.code == code, done.err


def test_an_input_in_the_folder(cli: Cli, command: list[object], folder: Path, tmp_path: Path) -> None:
    assert cli(*command).code == 0
    one = folder / tree(folder)[0]
    for given in (one.parent, f"{one.parent}/*.txt"):
        done = cli("classify", given, *MODEL, "-o", tmp_path / "p.parquet", "--into", folder)
        refused(done, "lies in it")


def test_folders_that_are_taken(cli: Cli, command: list[object], texts: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "cv.pdf").write_text("mine")
    base = ["classify", texts, *MODEL, "-o", tmp_path / "p.parquet", "--into"]
    refused(cli(*base, other), f"--into {other}: there is something else in it already (cv.pdf)")
    refused(cli(*base, other / "cv.pdf"), "this is a file")
    refused(cli(*base, tmp_path / "no/such"), f"there is no folder {tmp_path}/no; mkdir -p '{tmp_path}/no'")
    assert cli(*command).code == 0
    refused(cli(*base, folder), f"its files are of another output, {tmp_path}/o.parquet")
    refused(
        cli(*command[:-4], "-o", folder / "o.parquet", "--into", folder), "lies in it; put the output beside it"
    )
    done = cli(*command[:-4], "-o", f"{tmp_path}/out/", "--into", tmp_path / "out/sorted")
    refused(done, f"it lies in -o {tmp_path}/out/")
    assert os.listdir(other) == ["cv.pdf"]


@pytest.mark.parametrize("owner", ["{", "[]", '{"output": 3, "metadata": []}', '{"output": "../o.parquet"}'])
def test_a_folder_that_no_longer_says_whose_it_is(
    cli: Cli, command: list[object], folder: Path, owner: str
) -> None:
    assert cli(*command).code == 0
    (folder / ".mmcli/owner.json").write_text(owner)
    refused(cli(*command), f"--into {folder}: there is something else in it already")


def test_all_problems_together(cli: Cli, texts: Path, tmp_path: Path) -> None:
    done = cli("classify", texts, "-m", "fake:8", "--into", texts, "--link", "--copy", "--top-k", "0")
    refused(done, "--link and --copy", "it is the input", "add e.g. -o labels.parquet", "--top-k")


def test_failures_are_exit_8_with_the_output_complete(
    cli: Cli, command: list[object], folder: Path, tmp_path: Path
) -> None:
    assert cli(*command).code == 0
    shutil.rmtree(folder / "a")
    (folder / "a").write_text("mine")
    done = cli(*command)
    assert done.code == 8
    assert f"cannot write {folder}/a: Not a directory" in done.err
    assert "the output itself is complete" in done.err
    (folder / "a").unlink()
    assert cli(*command).code == 0
    assert matches(folder, tmp_path / "o.parquet")


def test_a_list_that_names_the_folder_too(folder: Path, texts: Path, tmp_path: Path) -> None:
    """`find . | mmcli classify -`, twice."""
    command = [sys.executable, "-m", "mmcli", "classify", "-", *MODEL, "--into", "sorted", "-o", "o.parquet"]
    for more in ([], ["--update"]):
        found = subprocess.run(["find", "-L", ".", "-name", "*.txt"], cwd=tmp_path, capture_output=True, check=True)
        done = subprocess.run([*command, *more], cwd=tmp_path, input=found.stdout, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert b"5 were there; 5 lie in it themselves and are left alone" in done.stderr
    assert len(tree(folder)) == 5
