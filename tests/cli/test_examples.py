"""--examples: which solved cases a record is shown, told by a fake whose answers depend on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli

from mmcli.models.fake import asked_vector, fake_caption, fake_vector
from mmcli.models.options import Generation

QUESTION = "what is it?"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in.csv").write_text("\n".join(["text", *(f"text {n}" for n in range(7)), ""]))
    return tmp_path / "in.csv"


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    rows = [{"text": f"shot {n}", "question": f"which {n}?", "answer": f"it is {n}"} for n in range(5)]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "shots.jsonl"


def answer(text: str, shown: list[int]) -> str:
    told = repr((None, [(f"which {n}?", f"it is {n}") for n in shown]))
    vector = asked_vector([fake_vector("text", text, 4)], QUESTION, told)
    return fake_caption(vector, Generation()).text


def answers(cli: Cli, *arguments: object) -> list[str | None]:
    done = cli("ask", *arguments, "-m", "fake:4", "-q", QUESTION, "--text-column", "text")
    assert done.code in (0, 3), done.err
    return [json.loads(line)["answer"] for line in done.out.splitlines()]


def test_all_are_shown_in_their_order(cli: Cli, inputs: Path, shots: Path) -> None:
    found = answers(cli, inputs, "--examples", shots)
    assert found == [answer(f"text {n}", [0, 1, 2, 3, 4]) for n in range(7)]


def test_random_ones_depend_on_the_seed_and_the_id_alone(cli: Cli, inputs: Path, shots: Path) -> None:
    options = ["--examples", shots, "--examples-select", "random", "--num-examples", "2"]
    found = answers(cli, inputs, *options)
    assert found == answers(cli, inputs, *options, "--batch-size", "2")
    assert len(set(found)) == 7
    assert found != answers(cli, inputs, *options, "--seed", "1")
    assert all(a in [answer(f"text {n}", [i, j]) for i in range(5) for j in range(5)] for n, a in enumerate(found))


def test_similar_ones_are_nearest_by_their_vectors(cli: Cli, inputs: Path, shots: Path, tmp_path: Path) -> None:
    names = {inputs: tmp_path / "in.parquet", shots: tmp_path / "shots.parquet"}
    for manifest, out in names.items():
        assert cli("embed", manifest, "-m", "fake:6", "--text-column", "text", "-o", out).code == 0
    options = ["--examples", shots, "--examples-select", "similar", "--num-examples", "2"]
    options += ["--embeddings", names[inputs], "--examples-embeddings", names[shots]]
    found = answers(cli, inputs, *options)
    vectors = {key: np.array(pq.read_table(out)["embedding"].to_pylist()) for key, out in names.items()}
    unit = {key: v / np.linalg.norm(v, axis=1, keepdims=True) for key, v in vectors.items()}
    order = np.argsort(-(unit[inputs] @ unit[shots].T), axis=1)
    assert found == [answer(f"text {n}", [int(order[n, 1]), int(order[n, 0])]) for n in range(7)]
    assert len({tuple(row[:2]) for row in order.tolist()}) > 1

    # Vectors of other inputs, of another model, and none at all.
    (tmp_path / "other.csv").write_text(inputs.read_text())
    done = cli("ask", tmp_path / "other.csv", "-m", "fake:4", "-q", QUESTION, "--text-column", "text", *options)
    assert done.code == 6
    assert "where the inputs have" in done.err
    again = ["embed", shots, "-m", "fake:7", "--text-column", "text", "-o", names[shots], "--overwrite"]
    assert cli(*again).code == 0
    done = cli("ask", inputs, "-m", "fake:4", "-q", QUESTION, "--text-column", "text", *options)
    assert done.code == 2
    assert "of different models" in done.err


def test_an_input_without_a_vector_is_an_error_row(cli: Cli, shots: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\ngood\nnan\ngood too\n")
    command = ["-m", "fake:6,obey", "--text-column", "text", "-o"]
    assert cli("embed", tmp_path / "in.csv", *command, tmp_path / "in.parquet").code == 3
    assert cli("embed", shots, *command, tmp_path / "shots.parquet").code == 0
    options = ["--examples", shots, "--examples-select", "similar", "--num-examples", "1"]
    options += ["--embeddings", tmp_path / "in.parquet", "--examples-embeddings", tmp_path / "shots.parquet"]
    found = answers(cli, tmp_path / "in.csv", *options)
    assert [text is None for text in found] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--examples", "none.jsonl"], "--examples: none.jsonl: no such file"),
        (["--examples-select", "random"], "there are no --examples to select from"),
        (["--examples", "SHOTS", "--examples-select", "nearest"], "not one of all, random, similar"),
        (["--examples", "SHOTS", "--examples-select", "similar"], "needs --embeddings and --examples-embeddings"),
        (["--examples", "SHOTS", "--examples-select", "random", "--num-examples", "6"], "has 5"),
        (["--examples", "INPUTS"], "the prompt's {answer}"),
    ],
)
def test_refused(cli: Cli, inputs: Path, shots: Path, options: list[str], said: str) -> None:
    options = [{"SHOTS": str(shots), "INPUTS": str(inputs)}.get(option, option) for option in options]
    done = cli("ask", inputs, "-m", "fake:4", "-q", QUESTION, "--text-column", "text", *options)
    assert done.code == 2
    assert said in done.err
