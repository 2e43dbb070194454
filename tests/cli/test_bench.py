from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Cli

from mmcli.engines.ceilings import Ceilings, Rate


def measured(cli: Cli, *arguments: object, code: int = 0) -> dict[str, Any]:
    done = cli("bench", *arguments, "--json")
    assert done.code == code, done.err
    return dict(json.loads(done.out))


def test_a_slow_model_limits(cli: Cli, texts: Path) -> None:
    """12.5 batches of 4 in a second, and no more."""
    found = measured(cli, texts, "-m", "fake:8,ms=80", "--batch-size", 4, "--time", "0.6s")
    assert found["limited_by"] == "model"
    assert 0 < found["end_to_end"]["rows_per_s"] <= 50
    assert 0 < found["model_only"]["rows_per_s"] <= 50 < found["decode"]["rows_per_s"]
    assert found["ceiling"] == min(found[side]["rows_per_s"] for side in ("decode", "model_only", "both_at_once"))
    assert found["end_to_end"]["busy"]["model"]["forward"] > 0.5


def test_slow_decoding_limits(cli: Cli, texts: Path) -> None:
    """100 rows in a second by a thread, 200 by two processes, and no more."""
    found = measured(cli, texts, "-m", "fake:8,process=10", "--batch-size", 4, "--time", "0.6s")
    assert found["limited_by"] == "decode"
    assert 0 < found["end_to_end"]["rows_per_s"] <= 100
    assert 0 < found["decode"]["rows_per_s"] <= 100 < found["model_only"]["rows_per_s"]
    assert found["end_to_end"]["busy"]["decode"]["process"] > 0.5
    two = measured(cli, texts, "-m", "fake:8,process=10", "--batch-size", 4, "--time", "0.6s", "--num-workers", 2)
    assert two["num_workers"] == 2
    assert two["decode"]["rows_per_s"] <= 200
    assert two["end_to_end"]["rows_per_s"] <= 200


def test_what_a_run_reaches_is_told_without_its_start_and_end(cli: Cli, texts: Path) -> None:
    found = measured(cli, texts, "-m", "fake:8,ms=50", "--batch-size", 4, "--time", "1.5s")
    assert found["rows"] / found["end_to_end"]["steady_rows_per_s"] > 1
    assert 0 < found["end_to_end"]["steady_rows_per_s"] <= 80
    assert found["steady_ratio"] == pytest.approx(
        found["end_to_end"]["steady_rows_per_s"] / found["ceiling"], abs=0.01
    )
    short = measured(cli, texts, "-m", "fake:8", "--rows", 8, "--time", "0.2s")
    assert short["steady_ratio"] is None


def test_cores_that_both_want_are_a_ceiling_of_their_own() -> None:
    both = Ceilings(Rate(1000, 10, 20), Rate(500, 10, 20), cores=2)
    # 20 + 40 ms of two cores' time for a row: 1 / (1 / 100 + 1 / 50).
    assert both.shared == pytest.approx(100 / 3)
    assert both.slower == pytest.approx(50)
    assert both.highest == both.shared
    assert both.limit == "model"
    busy = Ceilings(Rate(1000, 10, 10), Rate(500, 10, 9), cores=2, greedy=True)
    # Other work has left one core.
    assert busy.shared == pytest.approx(1 / (0.01 + 0.018))
    idle = Ceilings(Rate(1000, 10, 20), Rate(500, 10, 0.5), cores=2)
    assert idle.highest == pytest.approx(50)
    assert idle.limit == "model"
    decoding = Ceilings(Rate(1000, 10, 20), Rate(1200, 10, 10), cores=2)
    assert decoding.highest < 100
    assert decoding.limit == "decode"


def test_rows_that_cannot_be_read_are_error_rows(cli: Cli, texts: Path) -> None:
    (texts / "5.txt").write_bytes(b"\xff\xfe\xfd")
    found = measured(cli, texts, "-m", "fake:8", "--rows", 60, "--time", "0.2s", code=3)
    assert found["rows"] == 60
    assert found["errors_by_code"] == {"corrupt": 10}
    done = cli("bench", texts / "5.txt", "-m", "fake:8", "--time", "0.2s")
    assert done.code == 2
    assert "none of the inputs can be read (" in done.err
    assert done.out == ""


def test_the_table_names_the_ceilings_and_the_run(cli: Cli, texts: Path) -> None:
    done = cli("bench", texts, "-m", "fake:8,ms=200", "--time", "0.2s")
    assert done.code == 0
    first = [line.split("  ")[0] for line in done.out.splitlines()]
    assert {"decoding alone", "the model alone", "both at once", "a whole run", "once it runs"} <= set(first)
    assert "limited by the model" in done.out
    assert "fake" not in done.out
    assert not list(texts.glob("*.parquet"))


@pytest.mark.parametrize("task", ["caption", "ask", "classify"])
def test_every_task_can_be_measured(cli: Cli, texts: Path, task: str) -> None:
    more = {"ask": ["-q", "What?"], "classify": ["--labels", "a,b"]}.get(task, [])
    found = measured(cli, texts, "-m", "fake:8", "--task", task, *more, "--rows", 64, "--time", "0.1s")
    assert found["task"] == task
    assert found["rows"] == 64
    assert found["errors"] == 0


def test_all_that_is_wrong_is_said_at_once(cli: Cli, tmp_path: Path) -> None:
    done = cli("bench", "--task", "embd", "--labels", "a,b", "--time", "soon", "--rows", 0, "--batch-size", "x")
    assert done.code == 2
    assert "--task 'embd' is not one of embed, caption, ask, classify; did you mean embed?" in done.err
    for said in ("--labels is for --task classify", "--time 'soon'", "--rows '0'", "--batch-size 'x'", "-m MODEL"):
        assert said in done.err
    assert "no INPUT" in done.err or "no input" in done.err
    done = cli("bench", tmp_path, "-m", "openai:some")
    assert done.code == 2
    assert "bench measures models that run here, not a server" in done.err


def test_without_inputs_there_is_nothing_to_measure(cli: Cli, tmp_path: Path) -> None:
    done = cli("bench", tmp_path, "-m", "fake:8")
    assert done.code == 2
    assert "nothing to measure" in done.err
