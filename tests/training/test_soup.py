"""--average-best: the mean of the best evaluations' weights, if that is better; the same however often stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from training_runs import image_files, image_rows, objective_of, trainer_of

from mmcli.core.errors import ExitCode, Stopped
from mmcli.training.classify import Classify
from mmcli.training.options import TrainOptions
from mmcli.training.soup import Soup


@dataclass(slots=True)
class ByLoss(Classify):
    """By the loss, of which two evaluations are never equally good. `sign`: -1 where the largest is the best."""

    sign: float = 1.0

    def measured(self, found: Sequence[Any]) -> dict[str, float]:
        metrics = Classify.measured(self, found)
        return {**metrics, "neg_loss": -self.sign * metrics["loss"]}


# So fast that it goes to and fro.
OPTIONS = TrainOptions(
    epochs=4, batch_size=4, learning_rate=1e-2, schedule="constant", eval_steps=2, average_best=3, optimizer="sgd"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return tiny_encoders.IMAGES["vit"](folder / "base"), image_files(folder / "images", 24)


def run_of(
    run: Path, pictures: tuple[Path, Path], sign: float = 1.0, options: TrainOptions = OPTIONS, stop: Any = None
) -> tuple[Any, dict[int, tuple[float, dict[str, torch.Tensor]]], list[str]]:
    """The trainer, what each evaluation measured with which weights, and what was said."""
    objective = ByLoss(objective_of(pictures[0]).network, metric="neg_loss", sign=sign)
    rows, seen, said = image_rows(pictures[1]), {}, list[str]()
    for row, target in zip(rows, np.random.default_rng(0).integers(0, 3, len(rows)), strict=True):
        # Each batch is learned by heart, and the one before forgotten.
        row.target = int(target)
    trainer = trainer_of(run, objective, rows[:16], rows[:16], options, stop)

    def told(line: dict[str, Any]) -> None:
        if "val_neg_loss" in line:
            weights = {name: t.cpu().clone() for name, t in trainer._parts.model.state_dict().items()}
            seen[line["step"]] = line["val_neg_loss"], weights
            assert len(list((run / "evaluated").glob("step-?.pt"))) <= 3

    trainer.events.told, trainer.events.note = told, said.append
    return trainer, seen, said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return objective_of(folder).build(torch.device("cpu")).state_dict()


def test_the_average_is_the_best_where_it_is_better(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    trainer, seen, said = run_of(
        tmp_path / "run", pictures, options=replace(OPTIONS, ema=0.5, freeze=("embeddings",))
    )
    progress = trainer.train()
    best = sorted(seen, key=lambda step: -seen[step][0])[:3]
    assert progress.averaged == best
    assert progress.best > seen[best[0]][0]
    assert f"steps {', '.join(map(str, sorted(best)))}: neg_loss {progress.best:.4f}, better than" in said[-1]
    found = weights(tmp_path / "run" / "best")
    for name, tensor in found.items():
        wanted = torch.stack([seen[step][1][name] for step in best]).mean(dim=0)
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-7)
        if "embeddings" in name:
            assert torch.equal(tensor, seen[best[0]][1][name])
    assert {file.name for file in (tmp_path / "run" / "evaluated").iterdir()} == {f"step-{s}.pt" for s in best}
    again = weights(tmp_path / "run" / "last")
    last = seen[max(seen)][1]
    assert all(torch.equal(again[name], last[name]) for name in again)


def test_the_best_stays_where_the_average_is_no_better(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    """Of the evaluations with the largest loss; their mean has a smaller one."""
    trainer, seen, said = run_of(tmp_path / "run", pictures, sign=-1.0)
    progress = trainer.train()
    best = max(seen, key=lambda step: seen[step][0])
    assert (progress.averaged, progress.best, progress.best_step) == ([], seen[best][0], best)
    assert f"no better than {progress.best:.4f} of step {best} alone; best is that step" in said[-1]
    found = weights(tmp_path / "run" / "best")
    assert all(torch.equal(found[name], seen[best][1][name]) for name in found)


def test_a_run_stopped_anywhere_averages_the_same(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    run_of(tmp_path / "whole", pictures)[0].train()
    wanted = weights(tmp_path / "whole" / "best")
    generator, stops = random.Random(3), 0
    for number in range(2):
        run = tmp_path / str(number)
        for _ in range(2):
            asked, last = iter(range(100)), generator.randrange(7)
            try:
                stop = lambda asked=asked, last=last: ExitCode.INTERRUPTED if next(asked) >= last else None  # noqa: E731
                run_of(run, pictures, stop=stop)[0].train()
            except Stopped:
                stops += 1
                # As if it had been killed between the weights and the checkpoint.
                (run / "evaluated").mkdir(exist_ok=True)
                (run / "evaluated" / "step-999.pt").write_bytes(b"torn")
        trainer, _, _ = run_of(run, pictures)
        assert trainer.train().averaged
        found = weights(run / "best")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert not (run / "evaluated" / "step-999.pt").exists()
    assert stops >= 3


def test_whole_numbers_are_those_of_the_best(tmp_path: Path) -> None:
    soup = Soup(tmp_path, 2)
    for step, value in ((1, 0.25), (2, 1.0), (3, 4.0)):
        soup.write({"weight": torch.tensor([value]), "steps": torch.tensor(step)}, step)
    kept = soup.ranked([(0.5, 1), (0.5, 2)], 0.7, 3)
    assert kept == [(0.7, 3), (0.5, 1)]
    found = soup.average(kept)
    assert (found["weight"].tolist(), found["steps"].item()) == ([2.125], 3)


def test_through_the_command(
    tmp_path: Path, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from mmcli.cli.boundary import run as mmcli

    base, images = pictures
    common = ["finetune", str(images), "--val", str(images), "-m", str(base), "-o", str(tmp_path / "run"),
              "--num-workers", "0", "--batch-size", "12", "--learning-rate", "1e-3"]  # fmt: skip
    assert mmcli([*common, "--epochs", "3", "--average-best", "2"]) == 0
    said = capsys.readouterr().err
    assert "the average of the weights of steps " in said
    assert not (tmp_path / "run" / "evaluated").exists()
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (told["averaged_steps"] is not None) == ("better than" in said.replace("no better than", ""))
    assert mmcli([*common, "--overwrite", "--epochs", "1", "--average-best", "2"]) == 0
    assert "--average-best: step 2 alone was evaluated; there is nothing to average" in capsys.readouterr().err
    for more, wrong in (
        (["--average-best", "1"], "--average-best '1' is not a number from 2 up"),
        (["--average-best", "2", "--lora-rank", "2"], "--average-best is of whole weights, not of --lora-rank"),
    ):
        assert mmcli([*common, "--overwrite", *more]) == 2
        assert wrong in capsys.readouterr().err
