"""`mmcli caption|ask -m openai:NAME --endpoint URL`: rows, and servers that go away in mid-run."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli, finished, manifest, process, wait_until
from endpoint_server import EndpointServer, Reply, Seen, completion, echo, serving
from PIL import Image


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def table(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out).to_pylist()  # type: ignore[no-any-return]


def asking(server: EndpointServer, rows: Path, out: Path, *more: object) -> list[object]:
    there = ["--text-column", "text", "-m", "openai:tiny", "--endpoint", server.url, "-o", out]
    return ["ask", rows, "-q", "What?", *there, *more]


def test_rows_and_errors(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 6, r2="bad")

    def answer(seen: Seen) -> Reply:
        if seen.text.startswith("bad"):
            return Reply({"error": "what is this"}, 400)
        return Reply(completion(f"re: {seen.text}", tokens=4, logprobs=[("x", -0.5)]))

    with serving(answer) as server:
        done = cli(*asking(server, rows, tmp_path / "o.parquet"))
    assert (done.code, done.err.count("error: ")) == (3, 0)
    found = table(tmp_path / "o.parquet")
    assert [row["error_code"] for row in found] == [None, None, "invalid_output", None, None, None]
    assert found[1]["answer"] == "re: text number 1\n\nWhat?"
    trust = ("finish_reason", "n_tokens", "mean_logprob", "repetition", "modality")
    assert [found[1][name] for name in trust] == ["stop", 4, -0.5, False, "text"]
    told = json.loads(pq.read_schema(tmp_path / "o.parquet").metadata[b"mmcli"])
    assert told["model"]["endpoint"] == server.url
    assert "concurrency" not in json.dumps(told)


def test_pictures_with_workers_and_two_questions(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")

    def answer(seen: Seen) -> Reply:
        import base64
        import io

        url = seen.body["messages"][0]["content"][0]["image_url"]["url"]
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return Reply(completion(f"{np.asarray(picture)[0, 0, 0]} {seen.text}"))

    with serving(answer) as server:
        there = ["-m", "openai:tiny", "--endpoint", server.url, "-o", tmp_path / "o.parquet"]
        done = finished("ask", folder, "-q", "who=Who?", "-q", "why=Why?", *there)
    assert done.code == 0, done.err
    found = table(tmp_path / "o.parquet")
    assert [row["who_answer"] for row in found] == [f"{n} Who?" for n in range(5)]
    assert [row["why_answer"] for row in found] == [f"{n} Why?" for n in range(5)]
    assert found[0]["who_mean_logprob"] is None


def test_captions_choices_and_json(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 2)

    def answer(seen: Seen) -> Reply:
        if "yes" in seen.text:
            return Reply(completion('{"answer": "no"}'))
        return Reply(completion('{"age": 3}' if "age" in seen.text else "a text"))

    with serving(answer) as server:
        there = ["--text-column", "text", "-m", "openai:tiny", "--endpoint", server.url]
        found = [json.loads(line) for line in cli("caption", rows, *there).out.splitlines()]
        assert [row["caption"] for row in found] == ["a text", "a text"]
        done = cli("ask", rows, *there, "-q", "Old?", "--choices", "yes,no")
        found = [json.loads(line) for line in done.out.splitlines()]
        assert [(row["answer"], row["score"], row["top_k"]) for row in found] == [("no", None, [])] * 2
        done = cli("ask", rows, *there, "-q", "How old?", "--schema", "age int")
        found = [json.loads(line) for line in done.out.splitlines()]
        assert [row["answer"] for row in found] == [{"age": 3}] * 2


def test_a_server_that_dies_in_mid_run_loses_nothing(cli: Cli, tmp_path: Path) -> None:
    rows, out = manifest(tmp_path / "m.csv", 60), tmp_path / "o.parquet"
    answered: Counter[str] = Counter()
    lock, dead = threading.Lock(), threading.Event()

    def answer(seen: Seen) -> Reply:
        with lock:
            answered[seen.text] += 1
            if len(answered) == 30 and not dead.is_set():
                dead.set()
                threading.Thread(target=server.close).start()
        return echo(seen)

    server = EndpointServer(answer)
    command = asking(server, rows, out, "--batch-size", 8, "--part-rows", 8, "--retry-time", "1s")
    done = cli(*command)
    assert done.code == 75, done.err
    assert server.url in done.err
    assert "run the same command again" in done.err
    parts = sorted((tmp_path / "o.parquet.mmcli").glob("part-*.parquet"))
    committed = sum(pq.read_metadata(part).num_rows for part in parts)
    before = dict(answered)
    assert 8 <= committed <= len(before) < 60
    assert not out.exists()

    # Still away: told, and nothing is lost.
    assert cli(*command).code == 75

    with serving(answer, port=server.port) as server:
        done = cli(*command)
    assert done.code == 0, done.err
    found = table(out)
    assert [row["answer"] for row in found] == [f"re: text number {n}\n\nWhat?" for n in range(60)]
    again = [text for text, count in before.items() if answered[text] > count]
    assert len(again) <= len(before) - committed


def test_asking_to_stop_does_not_wait_for_slow_answers(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 20)
    with serving(lambda seen: Reply(completion("x"), delay=600 if "19" in seen.text else 0.0)) as server:
        more = ["--batch-size", 4, "--num-workers", 0]
        running = process(*asking(server, rows, tmp_path / "o.parquet", *more))
        wait_until(lambda: len(server.seen) == 20)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 143, err
    assert b"16 of 20 rows are safe" in err


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 2)
    ask = ["ask", rows, "--text-column", "text", "-q", "What?"]
    done = cli(*ask, "-m", "openai:tiny")
    assert (done.code, "--endpoint http" in done.err) == (2, True)
    done = cli(*ask, "-m", "openai:", "--endpoint", "h", "--concurrency", "0", "--retry-time", "soon")
    assert done.code == 2
    for word in ("name is missing", "--endpoint 'h'", "--concurrency", "--retry-time"):
        assert word in done.err
    done = cli(*ask, "-m", "fake:4", "--endpoint", "http://localhost:1/v1")
    assert (done.code, "openai:fake:4" in done.err) == (2, True)
    done = cli("embed", rows, "--text-column", "text", "-m", "openai:tiny")
    assert (done.code, "mmcli ask" in done.err) == (2, True)
    with serving() as server:
        pass
    done = cli(*ask, "-m", "openai:tiny", "--endpoint", server.url, "-o", tmp_path / "o.parquet")
    assert (done.code, "is the server running" in done.err) == (75, True)
