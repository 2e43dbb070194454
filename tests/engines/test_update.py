"""--update: afterwards the output is that of a full run, but only new, changed and failed inputs were computed."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rare import rarely

from mmcli.cli.boundary import run

NAMES = [f"{folder}{stem}{ext}" for folder in ("", "sub/") for stem in "abcdef" for ext in (".txt", ".png")]
# What a file holds: a number makes a good one.
CONTENT = st.integers(0, 5) | st.sampled_from(["bad", "empty"])
STEP = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES), CONTENT),
    st.tuples(st.just("write"), st.sampled_from(NAMES), CONTENT),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("touch"), st.sampled_from(NAMES)),
)


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """No option from outside, and nothing that a run sets stays."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("MMCLI_")]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


class World:
    """A folder of files, what is known of them, and an output."""

    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out, self.clock = folder / "in", out, 0
        self.files: dict[str, tuple[int, bool]] = {}
        (self.folder / "sub").mkdir(parents=True)
        # Good rows of the output, as it is: name and time.
        self.finished: set[tuple[str, int]] = set()

    def step(self, kind: str, name: str, argument: object = None) -> None:
        """Change the folder; every change has a time of its own."""
        self.clock += 1
        path = self.folder / name
        if kind == "write":
            path.write_bytes(content(name, argument))
            self.files[name] = self.clock, isinstance(argument, int)
            os.utime(path, ns=(0, self.clock * 1_000_000_000))
        elif name in self.files and kind == "delete":
            path.unlink()
            del self.files[name]
        elif name in self.files and kind == "touch":
            os.utime(path, ns=(0, self.clock * 1_000_000_000))
            self.files[name] = self.clock, self.files[name][1]
        elif name in self.files and kind == "rename" and Path(name).suffix == Path(str(argument)).suffix:
            os.replace(path, self.folder / str(argument))
            self.files[str(argument)] = self.files.pop(name)

    @property
    def code(self) -> int:
        return 0 if all(good for _, good in self.files.values()) else 3

    def expected_computed(self) -> int:
        return sum((name, time) not in self.finished for name, (time, _) in self.files.items())

    def note_finished(self) -> None:
        self.finished = {(name, time) for name, (time, good) in self.files.items() if good}


def content(name: str, what: object) -> bytes:
    if what == "empty" and name.endswith(".png"):
        return b""
    if name.endswith(".txt"):
        return f"text {what}".encode() if isinstance(what, int) else b"raise"
    if what == "bad":
        return b"\x89PNG\r\n\x1a\nnot a picture"
    file = io.BytesIO()
    Image.new("RGB", (3, 4), (int(str(what)) * 9, 1, 2)).save(file, "png")
    return file.getvalue()


def embed(world: World, out: str, *options: str) -> tuple[int, dict[str, int]]:
    """Exit code and the JSON report of a run in this process."""
    arguments = ["embed", str(world.folder), "-m", "fake:4,obey", "-o", out, "--num-workers", "0", "--json"]
    said = io.StringIO()
    with redirect_stderr(said):
        code = run([*arguments, "--batch-size", "3", "--part-rows", "4", *options])
    assert code in (0, 3, 4), said.getvalue()
    return code, json.loads(said.getvalue().splitlines()[-1])


def files_of(out: str) -> dict[str, bytes]:
    """Every file of an output, byte for byte: the file and what lies beside it, or the folder."""
    path = Path(out)
    found = [p for p in path.parent.rglob("*") if p.is_file()]
    return {str(p.relative_to(path.parent)): p.read_bytes() for p in found}


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", *rarely(["parts/", "arrays/"])])
@given(rounds=st.lists(st.tuples(st.lists(STEP, max_size=8), st.booleans()), min_size=2, max_size=4))
@settings(max_examples=5, deadline=None)
def test_an_update_is_a_full_run(name: str, rounds: list) -> None:
    formats = ["--format", "npy"] if name == "arrays/" else []
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "updated").mkdir()
        world = World(Path(scratch), f"{scratch}/updated/{name}")
        for number, (steps, interrupted) in enumerate(rounds):
            for step in steps:
                world.step(*step)
            if interrupted:
                # Ends at the first error; the rows before it are committed.
                embed(world, world.out, "--update", "--on-error", "fail", "--part-rows", "1", *formats)
            code, report = embed(world, world.out, "--update", *formats)
            assert code == world.code
            assert report["rows"] == len(world.files)
            if not interrupted:
                assert report["computed"] == world.expected_computed()
            world.note_finished()
            (Path(scratch) / f"full{number}").mkdir()
            full = f"{scratch}/full{number}/{name}"
            assert embed(world, full, *formats)[0] == world.code
            if name == "parts/":
                # Where its parts are cut depends on when a run was interrupted, and each knows its rows.
                assert pq.read_table(world.out).equals(pq.read_table(full))
            else:
                assert files_of(world.out) == files_of(full)
