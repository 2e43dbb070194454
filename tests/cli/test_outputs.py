"""mmcli embed to files and folders: what is there afterwards, and what is said."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import Cli, finished, manifest, process, wait_for_parts, wait_until

from mmcli.models.fake import fake_vector
from mmcli.sinks.outputs import read_output
from mmcli.sinks.rows import error_rows, read_rows

OUTPUTS = [("out.parquet", None), ("out.jsonl", None), ("out/", None), ("npy/", "npy")]
SLOW = "fake:4,ms=20"


@pytest.fixture(params=OUTPUTS, ids=["parquet", "jsonl", "folder", "npy"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """-o and -f."""
    name, format_name = request.param
    return ["-o", f"{tmp_path}/{name}", *(["-f", format_name] if format_name else [])]


def statuses(out: str) -> list[tuple[str, str]]:
    batches = read_rows(read_output(out), ["id", "status"])
    return [(row["id"], row["status"]) for batch in batches for row in batch.to_pylist()]


def vectors(path: Path) -> np.ndarray:
    column = pq.read_table(path).column("embedding").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def test_every_format(cli: Cli, texts: Path, output: list[str]) -> None:
    done = cli("embed", texts, "-m", "fake:4", *output)
    assert done.code == 0, done.err
    assert done.out == ""
    assert f"{output[1]}: 5 rows, 5 ok\n" in done.err
    assert statuses(output[1]) == [(f"{n}.txt", "ok") for n in range(5)]
    info = read_output(output[1])
    assert info.metadata["mmcli_version"]
    assert info.job["model"]["id"] == "fake:4"
    again = cli("embed", texts, "-m", "fake:4", *output)
    assert again.code == 0
    assert "complete already" in again.err


def test_values_and_order(cli: Cli, texts: Path, tmp_path: Path) -> None:
    cli("embed", texts, "-m", "fake:4", "-o", tmp_path / "a.parquet", "--batch-size", 2)
    expected = np.stack([fake_vector("text", f"text {n}", 4) for n in range(5)])
    np.testing.assert_array_equal(vectors(tmp_path / "a.parquet"), expected)


def test_stdout(cli: Cli, texts: Path) -> None:
    done = cli("embed", texts, "-m", "fake:4")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["id"] for row in rows] == [f"{n}.txt" for n in range(5)]
    np.testing.assert_array_equal(np.float32(rows[3]["embedding"]), fake_vector("text", "text 3", 4))
    assert "stdout: 5 rows, 5 ok" in done.err


def test_other_inputs_are_refused_then_updated(cli: Cli, texts: Path, output: list[str]) -> None:
    cli("embed", texts, "-m", "fake:4", *output)
    (texts / "5.txt").write_text("new")
    refused = cli("embed", texts, "-m", "fake:4", *output)
    assert refused.code == 6
    assert "inputs.rows: was 5, is 6" in refused.err
    assert "--update" in refused.err
    done = cli("embed", texts, "-m", "fake:4", *output, "--update")
    assert done.code == 0
    assert "6 rows, 6 ok, 5 reused" in done.err
    other = cli("embed", texts, "-m", "fake:6", *output, "--update")
    assert other.code == 6
    assert "model.id: was fake:4, is fake:6" in other.err
    assert cli("embed", texts, "-m", "fake:6", *output, "--overwrite").code == 0
    assert read_output(output[1]).job["model"]["id"] == "fake:6"


def test_the_same_folder_in_other_words_is_the_same_run(cli: Cli, texts: Path, tmp_path: Path) -> None:
    cli("embed", texts, "-m", "fake:4", "-o", tmp_path / "a.parquet")
    again = cli("embed", f"{texts}/", "-m", "fake:4", "-o", tmp_path / "a.parquet", "--batch-size", 3)
    assert again.code == 0
    assert "complete already" in again.err


def test_a_run_json_that_was_damaged(cli: Cli, texts: Path, tmp_path: Path) -> None:
    """Every command says which file, and what to type."""
    write = ("embed", texts, "-m", "fake:4", "-o", tmp_path / "o.parquet")
    (texts / "2.jpg").write_bytes(b"no picture")
    assert cli(*write, "--on-error", "fail", "--batch-size", 1, "--part-rows", 1).code == 4
    (tmp_path / "o.parquet.mmcli" / "run.json").write_text('{"job": []}')
    told = f"{tmp_path}/o.parquet.mmcli/run.json is damaged: fingerprint is missing"
    for asked in (write, (*write, "--update"), (*write, "--retry-errors")):
        done = cli(*asked)
        assert done.code == 6, done.err
        assert f"{told}\n  try: add --overwrite" in done.err
    for asked in (("inspect", tmp_path / "o.parquet"), ("eval", tmp_path / "o.parquet", "--truth", "l")):
        done = cli(*asked)
        assert done.code == 6, done.err
        assert f"{told}\n  try: the command that wrote it again, with --overwrite" in done.err
    vectors = cli("classify", tmp_path / "o.parquet", "-m", "fake:4", "--labels", "a,b")
    assert vectors.code == 2
    assert f"{told}; the command that wrote it again, with --overwrite" in vectors.err
    (texts / "2.jpg").unlink()
    assert cli(*write, "--overwrite").code == 0


def test_retry_errors(cli: Cli, texts: Path, output: list[str]) -> None:
    """Only what failed is computed again, also when the failed file has been repaired meanwhile."""
    (texts / "2.jpg").write_bytes(b"no picture")
    first = cli("embed", texts, "-m", "fake:4", *output)
    assert first.code == 3
    assert ("2.jpg", "error") in statuses(output[1])
    retry = ["embed", texts, "-m", "fake:4", *output, "--retry-errors"]
    again = cli(*retry)
    assert again.code == 3
    assert "6 rows, 5 ok, 1 error" in again.err
    assert "5 reused" in again.err
    (texts / "2.jpg").write_bytes(PNG)
    mended = cli(*retry)
    assert mended.code == 0, mended.err
    assert "6 rows, 6 ok, 5 reused" in mended.err
    assert "nothing to compute" in cli(*retry).err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("new", "9.txt is new"),
        ("gone", "4.txt is gone"),
        ("changed", "1.txt has changed"),
        ("renamed", "0.txt is gone"),
    ],
)
def test_retry_errors_of_other_inputs(cli: Cli, texts: Path, output: list[str], change: str, said: str) -> None:
    (texts / "2.jpg").write_bytes(b"no picture")
    cli("embed", texts, "-m", "fake:4", *output)
    before = statuses(output[1])
    match change:
        case "new":
            (texts / "9.txt").write_text("x")
        case "gone":
            (texts / "4.txt").unlink()
        case "changed":
            (texts / "1.txt").write_text("something else")
        case "renamed":
            (texts / "0.txt").rename(texts / "00.txt")
    refused = cli("embed", texts, "-m", "fake:4", *output, "--retry-errors")
    assert refused.code == 6
    assert said in refused.err
    assert "--update" in refused.err
    assert statuses(output[1]) == before


def test_retry_errors_needs_an_output(cli: Cli, texts: Path, output: list[str]) -> None:
    refused = cli("embed", texts, "-m", "fake:4", *output, "--retry-errors")
    assert refused.code == 2
    assert "there is no" in refused.err
    assert "run without it" in refused.err


def test_retry_errors_of_an_interrupted_run(cli: Cli, tmp_path: Path) -> None:
    """Its error rows are computed again, and the run is brought to its end."""
    rows, out = tmp_path / "m.csv", str(tmp_path / "out.parquet")
    stopped = ["embed", rows, "-m", "fake:4,obey", "-o", out, "--batch-size", 1, "--part-rows", 10]
    manifest(rows, 40, r3="nan", r35="nan")
    first = cli(*stopped, "--max-errors", 1)
    assert first.code == 4, first.err
    info = read_output(out)
    assert not info.complete
    done = cli(*stopped, "--retry-errors")
    assert done.code == 3
    assert f"{info.rows - 1 if info.rows < 36 else info.rows - 2} reused" in done.err
    assert len(statuses(out)) == 40


def test_errors_of_resumed_parts_count_once(cli: Cli, tmp_path: Path) -> None:
    """In the exit code, in the summary and in the budget."""
    rows, out = manifest(tmp_path / "m.csv", 200, r3="nan", r5="nan", r150="nan"), str(tmp_path / "out.parquet")
    command = ["embed", rows, "-m", "fake:4,obey,ms=5", "-o", out, "--batch-size", 1, "--part-rows", 5, "--json"]
    first = cli(*command, "--max-errors", 1)
    assert first.code == 4
    assert "2 error rows (2 nonfinite); --max-errors allows 1" in first.err
    assert "mmcli inspect" in first.err
    at_once = cli(*command, "--max-errors", 1)
    assert at_once.code == 4
    assert last_json(at_once.err)["computed"] == 0
    done = cli(*command, "--max-errors", 3)
    assert done.code == 3
    report = last_json(done.err)
    assert report["errors_by_code"] == {"nonfinite": 3}
    assert 6 <= int(str(report["resumed"])) < 150
    assert report["rows"] == 200
    assert cli(*command, "--max-errors", "10%").code == 3
    assert cli(*command, "--on-error", "fail").code == 4


def test_on_error_fail(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 10, r3="nan")
    done = cli("embed", rows, "-m", "fake:4,obey", "--on-error", "fail", "-o", tmp_path / "o.parquet")
    assert done.code == 4
    assert "--on-error fail allows none" in done.err


def test_no_inputs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.parquet"
    failed = cli("embed", tmp_path / "empty", "-m", "fake:4", "-o", out, "--fail-on-empty")
    assert failed.code == 5
    assert "no inputs found in" in failed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]
    done = cli("embed", tmp_path / "empty", "-m", "fake:4", "-o", out)
    assert done.code == 0
    assert "no inputs found in" in done.err
    assert pq.read_table(out).num_rows == 0


def last_json(err: str) -> dict[str, object]:
    value = json.loads(err.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def test_json_line(cli: Cli, texts: Path, tmp_path: Path) -> None:
    (texts / "2.jpg").write_bytes(b"no picture")
    done = cli("embed", texts, "-m", "fake:4", "-o", tmp_path / "o.parquet", "--json", "--quiet")
    assert done.code == 3
    assert len(done.err.splitlines()) == 1
    report = last_json(done.err)
    assert report["exit_code"] == 3
    assert report["output"] == str(tmp_path / "o.parquet")
    assert (report["rows"], report["ok"], report["errors"], report["committed"]) == (6, 5, 1, 6)
    assert report["error"] is None
    bad = cli("embed", texts, "-m", "fake:0", "--json")
    assert (last_json(bad.err)["exit_code"], bad.code) == (2, 2)
    assert "fake:0" in str(last_json(bad.err)["error"])


def test_time_limit_and_on_it_goes(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 60)
    command = ["embed", rows, "-m", SLOW, "-o", tmp_path / "o.parquet", "--batch-size", 1, "--json"]
    stopped = cli(*command, "--time-limit", "0.4s")
    assert stopped.code == 75
    assert "run the same command again to go on" in stopped.err
    report = last_json(stopped.err)
    assert report["exit_code"] == 75
    assert 0 < int(str(report["committed"])) < 60
    assert f"{report['committed']} of 60 rows are safe" in stopped.err
    done = cli(*command)
    assert done.code == 0
    assert last_json(done.err)["resumed"] == report["committed"]
    assert [name for name, _ in statuses(f"{tmp_path}/o.parquet")] == [f"{rows}#{n}" for n in range(60)]


@pytest.mark.parametrize(("number", "code", "name"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_signals(tmp_path: Path, number: int, code: int, name: str) -> None:
    rows, out = manifest(tmp_path / "m.csv", 3000), tmp_path / "o.parquet"
    command = ["embed", rows, "-m", SLOW, "-o", out, "--batch-size", 1, "--part-rows", 2, "--json"]
    with process(*command) as child:
        wait_for_parts(tmp_path / "o.parquet.mmcli")
        child.send_signal(number)
        err = child.communicate(timeout=60)[1].decode()
        assert child.returncode == code
    assert f"mmcli: {name}; " in err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    report = last_json(err)
    assert report["exit_code"] == code
    assert read_output(out).rows == report["committed"]


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    rows, out = manifest(tmp_path / "m.csv", 100), tmp_path / "o.parquet"
    command = ["embed", rows, "-m", "fake:4,ms=600000", "-o", out, "--batch-size", 1]
    with process(*command) as child:
        wait_until(lambda: (tmp_path / "o.parquet.mmcli" / "run.json").exists())
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130


@pytest.mark.parametrize(("number", "code", "name"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_while_the_model_loads(tmp_path: Path, number: int, code: int, name: str) -> None:
    rows, out = manifest(tmp_path / "m.csv", 3), tmp_path / "o.parquet"
    with process("embed", rows, "-m", "fake:4,load=60000", "-o", out) as child:
        wait_until(lambda: (tmp_path / "o.parquet.mmcli" / "run.json").exists())
        time.sleep(0.3)
        child.send_signal(number)
        err = child.communicate(timeout=60)[1].decode()
    assert child.returncode == code
    assert err == f"mmcli: {name}; 0 of 3 rows are safe\n  try: run the same command again to go on\n"


@pytest.mark.parametrize("number", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_a_signal_in_a_library_is_no_failure_of_it(tmp_path: Path, shared_data: Path, number: int) -> None:
    """One that comes while the size of the vectors is measured, where any exception blames config.json."""
    script = (
        "import os, sys, torch\n"
        "from mmcli.cli.boundary import run\n"
        "zeros = torch.zeros\n"
        f"torch.zeros = lambda *a, **k: (os.kill(os.getpid(), {number}), zeros(*a, **k))[1]\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    model = shared_data / "models" / "mobilenet_v2_1.0_224"
    command = [sys.executable, "-c", script, "embed", manifest(tmp_path / "m.csv", 3), "--path-column", "text"]
    done = subprocess.run([*map(str, command), "-m", str(model)], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + number, b"")
    assert done.stderr == (b"mmcli: interrupted\n" if number == 2 else b"mmcli: terminated\n")


def test_interrupted_before_anything_is_under_way() -> None:
    """A signal that comes while modules are imported."""
    script = (
        "import os, signal, sys, mmcli.__main__ as m\n"
        # A shell's background jobs are started with it ignored.
        "signal.signal(2, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == MODULE: os.kill(os.getpid(), 2)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['mmcli', 'inspect', 'nothing']\n"
        "m.main()\n"
    )
    for module in ("mmcli.cli.boundary", "mmcli.cli.app", "mmcli.sinks.rows"):
        code = script.replace("MODULE", repr(module))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"mmcli: interrupted\n")


def test_killed_and_resumed(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 200)
    command = ["embed", rows, "--batch-size", 4, "--part-rows", 8, "-m"]
    with process(*command, "fake:4,ms=5", "-o", tmp_path / "o.parquet") as child:
        wait_for_parts(tmp_path / "o.parquet.mmcli")
        child.kill()
    looked = cli("inspect", tmp_path / "o.parquet")
    assert looked.code == 0
    assert "of 200 rows are committed" in looked.out
    done = cli(*command, "fake:4", "-o", tmp_path / "o.parquet")
    assert done.code == 0
    assert "going on" in done.err
    assert cli(*command, "fake:4", "-o", tmp_path / "whole.parquet").code == 0
    assert pq.read_table(tmp_path / "o.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


def test_two_at_once(tmp_path: Path) -> None:
    rows, out = manifest(tmp_path / "m.csv", 3000), tmp_path / "o.parquet"
    command = ["embed", rows, "-m", SLOW, "-o", out, "--batch-size", 1]
    with process(*command) as first:
        wait_until(lambda: (tmp_path / "o.parquet.mmcli" / "run.json").exists())
        second = finished(*command)
        assert first.poll() is None, "waited for the other run to end"
        first.kill()
    assert second.code == 75
    assert f"another run writes this output: process {first.pid}" in second.err


def test_a_live_list_is_answered_line_by_line(texts: Path) -> None:
    with process("embed", "-", "-m", "fake:4", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for number in (2, 0):
            child.stdin.write(f"{texts}/{number}.txt\n".encode())
            child.stdin.flush()
            assert select.select([child.stdout], [], [], 20)[0], child.kill()
            assert json.loads(child.stdout.readline())["id"] == f"{texts}/{number}.txt"
        child.stdin.close()
        assert child.wait(timeout=10) == 0


def test_a_list_to_a_file(texts: Path, tmp_path: Path) -> None:
    paths = b"\0".join(os.fsencode(p) for p in sorted(texts.iterdir()))
    command = ["embed", "-", "-0", "-m", "fake:4", "-o", tmp_path / "o.parquet"]
    done = finished(*command, input=paths)
    assert done.code == 0
    assert len(statuses(f"{tmp_path}/o.parquet")) == 5
    assert "complete already" in finished(*command, input=paths).err


def test_memory_runs_out(cli: Cli, texts: Path, tmp_path: Path) -> None:
    """On the device, even for one input alone: an error row each."""
    done = cli("embed", texts, "-m", "fake:4,oom=0", "-o", tmp_path / "o.parquet")
    assert done.code == 3
    assert "5 errors (5 oom)" in done.err
    assert len(error_rows(read_output(tmp_path / "o.parquet"), 10)) == 5


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645"
    "400000000049454e44ae426082"
)
