"""Centring: means that `mmcli eval` keeps, and vectors that `mmcli embed` makes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli


def embedded(cli: Cli, sample_data: Path, out: Path, *more: object, code: int = 0) -> str:
    """Pictures and questions about them: pairs that the model confuses."""
    done = cli(
        "embed", sample_data / "images.jsonl", "--image-column", "image", "--text-column", "question",
        "--id-column", "id", "-m", sample_data / "models" / "clip", "-o", out, "--quiet", *more,
    )  # fmt: skip
    assert done.code == code, done.err
    return done.err


def scores(cli: Cli, *arguments: object) -> dict[str, float]:
    done = cli("eval", *arguments, "--json", "--bootstrap", 20)
    assert done.code == 0, done.err
    return {name: one["value"] for name, one in json.loads(done.out)["scores"].items()}


def vectors(path: Path, name: str) -> np.ndarray:
    column = pq.read_table(path).column(name).combine_chunks()
    found: np.ndarray = column.flatten().to_numpy().reshape(len(column), -1)
    return found


@pytest.fixture
def kept(cli: Cli, sample_data: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, float]]:
    """Vectors, the file with their means, and what was measured."""
    out, stats = tmp_path / "plain.parquet", tmp_path / "stats.json"
    embedded(cli, sample_data, out)
    return out, stats, scores(cli, out, "--save-center", stats)


def test_centred_vectors_measure_as_was_said(
    cli: Cli, sample_data: Path, tmp_path: Path, kept: tuple[Path, Path, dict[str, float]]
) -> None:
    plain, stats, told = kept
    out = tmp_path / "centred.parquet"
    embedded(cli, sample_data, out, "--center", stats)
    found = scores(cli, out)
    recalls = [name for name in told if name.startswith("centred_") and "_r_at_" in name]
    assert len(recalls) == 6
    assert {name: told[name] for name in recalls} == {
        name: found[name.removeprefix("centred_")] for name in recalls
    }
    assert any(told[name] != told[name.removeprefix("centred_")] for name in recalls)
    assert told["modality_gap"] > 0.5
    assert told["centred_modality_gap"] < 0.3 * told["modality_gap"]
    assert found["modality_gap"] == pytest.approx(told["centred_modality_gap"], abs=1e-6)
    means = json.loads(stats.read_text())["means"]
    for modality in ("image", "text"):
        moved = vectors(plain, f"{modality}_embedding") - np.array(means[modality])
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors(out, f"{modality}_embedding"), moved, atol=1e-6)


def test_it_is_part_of_what_the_output_is(
    cli: Cli, sample_data: Path, tmp_path: Path, kept: tuple[Path, Path, dict[str, float]]
) -> None:
    plain, stats, _ = kept
    error = embedded(cli, sample_data, plain, "--center", stats, code=6)
    assert "model.center: was not set, is " in error
    out = tmp_path / "centred.parquet"
    embedded(cli, sample_data, out, "--center", stats)
    identity = json.loads(cli("inspect", out, "--json").out)["model"]
    assert len(identity["center"]) == 32
    assert identity["normalized"] is True
    done = cli("eval", out, "--save-center", tmp_path / "again.json")
    assert done.code == 2
    assert "are centred already" in done.err
    done = cli(
        "classify",
        out,
        "--vector-column",
        "image_embedding",
        "-m",
        sample_data / "models" / "clip",
        "--labels",
        "a,b",
    )
    assert done.code == 2
    assert "are centred (mmcli embed --center)" in done.err


def test_two_files(cli: Cli, sample_data: Path, tmp_path: Path, kept: tuple[Path, Path, dict[str, float]]) -> None:
    """Each of one modality, as its column `modality` says."""
    model, manifest = sample_data / "models" / "clip", sample_data / "images.jsonl"
    for column, name in (("image", "images"), ("question", "texts")):
        option = "--image-column" if column == "image" else "--text-column"
        out = tmp_path / f"{name}.parquet"
        done = cli("embed", manifest, option, column, "--id-column", "id", "-m", model, "-o", out, "--quiet")
        assert done.code == 0, done.err
    stats = tmp_path / "two.json"
    scores(cli, tmp_path / "images.parquet", "--truth", tmp_path / "texts.parquet", "--save-center", stats)
    one, two = (json.loads(path.read_text()) for path in (kept[1], stats))
    assert two["items"] == {"image": 48, "text": 48}
    for modality in ("image", "text"):
        np.testing.assert_allclose(two["means"][modality], one["means"][modality], atol=1e-6)


def test_a_modality_without_a_mean(
    cli: Cli, sample_data: Path, tmp_path: Path, kept: tuple[Path, Path, dict[str, float]]
) -> None:
    stats = kept[1]
    told = json.loads(stats.read_text())
    del told["means"]["text"]
    stats.write_text(json.dumps(told))
    error = embedded(cli, sample_data, tmp_path / "x.parquet", "--center", stats, code=2)
    assert "does not take text; it takes image" in error


def _broken(told: dict[str, Any], how: str) -> None:
    match how:
        case "weights":
            told["model"]["weights"] = "0" * 32
        case "size":
            told["means"] = {"image": [0.0] * 5, "text": [0.0] * 5}
        case "lengths":
            told["means"]["text"] = [0.0] * 5
        case "nan":
            told["means"]["text"][0] = float("nan")
        case "format":
            told["format"] = "other"
        case "audio":
            told["means"] = {"audio": told["means"]["text"]}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights", "the means of --center are of another model"),
        ("size", "the means of --center have 5 numbers, those of -m"),
        ("lengths", "is damaged"),
        ("nan", "is damaged"),
        ("format", "was not written by mmcli eval --save-center"),
        ("audio", "its means are of audio; -m "),
    ],
)
def test_another_models_means(
    cli: Cli, sample_data: Path, tmp_path: Path, kept: tuple[Path, Path, dict[str, float]], how: str, message: str
) -> None:
    stats = kept[1]
    told = json.loads(stats.read_text())
    _broken(told, how)
    stats.write_text(json.dumps(told))
    out = tmp_path / "x.parquet"
    assert message in embedded(cli, sample_data, out, "--center", stats, code=2)
    assert not out.exists()


def test_options_that_do_not_fit(
    cli: Cli, sample_data: Path, tmp_path: Path, kept: tuple[Path, Path, dict[str, float]]
) -> None:
    out = tmp_path / "x.parquet"
    assert "leave out --no-normalize" in embedded(
        cli, sample_data, out, "--center", kept[1], "--no-normalize", code=2
    )
    assert "cannot read" in embedded(cli, sample_data, out, "--center", tmp_path / "none.json", code=2)
    done = cli("embed", sample_data / "texts.csv", "-m", "fake:8", "-o", out, "--center", kept[1])
    assert done.code == 2
    assert "-m fake:8 is no checkpoint" in done.err


def test_what_has_no_means(cli: Cli, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "label": ["a"], "right": ["a"]}), tmp_path / "classes.parquet")
    done = cli("eval", tmp_path / "classes.parquet", "--truth", "right", "--save-center", tmp_path / "s.txt")
    assert done.code == 2
    assert "--save-center is of vectors, and this is classification" in done.err
    assert "the means are JSON; give e.g. --save-center" in done.err
    one = pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"id": ["1"], "image_embedding": one, "text_embedding": one}), tmp_path / "v.parquet")
    done = cli("eval", tmp_path / "v.parquet", "--save-center", tmp_path / "s.json")
    assert done.code == 2
    assert "does not say which model it is of" in done.err
