"""`-f openai-batch` and `--batch-results`: requests in a file, answers out of files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli
from endpoint_server import Seen, completion, serving
from PIL import Image

from mmcli.core.openai_batch import digest_of

ASKED = ["-q", "what=What?", "-q", "why=Why?", "-m", "openai:tiny"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures, two of them alike, and one that is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (0, 1, 2, 2, 4):
        name = f"{len(list(folder.iterdir()))}.png"
        Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(folder / name)
    (folder / "3b.png").write_bytes(b"\x89PNG no picture")
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, answers: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


def answered(request: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    parts = request["body"]["messages"][0]["content"]
    told = text or f"{parts[-1]['text']} {len(parts[0]['image_url']['url'])}"
    response = {"status_code": 200, "request_id": "x", "body": completion(told, tokens=4)}
    return {"id": "y", "custom_id": request["custom_id"], "response": response, "error": None}


def test_there_and_back(cli: Cli, photos: Path, tmp_path: Path) -> None:
    requests, out = tmp_path / "requests.jsonl", tmp_path / "o.parquet"
    done = cli("ask", photos, *ASKED, "-f", "openai-batch", "-o", requests)
    assert done.code == 3, done.err
    found = lines(requests)
    assert len(found) == 10
    names = [request["custom_id"] for request in found]
    assert len(set(names)) == 10
    assert max(map(len, names)) <= 64
    assert all(request["method"] == "POST" and request["url"] == "/v1/chat/completions" for request in found)
    # Row and question, which is how a person finds the input again.
    assert [name.rsplit("-", 1)[0] for name in names] == [f"{r}-{q}" for r in (0, 1, 2, 3, 5) for q in (0, 1)]
    assert found[3]["body"]["model"] == "tiny"
    assert found[3]["body"]["messages"][0]["content"][-1] == {"type": "text", "text": "Why?"}

    answers = [answered(request) for request in found]
    random.Random(0).shuffle(answers)
    results = write(tmp_path / "results.jsonl", answers)
    done = cli("ask", photos, *ASKED, "--batch-results", results, "-o", out)
    assert done.code == 3, done.err
    rows = pq.read_table(out).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "ok", "error", "ok"]
    assert all(row["why_answer"].startswith("Why? ") for row in rows if row["status"] == "ok")
    assert [row["what_n_tokens"] for row in rows] == [4, 4, 4, 4, None, 4]


def test_requests_are_what_a_server_would_get(cli: Cli, photos: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    more = ["--max-new-tokens", "7", "--extra-body", '{"top_p": 0.5, "logprobs": null}']
    cli("ask", photos, *ASKED, *more, "-f", "openai-batch", "-o", requests)
    seen: list[Seen] = []
    with serving() as server:
        cli("ask", photos, *ASKED, *more, "--endpoint", server.url, "--concurrency", "1")
        seen = server.seen
    assert [one.body for one in seen] == [request["body"] for request in lines(requests)]
    assert {name: value for name, value in seen[0].body.items() if name != "messages"} == {
        "model": "tiny", "max_tokens": 7, "temperature": 0.0, "top_p": 0.5,
    }  # fmt: skip


def test_what_a_batch_lacks_is_an_error_row_until_it_is_there(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "3b.png").unlink()
    requests, out = tmp_path / "requests.jsonl", tmp_path / "o.parquet"
    ask = ["ask", photos, "-q", "What?", "-m", "openai:tiny"]
    assert cli(*ask, "-f", "openai-batch", "-o", requests).code == 0
    found = lines(requests)
    good = [answered(request) for request in found]
    refused = {
        "custom_id": found[1]["custom_id"],
        "response": {"status_code": 400, "body": {"error": {"message": "no"}}},
    }
    expired = {
        "custom_id": found[4]["custom_id"],
        "response": None,
        "error": {"code": "expired", "message": "late"},
    }
    first = write(tmp_path / "first.jsonl", [good[0], refused, expired])
    assert cli(*ask, "--batch-results", first, "-o", out).code == 3
    rows = pq.read_table(out).to_pylist()
    # 2 and 3 are alike: each has a request of its own, and either answer is theirs.
    assert [row["error_code"] for row in rows] == [
        None,
        "invalid_output",
        "not_found",
        "not_found",
        "invalid_output",
    ]
    assert "no" in rows[1]["error_message"]
    assert "late" in rows[4]["error_message"]

    second = write(tmp_path / "second.jsonl", [good[1], good[2], refused, good[4]])
    done = cli(*ask, "--batch-results", first, "--batch-results", second, "-o", out, "--retry-errors")
    assert done.code == 0, done.err
    rows = pq.read_table(out).to_pylist()
    assert [row["answer"] for row in rows] == [
        one["response"]["body"]["choices"][0]["message"]["content"] for one in good
    ]


def test_an_answer_belongs_to_its_request_alone(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "3b.png").unlink()
    requests = tmp_path / "requests.jsonl"
    ask = ["ask", photos, "-q", "What?", "-m", "openai:tiny"]
    cli(*ask, "-f", "openai-batch", "-o", requests)
    results = write(
        tmp_path / "results.jsonl", [answered(request, request["custom_id"]) for request in lines(requests)]
    )
    # A new picture in front, and one that has changed: the others are found by what they are.
    Image.new("RGB", (8, 8)).save(photos / "00.png")
    Image.new("RGB", (8, 8), "red").save(photos / "1.png")
    done = cli(*ask, "--batch-results", results)
    rows = [json.loads(line) for line in done.out.splitlines()]
    found = {row["id"]: row["error_code"] for row in rows}
    assert found == {
        "0.png": None,
        "00.png": "not_found",
        "1.png": "not_found",
        "2.png": None,
        "3.png": None,
        "4.png": None,
    }
    asked = {digest_of(request["custom_id"]) for request in lines(requests)}
    assert {digest_of(row["answer"]) for row in rows if row["answer"]} <= asked
    # Asked otherwise, they are answers to something else.
    other = cli("ask", photos, "-q", "Who?", "-m", "openai:tiny", "--batch-results", results)
    assert {json.loads(line)["error_code"] for line in other.out.splitlines()} == {"not_found"}


def test_mistakes(cli: Cli, photos: Path, tmp_path: Path) -> None:
    ask = ["ask", photos, "-q", "What?"]
    batch = ["-f", "openai-batch", "-o", tmp_path / "r.jsonl"]
    done = cli(*ask, "-m", "fake:4", *batch)
    assert (done.code, "openai:fake:4" in done.err) == (2, True)
    done = cli(*ask, "-m", "openai:tiny", *batch, "--endpoint", "http://h/v1")
    assert (done.code, "exclude one another" in done.err) == (2, True)
    done = cli(*ask, "-m", "openai:tiny", *batch, "--update")
    assert (done.code, "--update" in done.err) == (2, True)
    done = cli(*ask, "-m", "openai:tiny", *batch, "--extra-body", "{top_p}")
    assert (done.code, "--extra-body" in done.err) == (2, True)
    done = cli(*ask, "-m", "openai:tiny", "--batch-results", tmp_path / "none.jsonl")
    assert (done.code, "none.jsonl" in done.err) == (2, True)
    for content in ("{broken\n", '{"id": 3}\n', "[]\n"):
        (tmp_path / "odd.jsonl").write_text(content)
        done = cli(*ask, "-m", "openai:tiny", "--batch-results", tmp_path / "odd.jsonl")
        assert (done.code, "line 1" in done.err) == (2, True), done.err
    done = cli("embed", photos, "-m", "fake:4", *batch)
    assert (done.code, "openai:NAME" in done.err) == (2, True)
