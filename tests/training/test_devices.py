"""Several processes give the weights of one, go on exactly, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import tiny_dual
import tiny_encoders
import torch
from process_runs import run as run_alone
from safetensors.torch import load_file
from test_contrastive import pair_rows
from training_runs import LABELS, image_files, sound_rows, still
from transformers import GPT2Config, GPT2LMHeadModel

from mmcli.core.errors import ConfigError
from mmcli.training.data import Batches, InOrder
from mmcli.training.devices import Devices, interleaved, launched, open_devices
from mmcli.training.sharding import blocks_of

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Each process would need a GPU of its own.
ON_CPU = ["--device", "cpu"]
# Adam divides a gradient by its own size: one that is nothing but rounding becomes a whole step.
STEADY = ["--optimizer", "sgd", "--learning-rate", "0.1", "--num-workers", "0", "--no-preflight", *ON_CPU]


@dataclass
class Runs:
    """What two processes did, and one alone."""

    folder: Path
    ended: list[dict[str, Any]]
    alone: dict[str, Any]

    def both(self, name: str) -> list[Any]:
        """Exit code and messages of each process."""
        return [ended[name] for ended in self.ended]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def farthest(one: Path, other: Path) -> float:
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def manifest(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def commands(folder: Path) -> dict[str, list[str]]:
    """Those whose weights are to be the same; 13 rows in batches of 4 or 6 leave one process without a last row."""
    images = image_files(folder / "images", 13)
    pairs = [
        {"image": row.media[0].file, "text": row.media[1].text}
        for row in pair_rows(folder / "pairs", 13, repeated=True)
    ]
    texts = manifest(folder / "pairs.jsonl", pairs)
    columns = ["--image-column", "image", "--text-column", "text"]
    vit = str(still(tiny_encoders.IMAGES["vit"](folder / "vit")))
    clip = str(still(tiny_dual.clip(folder / "clip")))
    git = str(still(tiny_captioners.git(folder / "git")))
    bert = str(still(tiny_encoders.TEXTS["bert"](folder / "bert")))
    classify = ["finetune", str(images), "--val", str(images), "-m", vit, "--batch-size", "4", *STEADY]
    pairwise = ["finetune", texts, "--val", texts, "--epochs", "2", "--objective"]
    both = [*pairwise, "contrastive", "-m", clip, *columns, "--batch-size", "6", *STEADY]
    write = [*pairwise, "caption", "-m", git, "--image-column", "image", "--target-column", "text", *STEADY]
    return {
        "classify": [*classify, "--epochs", "2", "--ema", "0.5"],
        "in pieces": [*classify, "--epochs", "2", "--gradient-accumulation-steps", "2", "--balance"],
        "contrastive": both,
        "contrastive in pieces": [*both, "--gradient-accumulation-steps", "2", "--freeze", "text_model"],
        "caption": [*write, "--batch-size", "4", "--max-new-tokens", "8"],
        "fusion": ["fusion", bert, vit],
    }


def sharded(folder: Path) -> dict[str, list[str]]:
    """Commands for FSDP: sounds whose lengths make many batches of a piece; a model that writes."""
    sounds = [{"audio": row.media[0].file, "label": LABELS[row.target]} for row in sound_rows(folder / "sounds", 9)]
    heard = manifest(folder / "sounds.jsonl", sounds)
    hubert = str(still(tiny_encoders.SOUNDS["hubert-group"](folder / "hubert")))
    writer = str(still(tiny_captioners.vit_gpt2(folder / "vit_gpt2")))
    pairs = str(folder / "pairs.jsonl")
    common = ["--epochs", "2", "--batch-size", "4", *STEADY]
    return {
        "fsdp sounds": ["finetune", heard, "--val", heard, "-m", hubert, "--audio-column", "audio", *common,
                        "--gradient-accumulation-steps", "2"],
        "fsdp caption": ["finetune", pairs, "--val", pairs, "-m", writer, "--objective", "caption", *common,
                         "--image-column", "image", "--target-column", "text", "--max-new-tokens", "8"],
    }  # fmt: skip


def with_run(arguments: list[str], run: Path) -> list[str]:
    """The run's folder where it belongs."""
    return ["fusion", str(run), *arguments[1:]] if arguments[0] == "fusion" else [*arguments, "-o", str(run)]


def stopping(folder: Path, equal: dict[str, list[str]]) -> dict[str, list[str]]:
    """Runs that draw (dropout, crops), stopped after each step or not; and runs that end with errors."""
    base = tiny_encoders.IMAGES["vit"](folder / "drawing")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.2}))
    images, lines = folder / "images", []
    for file in sorted(images.rglob("*.png")):
        lines.append({"image": str(file), "label": file.parent.name})
    bad = folder / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n bad")
    broken = manifest(folder / "broken.jsonl", [*lines, {"image": str(bad), "label": "cat"}])
    common = ["-m", str(base), "--image-column", "image", "--num-workers", "0", "--batch-size", "5", *ON_CPU]
    good = manifest(folder / "good.jsonl", lines)
    drawing = ["finetune", good, "--val", good, *common, "--augment", "crop", "--max-steps", "4",
               "--learning-rate", "2e-3", "--no-preflight"]  # fmt: skip
    stopped = [*drawing, "-o", str(folder / "stopped")]
    # Stopped after a step, and gone on with by one process.
    begun = [*equal["classify"], "-o", str(folder / "begun")]
    # The second process has the row that cannot be read.
    seed = next(
        str(seed) for seed in range(99)
        if any((0, 13) in keys for keys in Batches(14, 5, seed, rank=1, world=2))
    )  # fmt: skip
    return {
        "probe": ["finetune", good, "--val", good, *common, "--objective", "probe", "-o", str(folder / "r6")],
        "whole": [*drawing, "-o", str(folder / "whole")],
        "stopped 1": [*stopped, "--time-limit", "0.001s"],
        "stopped 2": [*stopped, "--time-limit", "0.001s"],
        "stopped 3": stopped,
        "begun": [*begun, "--time-limit", "0.001s"],
        "unreadable": ["finetune", broken, "--val", good, *common, "--no-preflight", "--seed", seed,
                       "-o", str(folder / "r1")],
        "not finite": [*drawing, "--max-grad-norm", "0", "--warmup", "0", "--optimizer", "sgd",
                       "--learning-rate", "1e30", "-o", str(folder / "r2")],
        "preflight": ["finetune", broken, "--val", good, *common, "-o", str(folder / "r3")],
        "another run": [*drawing, "--seed", "1", "-o", str(folder / "whole")],
        "mistake": ["finetune", good, "--val", good, *common, "--epochs", "0", "-o", str(folder / "r4")],
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("devices")
    everything = commands(folder)
    equal = {name: everything[name] for name in ("classify", "contrastive")}
    several = {name: with_run(arguments, folder / f"two {name}") for name, arguments in equal.items()}
    several |= stopping(folder, equal)
    several["not sharded"] = ["fsdp", *equal["contrastive"], "--ema", "0.9", "-o", str(folder / "r5")]
    return run_both(folder, several, equal)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("more")
    equal = {name: words for name, words in commands(folder).items() if name not in ("classify", "contrastive")}
    return run_both(folder, {name: with_run(words, folder / f"two {name}") for name, words in equal.items()}, equal)


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sharded")
    commands(folder)
    equal = sharded(folder)
    several = {name: ["fsdp", *with_run(words, folder / f"two {name}")] for name, words in equal.items()}
    written = ["fsdp", *equal["fsdp caption"], "-o", str(folder / "sharded")]
    several |= {"sharded 1": [*written, "--time-limit", "0.001s"], "sharded 2": written}
    return run_both(folder, several, equal)


def run_both(folder: Path, several: dict[str, list[str]], equal: dict[str, list[str]]) -> Runs:
    """All of the commands in two processes, one after the other, while this process does what one gives."""
    (folder / "runs.json").write_text(json.dumps(several))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*TORCHRUN, str(HERE / "process_runs.py"), str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    try:
        alone = {name: run_alone(with_run(arguments, folder / f"one {name}")) for name, arguments in equal.items()}
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said.decode()[-5000:]
    return Runs(folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], alone)


@pytest.mark.parametrize("name", ["classify", "contrastive"])
def test_two_processes_give_the_weights_of_one(runs: Runs, name: str) -> None:
    """After eight steps or six, the last of each epoch with a row for one process alone: within 1e-6."""
    assert_same(runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in pieces", "contrastive in pieces", "caption", "fusion"])
def test_two_processes_give_the_weights_of_one_in_other_runs(more_runs: Runs, name: str) -> None:
    assert_same(more_runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp sounds", "fsdp caption"])
def test_two_processes_that_share_a_model_out_give_the_weights_of_one(sharded_runs: Runs, name: str) -> None:
    assert_same(sharded_runs, name)


def assert_same(runs: Runs, name: str) -> None:
    assert [code for code, _ in runs.both(name)] == [0, 0], runs.both(name)
    assert runs.alone[name][0] == 0, runs.alone[name]
    one, two = runs.folder / f"one {name}", runs.folder / f"two {name}"
    for kept in ("best", "last"):
        assert farthest(two / kept, one / kept) <= 1e-6
    measured = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert len(measured[0]) == len(measured[1]) > 6
    for line, other in zip(*measured, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"rows_per_s"}:
            assert other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-5), (line, other)


def test_two_processes_go_on_exactly(runs: Runs) -> None:
    """Stopped after each of two steps, with dropout and crops: bit for bit."""
    assert [[code for code, _ in runs.both(f"stopped {n}")] for n in (1, 2, 3)] == [[75, 75], [75, 75], [0, 0]]
    assert "stopped after step 2 of 4; the same command goes on" in runs.ended[0]["stopped 2"][1]
    for kept in ("best", "last"):
        assert farthest(runs.folder / "stopped" / kept, runs.folder / "whole" / kept) == 0.0


@pytest.mark.slow
def test_a_run_that_is_shared_out_goes_on_exactly(sharded_runs: Runs) -> None:
    runs = sharded_runs
    assert [[code for code, _ in runs.both(f"sharded {n}")] for n in (1, 2)] == [[75, 75], [0, 0]]
    for kept in ("best", "last"):
        assert farthest(runs.folder / "sharded" / kept, runs.folder / "two fsdp caption" / kept) == 0.0


def test_what_is_shared_out() -> None:
    """Blocks, and none with a weight that is used elsewhere, too."""
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=10)
    model = GPT2LMHeadModel(config)
    assert blocks_of(model) == list(model.transformer.h)
    model.transformer.h[1].attn.c_proj.weight = model.transformer.wpe.weight
    assert blocks_of(model) == [model.transformer.h[0], model.transformer.h[2]]
    assert blocks_of(model, ["GPT2MLP"]) == []
    assert blocks_of(torch.nn.Linear(1, 1)) == []


def test_one_process_goes_on_with_a_run_of_two(runs: Runs) -> None:
    """Without dropout its weights are those of one process from the beginning."""
    assert runs.both("begun")[0][0] == 75
    arguments = json.loads((runs.folder / "runs.json").read_text())["begun"]
    code, said = run_alone([one for one in arguments if one not in ("--time-limit", "0.001s")])
    assert code == 0, said
    assert "8 steps of 4 rows, 4 an epoch, 7 left" in said
    assert farthest(runs.folder / "begun" / "last", runs.folder / "one classify" / "last") <= 1e-6


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("unreadable", 7, "mmcli: error: {}/broken.jsonl#13: truncated: the file ends too early"),
        (
            "not finite",
            7,
            r"mmcli: error: the loss or its gradients are (nan|inf) at step \d, rows {}/good.jsonl#\d",
        ),
        ("preflight", 2, "mmcli: error: INPUT: {}/broken.jsonl#13 .truncated"),
        ("another run", 6, "mmcli: error: {}/whole is of another run: options.seed: was 0, is 1"),
        ("not sharded", 2, "mmcli: error: FSDP and --objective contrastive exclude one another"),
        ("probe", 2, "mmcli: error: --objective probe is of one process"),
        ("mistake", 2, "mmcli: error: --epochs '0' is not a number from 1 up"),
    ],
)
def test_what_ends_one_process_ends_all_and_is_said_once(runs: Runs, name: str, code: int, said: str) -> None:
    """Where the first process finds it, or the second one, or both."""
    (first, words), (second, silence) = runs.both(name)
    assert (first, second) == (code, code), words + silence
    assert len(re.findall("mmcli: error", words)) == (2 if name == "not sharded" else 1)
    assert re.search(said.format(re.escape(str(runs.folder))), words), words
    assert silence == ""


# --------------------------------------------------------------------------------- torchrun and signals


def command(runs: Runs, run: Path, *more: str) -> list[str]:
    """A run that draws, of many steps, with a worker in each process."""
    arguments = json.loads((runs.folder / "runs.json").read_text())["whole"]
    settings = ["--epochs", "10", "--max-steps", "30", "--eval-steps", "10", "--num-workers", "1",
                "--checkpoint-time", "0.05s", "-o", str(run), *more]  # fmt: skip
    return [*TORCHRUN, "-m", "mmcli", *arguments, *settings]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that torchrun started, in order of rank."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.slow
def test_killed_processes_lose_nothing(runs: Runs, tmp_path: Path) -> None:
    """SIGKILL of all of them while they learn; SIGTERM of torchrun; then the same command goes on: bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(runs, tmp_path / "whole"), check=True, capture_output=True, timeout=120, env=environment)
    run = tmp_path / "run"
    killed = subprocess.Popen(command(runs, run), stderr=subprocess.DEVNULL, env=environment)
    wait_for(lambda: (run / "checkpoint").exists())
    started = children(killed)
    assert len(started) == 2
    for number in started:
        os.killpg(number, signal.SIGKILL)
    assert killed.wait(60) != 0
    checkpoint = os.stat(run / "checkpoint").st_ino
    stopped = subprocess.Popen(command(runs, run), stderr=subprocess.PIPE, env=environment)
    wait_for(lambda: os.stat(run / "checkpoint").st_ino != checkpoint)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=60)
    assert re.search(r"mmcli: stopped after step \d+ of 30; the same command goes on", said.decode()), said.decode()
    assert b"mmcli: error" not in said
    subprocess.run(command(runs, run), check=True, capture_output=True, timeout=120, env=environment)
    for kept in ("best", "last"):
        assert farthest(run / kept, tmp_path / "whole" / kept) == 0.0


@pytest.mark.slow
def test_when_one_process_dies_the_others_end(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command(runs, run, "--epochs", "9999", "--max-steps", "9999", "--checkpoint-time", "1s")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    wait_for(lambda: (run / "checkpoint").exists())
    os.kill(children(process)[1], signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.monotonic() - began < 45
    assert b"Signal 9 (SIGKILL)" in said
    assert b"internal error" not in said


# ------------------------------------------------------------------------------------------ the parts


def test_who_is_launched() -> None:
    assert launched({}) == (0, 1)
    # A job of a cluster may say how many tasks it has: that alone makes none of them one of several.
    assert launched({"WORLD_SIZE": "8"}) == (0, 1)
    assert launched({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == (3, 4)
    assert open_devices("cpu", {}) == Devices()


@pytest.mark.parametrize(
    ("device", "more", "said"),
    [
        ("cuda:1", {}, "--device cuda:1: of several processes each gets its own"),
        ("mps", {}, "--device mps: of several processes each gets its own"),
        ("cpu", {"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate launch: DEEPSPEED is not for mmcli finetune"),
    ],
)
def test_devices_that_several_processes_cannot_have(device: str, more: dict[str, str], said: str) -> None:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **more}
    with pytest.raises(ConfigError, match=said):
        open_devices(device, environment)


def test_one_process_needs_no_group() -> None:
    alone = Devices()
    assert alone.numbers(1.5, 2) == [(1.5, 2)]
    assert alone.gather("a") == alone.collect("a") == ["a"]
    assert alone.each(lambda: "b") == alone.first(lambda: "b") == "b"
    assert alone.reducer(torch.nn.Linear(1, 1)) is None


def test_parts_of_the_validation_rows_come_together_in_order() -> None:
    parts = [[keys[0][1] for keys in InOrder(7, 1, rank, 3)] for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(InOrder(7, 1, rank, 3)) for rank in range(3)] == [3, 2, 2]
    assert interleaved(parts) == list(range(7))
