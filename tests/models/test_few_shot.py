"""Heads of solved examples equal what their definitions give, computed another way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmcli.core.errors import ConfigError
from mmcli.models.few_shot import FewShot, Support, choose_method, class_means, fit, probe
from mmcli.models.head import Cache, Head, read_head, write_head
from mmcli.models.options import Ranking
from mmcli.models.scores import classified, rank

BASE = {"model": "m", "identity": {"weights": "w"}}


def support(counts: tuple[int, ...], size: int = 6, normalize: bool = False, seed: int = 0) -> Support:
    """Classes around centres of their own."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((len(counts), size)) * 2
    classes = np.repeat(np.arange(len(counts)), counts)
    vectors = centres[classes] + generator.standard_normal((len(classes), size)) + 3
    order = generator.permutation(len(classes))
    labels = tuple(f"label {index}" for index in range(len(counts)))
    return Support(vectors[order].astype(np.float32), classes[order], labels, normalize)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def queries(size: int = 6) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((7, size)).astype(np.float32) + 3


def test_nearest_class_mean() -> None:
    solved = support((3, 1, 2))
    head = class_means(solved)
    found = head.logits(torch.from_numpy(queries())).numpy()
    for row, query in enumerate(queries()):
        for label in range(3):
            mean = np.mean([unit(v) for v, c in zip(solved.vectors, solved.classes, strict=True) if c == label], 0)
            assert found[row, label] == pytest.approx(20 * unit(query) @ unit(mean), abs=1e-4)


def test_the_scale_of_class_means_is_the_likeliest_of_left_out_examples() -> None:
    solved = support((12, 9, 15))

    def loss(scale: float) -> float:
        total = 0.0
        for index, label in enumerate(solved.classes):
            others = np.arange(len(solved.classes)) != index
            means = [
                unit(np.mean([unit(v) for v in solved.vectors[others & (solved.classes == c)]], 0))
                for c in range(3)
            ]
            logits = torch.tensor([scale * float(unit(solved.vectors[index]) @ mean) for mean in means])
            total -= float(logits.log_softmax(0)[label])
        return total

    scales = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
    assert class_means(solved).method["scale"] == min(scales, key=loss)


@pytest.mark.parametrize("counts", [(8, 9), (6, 7, 8), (1, 5, 5)])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_probe_is_logistic_regression_on_standardised_vectors(counts: tuple[int, ...], normalize: bool) -> None:
    solved = support(counts, normalize=normalize)
    head = probe(solved, seed=0)
    prepared = np.stack([unit(v) for v in solved.vectors]) if normalize else solved.vectors
    asked = np.stack([unit(v) for v in queries()]) if normalize else queries()
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=head.method["C"], max_iter=1000))
    reference.fit(prepared.astype(np.float64), solved.classes)
    wanted = reference.predict_proba(asked.astype(np.float64))
    found = head.logits(torch.from_numpy(queries())).softmax(-1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (head.method["C"] == 1.0) == (min(counts) == 1)


def test_the_penalty_depends_on_the_examples_and_not_on_their_luck() -> None:
    clear, noise = support((20, 20, 20)), support((20, 20, 20))
    noise.vectors[:] = np.random.default_rng(3).standard_normal(noise.vectors.shape)
    assert probe(clear, 0).method == probe(clear, 0).method
    assert probe(noise, 0).method["C"] < probe(clear, 0).method["C"]


def test_tip_adapter_is_the_formula_of_the_paper() -> None:
    solved = support((2, 3))
    text = torch.nn.functional.normalize(torch.randn(2, 6), dim=-1)
    zero_shot = Head(solved.labels, 100 * text, torch.zeros(2))
    head = fit(solved, FewShot("tip-adapter", alpha=1.3, beta=4.0), zero_shot)
    found = head.logits(torch.from_numpy(queries()))
    for row, query in enumerate(queries()):
        wanted = (100 * text @ torch.from_numpy(unit(query))).numpy()
        for key, label in zip(solved.vectors, solved.classes, strict=True):
            wanted[label] += 1.3 * np.exp(-4.0 * (1 - unit(query) @ unit(key)))
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_how_many_examples_decide_the_method() -> None:
    assert choose_method(FewShot(), [4, 9])[0].method == "probe"
    chosen, why = choose_method(FewShot(), [3, 9])
    assert (chosen.method, why) == ("mean", "nearest class means: a label has 3 of the 4 for a probe")
    assert choose_method(FewShot("tip-adapter"), [1, 1]) == (FewShot("tip-adapter"), None)


@pytest.mark.parametrize("cached", [False, True])
def test_a_saved_head_is_the_same_head(tmp_path: Path, cached: bool) -> None:
    cache = Cache(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), 2.0, 3.0) if cached else None
    head = Head(("é", "b"), torch.randn(2, 3), torch.randn(2), not cached, "sigmoid", cache, {"name": "x"})
    write_head(head, BASE, tmp_path)
    found, base = read_head(tmp_path)
    vectors = torch.randn(5, 3)
    torch.testing.assert_close(found.logits(vectors), head.logits(vectors), rtol=0, atol=0)
    assert (found.labels, found.activation, found.method, base) == (
        head.labels,
        "sigmoid",
        {"name": "x"},
        BASE,
    )


@pytest.mark.parametrize("damage", ["labels", "weights", "json", "format", "activation"])
def test_a_damaged_head_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    write_head(Head(("a", "b"), torch.randn(2, 3), torch.randn(2)), BASE, tmp_path)
    file = tmp_path / "head.json"
    told = json.loads(file.read_text())
    match damage:
        case "labels":
            file.write_text(json.dumps({**told, "labels": ["a"]}))
        case "weights":
            (tmp_path / "head.safetensors").write_bytes(b"no weights")
        case "json":
            file.write_text("{")
        case "format":
            file.write_text(json.dumps({**told, "format": 2}))
        case "activation":
            file.write_text(json.dumps({**told, "activation": "exp"}))
    with pytest.raises(ConfigError, match=r"-m .*: its (head cannot be read|format is 2)"):
        read_head(tmp_path)


# ------------------------------------------------------------------------------------------ ranking


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from([None, 0.3, 0.5, 0.9]),
)
def test_ranking_is_a_stable_sort(rows: list[list[int]], top_k: int, threshold: float | None) -> None:
    """Equal scores come in the order of the labels, whatever the batch; thresholds give all that reach them."""
    logits, ranking = torch.tensor(rows, dtype=torch.float32), Ranking(top_k, threshold)
    activation = "softmax" if threshold is None else "sigmoid"
    found = classified(rank(logits, activation, ranking), "abcd", ranking)  # type: ignore[arg-type]
    scores = logits.softmax(-1) if threshold is None else logits.sigmoid()
    for one, row in zip(found, scores.tolist(), strict=True):
        order = sorted(range(4), key=lambda index: (-row[index], index))
        assert [label for label, _ in one.top_k] == ["abcd"[index] for index in order][:top_k]
        assert [score for _, score in one.top_k] == pytest.approx([row[index] for index in order][:top_k], abs=1e-6)
        assert one.margin == pytest.approx(row[order[0]] - row[order[1]], abs=1e-6)
        parts = row if threshold is None else [p for score in row for p in (score, 1 - score)]
        entropy = -sum(p * np.log(p) for p in parts) / (1 if threshold is None else 4)
        assert one.entropy == pytest.approx(entropy, abs=1e-5)
        applying = None if threshold is None else tuple("abcd"[i] for i in order if row[i] >= threshold)
        assert one.labels == applying


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_scores_that_are_not_finite_are_not_scores(bad: float, activation: str) -> None:
    logits = torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 0.0]])
    first, second = classified(rank(logits, activation, Ranking()), "abc", Ranking())  # type: ignore[arg-type]
    assert all(np.isnan(score) for _, score in first.top_k)
    assert second.top_k[0][0] == "b"
    assert all(np.isfinite(score) for _, score in second.top_k)
