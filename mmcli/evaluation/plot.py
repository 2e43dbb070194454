"""A picture of a report: reliability and confusions of classes, recall at k, or scores with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcli.core.errors import ConfigError, OutputError, one_line
from mmcli.evaluation.captions import SCALE
from mmcli.evaluation.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FORMATS = ("png", "pdf", "svg")
BLUE, RED, PINK, GREY = "#2b6cb0", "#c53030", "#f5b5b0", "#718096"
# Cells are labelled with their numbers, and classes with their names, as long as that can be read.
NUMBERED, NAMED = 15, 60


def check_plot(path: Path) -> None:
    """Raise ConfigError with every reason why no picture could be written there."""
    problems = []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        problems.append("--plot needs matplotlib; type: pip install 'mmcli[eval]'")
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        problems.append(f"--plot {path}: end the name with one of .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        problems.append(f"--plot {path}: the folder {path.parent} does not exist")
    if problems:
        raise ConfigError(problems)


def write_plot(report: Report, path: Path) -> None:
    """Raises OutputError when it cannot be written."""
    from matplotlib import rc_context

    # Names of classes are text, whatever dollar signs they hold; no display is needed.
    with rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _figure(report)
        try:
            figure.savefig(path, dpi=150, bbox_inches="tight")
        except OSError as error:
            raise OutputError(f"cannot write --plot {path}: {error.strerror or error}") from error


def _figure(report: Report) -> Figure:
    from matplotlib.figure import Figure

    calibration, confusion = report.details.get("calibration"), report.details.get("confusion")
    if confusion is None:
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        if "recall_at" in report.details:
            _recall(axes, report.details["recall_at"])
        else:
            _scores(axes, report)
    else:
        size = float(np.clip(0.24 * len(confusion["classes"]) + 1.5, 5.5, 14))
        width = 5.0 if calibration else 0.0
        figure = Figure(figsize=(width + size + 0.5, size), layout="constrained")
        if calibration:
            left, right = figure.subfigures(1, 2, width_ratios=[width, size + 0.5], squeeze=False)[0]
            _reliability(left, calibration, report)
        _matrix((right if calibration else figure).subplots(), confusion)
    figure.suptitle(one_line(f"{Path(report.predictions).name}: {report.column} against {report.truth}", 90))
    return figure


def _reliability(figure: SubFigure, bins: list[dict[str, Any]], report: Report) -> None:
    """Accuracy over confidence, and beneath it how many rows each bin has (Guo et al. 2017, figure 1)."""
    axes, counts = figure.subplots(2, 1, height_ratios=[5, 1], sharex=True)
    width = bins[0]["high"] - bins[0]["low"]
    there = [b for b in bins if b["rows"]]
    left = [b["low"] for b in there]
    accuracy = np.array([b["accuracy"] for b in there])
    gap = np.array([b["confidence"] for b in there]) - accuracy
    axes.bar(left, accuracy, width, align="edge", color=BLUE, edgecolor="white", label="accuracy")
    axes.bar(
        left, gap, width, accuracy, align="edge", color=PINK, edgecolor=RED, linewidth=0.6,
        label="gap to the mean confidence",
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfect")
    ece = next(s for s in report.scores if s.name == "ece")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", box_aspect=1)
    axes.set_title(f"Reliability, ECE {ece.value:.3f}", fontsize=11)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    rows = [b["rows"] for b in bins]
    counts.bar([b["low"] for b in bins], rows, width, align="edge", color=GREY, edgecolor="white")
    counts.set(xlabel="confidence", ylabel="rows", box_aspect=0.2)


def _matrix(axes: Axes, confusion: dict[str, Any]) -> None:
    names = [one_line(name, 24) for name in confusion["classes"]]
    if confusion["matrix"] is None:
        axes.axis("off")
        axes.text(0.5, 0.5, f"{len(names):,} classes: too many for a picture", ha="center")
        return
    counts = np.array(confusion["matrix"])
    answers = [*names, "no answer"]
    if not counts[:, -1].any():
        counts, answers = counts[:, :-1], names
    true = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, true, out=np.zeros(counts.shape), where=true > 0)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto" if len(names) > NAMED else "equal")
    axes.set(xlabel="answered", ylabel="true")
    axes.set_title("Confusions, share of each true class", fontsize=11)
    axes.spines[:].set_visible(False)
    if len(names) <= NAMED:
        axes.set_xticks(range(len(answers)), answers, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    else:
        axes.set(xticks=[], yticks=[], ylabel=f"true: {len(names):,} classes in the order of their names")
    if len(names) <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = share[row, column] > 0.55
                axes.text(
                    column,
                    row,
                    f"{count}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    axes.figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)


def _recall(axes: Axes, recall_at: dict[str, dict[str, float]]) -> None:
    for (way, recall), color in zip(recall_at.items(), (BLUE, RED), strict=True):
        axes.plot([int(k) for k in recall], list(recall.values()), "o-", color=color, label=way.replace("_", " "))
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="k", ylabel="queries with their own among the first k")
    cutoffs = next(iter(recall_at.values()))
    axes.set_xticks([int(k) for k in cutoffs], list(cutoffs), rotation=90 if len(cutoffs) > 12 else 0)
    axes.minorticks_off()
    axes.set_title("Recall at k", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def _scores(axes: Axes, report: Report) -> None:
    """A dot for each score, and a line for its interval. CIDEr, whose best is 10, is drawn as a tenth."""
    there = [(s, s.value) for s in report.scores if s.value is not None][::-1]
    for place, (one, value) in enumerate(there):
        scale = SCALE if one.name == "cider" else 1.0
        if one.low is not None and one.high is not None:
            axes.plot([one.low / scale, one.high / scale], [place, place], color=BLUE, linewidth=3, alpha=0.4)
        axes.plot([value / scale], [place], "o", color=BLUE)
        axes.annotate(
            f"{value:.3f}", (value / scale, place), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(there)), ["cider / 10" if s.name == "cider" else s.name for s, _ in there])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.02)
    axes.set_ylim(-0.6, len(there) - 0.2)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("Scores with their 95 % intervals", fontsize=11)
