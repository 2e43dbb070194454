"""A diagnosis to read, of a classifier or of a shared space: sentences, tables, a picture, and JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.core.durable import output_errors, temporary_name, write_durably, write_json
from mmcli.core.errors import one_line
from mmcli.evaluation.bootstrap import Score
from mmcli.evaluation.diagnostics import Diagnosis, Measured, ModalityUse
from mmcli.evaluation.plot import BLUE, GREY, RED
from mmcli.evaluation.report import table
from mmcli.evaluation.retrieval import CUTOFFS
from mmcli.evaluation.shared_space import CENTRED, SharedSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JSON, TEXT, PICTURE = "diagnostics.json", "diagnostics.txt", "diagnostics.png"


def write_report(folder: Path, diagnosis: Diagnosis | SharedSpace) -> list[str]:
    """Write diagnostics.json, .txt and, where matplotlib is installed, .png; returns the lines of the text.

    Raises OutputError.
    """
    if isinstance(diagnosis, SharedSpace):
        return _write(
            folder, space_dict(diagnosis), space_lines(diagnosis), lambda figure: _recalls(figure, diagnosis)
        )
    return _write(folder, to_dict(diagnosis), lines(diagnosis), lambda figure: _worths(figure, diagnosis))


def _write(folder: Path, values: dict[str, Any], found: list[str], draw: Callable[[Figure], None]) -> list[str]:
    text = "\n".join([*found, ""])
    with output_errors(folder):
        write_json(folder / JSON, values)
        write_durably(folder / TEXT, lambda target: target.write_text(text, encoding="utf-8"))
        _draw(folder / PICTURE, draw)
    return found


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """JSON values: the fields of a Diagnosis, modalities by name, and the sentences."""
    found = asdict(diagnosis)
    options = found.pop("options")
    uses = {one.pop("name"): one for one in found.pop("modalities")}
    found["validation"] = _scores(diagnosis.validation)
    how = options.pop("resampling")
    settings = {"bootstrap": how["replicates"], "seed": how["seed"], "confidence": 0.95}
    settings |= {name: options[name] for name in ("permutations", "additive_rows")}
    return {**found, "modalities": uses, "settings": settings, "sentences": list(sentences(diagnosis))}


def _scores(scores: Sequence[Score]) -> dict[str, dict[str, float | None]]:
    return {one.name: {"value": one.value, "low": one.low, "high": one.high} for one in scores}


def lines(diagnosis: Diagnosis) -> list[str]:
    """Tables, and what they say."""
    drawn = f", drawn of {diagnosis.drawn_from:,}" if diagnosis.drawn_from > diagnosis.rows else ""
    return [
        f"{diagnosis.rows:,} rows{drawn}; numbers with their 95 % intervals",
        "",
        *table(_whole(diagnosis)),
        "",
        *table(_modalities(diagnosis)),
        "",
        *table(_missing(diagnosis)),
        "",
        *(one_line(sentence, 2000) for sentence in sentences(diagnosis)),
    ]


def _whole(diagnosis: Diagnosis) -> list[list[str]]:
    additive = diagnosis.additive
    projection = f"additive projection (EMAP), {additive.rows:,} rows"
    measured = {one.name: Measured(one.value, one.low, one.high) for one in diagnosis.validation}
    named = {
        "accuracy": diagnosis.accuracy,
        **{name: one for name, one in measured.items() if name != "accuracy"},
        "always the commonest class": diagnosis.commonest,
        "unimodal ensemble": diagnosis.ensemble,
        "accuracy beyond the best modality alone": diagnosis.joint,
        projection: additive.projected,
        "accuracy on these rows beyond it": additive.gain,
    }
    return [["", "value", "interval"], *([name, _value(one), _interval(one)] for name, one in named.items())]


def _modalities(diagnosis: Diagnosis) -> list[list[str]]:
    fields = {
        "accuracy alone": "alone",
        "accuracy when masked": "masked",
        "ablation drop": "drop",
        "accuracy when permuted": "permuted",
        "perceptual score": "perceptual",
        "the same / accuracy": "normalised",
        "share of perceptual scores": "share",
    }
    uses = diagnosis.modalities
    rows = [["", *(one_line(one.name, 30) for one in uses)], ["rows with it", *(f"{one.rows:,}" for one in uses)]]
    rows += [[name, *(_both(getattr(one, field)) for one in uses)] for name, field in fields.items()]
    return rows


def _missing(diagnosis: Diagnosis) -> list[list[str]]:
    rows = [["chance to be missing", "missing", "accuracy"]]
    for one in diagnosis.missing:
        rows.append([f"{one.rate:.0%}", f"{one.missing:.0%}", _both(one.accuracy)])
    return rows


# What it means --------------------------------------------------------------------------------------------------


def sentences(diagnosis: Diagnosis) -> Iterator[str]:
    """What the intervals allow to say, and no more."""
    yield _leaning(diagnosis)
    if diagnosis.leans_on is not None:
        for one in diagnosis.modalities:
            if one.name != diagnosis.leans_on:
                yield _neglected(diagnosis, one)
    best = max(diagnosis.modalities, key=lambda one: one.alone.value or 0.0)
    if diagnosis.joint.above_zero:
        yield f"All modalities together get {_both(diagnosis.joint)} more right than the best alone ({best.name})."
    else:
        yield (
            f"That all modalities together get more right than the best alone ({best.name}) cannot be told: "
            f"{_both(diagnosis.joint)}."
        )
    gain = diagnosis.additive.gain
    if gain.above_zero:
        yield f"It joins them: {_both(gain)} is right by interactions, which no sum of one function each gives."
    else:
        yield f"That it joins them otherwise than by adding up what each tells cannot be told: {_both(gain)}."


def _leaning(diagnosis: Diagnosis) -> str:
    shares = ", ".join(
        f"{one.name} {_percent(one.share)}" for one in diagnosis.modalities if one.share.value is not None
    )
    if (name := diagnosis.leans_on) is not None:
        lost = _both(diagnosis.modality(name).perceptual)
        return (
            f"The model leans on {name}: when rows have one another's {name}, {lost} of its accuracy is lost. "
            f"Shares of the modalities: {shares}."
        )
    if not any(one.perceptual.above_zero for one in diagnosis.modalities):
        return "That the model uses any modality cannot be told: rows may have one another's, and it is as right."
    if diagnosis.undecided:
        return (
            f"Whether the model leans on one modality is open; more validation rows would tell. Shares: {shares}."
        )
    return f"No modality counts for twice what the others do. Shares: {shares}."


def _neglected(diagnosis: Diagnosis, one: ModalityUse) -> str:
    commonest = f"always answering the commonest class gets {_value(diagnosis.commonest)} right"
    if one.over_commonest.above_zero:
        return (
            f"{one.name} tells something by itself: alone it gets {_both(one.alone)} right, while {commonest}; "
            f"beside {diagnosis.leans_on} the model makes little of it."
        )
    return (
        f"Whether {one.name} tells anything this model cannot show: alone it gets {_both(one.alone)} right, and "
        f"{commonest}. A model of {one.name} alone would show it."
    )


def _value(one: Measured) -> str:
    return "-" if one.value is None else f"{one.value:.3f}"


def _interval(one: Measured) -> str:
    return "-" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"


def _both(one: Measured) -> str:
    return _value(one) if one.low is None else f"{_value(one)} ({_interval(one)})"


def _percent(one: Measured) -> str:
    if one.value is None:
        return "-"
    interval = "" if one.low is None else f" ({one.low:.0%} to {one.high:.0%})"
    return f"{one.value:.0%}{interval}"


# Picture --------------------------------------------------------------------------------------------------------


def _draw(path: Path, draw: Callable[[Figure], None]) -> None:
    """A PNG; nothing where matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return
    with rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        draw(figure)
        temporary = temporary_name(path)
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)


def _worths(figure: Figure, diagnosis: Diagnosis) -> None:
    """What each modality is worth, and accuracy against missing ones."""
    bars, curve = figure.subplots(1, 2)
    _bars(bars, diagnosis)
    _curve(curve, diagnosis)


def _bars(axes: Axes, diagnosis: Diagnosis) -> None:
    kinds = (("perceptual", "permuted: perceptual score", BLUE), ("drop", "masked: ablation drop", RED))
    for place, (field, label, color) in enumerate(kinds):
        for row, one in enumerate(diagnosis.modalities):
            measured: Measured = getattr(one, field)
            at, value = row + (place - 0.5) * 0.36, measured.value or 0.0
            axes.bar(at, value, 0.34, color=color, alpha=0.85, label=label if row == 0 else None)
            _whisker(axes, at, measured)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(diagnosis.modalities)), [one_line(m.name, 24) for m in diagnosis.modalities])
    axes.set(ylabel="accuracy lost")
    axes.set_title("What each modality is worth, 95 % intervals", fontsize=11)
    axes.margins(y=0.18)
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _whisker(axes: Axes, at: float, measured: Measured) -> None:
    if measured.low is not None and measured.high is not None:
        axes.plot([at, at], [measured.low, measured.high], color="black", linewidth=1.2)


def _curve(axes: Axes, diagnosis: Diagnosis) -> None:
    points = [one for one in diagnosis.missing if one.accuracy.value is not None]
    rates = [one.rate for one in points]
    axes.plot(rates, [one.accuracy.value or 0.0 for one in points], "o-", color=BLUE, label="accuracy")
    low, high = [one.accuracy.low for one in points], [one.accuracy.high for one in points]
    if None not in low and None not in high:
        axes.fill_between(rates, low, high, color=BLUE, alpha=0.2, linewidth=0)  # type: ignore[arg-type]
    lines = ((diagnosis.ensemble, "unimodal ensemble", RED), (diagnosis.commonest, "commonest class", GREY))
    for measured, label, color in lines:
        axes.axhline(measured.value or 0.0, color=color, linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="chance of each modality to be missing (one stays)", ylabel="accuracy", ylim=(0, 1.03))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xticks(rates)
    axes.set_title("Missing modalities", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


# Of a shared space ----------------------------------------------------------------------------------------------


def space_dict(space: SharedSpace) -> dict[str, Any]:
    """JSON values."""
    told = {"modalities": list(space.names), "items": list(space.items)}
    return {**told, "scores": _scores(space.scores), "notes": space.notes}


def space_lines(space: SharedSpace) -> list[str]:
    """A table: each number as it is, and after centring."""
    scores = {one.name: Measured(one.value, one.low, one.high) for one in space.scores}
    rows = [["", "as it is", "centred"]]
    for name, one in scores.items():
        if not name.startswith(CENTRED) and not name.endswith("_rank"):
            after = scores.get(CENTRED + name)
            rows.append([name, _both(one), "-" if after is None else _both(after)])
    counts = " and ".join(f"{n:,} {name} items" for n, name in zip(space.items, space.names, strict=True))
    return [f"{counts}; numbers with their 95 % intervals", "", *table(rows)]


def _recalls(figure: Figure, space: SharedSpace) -> None:
    """R@k of both ways, before and after centring."""
    scores = {one.name: Measured(one.value, one.low, one.high) for one in space.scores}
    first, second = space.names
    for axes, (a, b) in zip(figure.subplots(1, 2, sharey=True), ((first, second), (second, first)), strict=True):
        for place, (prefix, label, color) in enumerate((("", "as it is", BLUE), (CENTRED, "centred", RED))):
            for column, k in enumerate(CUTOFFS):
                one = scores.get(f"{prefix}{a}_to_{b}_r_at_{k}")
                if one is not None:
                    at = column + (place - 0.5) * 0.36
                    axes.bar(
                        at, one.value or 0.0, 0.34, color=color, alpha=0.85, label=label if not column else None
                    )
                    _whisker(axes, at, one)
        axes.set_xticks(range(len(CUTOFFS)), [f"R@{k}" for k in CUTOFFS])
        axes.set_ylim(0, 1.03)
        axes.set_title(one_line(f"{a} to {b}, 95 % intervals", 60), fontsize=11)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    gaps = [scores.get(f"{prefix}modality_gap") for prefix in ("", CENTRED)]
    if gaps[0] is not None and gaps[1] is not None:
        figure.suptitle(f"Modality gap {_value(gaps[0])}, centred {_value(gaps[1])}", fontsize=12)
