"""The file of each modality's mean vector: mmcli eval --save-center writes it, mmcli embed --center reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.core.durable import output_errors, write_json
from mmcli.core.errors import ConfigError
from mmcli.core.records import MODALITIES

if TYPE_CHECKING:
    import numpy as np

    from mmcli.evaluation.vectors import Side
    from mmcli.models.center import Center

FORMAT = "mmcli center 1"


def modalities_of(left: Side, right: Side) -> list[str]:
    """Of two sides of one model's vectors. Raises ConfigError where their means are of no use for --center."""
    problems, identities = [], []
    for side in (left, right):
        name, model = side.table.name, side.table.job.get("model")
        if side.table.job.get("task") != "embed" or not isinstance(model, dict):
            problems.append(
                f"--save-center: {name} does not say which model it is of; give an output of mmcli embed"
            )
        elif "center" in model:
            problems.append(f"--save-center: the vectors of {name} are centred already; embed without --center")
        else:
            identities.append({key: model.get(key) for key in ("id", "weights", "revision", "pooling")})
    if len(identities) == 2 and identities[0] != identities[1]:
        problems.append(f"--save-center: {left.table.name} and {right.table.name} are of different models")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    found = [_modality(left), _modality(right)]
    if found[0] == found[1]:
        raise ConfigError(f"--save-center: both sides are {found[0]}; a mean is of one modality each")
    return found


def _modality(side: Side) -> str:
    """By the column's name, else by the column `modality`. Raises ConfigError."""
    from mmcli.evaluation.tables import values

    if side.modality in MODALITIES:
        return side.modality
    found: set[str] = set()
    if "modality" in side.table.columns:
        found = {one for batch in side.table.read(["modality"]) for one in values(batch["modality"]) if one}
    if len(found) != 1 or not found <= set(MODALITIES):
        what = ", ".join(sorted(found)) or "unknown"
        raise ConfigError(
            f"--save-center: the vectors of {side.column} have to be of one modality; they are {what}"
        )
    return found.pop()


def write_center(path: Path, means: dict[str, np.ndarray], items: dict[str, int], model: dict[str, Any]) -> None:
    """Write the means [D] of unit vectors by modality; `model`: what identifies their model. Raises OutputError."""
    told = {"format": FORMAT, "model": model, "items": items}
    with output_errors(path):
        write_json(path, {**told, "means": {name: mean.tolist() for name, mean in means.items()}})


def read_center(path: Path) -> tuple[Center, dict[str, Any]]:
    """What `write_center` wrote: the means, and what identifies their model. Raises ConfigError."""
    from mmcli.models.center import Center

    try:
        told = json.loads(path.read_bytes())
        if told["format"] != FORMAT:
            raise ValueError
        means = {name: tuple(map(float, mean)) for name, mean in told["means"].items()}
        model = dict(told["model"])
    except OSError as error:
        raise ConfigError(f"--center: cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--center {path} was not written by mmcli eval --save-center") from error
    numbers = [number for mean in means.values() for number in mean]
    one_size = len({len(mean) for mean in means.values()}) == 1
    if not means.keys() <= set(MODALITIES) or not one_size or not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--center {path} is damaged: a mean of each modality is wanted, as long as its vectors")
    return Center(means), model
