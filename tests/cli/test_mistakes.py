"""Wrong commands and a hostile world: each has its exit code, and says what to type."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import COMMAND, Cli, Ended, finished, manifest, process
from rare import rarely

from mmcli.cli import boundary
from mmcli.sinks.outputs import read_output

SHELL = " ".join(COMMAND)


def shell(command: str) -> Ended:
    """A line for bash in which `mmcli` is the command."""
    line = re.sub(r"\bmmcli (?=embed)", f"{SHELL} ", command)
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60)
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_head_ends_quietly(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 5000)
    done = shell(f"mmcli embed {rows} -m fake:64 --quiet | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.code == 141
    assert done.out.startswith('{"id":')
    assert len(done.out.splitlines()) == 1
    assert done.err == ""


def test_no_space_behind_stdout(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 10)
    done = shell(f"mmcli embed {rows} -m fake:4 > /dev/full")
    assert done.code == 8
    assert done.err.startswith("mmcli: error: cannot write to stdout: No space left on device\n")


def test_closed_streams(tmp_path: Path) -> None:
    """Nothing of ours gets the number of a closed stream, and nothing but rows comes on stdout."""
    rows = manifest(tmp_path / "m.csv", 3)
    silent = shell(f"mmcli embed {rows} -m fake:4 2>&-")
    assert silent.code == 0
    assert [line[:6] for line in silent.out.splitlines()] == ['{"id":'] * 3
    closed = shell(f"mmcli embed {rows} -m fake:4 >&-")
    assert closed.code == 8
    assert "stdout is closed" in closed.err
    assert shell(f"mmcli embed {rows} -m fake:4 -o {tmp_path}/o.parquet >&- 2>&- <&-").code == 0
    assert read_output(tmp_path / "o.parquet").rows == 3
    code = "import os, mmcli.__main__ as m; m._open_standard_streams(); [os.fstat(n) for n in range(3)]"
    assert shell(f"{COMMAND[0]} -c '{code}' <&- >&- 2>&-").code == 0
    no_list = shell("mmcli embed - -m fake:4 <&-")
    assert no_list.code == 2
    assert "stdin is closed" in no_list.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(cli: Cli, tmp_path: Path, small_disk: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 600)
    command = ["embed", rows, "-m", "fake:128", "-o", small_disk / "o.parquet", "--batch-size", 8]
    done = cli(*command, "--part-rows", 40)
    assert done.code == 8
    assert f"cannot write {small_disk}/o.parquet" in done.err
    assert "No space left on device" in done.err
    assert "committed rows are kept" in done.err
    committed = read_output(small_disk / "o.parquet").rows
    assert committed > 0
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    again = cli(*command)
    assert again.code == 0
    assert f"{committed:,} rows are there" in again.err


def test_a_read_only_folder(cli: Cli, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        # The administrator may write anywhere, save for a file system that is mounted read-only.
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip("run as root, and no read-only file system can be mounted here")
    try:
        done = cli("embed", texts, "-m", "fake:4", "-o", folder / "o.parquet")
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
    assert done.code == 8
    assert f"cannot write {folder}/o.parquet: " in done.err
    assert "  try: choose an output" in done.err


def test_a_place_that_cannot_be(cli: Cli, texts: Path, tmp_path: Path) -> None:
    missing = cli("embed", texts, "-m", "fake:4", "-o", tmp_path / "no" / "o.parquet")
    assert missing.code == 2
    assert f"mkdir -p '{tmp_path}/no'" in missing.err
    inside_a_file = cli("embed", texts, "-m", "fake:4", "-o", texts / "0.txt" / "o.parquet")
    assert inside_a_file.code == 2
    suffix = cli("embed", texts, "-m", "fake:4", "-o", tmp_path / "o.parket")
    assert suffix.code == 2
    assert "did you mean" in suffix.err
    foreign = cli("embed", texts, "-m", "fake:4", "-o", write_parquet(tmp_path / "mine.parquet", {"a": [1]}))
    assert foreign.code == 6
    assert "was not written by mmcli" in foreign.err
    assert pq.read_table(tmp_path / "mine.parquet").column_names == ["a"]


def test_an_input_is_never_the_output(cli: Cli, texts: Path, tmp_path: Path) -> None:
    rows = write_parquet(tmp_path / "m.parquet", {"text": ["a"]})
    for place in (rows, texts, f"{texts}/"):
        done = cli("embed", texts if place != rows else rows, "-m", "fake:4", "-o", place, "--overwrite")
        assert done.code == 2
        assert "is also an input" in done.err
    assert pq.read_table(rows).column_names == ["text"]
    assert len(list(texts.iterdir())) == 5


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_all_problems_in_one_go(cli: Cli, tmp_path: Path) -> None:
    """The manifest, its columns, the output and every option: nobody fixes one to learn of the next."""
    rows = write_parquet(tmp_path / "m.parquet", {"caption": ["a"], "n": [1]})
    done = cli(
        *("embed", rows, tmp_path / "none", "-m", "fake:x", "--text-column", "capton", "-o", "o.parket"),
        *("--batch-size", "many", "--frames", 0, "--num-workers", -1, "--timeout", "soon", "--max-errors", "few"),
        *("--embedding-dtype", "float61", "--device", "gpu", "--dtype", "half", "--on-error", "ignore"),
        *("--update", "--overwrite", "--seed", "x", "--part-rows", 0, "--time-limit", "-1"),
    )
    assert done.code == 2
    lines = [line for line in done.err.splitlines() if line.startswith("mmcli: error: ")]
    for word in (
        *("none: no such", "fake:x", "did you mean caption?", "o.parket", "--batch-size 'many'", "--frames '0'"),
        *(
            "--num-workers '-1'",
            "--timeout 'soon'",
            "--max-errors 'few'",
            "--embedding-dtype 'float61' is not one of float32, float16; did you mean float16?",
            "--device 'gpu' is not one of auto, cpu, cuda, cuda:N, mps; did you mean cuda?",
            "--dtype 'half' is not one of auto, float32, bfloat16, float16; did you mean float16?",
        ),
        *("--on-error 'ignore'", "--overwrite and --update", "--seed 'x'", "--part-rows '0'"),
        "--time-limit '-1'",
    ):
        assert sum(word in line for line in lines) == 1, word
    assert len(lines) == 17


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (
            [],
            "no command given; it is one of ask, bench, caption, classify, embed, eval, finetune, inspect",
            "mmcli --help",
        ),
        (["emebd"], "no such command 'emebd'; did you mean embed?", "mmcli --help"),
        (
            ["embed", "--batchsize", "3"],
            "no such option: --batchsize; did you mean --batch-size?",
            "mmcli embed --help",
        ),
        (["embed", "-m"], "option '-m' requires an argument", "mmcli embed --help"),
        (["embed", "-m", "fake:4"], "no INPUT given", ""),
        (["embed", "."], "no model given; add -m MODEL", ""),
        (["inspect"], "no OUT given", ""),
        (["inspect", "none.parquet"], "there is no output at none.parquet", ""),
        (["inspect", "a", "b"], "got unexpected extra argument(s) (b)", "mmcli inspect --help"),
        (["embed", ".", "-m", "./none"], "none", ""),
        (["embed", ".", "-m", "fake:4", "--update"], "--update needs an output file", ""),
        (["embed", ".", "-m", "fake:4", "-f", "npy"], "--format npy cannot go to stdout", ""),
        (["embed", "", "-m", "fake:4"], "an INPUT is empty ('')", ""),
        (["embed", __file__, "-m", "fake:4", "--text-column", "a"], "leave it out, or give a .parquet", ""),
        (["embed", "https://x.org/a.jpg", "-m", "fake:4"], "URLs are not read", ""),
    ],
)
def test_one_mistake(cli: Cli, arguments: list[str], said: str, hint: str) -> None:
    done = cli(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert said in done.err
    assert hint in done.err
    assert all(line.startswith(("mmcli: error: ", "  try: ")) for line in done.err.splitlines())


def test_a_corrupt_manifest(cli: Cli, tmp_path: Path, shared_data: Path) -> None:
    broken = tmp_path / "m.parquet"
    write_parquet(broken, {"text": ["a"] * 1000})
    broken.write_bytes(broken.read_bytes()[:-20])
    done = cli("embed", broken, "-m", "fake:4")
    assert done.code == 2
    assert str(broken) in done.err
    for path in sorted((shared_data / "parquet" / "bad_data").glob("*.parquet")):
        done = cli("embed", path, "-m", "fake:4", "-o", tmp_path / "o.parquet", "--overwrite")
        assert done.code in (0, 2, 3, 6), done.err
        assert "internal error" not in done.err
        assert "Traceback" not in done.err


def test_names_that_would_steer_a_terminal(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    evil = "a\n\x1b]0;pwned\x07\x1b[31m.jpg"
    (folder / evil).write_bytes(b"no picture")
    (folder / os.fsdecode(b"\xff\xfe.txt")).write_text("not UTF-8")
    done = cli("embed", folder, "-m", "fake:4", "-o", tmp_path / "o.parquet")
    assert done.code == 3
    looked = cli("inspect", tmp_path / "o.parquet", "--errors", 5)
    assert r"a\n\x1b]0;pwned\x07\x1b[31m.jpg" in looked.out
    missing = cli("embed", folder / (evil + "x"), "-m", "fake:4")
    assert missing.code == 2
    for text in (done.err, looked.out, looked.err, missing.err):
        assert "\x1b" not in text
        assert "\x07" not in text
    ids = pq.read_table(tmp_path / "o.parquet").column("id").to_pylist()
    assert ids[1] == r"\xff\xfe.txt"


@pytest.mark.parametrize("colour", [True, *rarely([False])])
def test_progress_on_a_terminal(tmp_path: Path, colour: bool) -> None:
    """It moves, it says how far it is, and the names of files never reach it. NO_COLOR is honoured."""
    folder = tmp_path / "\x1b]0;pwned\x07"
    folder.mkdir()
    rows = manifest(folder / "m.csv", 60)
    ours, theirs = pty.openpty()
    command = [
        *COMMAND,
        "embed",
        str(rows),
        "-m",
        "fake:4,ms=30",
        "-o",
        str(tmp_path / "o.parquet"),
        "--batch-size",
        "1",
    ]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    environment |= {} if colour else {"NO_COLOR": "1"}
    with subprocess.Popen(command, stderr=theirs, env=environment) as child:
        os.close(theirs)
        seen = read_terminal(ours)
        assert child.wait() == 0
    assert b"]0;pwned" not in seen.replace(b"\\x1b]0;pwned", b"")
    shown = re.findall(rb"(\d+) of 60 rows", seen)
    assert len(set(shown)) >= 2
    assert b"60 rows, 60 ok" in seen
    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-9]", seen)) == colour


def read_terminal(descriptor: int) -> bytes:
    seen = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not select.select([descriptor], [], [], 1)[0]:
            continue
        try:
            block = os.read(descriptor, 65536)
        except OSError:
            break
        if not block:
            break
        seen += block
    os.close(descriptor)
    return seen


def test_library_chatter_stays_away(tmp_path: Path) -> None:
    """Warnings and log records are dropped, or written to --log-file, or shown with --debug."""
    rows = manifest(tmp_path / "m.csv", 2)
    code = (
        "import warnings, logging, sys; from mmcli.cli.boundary import run; "
        "from mmcli.models.fake import FakeRunner; load = FakeRunner.__init__\n"
        "def talk(self, plan):\n"
        "    warnings.warn('old thing'); logging.getLogger('library').warning('chatter'); load(self, plan)\n"
        "FakeRunner.__init__ = talk\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    command = [COMMAND[0], "-c", code, "embed", str(rows), "-m", "fake:4", "--quiet"]
    plain = subprocess.run(command, capture_output=True, check=True)
    assert plain.stderr == b""
    log = tmp_path / "log"
    logged = subprocess.run([*command, "--log-file", str(log)], capture_output=True, check=True)
    assert logged.stderr == b""
    assert "chatter" in log.read_text()
    assert "old thing" in log.read_text()
    assert "stdout: 2 rows, 2 ok" in log.read_text()
    shown = subprocess.run([*command, "--debug"], capture_output=True, check=True)
    assert b"chatter" in shown.stderr


def test_not_enough_memory_on_the_host() -> None:
    def greedy() -> int:
        raise MemoryError

    assert boundary.guard(greedy).exit_code == 7


def test_a_bug_is_told_in_one_line(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    def buggy() -> int:
        raise ZeroDivisionError("of\nours")

    assert boundary.guard(buggy).exit_code == 1
    said = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: of" in said
    assert "--debug" in said
    assert "Traceback" not in said
    boundary.guard(buggy, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_a_model_that_fails_ends_the_run(cli: Cli, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 4, **{f"r{n}": "fail" for n in range(4)})
    done = cli("embed", rows, "-m", "fake:4,obey", "-o", tmp_path / "o.parquet", "--json")
    assert done.code == 7
    assert "this model was told to fail" in done.err


def test_a_crashing_decoder_costs_one_row(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 6, r2="segfault", r4="exit")
    environment = {**os.environ, "MMCLI_NUM_WORKERS": "2"}
    done = finished("embed", rows, "-m", "fake:4,obey", "-o", tmp_path / "o.parquet", env=environment)
    assert done.code == 3
    assert "6 rows, 4 ok, 2 errors (2 worker_crash)" in done.err


def test_interrupted_while_listing(tmp_path: Path) -> None:
    """A list on stdin that does not end: nothing is computed yet, nothing stays."""
    out = tmp_path / "o.parquet"
    with process("embed", "-", "-m", "fake:4", "-o", out, stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 90
        while not (tmp_path / "o.parquet.mmcli" / "lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        child.send_signal(15)
        assert child.wait(timeout=60) == 143
        assert child.stderr is not None
        assert child.stderr.read() == b"mmcli: terminated\n"
    assert list(tmp_path.iterdir()) == []
