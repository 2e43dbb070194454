"""Strings -> what a model that classifies is asked: labels, templates, what becomes of scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.options import LabelArguments
from mmcli.cli.parse import Problems
from mmcli.cli.prompting import read_text
from mmcli.core.errors import ConfigError, one_line

if TYPE_CHECKING:
    from mmcli.models.head import Head
    from mmcli.models.options import Classification, Label, Ranking

# The key of a Parquet file's metadata that says how its labels' vectors are read.
_KEPT = b"mmcli.labels"


def read_labels(asked: LabelArguments, problems: Problems) -> Classification | None:
    """What is asked; problems are added."""
    from mmcli.models.options import Classification

    before = len(problems.lines)
    kept = None
    labels: tuple[Label, ...] = ()
    if asked.labels is not None and asked.labels_file is not None:
        problems.add("--labels and --labels-file exclude one another; give one of them")
    elif asked.labels_file is not None and asked.labels_file.suffix in (".parquet", ".pq"):
        kept = problems.collect(read_kept, asked.labels_file)
    elif asked.labels_file is not None:
        labels = problems.collect(_labels_of_file, asked.labels_file) or ()
    elif asked.labels is not None:
        labels = problems.collect(_named_labels, "--labels", asked.labels.split(",")) or ()
    one = len(labels) == 1 or (kept is not None and len(kept[0].labels) == 1)
    if asked.labels is not None and os.path.isfile(asked.labels):
        problems.add(f"--labels {asked.labels} is a file; for the labels in it: --labels-file {asked.labels}")
    elif one and not asked.multi_label:
        problems.add(f"{_flag(asked)}: with one label every input has it; give two or more, or add --multi-label")
    templates = problems.collect(_templates, asked)
    if templates and kept is not None:
        problems.add("--template: vectors that are kept in a file were made with theirs; leave it out")
    question = problems.collect(read_text, "--question", asked.question)
    ranking = _ranking(asked, problems)
    if len(problems.lines) > before or ranking is None:
        return None
    return Classification(labels, templates or None, question, ranking, kept)


def _flag(asked: LabelArguments) -> str:
    return "--labels" if asked.labels is not None else f"--labels-file {asked.labels_file}"


def _ranking(asked: LabelArguments, problems: Problems) -> Ranking | None:
    from mmcli.models.options import Ranking

    top_k = problems.collect(parse.number, "--top-k", asked.top_k, 1)
    threshold = problems.collect(parse.share, "--threshold", asked.threshold)
    if threshold is not None and asked.threshold != "0.5" and not asked.multi_label:
        problems.add("--threshold goes with --multi-label; to reject low scores: --min-score")
    return None if top_k is None else Ranking(top_k, threshold if asked.multi_label else None)


def min_score(asked: LabelArguments, problems: Problems) -> float | None:
    """Of --min-score."""
    return None if asked.min_score is None else problems.collect(parse.share, "--min-score", asked.min_score)


def _named_labels(option: str, names: list[str]) -> tuple[Label, ...]:
    return _checked(option, [(name, [name]) for name in names])


def _checked(option: str, named: list[tuple[str, list[str]]]) -> tuple[Label, ...]:
    """Labels with their texts. Raises ConfigError for none, empty ones, and two of one name."""
    from mmcli.models.options import Label

    labels = [Label(name.strip(), tuple(text.strip() for text in texts)) for name, texts in named]
    names = [label.name for label in labels]
    problems = []
    if not labels or names == [""]:
        problems.append(f"{option}: there is no label in it; type e.g. cat,dog")
    elif empty := [place for place, name in enumerate(names, 1) if not name]:
        problems.append(f"{option}: label {empty[0]} of {len(names)} is empty")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        problems.append(f"{option}: {', '.join(map(repr, twice[:5]))} is there twice; labels must differ")
    problems += [
        f"{option}: the label {one.name!r} has an empty text" for one in labels if one.name and "" in one.texts
    ]
    problems += [f"{option}: the label {one.name!r} has no text" for one in labels if not one.texts]
    if problems:
        raise ConfigError(problems)
    return tuple(labels)


def _labels_of_file(path: Path) -> tuple[Label, ...]:
    """One a line; or JSON: a list of names, or an object of names with a text or several. Raises ConfigError."""
    option = f"--labels-file {path}"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--labels-file: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} is not UTF-8") from error
    if path.suffix != ".json":
        return _named_labels(option, [line for line in text.splitlines() if line.strip()])
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise ConfigError(f"{option} is no JSON: {one_line(str(error))}") from error
    if isinstance(found, _Pairs):
        named = [(name, [texts] if isinstance(texts, str) else texts) for name, texts in found.pairs]
    else:
        named = [(name, [name]) for name in found] if isinstance(found, list) else []
    strings = [one for name, texts in named for one in (name, *(texts if isinstance(texts, list) else [None]))]
    if not all(isinstance(one, str) for one in strings) or (not named and found not in ([],)):
        raise ConfigError(f'{option}: a list of names is wanted there, or {{"cat": ["cat", "kitten"], ...}}')
    return _checked(option, named)


class _Pairs:
    """A JSON object with all of its keys, equal ones too."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _templates(asked: LabelArguments) -> tuple[str, ...]:
    """Of --template and --templates; () for none. Raises ConfigError."""
    problems = []
    found = list(asked.template or ())
    for template in found:
        if "{}" not in template:
            problems.append(f"--template {template!r}: there is no {{}} in it, where a label is put in")
    if asked.templates is not None:
        from mmcli.models.templates import TEMPLATES

        if asked.templates not in TEMPLATES:
            parse_problem = f"--templates {asked.templates!r} is not one of {', '.join(TEMPLATES)}"
            problems.append(parse_problem + "; one of your own is --template 'a photo of a {}.'")
        else:
            found += TEMPLATES[asked.templates]
    if problems:
        raise ConfigError(problems)
    return tuple(dict.fromkeys(found))


# ------------------------------------------------------------------------------------- kept vectors


def write_kept(head: Head, texts: list[tuple[str, ...]], identity: dict[str, Any], path: Path) -> None:
    """Write a zero-shot head as Parquet: `label`, `texts`, and `embedding`, its unit vector. Raises OutputError."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmcli.core.durable import output_errors, write_durably

    scale = head.method["scale"]
    vectors = (head.weight / scale).cpu().numpy().astype(np.float32)
    flat = pa.array(vectors.reshape(-1))
    told = {"scale": scale, "bias": head.method["bias"], "activation": head.activation, "model": identity}
    table = pa.table(
        {
            "label": pa.array(head.labels, pa.string()),
            "texts": pa.array([list(one) for one in texts], pa.list_(pa.string())),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    ).replace_schema_metadata({_KEPT: json.dumps(told)})
    with output_errors(path):
        write_durably(path, lambda target: pq.write_table(table, target))


def read_kept(path: Path) -> tuple[Head, dict[str, Any]]:
    """What `write_kept` wrote: the head, and what identifies its model. Raises ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from mmcli.models.head import Similarity
    from mmcli.models.zero_shot import zero_shot_head

    try:
        table = pq.read_table(path)
        told = json.loads((table.schema.metadata or {})[_KEPT])
        labels = table.column("label").to_pylist()
        column = table.column("embedding").combine_chunks()
        vectors = torch.from_numpy(column.flatten().to_numpy().reshape(len(labels), -1).copy())
        similarity = Similarity(told["scale"], told["bias"], told["activation"])
        return zero_shot_head(labels, vectors, similarity), dict(told["model"])
    except FileNotFoundError as error:
        raise ConfigError(f"--labels-file: cannot read {path}: there is no such file") from error
    except OSError as error:
        raise ConfigError(f"--labels-file: cannot read {path}: {error.strerror or one_line(str(error))}") from error
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"--labels-file {path}: it was not written by --save-labels") from error
