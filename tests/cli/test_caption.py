"""`mmcli caption` on the pipeline of `embed`: rows, errors, --update, --retry-errors, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli, manifest

from mmcli.models.fake import fake_caption, fake_vector
from mmcli.models.options import Generation
from mmcli.tasks.write import KINDS

COLUMNS = {"caption": pa.string(), **KINDS["text"].columns}


def text_of(content: str, **generation: Any) -> str:
    return fake_caption(fake_vector("text", content, 4), Generation(**generation)).text


def table(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    return pq.read_table(out).to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl"])
def test_rows_and_errors(cli: Cli, tmp_path: Path, name: str) -> None:
    rows = manifest(tmp_path / "m.csv", 6, r1="nan", r2="empty", r3="fail", r4="raise")
    done = cli("caption", rows, "-m", "fake:4,obey", "--text-column", "text", "-o", tmp_path / name)
    assert done.code == 3
    found = table(tmp_path / name)
    codes = [None, "nonfinite", "empty_output", "invalid_output", "corrupt", None]
    assert [row["error_code"] for row in found] == codes
    for row, code in zip(found, codes, strict=True):
        assert all((row[column] is None) == (code is not None) for column in COLUMNS)
    assert found[5]["caption"] == text_of("text number 5")
    assert (found[5]["finish_reason"], found[5]["n_tokens"], found[5]["repetition"]) == ("stop", 4, False)
    if name.endswith("parquet"):
        assert [pq.read_schema(tmp_path / name).field(c).type for c in COLUMNS] == list(COLUMNS.values())


def test_cut_texts_say_so(cli: Cli, texts: Path) -> None:
    done = cli("caption", texts, "-m", "fake:4", "--max-new-tokens", "2")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["caption"] for row in rows] == [text_of(f"text {n}", max_new_tokens=2) for n in range(5)]
    assert {row["finish_reason"] for row in rows} == {"length"}


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl"])
def test_update_equals_a_full_run(cli: Cli, texts: Path, tmp_path: Path, name: str) -> None:
    command = ["caption", texts, "-m", "fake:4,obey", "--json"]
    (texts / "0.txt").write_text("empty")
    assert cli(*command, "-o", tmp_path / name).code == 3
    (texts / "0.txt").write_text("now it says something")
    (texts / "new.txt").write_text("new")
    (texts / "4.txt").unlink()
    done = cli(*command, "-o", tmp_path / name, "--update")
    assert done.code == 0
    assert json.loads(done.err.splitlines()[-1])["reused"] == 3
    assert cli(*command, "-o", tmp_path / f"full-{name}").code == 0
    assert table(tmp_path / name) == table(tmp_path / f"full-{name}")
    assert len(table(tmp_path / name)) == 5


def test_retry_errors(cli: Cli, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    (texts / "0.txt").write_text("empty")
    assert cli("caption", texts, "-m", "fake:4,obey", "-o", out).code == 3
    before = table(out)
    (texts / "0.txt").write_text("some")
    done = cli("caption", texts, "-m", "fake:4,obey", "-o", out, "--retry-errors", "--json")
    assert done.code == 0
    assert json.loads(done.err.splitlines()[-1])["reused"] == 4
    assert table(out)[1:] == before[1:]
    assert table(out)[0]["caption"] == text_of("some")


def test_an_interrupted_run_goes_on(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 60, r40="fail")
    command = ["caption", rows, "-m", "fake:4,obey", "--text-column", "text", "-o", tmp_path / "o.parquet"]
    command += ["--part-rows", "8", "--batch-size", "2", "--json"]
    assert cli(*command, "--on-error", "fail").code == 4
    assert not (tmp_path / "o.parquet").exists()
    done = cli(*command)
    assert done.code == 3
    assert json.loads(done.err.splitlines()[-1])["resumed"] > 0
    assert [row["caption"] for row in table(tmp_path / "o.parquet")] == [
        None if n == 40 else text_of(f"text number {n}") for n in range(60)
    ]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--prompt", "a photo of"], "model.generation.prompt: was not set, is a photo of"),
        (["--max-new-tokens", "9"], "model.generation.max_new_tokens: was 50, is 9"),
        (["--num-beams", "3"], "model.generation.num_beams: was 1, is 3"),
        (["--temperature", "0.5"], "model.generation.temperature: was 0.0, is 0.5"),
        (["--seed", "7"], "model.generation.seed: was 0, is 7"),
    ],
)
def test_options_are_in_the_fingerprint(
    cli: Cli, texts: Path, tmp_path: Path, options: list[str], difference: str
) -> None:
    command = ["caption", texts, "-m", "fake:4", "-o", tmp_path / "o.parquet"]
    assert cli(*command).code == 0
    done = cli(*command, *options)
    assert done.code == 6
    assert difference in done.err


def test_two_media_a_row_have_one_caption(cli: Cli, tmp_path: Path) -> None:
    images = Path(__file__).parents[2] / "sample_data/images"
    first, second, *_ = sorted(images.glob("*.png"))
    lines = [f"hello,{first}", f"hello,{second}", f"bye,{first}", f"hello,{images}/none.png"]
    (tmp_path / "m.csv").write_text("\n".join(["text,image", *lines, ""]))
    out = tmp_path / "o.parquet"
    columns = ["--text-column", "text", "--image-column", "image"]
    assert cli("caption", tmp_path / "m.csv", "-m", "fake:4", *columns, "-o", out).code == 3
    rows = table(out)
    assert len({row["caption"] for row in rows[:3]}) == 3
    assert [row["modality"] for row in rows[:3]] == ["image+text"] * 3
    assert (rows[3]["caption"], rows[3]["error_code"]) == (None, "not_found")


def test_refusals_come_together(cli: Cli, texts: Path) -> None:
    wrong = ["--max-new-tokens", "0", "--num-beams", "x", "--temperature", "-1", "--seed", "s"]
    done = cli("caption", texts, "-m", "fake:4", *wrong)
    assert done.code == 2
    for said in (
        "--max-new-tokens '0'",
        "--num-beams 'x'",
        "--temperature '-1' is not a number from 0",
        "--seed 's'",
    ):
        assert done.err.count(said) == 1
    assert "give one of them" in cli("caption", texts, "-m", "fake:4", "--num-beams", "2", "--temperature", "1").err
    assert "no model given" in cli("caption", texts).err


def test_no_vectors_no_npy(cli: Cli, texts: Path, tmp_path: Path) -> None:
    done = cli("caption", texts, "-m", "fake:4", "-o", f"{tmp_path}/o/", "-f", "npy")
    assert done.code == 2
    assert "--format npy holds vectors, and this task has none" in done.err
