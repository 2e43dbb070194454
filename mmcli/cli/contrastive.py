"""What the objective *contrastive* of `mmcli finetune` wants of rows, and makes of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.encoders import open_encoders
from mmcli.cli.messages import Messages
from mmcli.cli.options import TrainingArguments
from mmcli.cli.parse import Problems
from mmcli.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from mmcli.cli.objectives import Given, Listed
    from mmcli.models.options import ModelOptions
    from mmcli.training.contrastive import Network
    from mmcli.training.objective import Objective
    from mmcli.training.options import TrainOptions

_LOSSES = ("clip", "siglip")
_PROJECTION_SIZE = "512"
# Of metrics of texts that heed the clip beside them.
_CONDITIONED = "conditioned_"


class ContrastiveRecipe:
    """Of *contrastive*."""

    labelled = False
    metrics: tuple[str, ...] = ("r_at_1", "r_at_5", "r_at_10", f"{_CONDITIONED}r_at_1")

    def columns(self, training: TrainingArguments) -> dict[str, str]:
        """Those of auxiliary labels."""
        return dict.fromkeys(training.auxiliary_column or (), "--auxiliary-column")

    def check(self, train: Listed, val: Listed | None, messages: Messages, problems: Problems) -> None:
        """Two media in every row."""
        for what, listed in (("INPUT", train), ("--val", val)):
            if listed is not None and len(listed.slots) != 2:
                problems.add(
                    f"{what}: --objective contrastive learns which of two media belong together; name two columns "
                    "of a manifest, such as --image-column image --text-column caption"
                )

    def make(
        self, given: Given, model: ModelOptions, train: Listed, options: TrainOptions, metric: str
    ) -> Objective:
        """A dual encoder as it is, or two encoders joined."""
        from mmcli.training.contrastive import Contrastive

        problems = Problems()
        if options.label_smoothing or options.balance:
            problems.add("--label-smoothing and --balance are of labels, which --objective contrastive has not")
        network = problems.collect(_joined if given.training.encoder else _base, given, model, train)
        problems.check()
        assert network is not None
        if metric.startswith(_CONDITIONED) and not network.plan.detail.conditioned:
            raise ConfigError(f"--metric {metric} is of models whose texts heed the clip beside them (X-CLIP)")
        return Contrastive(network, train.slots, measure_retrieval, measure_scores, metric=metric)  # type: ignore[arg-type]

    def targets(self, listed: Listed, objective: Any) -> list[Any]:
        """Rows with an equal medium belong together."""
        from mmcli.training.contrastive import group_rows

        return group_rows([record.media for record in listed.records])


def _base(given: Given, model: ModelOptions, train: Listed) -> Network:
    """Of -m. Raises ConfigError."""
    from mmcli.models.resolve import resolve
    from mmcli.training.contrastive import CheckpointNetwork, check_base

    problems = Problems()
    if given.training.loss is not None:
        problems.add(f"--loss goes with --encoder; -m {model.model} has a loss of its own")
    if given.training.projection_size is not None:
        problems.add(f"--projection-size goes with --encoder; the space of -m {model.model} is there already")
    plan: Any = problems.collect(resolve, model)
    if plan is not None:
        problems.collect(check_base, plan, train.slots)
    problems.check()
    return CheckpointNetwork(plan, given.training.from_config)


def _joined(given: Given, model: ModelOptions, train: Listed) -> Network:
    """Of --encoder. Raises ConfigError with every problem."""
    from mmcli.models.device import check_device
    from mmcli.training.joined import JoinedNetwork

    problems, asked = Problems(), given.training
    problems.collect(check_device, model.device)
    size = problems.collect(parse.number, "--projection-size", asked.projection_size or _PROJECTION_SIZE, 1)
    loss: Any = problems.collect(parse.choice, "--loss", asked.loss or _LOSSES[0], _LOSSES)
    encoders = open_encoders(asked.encoder or (), model, train.slots, problems)
    problems.check()
    assert size is not None
    return JoinedNetwork.of_encoders(encoders, model, size, loss, asked.from_config)


def measure_retrieval(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """R@1, R@5 and R@10, the mean of both ways; median rank, the worse of both; and the modality gap.

    As `mmcli eval` has them: hits of any that belongs to the query, ties against the model. The gap is the distance
    between the means of unit vectors (Liang et al. 2022, "Mind the gap").
    """
    import numpy as np

    from mmcli.evaluation.retrieval import CUTOFFS, Items, ranks

    forward, backward = ranks(Items.of(a, groups), Items.of(b, groups))
    found = {f"r_at_{k}": float((np.mean(forward <= k) + np.mean(backward <= k)) / 2) for k in CUTOFFS}
    units = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in (a, b)]
    gap = float(np.linalg.norm(units[0].mean(axis=0) - units[1].mean(axis=0)))
    return {**found, "median_rank": float(max(np.median(forward), np.median(backward))), "modality_gap": gap}


def measure_scores(scores: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """R@1, R@5 and R@10 as `measure_retrieval` has them, of a score for each pair of rows [n, n]."""
    import numpy as np

    from mmcli.evaluation.retrieval import CUTOFFS, TIE

    own = groups[:, None] == groups
    found: dict[str, float] = {}
    for way in (scores, scores.T):
        best = np.where(own, way, -np.inf).max(axis=1, keepdims=True)
        ranks = 1 + ((way >= best - TIE) & ~own).sum(axis=1)
        for k in CUTOFFS:
            name = f"{_CONDITIONED}r_at_{k}"
            found[name] = found.get(name, 0.0) + float(np.mean(ranks <= k)) / 2
    return found
