"""`mmcli ask`: which questions reach the model, what their columns are, what is refused; told by a fake model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli
from PIL import Image

from mmcli.models.fake import asked_vector, fake_caption, fake_choice, fake_vector
from mmcli.models.options import Generation
from mmcli.tasks.write import KINDS

MODEL = ["-m", "fake:4"]
TITLES = ["a cat", "a dog", "", "{braces}"]
QUESTIONS = ["what?", "", "who is it?", "is it {title}?"]


def picture(number: int) -> np.ndarray:
    return np.full((8, 9, 3), 20 * number, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, and a manifest of them beside the folder."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.fromarray(picture(number)).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


@pytest.fixture
def manifest(folder: Path, tmp_path: Path) -> Path:
    cells = zip(range(4), TITLES, QUESTIONS, strict=True)
    rows = [{"image": f"in/{n}.png", "title": t, "question": q or None, "answer": f"true {n}"} for n, t, q in cells]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "m.jsonl"


def answer(number: int, question: str, system: str | None = None) -> str:
    vector = asked_vector([fake_vector("image", picture(number), 4)], question, system)
    return fake_caption(vector, Generation()).text


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    if isinstance(out, Path) and out.suffix == ".parquet":
        return pq.read_table(out).to_pylist()  # type: ignore[no-any-return]
    text = out.read_text() if isinstance(out, Path) else out
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------------------------------ questions


def test_one_question(cli: Cli, folder: Path) -> None:
    done = cli("ask", folder, *MODEL, "-q", "what is it?")
    assert done.code == 0
    found = rows_of(done.out)
    assert [row["answer"] for row in found] == [answer(n, "what is it?") for n in range(4)]
    assert [c for c in found[0] if c in ("answer", *KINDS["text"].columns)] == ["answer", *KINDS["text"].columns]


def test_several_questions_from_everywhere(cli: Cli, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("colour=what colour?\n\n  how many {{all}}?  \n")
    (tmp_path / "long.txt").write_text("x=1 is\na question\n")
    asked = ["-q", "first?", "-q", f"long=@{tmp_path}/long.txt", "--questions", tmp_path / "q.txt"]
    asked += ["--question-column", "own=question"]
    out = tmp_path / "o.parquet"
    assert cli("ask", manifest, *MODEL, *asked, "-o", out).code == 3
    found = rows_of(out)
    texts = {"q1": "first?", "long": "x=1 is\na question", "colour": "what colour?", "q4": "how many {all}?"}
    columns = [f"{name}_{c}" for name in (*texts, "own") for c in ("answer", *KINDS["text"].columns)]
    assert pq.read_schema(out).names[3 : 3 + len(columns)] == columns
    for number, row in enumerate(found):
        if not QUESTIONS[number]:
            continue
        assert {name: row[f"{name}_answer"] for name in texts} == {n: answer(number, q) for n, q in texts.items()}
        assert row["own_answer"] == answer(number, QUESTIONS[number])
    # A question that is null: the whole row is an error.
    assert (found[1]["error_code"], found[1]["q1_answer"]) == ("bad_row", None)
    assert found[1]["error_message"] == "column 'question', which the prompt names, is empty"


def test_columns_in_texts(cli: Cli, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You look at {title}.\n")
    asked = ["-q", "is it {title}, {{really}}?", "--system", f"@{tmp_path}/system.txt"]
    found = rows_of(cli("ask", manifest, *MODEL, *asked).out)
    for number, title in enumerate(TITLES):
        if title:
            said = f"is it {title}, {{really}}?", f"You look at {title}."
            assert found[number]["answer"] == answer(number, *said)
    assert [row["error_code"] for row in found] == [None, None, "bad_row", None]


def test_questions_of_a_column_are_not_templates(cli: Cli, manifest: Path) -> None:
    found = rows_of(cli("ask", manifest, *MODEL, "--question-column", "question").out)
    assert found[3]["answer"] == answer(3, "is it {title}?")


def test_choices(cli: Cli, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    assert cli("ask", manifest, *MODEL, "-q", "is it red?", "--choices", "yes, no,unclear", "-o", out).code == 0
    for number, row in enumerate(rows_of(out)):
        vector = asked_vector([fake_vector("image", picture(number), 4)], "is it red?", None)
        wanted = fake_choice(vector, ("yes", "no", "unclear"))
        assert row["answer"] == wanted.answer
        assert row["score"] == pytest.approx(wanted.score)
        assert [(one["answer"], pytest.approx(one["score"])) for one in row["top_k"]] == list(wanted.top_k)
    schema = pq.read_schema(out)
    assert {name: schema.field(name).type for name in ("answer", "score", "top_k")} == {
        "answer": pa.string(), **KINDS["scores"].columns
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl"])
def test_update_asks_what_is_new(cli: Cli, manifest: Path, tmp_path: Path, name: str) -> None:
    command = [
        "ask",
        manifest,
        *MODEL,
        "--question-column",
        "question",
        "-q",
        "what?",
        "--json",
        "--id-column",
        "image",
    ]
    assert cli(*command, "-o", tmp_path / name).code == 3
    lines = manifest.read_text().splitlines()
    # A question that is there now, another one, and a column that is not asked for.
    lines[1] = lines[1].replace("null", '"why?"')
    lines[2] = lines[2].replace("who is it?", "where is it?")
    lines[3] = lines[3].replace("{braces}", "another title")
    manifest.write_text("\n".join(lines))
    done = cli(*command, "-o", tmp_path / name, "--update")
    assert (done.code, json.loads(done.err.splitlines()[-1])["reused"]) == (0, 2)
    assert cli(*command, "-o", tmp_path / f"full-{name}").code == 0
    assert rows_of(tmp_path / name) == rows_of(tmp_path / f"full-{name}")
    assert rows_of(tmp_path / name)[2]["q2_answer"] == answer(2, "where is it?")


def test_errors_are_asked_again(cli: Cli, manifest: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    (folder / "2.png").rename(tmp_path / "2.png")
    command = ["ask", manifest, *MODEL, "-q", "what?", "-q", "who?", "-o", out, "--json"]
    assert cli(*command).code == 3
    (tmp_path / "2.png").rename(folder / "2.png")
    done = cli(*command, "--retry-errors")
    assert (done.code, json.loads(done.err.splitlines()[-1])["reused"]) == (0, 3)
    assert [row["q2_answer"] for row in rows_of(out)] == [answer(n, "who?") for n in range(4)]


def test_another_question_is_another_run(cli: Cli, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "3.png").unlink()
    command = ["ask", manifest, *MODEL, "-o", tmp_path / "o.parquet", "--part-rows", "1", "--on-error", "fail"]
    command += ["--batch-size", "1"]
    assert cli(*command, "-q", "what?").code == 4
    for other in (["-q", "who?"], ["-q", "name=what?"], ["-q", "what?", "--choices", "a,b"]):
        assert cli(*command, *other).code == 6
    assert cli(*command, "-q", "what?").code == 4


# ------------------------------------------------------------------------------------------ conversations


def test_conversations_of_every_manifest(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """JSON lines and Parquet give the same; what is none is an error; what changed is done again."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    talks: list[Any] = [
        [{"role": "user", "content": parts}],
        [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}],
        [
            {"role": "user", "content": parts[1:]},
            *({"role": r, "content": parts[1:]} for r in ("assistant", "user")),
        ],
        None,
    ]
    cells = {"image": [f"in/{n}.png" for n in range(4)], "messages": talks}
    pq.write_table(pa.table(cells), tmp_path / "m.parquet")
    lines = [json.dumps({name: cells[name][n] for name in cells}) for n in range(4)]
    (tmp_path / "m.jsonl").write_text("".join(line + "\n" for line in lines))
    asked = [*MODEL, "--messages-column", "messages"]
    found = {}
    for name in ("m.jsonl", "m.parquet"):
        done = cli("ask", tmp_path / name, *asked)
        assert done.code == 3
        found[name] = rows_of(done.out)
    assert [row["error_code"] for row in found["m.jsonl"]] == [None, "bad_row", None, "bad_row"]
    assert "it ends with the role assistant" in found["m.jsonl"][1]["error_message"]
    assert len({row["answer"] for row in found["m.jsonl"]}) == 3
    assert [row["answer"] for row in found["m.jsonl"]] == [row["answer"] for row in found["m.parquet"]]
    out = tmp_path / "o.jsonl"
    assert cli("ask", tmp_path / "m.jsonl", *asked, "-o", out).code == 3
    (tmp_path / "m.jsonl").write_text("".join(line.replace("what?", "why?") + "\n" for line in lines[:1]))
    with (tmp_path / "m.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in lines[1:])
    assert cli("ask", tmp_path / "m.jsonl", *asked, "-o", out, "--update").code == 3
    again = [row["answer"] for row in rows_of(out)]
    assert again[0] not in (None, found["m.jsonl"][0]["answer"])
    assert again[1:] == [row["answer"] for row in found["m.jsonl"]][1:]


# ------------------------------------------------------------------------------------------ refusals

WRONG = [
    ([], "nothing is asked; add -q 'What is in the picture?', --question-column or --questions"),
    (["-q", " "], "--question is empty"),
    (["-q", "@none.txt"], "--question: cannot read none.txt: No such file or directory"),
    (["--questions", "none.txt"], "--questions: cannot read none.txt: No such file or directory"),
    (["--questions", "empty.txt"], "--questions: empty.txt is empty"),
    (["-q", "a=what?", "-q", "a=who?"], "two questions have the name a"),
    (["-q", "q2=what?", "-q", "who?"], "two questions have the name q2"),
    (["-q", "what {is it?"], "prompt 'what {is it?': expected '}' before end of string; a column is {title}"),
    (["-q", "what {title!r}?"], "no column's name alone"),
    (["-q", "what {}?"], "{} names no column"),
    (["-q", "is it {titel}?"], "the prompt's {titel}: m.jsonl has no such column; did you mean title?"),
    (["--question-column", "qestion"], "--question-column qestion: m.jsonl has no such column; did you mean quest"),
    (["--question-column", "a{b"], "--question-column 'a{b': rename it"),
    (["-q", "what?", "--keep", "answer"], "--keep answer: the output has a column answer of its own; call it"),
    (["-q", "what?", "--choices", "yes"], "--choices 'yes': give two or more different answers"),
    (["-q", "what?", "--choices", "a,b", "--schema", "a int"], "--choices and --schema exclude one another"),
    (["-q", "what?", "--choices", "a,b", "--num-beams", "2"], "--choices does not go with --num-beams 2"),
    (["-q", "what?", "--boxes-column", "b"], "--boxes-column goes with --features-column"),
    (["-q", "what?", "--features-column", "f"], "rows are known by a text: add --question-column, or"),
    (["--question-column", "question", "--features-column", "f"], "--features-column f: m.jsonl has no such"),
    (["-q", "what?", "--answers", "bad.json"], "--answers: bad.json is no JSON list"),
    (["-q", "what?", "--prompt", "x"], "no such option: --prompt"),
    (["--messages-column", "mesages"], "--messages-column mesages: m.jsonl has no such column"),
    (["--messages-column", "title", "-q", "a", "--system", "b"], "all that is said; leave out -q and --system"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_refused(cli: Cli, manifest: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str], said: str) -> None:
    monkeypatch.chdir(manifest.parent)
    Path("empty.txt").write_text("\n \n")
    Path("bad.json").write_text('["a", ')
    done = cli("ask", "m.jsonl", *MODEL, *wrong, "-o", "o.parquet")
    assert done.code == 2
    assert said in done.err
    assert not Path("o.parquet").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ["-q", "is it {title}?"],
            "the prompt's {title}: only manifests have columns, not folders and files; a brace",
        ),
        (["--question-column", "title"], "--question-column title: only manifests have columns"),
    ],
)
def test_a_folder_has_no_columns(cli: Cli, folder: Path, asked: list[str], said: str) -> None:
    done = cli("ask", folder, *MODEL, *asked)
    assert done.code == 2
    assert said in done.err
