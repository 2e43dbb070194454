"""`mmcli classify` with models that write, entail or live on a server, and with SigLIP and X-CLIP."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny_chats
import tiny_dual
from cli_runs import Cli, manifest
from endpoint_server import Reply, Seen, completion, serving
from PIL import Image
from tiny_classifiers import ENTAILMENT

LABELS = ("--labels", "red,blue,green")


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (32 + 4 * number, 32), (50 * number, 90, 200 - 40 * number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dual.siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def xclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dual.xclip(tmp_path_factory.mktemp("xclip"))


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ENTAILMENT["bert"](tmp_path_factory.mktemp("nli"))


def check_ranked(row: dict[str, Any], labels: set[str]) -> None:
    """What holds for scores of labels that exclude one another."""
    top = row["top_k"]
    assert {one["label"] for one in top} == labels
    scores = [one["score"] for one in top]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert (row["label"], row["score"]) == (top[0]["label"], top[0]["score"])
    assert row["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-6)
    assert row["entropy"] == pytest.approx(-sum(s * math.log(s) for s in scores if s > 0), abs=1e-5)


# ----------------------------------------------------------------------------------- models that write


def test_a_chat_model_chooses_as_ask_does(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    model = tiny_chats.smolvlm(tmp_path / "chat")
    done = cli("classify", pictures, "-m", model, *LABELS, "--question", "Which colour: {labels}?")
    assert done.code == 0, done.err
    found = rows(done.out)
    for row in found:
        check_ranked(row, {"red", "blue", "green"})
    asked = cli(
        "ask", pictures, "-m", model, "-q", "Which colour: red, blue, green?", "--choices", "red,blue,green",
        "--max-new-tokens", 20,
    )  # fmt: skip
    assert [row["label"] for row in found] == [row["answer"] for row in rows(asked.out)]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in rows(asked.out)], abs=1e-6)
    alone = cli("classify", pictures, "-m", model, *LABELS, "--question", "Which colour: {labels}?",
                "--batch-size", 1)  # fmt: skip
    assert [row["score"] for row in rows(alone.out)] == pytest.approx([row["score"] for row in found], abs=1e-5)


def test_a_vqa_model_chooses(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    """A model that answers questions tells colours apart when it is asked for them."""
    colours = ("red", "green", "blue", "yellow")
    listed = [json.loads(line) for line in (sample_data / "images.jsonl").read_text().splitlines()]
    chosen = [row for row in listed if row["label"].split()[0] in colours]
    inputs = tmp_path / "inputs.jsonl"
    text = "\n".join(json.dumps({**row, "image": str(sample_data / row["image"])}) for row in chosen)
    inputs.write_text(text + "\n")
    common = ("classify", inputs, "--image-column", "image", "--keep", "truth=label", "--labels", ",".join(colours))
    out = tmp_path / "out.parquet"
    done = cli(*common, "-m", sample_data / "models" / "vqa", "--question", "what color is the shape?", "-o", out)
    assert done.code == 0, done.err
    found = pq.read_table(out).to_pylist()
    right = sum(row["label"] == row["truth"].split()[0] for row in found)
    assert right >= 0.9 * len(found) > 0
    told = json.loads(pq.read_schema(out).metadata[b"mmcli"])
    assert (told["task"], told["model"]["labels"]) == ("classify", list(colours))


def test_a_server_chooses(cli: Cli, tmp_path: Path) -> None:
    """What a server does not tell is null, and no score is no reason to reject."""
    inputs = manifest(tmp_path / "m.csv", 4, r2="bad")

    def answer(seen: Seen) -> Reply:
        if seen.text.startswith("bad"):
            return Reply(completion("purple"))
        return Reply(completion("blue"))

    with serving(answer) as server:
        done = cli("classify", inputs, "--text-column", "text", "-m", "openai:tiny", "--endpoint", server.url,
                   *LABELS, "--min-score", "0.5")  # fmt: skip
        asked = server.seen[0].text
    assert done.code == 3, done.err
    found = rows(done.out)
    assert [row["label"] for row in found] == ["blue", "blue", None, "blue"]
    assert [row["error_code"] for row in found] == [None, None, "invalid_output", None]
    assert found[0]["top_k"] == [{"label": "blue", "score": None}]
    assert [found[0][name] for name in ("score", "margin", "entropy", "rejected")] == [None, None, None, False]
    assert "Which of these is it: red, blue, green?" in asked


# ------------------------------------------------------------------------------------------ entailment


def test_texts_by_entailment(cli: Cli, nli: Path, tmp_path: Path) -> None:
    texts = manifest(tmp_path / "m.csv", 6)
    common = ("classify", texts, "--text-column", "text", "-m", nli, "--labels", "cat,dog,photo")
    done = cli(*common)
    assert done.code == 0, done.err
    for row in rows(done.out):
        check_ranked(row, {"cat", "dog", "photo"})
    alone = rows(cli(*common, "--batch-size", 1).out)
    assert [row["score"] for row in alone] == pytest.approx([row["score"] for row in rows(done.out)], abs=1e-5)
    other = rows(cli(*common, "--template", "a photo of a {}").out)
    assert [row["score"] for row in other] != [row["score"] for row in alone]


def test_any_number_of_labels_by_entailment(cli: Cli, nli: Path, tmp_path: Path) -> None:
    texts = manifest(tmp_path / "m.csv", 6)
    common = ("classify", texts, "--text-column", "text", "-m", nli, "--multi-label")
    found = rows(cli(*common, "--labels", "cat,dog,photo", "--threshold", "0.4").out)
    for row in found:
        assert row["labels"] == [one["label"] for one in row["top_k"] if one["score"] >= 0.4]
    # Each label alone: what else there is to choose from does not matter.
    alone = rows(cli(*common, "--labels", "dog").out)
    scores = [next(one["score"] for one in row["top_k"] if one["label"] == "dog") for row in found]
    assert [row["score"] for row in alone] == pytest.approx(scores, abs=1e-5)
    assert [row["margin"] for row in alone] == [None] * 6


def test_a_model_with_a_head_takes_no_labels(cli: Cli, nli: Path, tmp_path: Path) -> None:
    texts = manifest(tmp_path / "m.csv", 2)
    own = cli("classify", texts, "--text-column", "text", "-m", nli)
    assert {one["label"] for one in rows(own.out)[0]["top_k"]} == {"CONTRADICTION", "NEUTRAL", "ENTAILMENT"}
    saved = cli("classify", texts, "--text-column", "text", "-m", nli, "--save-head", tmp_path / "head")
    assert saved.code == 2
    assert "compares no vectors that could be kept" in saved.err


# ---------------------------------------------------------------------------------------- dual encoders


def test_any_number_of_labels_by_siglip(cli: Cli, siglip: Path, pictures: Path, tmp_path: Path) -> None:
    kept, vectors = tmp_path / "labels.parquet", tmp_path / "v.parquet"
    many = ("--multi-label", "--threshold", "0.5")
    done = cli("classify", pictures, "-m", siglip, *LABELS, *many, "--save-labels", kept)
    assert done.code == 0, done.err
    found = rows(done.out)
    for row in found:
        assert row["labels"] == [one["label"] for one in row["top_k"] if one["score"] >= 0.5]
    # Kept vectors know how their scores are made, without the model.
    assert cli("embed", pictures, "-m", siglip, "-o", vectors).code == 0
    again = cli("classify", vectors, "--labels-file", kept, *many)
    assert again.code == 0, again.err
    assert [row["score"] for row in rows(again.out)] == pytest.approx([row["score"] for row in found], abs=1e-5)
    one = cli("classify", pictures, "-m", siglip, "--labels", "red", "--multi-label")
    assert one.code == 0, one.err
    reds = [next(one["score"] for one in row["top_k"] if one["label"] == "red") for row in found]
    assert [row["score"] for row in rows(one.out)] == pytest.approx(reds, abs=1e-5)


def test_rows_do_not_depend_on_the_batch_or_the_workers(cli: Cli, siglip: Path, pictures: Path) -> None:
    wanted = rows(cli("classify", pictures, "-m", siglip, *LABELS).out)
    for more in (("--batch-size", 1), ("--batch-size", 2, "--num-workers", 2)):
        found = rows(cli("classify", pictures, "-m", siglip, *LABELS, *more).out)
        assert [row["label"] for row in found] == [row["label"] for row in wanted]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-5)


def test_bfloat16(cli: Cli, sample_data: Path) -> None:
    model, labels = sample_data / "models" / "clip", sample_data / "labels.txt"
    common = (
        "classify",
        sample_data / "images.jsonl",
        "--image-column",
        "image",
        "-m",
        model,
        "--labels-file",
        labels,
    )
    plain, half = rows(cli(*common).out), rows(cli(*common, "--dtype", "bfloat16").out)
    assert sum(a["label"] == b["label"] for a, b in zip(plain, half, strict=True)) >= 46


@pytest.fixture
def clips(shared_data: Path) -> Path:
    return shared_data / "video"


def test_labels_that_depend_on_the_clip(cli: Cli, xclip: Path, clips: Path, tmp_path: Path) -> None:
    """X-CLIP's labels have other vectors beside each clip: scores of clips, and none of their vectors."""
    inputs = (clips / "nasa_13013.mp4", clips / "chaplin.mp4")
    direct = cli("classify", *inputs, "-m", xclip, *LABELS)
    assert direct.code == 0, direct.err
    for row in rows(direct.out):
        check_ranked(row, {"red", "blue", "green"})
    vectors = tmp_path / "v.parquet"
    assert cli("embed", *inputs, "-m", xclip, "-o", vectors).code == 0
    refused = cli("classify", vectors, "-m", xclip, *LABELS)
    assert refused.code == 2
    assert "INPUT: the vectors of labels depend on each clip" in refused.err
    for flag in ("--save-labels", "--save-head"):
        done = cli("classify", *inputs, "-m", xclip, *LABELS, flag, tmp_path / "kept.parquet")
        assert (done.code, "depend on each clip" in done.err) == (2, True)
    # Examples are vectors like any others.
    solved = tmp_path / "solved.csv"
    solved.write_text("video,label\n" + "".join(f"{path},{path.stem}\n" for path in inputs))
    learned = cli("classify", vectors, "-m", xclip, "--examples", solved)
    assert [row["label"] for row in rows(learned.out)] == ["nasa_13013", "chaplin"]
    tip = cli("classify", *inputs, "-m", xclip, "--examples", solved, "--method", "tip-adapter")
    assert tip.code == 2
    assert "take --method mean or probe" in tip.err
