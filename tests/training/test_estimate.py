"""What is told of memory and time is what a run takes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_encoders
import torch
from training_runs import image_files, image_rows, objective_of, trainer_of

from mmcli.training.estimate import Forecast, as_text, describe_memory, memory_before, peak_memory
from mmcli.training.options import TrainOptions

OPTIONS = TrainOptions(max_steps=4, batch_size=6)


@pytest.mark.parametrize("changed", [{}, {"optimizer": "sgd", "ema": 0.9}, {"freeze": ("image",), "wise_ft": 0.5}])
def test_memory_before_the_first_step(tmp_path: Path, changed: dict[str, object]) -> None:
    """As large as the tensors that there are after a step."""
    base, images = tiny_encoders.IMAGES["resnet"](tmp_path / "base"), image_files(tmp_path / "images", 12)
    options = replace(OPTIONS, **changed)  # type: ignore[arg-type]
    rows, told = image_rows(images), list[str]()
    trainer = trainer_of(tmp_path / "run", objective_of(base), rows, rows, options)
    trainer.events.note = told.append
    trainer.train()
    parts, model = trainer._parts, trainer._parts.model
    found = memory_before(model, options)
    state = [t for group in parts.optimizer.state.values() for t in group.values() if isinstance(t, torch.Tensor)]
    kept = {
        "weights": list(model.state_dict().values()),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        options.optimizer: [tensor for tensor in state if tensor.ndim],
        "copies of weights": list(parts.average.state.values()) if parts.average else [],
    }
    if options.wise_ft is not None:
        kept["copies of weights"] += trainer._base.values()
    wanted = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in kept.items() if tensors}
    assert found == wanted
    assert told[1] == describe_memory(found)
    assert f"weights {as_text(found['weights'])}" in told[1]


def test_time_and_memory_after_the_first_steps() -> None:
    told: list[str] = []
    forecast = Forecast(told.append, torch.device("cpu"), first=5, steps=10_000_000)
    for step in range(6, 15):
        forecast.after(step)
    assert not told
    forecast._began -= 5.0
    forecast.after(15)
    forecast.after(16)
    (line,) = told
    # 10 steps took 5 s and a little.
    minutes = int(re.match(r"about (\d+) minutes to go, without evaluations", line).group(1))  # type: ignore[union-attr]
    assert minutes == pytest.approx(0.5 * 10_000_000 / 60, rel=0.05)
    assert f"about {as_text(peak_memory(torch.device('cpu')))} of memory" in line


def test_slow_steps_are_told_soon_and_short_runs_at_their_end() -> None:
    told: list[str] = []
    slow = Forecast(told.append, torch.device("cpu"), first=0, steps=100)
    slow._began -= 20.0
    slow.after(1)
    assert told[0].startswith("about 33 minutes to go")
    short = Forecast(told.append, torch.device("cpu"), first=0, steps=3)
    for step in (1, 2, 3):
        short.after(step)
    assert len(told) == 2
    assert told[1].startswith("less than a minute to go")


def test_peak_memory_grows_with_what_is_used() -> None:
    before = peak_memory(torch.device("cpu"))
    size = before // 4 + 400_000_000
    torch.ones(size // 4)
    assert peak_memory(torch.device("cpu")) >= before
    # The peak of the whole process, which holds torch and more than 100 MB.
    assert 100e6 < before < 100e9


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MB"), (349.6e6, "350 MB"), (1e9, "1.0 GB"), (12.34e9, "12.3 GB")]
)
def test_sizes_to_read(size: float, text: str) -> None:
    assert as_text(size) == text
