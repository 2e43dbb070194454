"""A checkpoint's directory, local or from the hub: its files, what identifies them, and what is unsafe in them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ConfigError, ModelError, TryAgain, one_line
from mmcli.models.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mmcli.models.adapters import Adapter

# What a plan and a processor need; weights are fetched when they are loaded.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors",)
PICKLE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files that decide what a processor does to an input.
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "sentence_bert_config.json", "modules.json",
    "config_sentence_transformers.json", "chat_template.jinja", "chat_template.json",
    "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/vocab.txt", "qformer_tokenizer/tokenizer_config.json",
)  # fmt: skip
# What makes a directory an adapter's (peft).
ADAPTER_CONFIG = "adapter_config.json"
# Weights up to this size are digested whole (1 GB/s), larger ones by 256 blocks of 1 MiB spread over the file.
WHOLE_DIGEST_LIMIT = 2 * 1024**3
_BLOCK = 1024 * 1024


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose small files are on disk.

    id         as the user named it
    directory  where its config.json, processor and weights are
    revision   commit on the hub; None for a local directory
    folders    all folders with files of the model, the outermost first, where there are more than `directory`
               (sentence-transformers)
    adapter    what is added to the weights (peft); None: nothing
    """

    id: str
    directory: Path
    revision: str | None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    folders: tuple[Path, ...] = ()
    adapter: Adapter | None = None

    @property
    def root(self) -> Path:
        """The outermost folder."""
        return self._folders[0]

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.folders or (self.directory,)

    def json(self, name: str, folder: Path | None = None) -> dict[str, Any]:
        """A JSON file in `directory` or `folder`, {} when there is none. Raises ConfigError when it is damaged."""
        path = (folder or self.directory) / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"-m {self.id}: {name} cannot be read: {one_line(str(error))}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"-m {self.id}: {name} holds no JSON object")
        return content

    def processor_json(self, part: str) -> dict[str, Any]:
        """Settings of the processor's `image_processor`, `feature_extractor` or `video_processor`."""
        nested = self.json("processor_config.json").get(part)
        own = "video_preprocessor_config.json" if part == "video_processor" else "preprocessor_config.json"
        return self.json(own) or (nested if isinstance(nested, dict) else {})

    @cached_property
    def config(self) -> PretrainedConfig:
        """config.json with the defaults of its type. Raises ConfigError."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise ConfigError(f"-m {self.id}: config.json is not usable: {one_line(str(error))}") from error

    def describe(self) -> dict[str, Any]:
        """What identifies it: the commit of a hub checkpoint, else a digest of its weights."""
        identity = {"revision": self.revision} if self.revision else {"weights": self.weights_digest}
        # Its weights identify a local model wherever it lies; by its path a run could not go on from elsewhere.
        name = self.id if self.revision else self.root.resolve().name
        if self.adapter is not None:
            name, identity = self.adapter.name, self.adapter.describe()
        return {
            "id": name,
            **identity,
            "processor": self._digest(PROCESSOR_FILES),
            # What is never written, and how a text begins, is in the second.
            "config": self._digest(["config.json", "generation_config.json"]),
        }

    @cached_property
    def weights_digest(self) -> str:
        """Of its weights on disk."""
        digest = blake2b(digest_size=16)
        for path in self.weight_files():
            digest.update(path.relative_to(self.root).as_posix().encode())
            digest_weights(digest, path)
        return digest.hexdigest()

    def _digest(self, names: tuple[str, ...] | list[str]) -> str:
        digest = blake2b(digest_size=16)
        for path in (folder / name for folder in self._folders for name in names):
            if path.is_file():
                name, content = path.relative_to(self.root).as_posix(), path.read_bytes()
                digest.update(b"%d %d " % (len(name), len(content)) + name.encode() + content)
        return digest.hexdigest()

    def weight_files(self) -> list[Path]:
        """The weights on disk, in a fixed order; not those of subfolders (onnx/, checkpoint-500/)."""
        return sorted({p for folder in self._folders for name in self._patterns for p in folder.glob(name)})

    @property
    def _patterns(self) -> tuple[str, ...]:
        return WEIGHT_FILES + (PICKLE_FILES if self.allow_pickle else ())

    def fetch_weights(self) -> None:
        """Download what `open_checkpoint` has left on the hub. Raises ModelError, TryAgain."""
        if self.adapter is not None:
            self.adapter.fetch_bases(self.root)
        elif self.revision is not None:
            for folder in self._folders:
                place = folder.relative_to(self.root).as_posix()
                patterns = [name if place == "." else f"{place}/{name}" for name in self._patterns]
                # The hub's `*` matches any path, so those of the outermost folder match everywhere.
                snapshot(self.id, self.revision, patterns, offline=False, ignore="*/*" if place == "." else None)
            if not self.weight_files():
                raise ModelError(f"-m {self.id}: {_no_safetensors(self.directory)}", hint="add --allow-pickle")

    def load(self, model_class: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """`model_class.from_pretrained` with its adapter merged: the model, on the host, and its loading info.

        Every model whose weights are a checkpoint's is loaded here. Raises ModelError, TryAgain, ConfigError for an
        adapter, and what `from_pretrained` raises.
        """
        self.fetch_weights()
        options |= {
            "use_safetensors": None if self.allow_pickle else True,
            "trust_remote_code": self.trust_remote_code,
            "output_loading_info": True,
        }
        if self.adapter is None:
            model, info = model_class.from_pretrained(self.directory, **options)
            return model, info
        from mmcli.models.merging import load_adapted

        return load_adapted(self, self.adapter, model_class, options)


def open_checkpoint(options: ModelOptions) -> Checkpoint:
    """Find a checkpoint and check what its small files say. Raises ConfigError, TryAgain when the hub is away."""
    name = options.model
    trust, pickle = options.trust_remote_code, options.allow_pickle
    if os.path.isdir(name):
        if options.revision is not None:
            raise ConfigError(f"--revision {options.revision}: {name} is a local directory, which has no revisions")
        checkpoint = Checkpoint(name, Path(name), None, trust, pickle)
    else:
        _check_hub_id(name)
        directory = snapshot(name, options.revision, list(SMALL_FILES), options.offline)
        checkpoint = Checkpoint(name, directory, directory.name, trust, pickle)
    if (checkpoint.directory / ADAPTER_CONFIG).is_file():
        from mmcli.models.adapters import open_adapter

        checkpoint = open_adapter(checkpoint, options)
    elif options.base_model is not None:
        raise ConfigError(f"--base-model {options.base_model}: -m {name} is a model of its own, not an adapter")
    if not (checkpoint.directory / "modules.json").is_file():
        check_files(checkpoint, options.weights)
    return checkpoint


def check_files(checkpoint: Checkpoint, weights: bool = True) -> None:
    """Raise ConfigError for a directory that is no model, asks for its own code to be run, or has no `weights`."""
    config = checkpoint.json("config.json")
    if not config:
        raise ConfigError(
            f"-m {checkpoint.id}: it has no config.json; a model is a directory as save_pretrained writes it"
        )
    # CVE-2026-5241: such a key once switched on code that comes with the checkpoint.
    if "trust_remote_code" in config and not checkpoint.trust_remote_code:
        raise ConfigError(
            f"-m {checkpoint.id}: its config.json asks for trust_remote_code, which is refused",
            hint="remove that key, or add --trust-remote-code when you trust its author",
        )
    is_local = checkpoint.adapter is None and checkpoint.revision is None
    if weights and is_local and not checkpoint.weight_files():
        raise ConfigError(f"-m {checkpoint.id}: {_no_safetensors(checkpoint.directory)}")


def _no_safetensors(directory: Path) -> str:
    pickles = sorted(p.name for pattern in PICKLE_FILES for p in directory.glob(pattern))
    if pickles:
        return f"it has {pickles[0]}, a pickle, which can run code when loaded; add --allow-pickle if you trust it"
    return "there are no weights (*.safetensors) in it"


def _check_hub_id(name: str) -> None:
    """Raise ConfigError when `name` can be no hub id: then it was meant as a path."""
    if os.path.exists(name):
        raise ConfigError(f"-m {name}: this is a file; a model is a directory, give the one that holds config.json")
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts):
        raise ConfigError(f"-m {name}: no such directory{_near(name)}")
    folder = os.path.dirname(name)
    if folder and os.path.isdir(folder) and (near := _near(name)):
        raise ConfigError(f"-m {name}: no such directory{near}")


def _near(name: str) -> str:
    folder, base = os.path.split(name.rstrip("/"))
    try:
        siblings = [e.name for e in os.scandir(folder or ".") if e.is_dir()]
    except OSError:
        return ""
    close = get_close_matches(base, siblings, n=1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""


def snapshot(
    name: str, revision: str | None, patterns: list[str], offline: bool, ignore: str | None = None
) -> Path:
    """The directory of a hub repository with the files that match. Raises ConfigError, TryAgain."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=ignore, local_files_only=offline
        )
    except HFValidationError as error:
        raise ConfigError(f"-m {name}: neither a directory nor a hub id") from error
    except GatedRepoError as error:
        raise ConfigError(
            f"-m {name}: its authors ask for consent; accept on the hub, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"--revision {revision}: the hub has no such revision of {name}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"-m {name}: neither a directory here nor a model on the hub (private: set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise ConfigError(
                f"-m {name}: no such directory, nor is it in the hub's cache, and the hub is off "
                "(--offline or HF_HUB_OFFLINE)"
            ) from error
        raise TryAgain(
            f"-m {name}: no such directory, and the hub cannot be reached",
            hint="the same command with a network (HTTPS_PROXY behind a proxy), or the path of a copy of the model",
        ) from error
    except OSError as error:
        raise TryAgain(f"-m {name}: cannot fetch it from the hub: {one_line(str(error))}") from error
    return Path(found)


def digest_weights(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(b"%d " % size)
    with path.open("rb") as file:
        if size <= WHOLE_DIGEST_LIMIT:
            while block := file.read(_BLOCK):
                digest.update(block)
            return
        # The header of safetensors with the names, then samples; a retrained model differs everywhere.
        for number in range(256):
            file.seek(number * (size - _BLOCK) // 255)
            digest.update(file.read(_BLOCK))
