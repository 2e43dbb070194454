"""What a diagnosis says, and that it says no more than its intervals allow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmcli.core.errors import OutputError
from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.diagnostics import DiagnosticOptions, Predict, Rows, diagnose
from mmcli.evaluation.diagnostics_report import lines, sentences, to_dict, write_report
from mmcli.evaluation.shared_space import diagnose_space

CLASSES = 3


def noisy(weights: dict[str, tuple[float, float]], rows: int = 300) -> tuple[Predict, Rows]:
    """A model that adds up evidence. Of each modality: how often it tells the class rightly, and its weight."""
    rng = np.random.default_rng(7)
    truth = rng.integers(0, CLASSES, rows)
    votes = []
    for right, weight in weights.values():
        told = np.where(rng.random(rows) < right, truth, rng.integers(0, CLASSES, rows))
        votes.append(np.eye(CLASSES)[told] * weight * rng.uniform(0.2, 1.8, (rows, 1)))

    def predict(indices: np.ndarray, present: np.ndarray) -> np.ndarray:
        logits = [votes[m][indices[:, m]] * present[:, m, None] for m in range(len(votes))]
        return np.sum(logits, axis=0)

    return predict, Rows(tuple(weights), truth)


def told(weights: dict[str, tuple[float, float]], rows: int = 300, replicates: int = 300) -> str:
    options = DiagnosticOptions(Resampling(replicates), permutations=3, additive_rows=50)
    return "\n".join(sentences(diagnose(*noisy(weights, rows), options)))


def test_rows_that_were_drawn_are_told() -> None:
    predict, rows = noisy({"image": (0.9, 1.0), "text": (0.9, 1.0)}, 100)
    options = DiagnosticOptions(Resampling(0), permutations=2, additive_rows=20)
    assert lines(diagnose(predict, rows, options))[0] == "100 rows; numbers with their 95 % intervals"
    found = diagnose(predict, replace(rows, drawn_from=4000), options)
    assert lines(found)[0] == "100 rows, drawn of 4,000; numbers with their 95 % intervals"
    assert (to_dict(found)["rows"], to_dict(found)["drawn_from"]) == (100, 4000)


def test_a_modality_that_is_leaned_on() -> None:
    """The image would tell as much as the text, and has a tenth of its weight."""
    text = told({"image": (0.9, 0.1), "text": (0.9, 1.0)})
    assert "The model leans on text" in text
    assert "image tells something by itself" in text
    assert "beside text the model makes little of it" in text


def test_what_a_deaf_model_cannot_show() -> None:
    text = told({"image": (0.9, 0.0), "text": (0.9, 1.0)})
    assert "The model leans on text" in text
    assert "Whether image tells anything this model cannot show" in text


def test_no_modality_is_blamed() -> None:
    assert "No modality counts for twice what the others do" in told({"image": (0.8, 1.0), "text": (0.8, 1.0)})
    assert "cannot be told: rows may have one another's" in told({"image": (0.9, 0.0), "text": (0.9, 0.0)})


def test_an_additive_model_joins_nothing() -> None:
    assert "That it joins them otherwise than by adding up" in told({"image": (0.8, 1.0), "text": (0.8, 1.0)})


def test_files(tmp_path: Path) -> None:
    diagnosis = diagnose(*noisy({"image": (0.9, 0.4), "te\x1bxt": (0.9, 1.0), "audio": (0.7, 0.5)}))
    written = write_report(tmp_path, diagnosis)
    assert written == lines(diagnosis)
    assert (tmp_path / "diagnostics.txt").read_text().splitlines() == written
    assert "\x1b" not in "".join(written)
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    assert found == json.loads(json.dumps(to_dict(diagnosis)))
    assert found["modalities"]["image"]["perceptual"]["value"] == diagnosis.modality("image").perceptual.value
    assert [one["rate"] for one in found["missing"]] == [0, 0.1, 0.3, 0.5, 0.7]
    assert found["additive"]["rows"] == 128
    assert found["additive"]["partners"] == 128**2 // (3 * 128)
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diagnostics.json", "diagnostics.png", "diagnostics.txt"]


def test_without_intervals() -> None:
    diagnosis = diagnose(*noisy({"image": (0.9, 0.4), "text": (0.9, 1.0)}), DiagnosticOptions(Resampling(0)))
    assert any(line.startswith("accuracy") for line in lines(diagnosis))
    json.dumps(to_dict(diagnosis), allow_nan=False)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    diagnosis = diagnose(*noisy({"image": (0.9, 0.4), "text": (0.9, 1.0)}), DiagnosticOptions(Resampling(0)))
    with pytest.raises(OutputError):
        write_report(tmp_path / "missing", diagnosis)


def test_of_a_shared_space(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(300, 8))
    sides = [shared + 0.7 * rng.normal(size=shared.shape) + 4 * np.eye(8)[m] for m in range(2)]
    space = diagnose_space(("image", "text"), sides[0], sides[1], range(300), Resampling(100))
    written = write_report(tmp_path, space)
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    assert found["items"] == [300, 300]
    for name in ("modality_gap", "image_to_text_r_at_5", "text_to_image_r_at_1"):
        shown = next(line.split() for line in written if line.startswith(name))
        assert shown[1] == f"{found['scores'][name]['value']:.3f}"
        assert f"{found['scores']['centred_' + name]['value']:.3f}" in shown[2:]
    assert (tmp_path / "diagnostics.txt").read_text().splitlines() == written
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
