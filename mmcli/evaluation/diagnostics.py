"""What a classifier of several modalities makes of each of them: does it lean on one, does it join them?

Everything is computed from answers of the model to rows put together anew (`Predict`), so that any model can be
asked. Intervals are of the percentile bootstrap over rows (see mmcli.evaluation.bootstrap), differences are paired:
both sides of a difference are resampled together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import isqrt

import numpy as np

from mmcli.core.errors import ModelError
from mmcli.evaluation.bootstrap import Resampling, Score, ratio, score
from mmcli.evaluation.validation import log_softmax, validation_scores

# Rows put together of the modalities of validation rows -> logits float [k, L].
# indices int64 [k, M]: row r has modality m of validation row indices[r, m]; present bool [k, M]: it has it at all.
# A row may have nothing at all. An answer may depend on nothing but these.
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]
RATES = (0.0, 0.1, 0.3, 0.5, 0.7)
# More rows than so many are not asked about after training, but as many drawn: intervals are of +-2 % then.
DRAWN_ROWS = 2000
# All subsets of modalities are asked for: 2^M answers a row. mmcli has four modalities.
MOST_MODALITIES = 8
# Rows of one call, after each of which it is told how far it is. Indices and logits of 1,000 classes take 4 MB.
BLOCK_ROWS = 1024
# (answers so far, in all)
Told = Callable[[int, int], None]
_PERMUTED_ROWS = 20_000
# A modality is leaned on when it counts for at least twice what all others together do.
LEANS = 2 / 3
_SMALL = 1e-9


@dataclass(frozen=True, slots=True)
class Rows:
    """Validation rows.

    modalities  names, in the order of the columns of `present`
    truth       int64 [n], the index of the right class
    present     bool [n, M], which modalities a row has; None: all
    drawn_from  how many there are, of which these were drawn at random; None: these are all
    """

    modalities: tuple[str, ...]
    truth: np.ndarray
    present: np.ndarray | None = None
    drawn_from: int | None = None

    def there(self) -> np.ndarray:
        """bool [n, M]."""
        shape = len(self.truth), len(self.modalities)
        return np.ones(shape, bool) if self.present is None else self.present


@dataclass(frozen=True, slots=True)
class DiagnosticOptions:
    """How much is computed: see `answers_needed`.

    permutations   of each modality, whose mean the perceptual score is; of more than 2,000 rows fewer, 2 at least
    additive_rows  so many rows, drawn at random, are in the additive projection
    """

    resampling: Resampling = field(default_factory=Resampling)
    permutations: int = 10
    additive_rows: int = 128
    rates: tuple[float, ...] = RATES

    @classmethod
    def affordable(cls, rows: int) -> DiagnosticOptions:
        """About 20 answers for each row about two modalities, and 30,000 at most of DRAWN_ROWS rows.

        An answer by six layers of 512 took 53 ms of a CPU core, a row of a training step with ResNet-50 and BERT
        825 ms: 300 rows are asked about in a tenth of the time that 3 epochs of 1,500 rows take. With the usual
        options there are 23,000 answers, a third of it.
        """
        return cls(permutations=5, additive_rows=min(64, max(2, isqrt(10 * rows))))

    def permutations_of(self, rows: int) -> int:
        """Of so many rows: what counts for the mean is how many rows are permuted in all."""
        return min(self.permutations, max(2, _PERMUTED_ROWS // rows))

    def partners_of(self, rows: int, modalities: int) -> int:
        """Combinations that each of the projection's rows is put into: all of two modalities, else drawn ones."""
        chosen = min(rows, self.additive_rows)
        return chosen if modalities == 2 else min(chosen, max(1, self.additive_rows**2 // (modalities * chosen)))


def answers_needed(rows: int, modalities: int, options: DiagnosticOptions) -> int:
    """How many rows `diagnose` asks the model about."""
    subsets = rows * ((1 << modalities) - 1) + 1
    permuted = rows * modalities * options.permutations_of(rows)
    chosen, partners = min(rows, options.additive_rows), options.partners_of(rows, modalities)
    projected = chosen * partners if modalities == 2 else modalities * chosen * partners + partners
    return subsets + permuted + projected


@dataclass(frozen=True, slots=True)
class Measured:
    """A number and its 95 % interval; None where it is undefined, or no interval was asked for."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def above_zero(self) -> bool:
        """Whether all of its interval is; without one, the number (beyond rounding)."""
        bound = self.value if self.low is None else self.low
        return bound is not None and bound > _SMALL


@dataclass(frozen=True, slots=True)
class ModalityUse:
    """What one modality is to the model. Accuracies are shares of all rows.

    rows            that have it
    alone           accuracy when it is all that the model sees; rows that lack it are answered without anything
    over_commonest  `alone` - the share of the commonest class: what it tells by itself
    masked          accuracy without it
    drop            accuracy - `masked`: the ablation drop
    permuted        accuracy when rows have it of one another: mean over permutations among the rows that have it
    perceptual      accuracy - `permuted`: the perceptual score (Gat, Schwing & Schwing 2021), not normalised. Other
                    than by masking, each input is one that the model has seen the like of
    normalised      `perceptual` / accuracy: the model-normalised perceptual score (likewise); 1: nothing is right
                    without it
    share           of the sum of all modalities' perceptual scores, negative ones taken as 0
    """

    name: str
    rows: int
    alone: Measured
    over_commonest: Measured
    masked: Measured
    drop: Measured
    permuted: Measured
    perceptual: Measured
    normalised: Measured
    share: Measured


@dataclass(frozen=True, slots=True)
class MissingRate:
    """Accuracy when modalities are missing at random.

    Each modality of a row is missing with probability `rate`; where that leaves nothing, one of them, each as
    likely, stays (as modality dropout does in training, Neverova et al. 2016). The accuracy is the expectation over
    all ways to be missing, no sample. `missing`: the share of the modalities that is missing then.
    """

    rate: float
    missing: float
    accuracy: Measured


@dataclass(frozen=True, slots=True)
class Additive:
    """The empirical multimodally-additive projection, EMAP (Hessel & Lee 2020).

    The sum of functions of one modality each that is nearest to the model's logits: of two modalities
    mean_b f(a, b) + mean_a f(a, b) - mean f, over all pairs of `rows` rows, their own and put together. What it
    gets right needs no interaction of modalities. Of M > 2 modalities the n^M combinations are too many: each
    one's mean is taken over the same `partners` combinations p of the others,
    sum_m mean_p f(x_m, p without m) - (M - 1) mean_p f(p), which is exact for an additive model whatever p.

    accuracy   of the model on these rows
    projected  of the projection
    gain       accuracy - projected: what the model gets right by interactions. The interval is that of the rows;
               the projection itself is not computed anew for each sample
    """

    rows: int
    partners: int
    accuracy: Measured
    projected: Measured
    gain: Measured


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Of a classifier of several modalities.

    validation mean_per_class, macro_f1, ece, nll, ... (see mmcli.evaluation.validation), with all that a row has
    accuracy   likewise
    commonest  the share of the commonest class among the rows: what answering without looking gets right
    ensemble   accuracy of the mean of the log-probabilities of the model's answers to each modality alone: the
               unimodal ensemble, which cannot join what modalities tell
    joint      accuracy - that of the best modality alone
    leans_on   the modality that counts for at least twice what all others together do: the lower bound of its
               share is 2/3 or more; None
    undecided  the intervals leave open whether there is such a modality
    drawn_from how many rows there are, of which `rows` were drawn
    """

    rows: int
    modalities: tuple[ModalityUse, ...]
    validation: tuple[Score, ...]
    accuracy: Measured
    commonest: Measured
    ensemble: Measured
    joint: Measured
    missing: tuple[MissingRate, ...]
    additive: Additive
    leans_on: str | None
    undecided: bool
    options: DiagnosticOptions
    drawn_from: int

    def modality(self, name: str) -> ModalityUse:
        """That of a name."""
        return next(one for one in self.modalities if one.name == name)


def diagnose(
    predict: Predict, rows: Rows, options: DiagnosticOptions | None = None, told: Told | None = None
) -> Diagnosis:
    """Ask the model; `told` is called after each block with how far it is.

    Raises ValueError for fewer than two modalities, ModelError for logits that are no numbers.
    """
    options = options or DiagnosticOptions()
    count, size = len(rows.truth), len(rows.modalities)
    if not 2 <= size <= MOST_MODALITIES:
        raise ValueError(f"{size} modalities; diagnostics are of 2 to {MOST_MODALITIES}")
    if not count:
        raise ValueError("there are no rows")
    asked = _Asked(predict, rows, told, answers_needed(count, size, options))
    rng = np.random.default_rng(options.resampling.seed)
    found = asked.subsets()
    right = {subset: asked.right(logits) for subset, logits in found.items()}
    columns = {"accuracy": right[tuple(range(size))], "commonest": _commonest(rows.truth)}
    columns["ensemble"] = asked.right(_ensemble(found, rows.there()))
    for m, name in enumerate(rows.modalities):
        columns[f"alone {name}"] = right[(m,)]
        columns[f"masked {name}"] = right[tuple(k for k in range(size) if k != m)]
        columns[f"permuted {name}"] = asked.permuted(m, options.permutations_of(count), rng)
    curve = {rate: _under_missing(right, rows.there(), rate) for rate in options.rates}
    columns |= {f"missing {rate}": by_row for rate, (by_row, _) in curve.items()}
    scores = _scores(columns, lambda means: _derived(means, rows.modalities), options.resampling)
    uses = tuple(_use(name, int(rows.there()[:, m].sum()), scores) for m, name in enumerate(rows.modalities))
    leans_on, undecided = _leaning(uses)
    whole = found[tuple(range(size))]
    return Diagnosis(
        rows=count,
        modalities=uses,
        validation=tuple(validation_scores(whole, rows.truth, options.resampling)),
        **{name: scores[name] for name in ("accuracy", "commonest", "ensemble", "joint")},
        missing=tuple(MissingRate(rate, gone, scores[f"missing {rate}"]) for rate, (_, gone) in curve.items()),
        additive=_additive(asked, whole, options, rng),
        leans_on=leans_on,
        undecided=undecided,
        options=options,
        drawn_from=count if rows.drawn_from is None else rows.drawn_from,
    )


class _Asked:
    """The model, asked in blocks about rows put together."""

    def __init__(self, predict: Predict, rows: Rows, told: Told | None = None, needed: int = 0) -> None:
        self._predict, self._rows, self._told = predict, rows, told
        self._done, self._needed = 0, needed
        self.there = rows.there()
        self.own = np.repeat(np.arange(len(rows.truth))[:, None], len(rows.modalities), axis=1)

    def logits(self, indices: np.ndarray, present: np.ndarray) -> np.ndarray:
        """float64 [k, L]. A modality that the row it is of lacks is not present."""
        present = present & np.take_along_axis(self.there, indices, axis=0)
        blocks = []
        for start in range(0, len(indices), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            blocks.append(np.asarray(self._predict(indices[block], present[block]), float))
            self._done += len(blocks[-1])
            if self._told is not None:
                self._told(self._done, self._needed)
        found = np.concatenate(blocks)
        if not np.isfinite(found).all():
            bad = indices[int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])]
            rows = ", ".join(map(str, sorted(set(bad.tolist()))))
            raise ModelError(f"the model gave NaN or infinite logits for validation row {rows}")
        return found

    def right(self, logits: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """1.0 where the answer to a row is its truth, else 0.0."""
        found: np.ndarray = (logits.argmax(axis=1) == self._rows.truth[rows]).astype(float)
        return found

    def subsets(self) -> dict[tuple[int, ...], np.ndarray]:
        """Logits [n, L] of all rows when only some modalities are seen, for all subsets."""
        size = len(self._rows.modalities)
        # Nothing is the same for every row.
        nothing = self.logits(self.own[:1], np.zeros((1, size), bool))
        found: dict[tuple[int, ...], np.ndarray] = {}
        found[()] = np.broadcast_to(nothing, (len(self.own), nothing.shape[1]))
        for kept in (c for k in range(1, size + 1) for c in combinations(range(size), k)):
            seen = np.isin(np.arange(size), kept)
            found[kept] = self.logits(self.own, np.broadcast_to(seen, self.own.shape))
        return found

    def permuted(self, modality: int, times: int, rng: np.random.Generator) -> np.ndarray:
        """float64 [n]: how often a row is right when it has the modality of another one, drawn at random."""
        having = np.flatnonzero(self.there[:, modality])
        total = np.zeros(len(self.own))
        for _ in range(times):
            indices = self.own.copy()
            indices[having, modality] = rng.permutation(having)
            total += self.right(self.logits(indices, np.ones_like(self.there)))
        return total / times


def _commonest(truth: np.ndarray) -> np.ndarray:
    found: np.ndarray = (truth == np.bincount(truth).argmax()).astype(float)
    return found


def _ensemble(logits: dict[tuple[int, ...], np.ndarray], there: np.ndarray) -> np.ndarray:
    """Mean log-probabilities [n, L] over the modalities that a row has; of nothing where it has none."""
    total = np.zeros_like(logits[()])
    for m in range(there.shape[1]):
        total += np.where(there[:, m, None], log_softmax(logits[(m,)]), 0.0)
    having = there.sum(axis=1)[:, None]
    answered: np.ndarray = np.where(having > 0, total / np.maximum(having, 1), logits[()])
    return answered


def _under_missing(
    right: dict[tuple[int, ...], np.ndarray], there: np.ndarray, rate: float
) -> tuple[np.ndarray, float]:
    """The expected share [n] of right answers of each row, and the share of modalities that is missing."""
    having = there.sum(axis=1)
    expected, missing = np.where(having == 0, right[()], 0.0), np.zeros(len(there))
    for kept, correct in right.items():
        seen = np.isin(np.arange(there.shape[1]), kept)
        possible = np.all(there | ~seen, axis=1) & (len(kept) > 0)
        gone = having - len(kept)
        chance = (1 - rate) ** len(kept) * rate ** np.maximum(gone, 0)
        if len(kept) == 1:
            # One of all stays where all would be missing.
            chance = chance + rate ** np.maximum(having, 1) / np.maximum(having, 1)
        chance = np.where(possible, chance, 0.0)
        expected += chance * correct
        missing += chance * gone
    return expected, float(missing.sum() / max(1, having.sum()))


def _derived(means: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """All numbers of the rows, of the means over them."""
    found = dict(means)
    accuracy = means["accuracy"]
    found["joint"] = accuracy - max(means[f"alone {name}"] for name in names)
    scores = {name: accuracy - means[f"permuted {name}"] for name in names}
    total = sum(max(score, 0.0) for score in scores.values())
    for name, perceptual in scores.items():
        found[f"over_commonest {name}"] = means[f"alone {name}"] - means["commonest"]
        found[f"drop {name}"] = accuracy - means[f"masked {name}"]
        found[f"perceptual {name}"] = perceptual
        found[f"normalised {name}"] = float(ratio(perceptual, accuracy))
        found[f"share {name}"] = float(ratio(max(perceptual, 0.0), total if total > _SMALL else 0.0))
    return found


def _scores(
    columns: dict[str, np.ndarray], derive: Callable[[dict[str, float]], dict[str, float]], how: Resampling
) -> dict[str, Measured]:
    """Numbers that are functions of means over rows. `columns`: float64 [n] each."""
    matrix = np.stack(list(columns.values()), axis=1)

    def derived(weights: np.ndarray) -> dict[str, float]:
        means = weights @ matrix / weights.sum()
        return derive(dict(zip(columns, means.tolist(), strict=True)))

    rows = len(matrix)
    names = list(derived(np.ones(rows)))
    scores = score(names, lambda w: np.array(list(derived(w).values())), np.ones(rows, bool), how)
    return {one.name: Measured(one.value, one.low, one.high) for one in scores}


def _use(name: str, rows: int, scores: dict[str, Measured]) -> ModalityUse:
    what = ("alone", "over_commonest", "masked", "drop", "permuted", "perceptual", "normalised", "share")
    return ModalityUse(name, rows, **{one: scores[f"{one} {name}"] for one in what})


def _leaning(uses: Sequence[ModalityUse]) -> tuple[str | None, bool]:
    """The modality that is leaned on, and whether that is open. The intervals decide."""
    used = [one for one in uses if one.perceptual.above_zero]
    if not used:
        return None, False
    first = max(used, key=lambda one: one.share.value or 0.0)
    low, high = (
        one if one is not None else first.share.value or 0.0 for one in (first.share.low, first.share.high)
    )
    if low >= LEANS:
        return first.name, False
    return None, high >= LEANS


def _additive(asked: _Asked, own: np.ndarray, options: DiagnosticOptions, rng: np.random.Generator) -> Additive:
    """`own`: the model's logits [n, L] of the rows as they are."""
    count, size = asked.there.shape
    chosen = np.sort(rng.permutation(count)[: options.additive_rows])
    partners = options.partners_of(count, size)
    if size == 2:
        projected = _pairs(asked, chosen)
    else:
        others = np.stack([rng.permutation(chosen)[:partners] for _ in range(size)], axis=1)
        projected = _anchored(asked, chosen, others)
    columns = {"accuracy": asked.right(own[chosen], chosen), "projected": asked.right(projected, chosen)}
    scores = _scores(
        columns, lambda means: {**means, "gain": means["accuracy"] - means["projected"]}, options.resampling
    )
    return Additive(len(chosen), partners, **scores)


def _pairs(asked: _Asked, chosen: np.ndarray) -> np.ndarray:
    """The projection [k, L] of two modalities: all k^2 pairs, in blocks of rows of that matrix."""
    count = len(chosen)
    step = max(1, BLOCK_ROWS // count)
    of_first, of_second = [], None
    for start in range(0, count, step):
        block = chosen[start : start + step]
        pairs = np.stack([np.repeat(block, count), np.tile(chosen, len(block))], axis=1)
        logits = asked.logits(pairs, np.ones(pairs.shape, bool)).reshape(len(block), count, -1)
        of_first.append(logits.mean(axis=1))
        of_second = logits.sum(axis=0) + (0.0 if of_second is None else of_second)
    firsts, seconds = np.concatenate(of_first), np.asarray(of_second) / count
    projected: np.ndarray = firsts + seconds - firsts.mean(axis=0)
    return projected


def _anchored(asked: _Asked, chosen: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The projection [k, L] of several modalities, over combinations `others` int64 [p, M]: see Additive."""
    partners, size = others.shape
    mean = asked.logits(others, np.ones(others.shape, bool)).mean(axis=0)
    projected = np.tile(-(size - 1) * mean, (len(chosen), 1))
    step = max(1, BLOCK_ROWS // partners)
    for m in range(size):
        for start in range(0, len(chosen), step):
            block = chosen[start : start + step]
            indices = np.tile(others, (len(block), 1))
            indices[:, m] = np.repeat(block, partners)
            logits = asked.logits(indices, np.ones(indices.shape, bool))
            projected[start : start + step] += logits.reshape(len(block), partners, -1).mean(axis=1)
    return projected
