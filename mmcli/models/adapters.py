"""Adapters (peft): directories that hold what is added to the weights of another checkpoint, their base.

adapter_config.json         peft's: the kind of adapter, and its base: a hub id or a directory
adapter_model.safetensors   what was learned
mmcli_adapter.json          of those that `mmcli finetune --lora-save adapter` writes: see `BASE_FILE`

What applies them is in mmcli.models.merging.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmcli.core.errors import ConfigError, one_line
from mmcli.core.temporary import temporary_folder
from mmcli.models.checkpoint import (
    ADAPTER_CONFIG,
    PICKLE_FILES,
    WEIGHT_FILES,
    Checkpoint,
    digest_weights,
    open_checkpoint,
    snapshot,
)
from mmcli.models.options import ModelOptions

# What peft puts before the names of all weights.
PREFIX = "base_model.model."
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
# {"config": config.json of the whole model, "bases": {"": BASE}}, or {"image": BASE, ...} of a fusion's encoders.
# BASE: {"model": id or absolute path, "revision": commit or null, "near": the path from the adapter's directory,
# "weights": their digest}, the last two of a directory. The config has a file of its own since transformers takes a
# directory with both config.json and adapter_config.json for a whole model.
BASE_FILE = "mmcli_adapter.json"
# What no merging makes weights of: tokens and keys that are put before the inputs, and mixtures of adapters.
UNMERGED = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "SHADOW", "XLORA",
)  # fmt: skip
# The last layer of a classification head: as many rows as labels.
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classifier.1.weight", "head.weight")
_HINT = "; --base-model DIR says where it is"


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files are on disk.

    id         as the user named it
    directory  where they are
    revision   commit on the hub; None for a local directory
    bases      what it is added to: one checkpoint, under "", or those of a fusion's encoders
    """

    id: str
    directory: Path
    revision: str | None
    bases: Mapping[str, Checkpoint]

    @property
    def name(self) -> str:
        """What identifies it to people, wherever it lies."""
        return self.id if self.revision else self.directory.resolve().name

    def describe(self) -> dict[str, Any]:
        """What identifies its weights and those of its bases."""
        digest = blake2b(digest_size=16)
        for name in (ADAPTER_CONFIG, WEIGHTS, PICKLED):
            if (self.directory / name).is_file():
                digest_weights(digest, self.directory / name)
        bases = {name: base.describe() for name, base in self.bases.items()}
        for base in bases.values():
            digest.update(repr((base.get("revision"), base.get("weights"))).encode())
        own = {"revision": self.revision} if self.revision else {}
        return {**own, "weights": digest.hexdigest(), "base": bases.get("", bases)}

    def fetch_bases(self, folder: Path) -> None:
        """Download their weights, and link the only one's into `folder`. Raises ModelError, TryAgain."""
        for name, base in self.bases.items():
            base.fetch_weights()
            if not name:
                _link(base.directory, folder)


def open_adapter(checkpoint: Checkpoint, options: ModelOptions) -> Checkpoint:
    """An adapter's directory -> the checkpoint that it makes of its base, whose `directory` holds links.

    Raises ConfigError, TryAgain.
    """
    content = checkpoint.json(ADAPTER_CONFIG)
    problems = _problems(checkpoint, content, options)
    if problems:
        raise ConfigError(problems)
    directory = checkpoint.directory
    if checkpoint.revision is not None:
        files = [WEIGHTS, PICKLED] if options.allow_pickle else [WEIGHTS]
        directory = snapshot(checkpoint.id, checkpoint.revision, files, options.offline)
    if not (directory / WEIGHTS).is_file() and not (options.allow_pickle and (directory / PICKLED).is_file()):
        raise ConfigError(f"-m {checkpoint.id}: {_no_weights(directory)}")
    told = checkpoint.json(BASE_FILE)
    bases = _open_bases(checkpoint, content, told, options)
    adapter = Adapter(checkpoint.id, directory, checkpoint.revision, bases)
    folder = _combined(adapter, _config(adapter, content, told))
    return replace(checkpoint, directory=folder, adapter=adapter)


def _problems(checkpoint: Checkpoint, content: dict[str, Any], options: ModelOptions) -> list[str]:
    kind, found = str(content.get("peft_type")), []
    if kind in UNMERGED:
        found.append(
            f"-m {checkpoint.id}: a {kind} adapter is no change of weights, so it cannot be merged; LoRA and "
            "its like can (IA3, LoHa, LoKr, DoRA, ...)"
        )
    if find_spec("peft") is None:
        found.append(f"-m {checkpoint.id}: an adapter needs the library peft: pip install 'mmcli[finetune]'")
    return found


def _no_weights(directory: Path) -> str:
    if (directory / PICKLED).is_file():
        return f"it has {PICKLED}, a pickle, which can run code when loaded; add --allow-pickle if you trust it"
    return f"an adapter without {WEIGHTS}"


# ---------------------------------------------------------------------------------------------- the base


def _open_bases(
    checkpoint: Checkpoint, content: dict[str, Any], told: dict[str, Any], options: ModelOptions
) -> dict[str, Checkpoint]:
    known: dict[str, dict[str, Any]] = told.get("bases") or {}
    given: dict[str, str] = {"": options.base_model} if options.base_model is not None else {}
    if known and "" not in known:
        if options.base_model is not None:
            pairs = (text.partition("=") for text in options.base_model.split(","))
            given = {name: place for name, _, place in pairs}
        if unknown := sorted(given.keys() - known.keys()):
            raise ConfigError(
                f"--base-model {options.base_model}: the bases of {checkpoint.id} are of {', '.join(known)}: "
                f"--base-model {next(iter(known))}=DIR ({unknown[0]!r} is none)"
            )
    elif not known:
        known = {"": {"model": content.get("base_model_name_or_path"), "revision": content.get("revision")}}
    return {name: _open_base(checkpoint, base, given.get(name), options) for name, base in known.items()}


def _open_base(
    checkpoint: Checkpoint, told: dict[str, Any], given: str | None, options: ModelOptions
) -> Checkpoint:
    name = given or told.get("model")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"-m {checkpoint.id}: an adapter that does not say what its base is{_HINT}")
    places = [name] if given else list(_places(checkpoint, name, told.get("near")))
    digest = told.get("weights")
    found = [place for place in places if os.path.isdir(place)]
    if not found and (digest or name.startswith((".", "/", "~"))):
        raise ConfigError(f"-m {checkpoint.id}: an adapter whose base, {name}, is not there{_HINT}")
    bases = []
    for place in found or [name]:
        revision = None if found or given else told.get("revision")
        asked = replace(options, model=place, revision=revision, base_model=None)
        try:
            base = open_checkpoint(asked)
        except ConfigError as error:
            problems = [f"-m {checkpoint.id}: its base: {problem}" for problem in error.problems]
            raise ConfigError(problems, hint=error.hint) from error
        if base.adapter is not None:
            raise ConfigError(f"-m {checkpoint.id}: its base, {place}, is an adapter itself: not supported")
        bases.append(base)
    # A run that was moved together with its base may have left another model in the old place.
    fitting = next((base for base in bases if not digest or base.weights_digest == digest), None)
    if fitting is None:
        raise ConfigError(
            f"-m {checkpoint.id}: an adapter of {told['model']}, whose weights were others than {found[0]} has "
            f"now{_HINT}"
        )
    return fitting


def _places(checkpoint: Checkpoint, name: str, near: str | None) -> Iterator[str]:
    """Where a base may be: as it is named; from the adapter's directory, if that is local."""
    yield name
    if checkpoint.revision is None and not os.path.isabs(name):
        yield str(checkpoint.directory / name)
    if near:
        yield os.path.normpath(checkpoint.directory / near)


# --------------------------------------------------------------------------------- one directory of both


def _config(adapter: Adapter, content: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """config.json of the whole model: the adapter's own, or the base's with the class that it was made for."""
    from transformers.models.auto import modeling_auto

    own = told.get("config") or Checkpoint(adapter.id, adapter.directory, None).json("config.json")
    if own:
        return dict(own)
    config = adapter.bases[""].json("config.json")
    made = content.get("auto_mapping") or {}
    name = made.get("base_model_class") if str(made.get("parent_library")).startswith("transformers.") else None
    if content.get("task_type") == "SEQ_CLS":
        name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.get("model_type"))
    if not isinstance(name, str):
        return config
    config["architectures"] = [name]
    count = _labels(adapter.directory) if name.endswith("Classification") else None
    if count is not None and len(config.get("id2label") or ()) != count:
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(count)}
        config["label2id"] = {f"LABEL_{index}": index for index in range(count)}
    return config


def _labels(directory: Path) -> int | None:
    """How many the head in an adapter's file is for; None where it has none, or is a pickle."""
    from safetensors import SafetensorError, safe_open

    if not (directory / WEIGHTS).is_file():
        return None
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{directory / WEIGHTS} cannot be read: {one_line(str(error))}") from error
    found = [shape[0] for end in _HEADS for name, shape in shapes.items() if f".{name}".endswith(f".{end}")]
    return found[0] if found else None


def _combined(adapter: Adapter, config: dict[str, Any]) -> Path:
    """A temporary folder as save_pretrained would have written it: links to the adapter's files, then the base's.

    Its weights are linked once they are there.
    """
    folder = temporary_folder("adapter")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _link(adapter.directory, folder, weights=False)
    if "" in adapter.bases:
        _link(adapter.bases[""].directory, folder)
    return folder


def _link(source: Path, folder: Path, weights: bool = True) -> None:
    """Links to all that `folder` does not have yet."""
    for path in source.iterdir():
        is_weights = any(path.match(pattern) for pattern in (*WEIGHT_FILES, *PICKLE_FILES))
        if path.name.startswith((".", "adapter_")) or path.name == BASE_FILE or (is_weights and not weights):
            continue
        if not os.path.lexists(folder / path.name):
            os.symlink(path.resolve(), folder / path.name)
