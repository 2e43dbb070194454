"""The family endpoint with a real server: `transformers serve`, a tiny checkpoint, loopback, and SIGKILL."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_chats
import torch
import transformers as hf
from PIL import Image

TOKENS = 16
QUESTION = "What is it?"


@pytest.fixture(scope="module", autouse=True)
def serving_is_installed() -> None:
    for name in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tiny_chats.BUILDERS["llava"](tmp_path_factory.mktemp("served") / "llava")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(60):
        random = np.random.default_rng(number)
        pixels = np.kron(random.integers(0, 256, (2 + number % 5, 3, 3)), np.ones((12, 12, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path, photos: Path) -> list[tuple[str, str, int]]:
    """(text, finish_reason, tokens) by the checkpoint's own processor and `generate`, alone."""
    processor: Any = hf.AutoProcessor.from_pretrained(checkpoint)
    model = hf.LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    found = []
    for path in sorted(photos.iterdir()):
        parts = [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        written = tokens[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(written, skip_special_tokens=True).strip()
        found.append((text, "length" if len(written) == TOKENS else "stop", len(written)))
    assert len({text for text, _, _ in found}) > 20
    assert {reason for _, reason, _ in found} == {"stop", "length"}
    return found


@contextmanager
def served(checkpoint: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`transformers serve`, once it answers."""
    command = [Path(sys.executable).parent / "transformers", "serve", checkpoint, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        wait_until(lambda: answers(port) or server.poll() is not None, 120)
        assert server.poll() is None, log.read_text()
        yield server
    finally:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30):
            return True
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows(out: Path) -> list[tuple[str, str, int]]:
    table = pq.read_table(out)
    assert table["status"].to_pylist() == ["ok"] * len(table)
    columns = [table[name].to_pylist() for name in ("answer", "finish_reason", "n_tokens")]
    return list(zip(*columns, strict=True))


@pytest.mark.slow
def test_killed_in_mid_run_it_loses_nothing(
    checkpoint: Path, photos: Path, expected: list[tuple[str, str, int]], tmp_path: Path
) -> None:
    port, out = free_port(), tmp_path / "o.parquet"
    model = ["-m", f"openai:{checkpoint}", "--endpoint", f"http://127.0.0.1:{port}/v1", "--retry-time", "2s"]
    how = ["-q", QUESTION, "--max-new-tokens", str(TOKENS), "--batch-size", "4", "--part-rows", "4"]
    command = [sys.executable, "-m", "mmcli", "ask", str(photos), *model, *how, "-o", str(out)]

    def parts() -> list[Path]:
        return sorted((tmp_path / "o.parquet.mmcli").glob("part-*.parquet"))

    with served(checkpoint, port, tmp_path / "log") as server:
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(parts()) >= 2, 60)
        server.kill()
        _, told = run.communicate(timeout=60)
    assert run.returncode == 75, told
    assert not out.exists()
    committed = sum(pq.read_metadata(part).num_rows for part in parts())
    assert 8 <= committed < 60
    assert f"{committed} of 60 rows are safe" in told

    with served(checkpoint, port, tmp_path / "log"):
        again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"{committed} rows are there from an interrupted run" in again.stderr
    assert rows(out) == expected
    assert pq.read_table(out)["id"].to_pylist() == sorted(path.name for path in photos.iterdir())
    # It gives no scores.
    assert pq.read_table(out)["mean_logprob"].null_count == 60
