"""Zero-shot classification by entailment gives what transformers' pipeline gives for each text alone."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_classifiers
import torch
import transformers as hf
from classify_runs import ALL, ClassifyRun, as_array, asked, plan_of
from model_runs import DEVICE, outputs_of
from rare import rarely
from safetensors.torch import load_file, save_file
from test_encoders import TEXTS
from tiny_dual import bert_tokenizer, edit_json

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import Media, Record
from mmcli.models import entailment
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.options import Classification, Label, ModelOptions, Ranking
from mmcli.models.plan import ClassificationPlan
from mmcli.tasks.classify import Classify

LABELS = ("cat", "red circle", "a dog's photo", "42")
# The pipeline takes no empty text.
GIVEN = [text for text in TEXTS if text]
BATCHES = ((1, 11), (5, 11), (16, 22))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return tiny_classifiers.ENTAILMENT[name](tmp_path_factory.mktemp("tiny") / name)

    return build


def pipeline_scores(
    folder: Path, labels: Sequence[str], multi_label: bool, template: str = "This example is {}."
) -> np.ndarray:
    """float [texts, L], in the order of the labels."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    pipeline: Any = hf.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer, device="cpu")
    found = [pipeline(text, list(labels), multi_label=multi_label, hypothesis_template=template) for text in GIVEN]
    scores = [dict(zip(one["labels"], one["scores"], strict=True)) for one in found]
    return np.array([[one[label] for label in labels] for one in scores])


def check(run: ClassifyRun, wanted: np.ndarray, batches: Sequence[tuple[int, int]] = BATCHES) -> None:
    for batch_size, rows in batches:
        found = run.scores("text", GIVEN, batch_size, rows)
        assert np.abs(found - wanted[np.arange(rows) % len(wanted)]).max() < 1e-5, batch_size


@pytest.mark.parametrize("multi_label", [False, *rarely([True])])
@pytest.mark.parametrize(
    "name", rarely(tiny_classifiers.ENTAILMENT, {"bert", "bert-two", "deberta-v2", "bart"}.__contains__)
)
def test_as_the_pipeline(name: str, multi_label: bool, tiny: Callable[[str], Path]) -> None:
    folder = tiny(name)
    wanted = pipeline_scores(folder, LABELS, multi_label)
    # Scores tell labels and texts apart.
    assert np.ptp(wanted, axis=0).min() > 1e-3
    assert np.ptp(wanted, axis=1).min() > 1e-3
    check(ClassifyRun(folder, asked(*LABELS, threshold=0.5 if multi_label else None)), wanted)


@pytest.mark.parametrize("multi_label", [False, True])
def test_one_label(multi_label: bool, tiny: Callable[[str], Path]) -> None:
    """The softmax over one label would always be 1: then it is entailment against contradiction."""
    folder = tiny("bert")
    wanted = pipeline_scores(folder, LABELS[:1], multi_label)
    check(ClassifyRun(folder, asked(LABELS[0], threshold=0.5 if multi_label else None)), wanted, BATCHES[1:2])
    assert 0.0 < wanted.min() < wanted.max() < 1.0


def test_a_template(tiny: Callable[[str], Path]) -> None:
    folder, template = tiny("roberta"), "is it a photo of {}?"
    wanted = pipeline_scores(folder, LABELS, False, template)
    run = ClassifyRun(folder, asked(*LABELS, templates=(template,)))
    check(run, wanted, BATCHES[1:2])
    assert np.abs(wanted - pipeline_scores(folder, LABELS, False)).max() > 1e-2


def test_long_texts_are_cut_and_hypotheses_are_not(tiny: Callable[[str], Path]) -> None:
    run = ClassifyRun(tiny("bert"), asked(*LABELS))
    tokenizer = bert_tokenizer()
    samples = run.samples("text", "a cat " * 200)
    assert len(samples) == len(LABELS)
    for sample, label in zip(samples, LABELS, strict=True):
        ids = sample.arrays["input_ids"].tolist()
        hypothesis = tokenizer(f"This example is {label}.")["input_ids"][1:]
        assert (len(ids), ids[-len(hypothesis) :]) == (64, hypothesis)
    assert len(run.samples("text", "")) == len(LABELS)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_logits_of_several_hypotheses_are_averaged(threshold: float | None, tiny: Callable[[str], Path]) -> None:
    folder, templates = tiny("bert"), ("this is {}.", "{}")
    labels = (Label("animal", ("cat", "dog")), Label("shape", ("red circle",)), Label("x", ("a", "b", "c")))
    run = ClassifyRun(folder, Classification(labels, templates, None, Ranking(ALL, threshold)))
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logits(text: str, label: Label) -> torch.Tensor:
        """Contradiction, neutral, entailment: the mean over texts and templates."""
        hypotheses = [template.format(one) for one in label.texts for template in templates]
        pairs = [tokenizer(text, h, truncation="only_first", return_tensors="pt") for h in hypotheses]
        return torch.cat([model(**pair).logits for pair in pairs]).mean(0)

    means = torch.stack([torch.stack([logits(text, label) for label in labels]) for text in GIVEN])
    wanted = means[..., 2].softmax(-1) if threshold is None else means[..., [0, 2]].softmax(-1)[..., 1]
    check(run, wanted.numpy(), BATCHES[1:2])


def test_what_is_kept(tiny: Callable[[str], Path]) -> None:
    whole = ClassifyRun(tiny("bert"), asked(*LABELS))
    scores = whole.scores("text", GIVEN, 5, len(GIVEN))
    best = ClassifyRun(tiny("bert"), asked(*LABELS, top_k=1))("text", GIVEN, 5, len(GIVEN))
    for one, row in zip(best, scores, strict=True):
        ordered = np.sort(row)[::-1]
        assert one.top_k == ((LABELS[int(row.argmax())], pytest.approx(ordered[0])),)
        assert one.margin == pytest.approx(ordered[0] - ordered[1], abs=1e-6)
        assert one.entropy == pytest.approx(-(row * np.log(row)).sum(), abs=1e-5)
        assert one.labels is None
    several = ClassifyRun(tiny("bert"), asked(*LABELS, threshold=0.4))("text", GIVEN, 5, len(GIVEN))
    for one, row in zip(several, as_array(several, LABELS), strict=True):
        assert set(one.labels or ()) == {label for label, score in zip(LABELS, row, strict=True) if score >= 0.4}


# ---------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("names", "contradiction", "of_entailment"),
    [
        (("contradiction", "neutral", "entailment"), 0, 2),
        (("Entailment", "Neutral", "Contradiction"), 2, 0),
        (("contradiction", "entailment", "neutral"), 0, 1),
        (("entailment", "not_entailment"), 1, 0),
        (("not_entailment", "entailment"), 0, 1),
        # The pipeline would take the last label for a contradiction, which is the neutral one.
        (("entailment", "contradiction", "neutral"), 1, 0),
        (("neutral", "entail", "contradict"), 2, 1),
    ],
)
def test_where_the_labels_are(
    names: tuple[str, ...], contradiction: int, of_entailment: int, tmp_path: Path
) -> None:
    settings = tiny_classifiers.nli(*names)
    folder = tiny_classifiers.head("Bert", max_position_embeddings=64, **settings)(tmp_path / "nli")
    pairs = entailment.find(open_checkpoint(ModelOptions(str(folder))))
    assert pairs is not None
    assert (pairs.contradiction, pairs.entailment) == (contradiction, of_entailment)
    edit_json(folder / "config.json", label2id=None)
    assert entailment.find(open_checkpoint(ModelOptions(str(folder)))) == pairs


def test_other_classifiers_take_no_labels(tmp_path: Path) -> None:
    for name in ("distilbert", "vit"):
        folder = tiny_classifiers.BUILDERS[name](tmp_path / name)
        assert entailment.find(open_checkpoint(ModelOptions(str(folder)))) is None
        with pytest.raises(ConfigError, match=r"labels of its own .* leave --labels out"):
            plan_of(folder, asked("cat", "dog"))


def test_without_labels_it_has_its_own(tiny: Callable[[str], Path]) -> None:
    assert plan_of(tiny("bert")).labels == ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


# ---------------------------------------------------------------------------------------------------- failures


def planned(folder: Path, wanted: Classification) -> ClassificationPlan:
    options = ModelOptions(str(folder), device=DEVICE)
    checkpoint = open_checkpoint(options)
    pairs = entailment.find(checkpoint)
    assert pairs is not None
    return entailment.plan(checkpoint, options, "float32", pairs, wanted)


def test_all_problems_are_told_together(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny("bert"), folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError) as caught:
        planned(folder, Classification(question="Which?"))
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert all(part in told for part in ("no tokenizer", "give --labels", "--question is for chat models"))


def test_labels_that_leave_no_room(tiny: Callable[[str], Path]) -> None:
    tokenizer = bert_tokenizer()
    sizes = {n: len(tokenizer("", f"This example is {'a' * n}.")["input_ids"]) for n in range(30, 60)}
    (fits,) = [n for n, size in sizes.items() if size == 63]
    run = ClassifyRun(tiny("bert"), asked("cat", "a" * fits))
    assert [len(s.arrays["input_ids"]) for s in run.samples("text", "b b b b")][1] == 64
    with pytest.raises(ConfigError) as caught:
        planned(tiny("bert"), asked("a" * (fits + 1), "cat", "b" * (fits + 9)))
    assert len(caught.value.problems) == 2
    assert "has 64 tokens" in caught.value.problems[0]
    assert "reads 64, a text's among them" in caught.value.problems[0]


def test_weights_that_are_not_finite_are_an_error_row(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(tiny("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][2] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run = ClassifyRun(folder, asked(*LABELS))
    outputs = outputs_of(run.runner, run.samples("text", "a cat"))
    record = Record(0, "a", None, (Media("text", text="a cat"),))
    result = Classify(join=run.joiner).result(record, ["text"], list(outputs))
    assert result.error is not None
    assert result.error.code == "nonfinite"


def test_texts_that_cannot_be_read(tiny: Callable[[str], Path]) -> None:
    run = ClassifyRun(tiny("bert"), asked(*LABELS))
    with pytest.raises(RowError, match="does not take this text"):
        run.samples("text", "\ud800")
    with pytest.raises(RowError, match="2 texts"):
        run.processor.record([("text", "a"), ("text", "b")], ())


def test_what_identifies_the_scores(tiny: Callable[[str], Path]) -> None:
    """Another hypothesis is another run; and the plan goes to the workers."""
    folder = tiny("bert")
    plain = plan_of(folder, asked("cat", "dog"))
    same = Classification(
        (Label("cat", ("cat",)), Label("dog", ("dog",))), ("This example is {}.",), None, Ranking(ALL)
    )
    others = [
        plan_of(folder, asked("cat", "dog", templates=("{}",))),
        plan_of(folder, asked("cat", "dog", threshold=0.5)),
        plan_of(folder, asked("dog", "cat")),
        plan_of(
            folder, Classification((Label("cat", ("kitten",)), Label("dog", ("dog",))), None, None, Ranking(ALL))
        ),
    ]
    assert plan_of(folder, same).describe() == plain.describe()
    described = [str(plan.describe()) for plan in (plain, *others)]
    assert len(set(described)) == len(described)
    assert pickle.loads(pickle.dumps(plain)).describe() == plain.describe()
